"""Contenders that take turns, each in a process of its own, so that none profits or suffers from another's settings.

No torch at import: the allocator must be set up before torch's first allocation.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any


class Turn:
    """A process that runs `serve` and answers one number per call."""

    def __init__(self, *args: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other, *args), daemon=True)
        self.process.start()
        other.close()

    def __call__(self, steps: int) -> float:
        """Seconds per step over this many steps."""
        self.pipe.send(steps)
        return self.receive()

    def receive(self) -> float:
        try:
            answer = self.pipe.recv()
        except EOFError:
            raise SystemExit(f"a contender died with exit code {self.process.exitcode}") from None
        if isinstance(answer, str):
            raise SystemExit(answer)
        return answer

    def close(self) -> None:
        self.pipe.close()
        self.process.join()


def serve(
    pipe: Connection, kind: str, name: str, batch: int, device: str, threads: int, tuned: bool, fused: bool
) -> None:
    """Be one contender until the pipe closes; kind "verify" compares both sides once and ends."""
    from caffejacinto_py.engine import allocator

    if tuned:
        allocator.tune()
    else:
        os.environ["CAFFEJACINTO_ALLOCATOR"] = "default"
    import torch

    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
    import contenders

    if device.startswith("cuda"):  # the rivals get what ours gets; torch's default lets convolutions read TF32
        from caffejacinto_py.engine import gpu

        gpu.allow(tf32=False, search=True)
    try:
        if kind == "verify":
            contenders.verify(name, device)
            pipe.send(0.0)
            return
        run = contenders.contender(kind, name, batch, device, fused=fused)
    except SystemExit as reason:
        pipe.send(str(reason))
        return
    pipe.send(0.0)  # ready
    while True:
        try:
            steps = pipe.recv()
        except EOFError:
            return
        pipe.send(run(steps))


def take_turns(contenders: Mapping[str, Callable[[int], float]], rounds: int, count: int) -> dict[str, list[float]]:
    """Seconds per step of contenders in this process, one number a round, in rotating order."""
    seconds: dict[str, list[float]] = {kind: [] for kind in contenders}
    order = list(contenders)
    for _ in range(rounds):
        for kind in order:
            seconds[kind].append(contenders[kind](count))
        order.append(order.pop(0))
    return seconds


def ratio(found: Sequence[float], base: Sequence[float]) -> str:
    """Median and range of the ratios, round by round."""
    ratios = [a / b for a, b in zip(found, base, strict=True)]
    return f"{statistics.median(ratios):.3f}  ({min(ratios):.3f}..{max(ratios):.3f})"
