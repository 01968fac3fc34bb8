"""Losses and clocks of a training run, kept without waiting for the device."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable

import torch
from torch import Tensor


class Losses:
    """The last losses: a window for the smoothed value (`average_loss`), and those not yet looked at for NaN."""

    def __init__(self, window: int) -> None:
        self._window: deque[float | Tensor] = deque(maxlen=window)
        self._unseen: list[tuple[int, float | Tensor]] = []

    def add(self, iteration: int, loss: Tensor) -> None:
        """loss: a detached scalar. Of a CPU it is read at once, which costs nothing; of a GPU when somebody asks."""
        value = loss.item() if loss.device.type == "cpu" else loss
        self._window.append(value)
        self._unseen.append((iteration, value))

    def reset(self, values: Iterable[float] = ()) -> None:
        self._window.clear()
        self._window.extend(values)

    def values(self) -> list[float]:
        """The window, oldest first. Waits for the device."""
        values = _read(self._window)
        self.reset(values)
        return values

    def smoothed(self) -> float:
        """The mean of the window, NaN when there is none."""
        values = self.values()
        return sum(values) / len(values) if values else float("nan")

    def first_bad(self) -> tuple[int, float] | None:
        """(iteration, loss) of the first loss since the last call that is NaN or infinite. Waits for the device."""
        unseen, self._unseen = self._unseen, []
        for (iteration, _), value in zip(unseen, _read([v for _, v in unseen])):
            if not math.isfinite(value):
                return iteration, value
        return None


def _read(losses: Iterable[float | Tensor]) -> list[float]:
    """All as numbers, with one wait for the device."""
    losses = list(losses)
    fresh = [v for v in losses if isinstance(v, Tensor)]
    known = iter(torch.stack(fresh).tolist() if fresh else [])
    return [next(known) if isinstance(v, Tensor) else v for v in losses]


class Clock:
    """Seconds and images of training alone: tests and snapshots stop it.

    device: a GPU has work in its queue when the host is through with an iteration; the clock stops behind that.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device if device is not None and device.type == "cuda" else None
        self.seconds = 0.0
        self.images = 0
        self.iterations = 0
        self._since: float | None = None
        self._mark = (0.0, 0)

    @property
    def running(self) -> bool:
        return self._since is not None

    def start(self) -> None:
        if self._since is None:
            self._since = time.perf_counter()

    def stop(self) -> None:
        if self._since is not None:
            if self._device is not None:
                torch.cuda.synchronize(self._device)
            self.seconds += time.perf_counter() - self._since
            self._since = None

    def count(self, images: int) -> None:
        self.images += images
        self.iterations += 1

    def now(self) -> float:
        return self.seconds + (time.perf_counter() - self._since if self._since is not None else 0.0)

    def lap(self) -> tuple[float, int]:
        """(seconds, iterations) since the last lap."""
        mark, self._mark = self._mark, (self.now(), self.iterations)
        return self._mark[0] - mark[0], self._mark[1] - mark[1]
