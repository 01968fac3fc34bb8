"""Losses and clocks of a training run, kept without waiting for the device."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable

import torch
from torch import Tensor


class Losses:
    """The last losses: a window for the smoothed value (`average_loss`), and those not yet looked at for NaN."""

    def __init__(self, window: int) -> None:
        self._window: deque[float | Tensor] = deque(maxlen=window)
        self._unseen: list[tuple[int, Tensor]] = []

    def add(self, iteration: int, loss: Tensor) -> None:
        """loss: a detached scalar, of any device."""
        self._window.append(loss)
        self._unseen.append((iteration, loss))

    def reset(self, values: Iterable[float] = ()) -> None:
        self._window.clear()
        self._window.extend(values)

    def values(self) -> list[float]:
        """The window, oldest first. Waits for the device."""
        known = [v for v in self._window if isinstance(v, float)]
        fresh = [v for v in self._window if not isinstance(v, float)]
        values = known + (torch.stack(fresh).tolist() if fresh else [])
        self.reset(values)
        return values

    def smoothed(self) -> float:
        """The mean of the window, NaN when there is none."""
        values = self.values()
        return sum(values) / len(values) if values else float("nan")

    def first_bad(self) -> tuple[int, float] | None:
        """(iteration, loss) of the first loss since the last call that is NaN or infinite. Waits for the device."""
        if not self._unseen:
            return None
        values = torch.stack([loss for _, loss in self._unseen])
        bad = (~torch.isfinite(values)).nonzero()
        found = None
        if len(bad):
            k = int(bad[0])
            found = self._unseen[k][0], float(values[k])
        self._unseen.clear()
        return found


class Clock:
    """Seconds and images of training alone: tests and snapshots stop it.

    On a GPU reading it needs a synchronised device; every place that reads it has just waited for a loss.
    """

    def __init__(self) -> None:
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
