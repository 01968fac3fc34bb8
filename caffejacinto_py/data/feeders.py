"""Feeders: batches of a source layer, prepared ahead of the solver, in order, whatever the number of workers."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from caffejacinto_py.data.batches import Batches
from caffejacinto_py.errors import UsageError

Shape = tuple[int, ...]
Make = Callable[[int], list[np.ndarray]]


class Feeder(Protocol):
    """What the solver sees. position: batches delivered since the start of the run (`start` included)."""

    @property
    def position(self) -> int: ...

    def next(self) -> list[np.ndarray]:
        """The next batch: one float32 C-contiguous array per top, owned by the caller."""
        ...

    def close(self) -> None: ...


class DirectFeeder:
    """Makes each batch when it is asked for, in the caller's thread."""

    def __init__(self, batches: Batches, *, start: int = 0) -> None:
        self._batches = batches
        self.position = start

    def next(self) -> list[np.ndarray]:
        made = self._batches.make(self.position)
        self.position += 1
        return made

    def close(self) -> None:
        pass


class _Line:
    """The queue between workers and the solver: workers claim batch numbers, the solver takes results in order."""

    def __init__(self, start: int, depth: int) -> None:
        self.changed = threading.Condition()
        self.claimed = self.taken = start
        self.depth = depth
        self.ready: dict[int, list[np.ndarray] | Exception] = {}
        self.stopped = False

    def claim(self) -> int | None:
        """The next batch number to make; waits while `depth` batches are ahead. None: stop."""
        with self.changed:
            while not self.stopped and self.claimed >= self.taken + self.depth:
                self.changed.wait()
            if self.stopped:
                return None
            self.claimed += 1
            return self.claimed - 1

    def put(self, k: int, made: list[np.ndarray] | Exception) -> None:
        with self.changed:
            if not self.stopped:
                self.ready[k] = made
            self.changed.notify_all()

    def take(self) -> list[np.ndarray]:
        with self.changed:
            while not self.stopped and self.taken not in self.ready:
                self.changed.wait()
            if self.stopped:  # even if a worker has just finished the batch
                raise UsageError("next() on a feeder that is closed")
            made = self.ready[self.taken]
            if isinstance(made, Exception):
                raise made  # and stay here: asked again, fail again
            del self.ready[self.taken]
            self.taken += 1
            self.changed.notify_all()
            return made

    def stop(self) -> None:
        with self.changed:
            self.stopped = True
            self.ready.clear()
            self.changed.notify_all()


class ParallelFeeder:
    """Worker threads, each making whole batches; `depth` batches at most are ahead of the solver.

    A worker is a thread that calls `make`, or a thread that waits for its own worker process (`process=True`). One
    thread is the default: numpy, OpenCV and LMDB release the interpreter lock while they work (of 0.55 ms CPU for a
    256x256 JPEG cropped to 224, 0.4 are decoding), and raw 28x28 records, which are mostly Python, take 2.3 us each.
    Processes take a second to start and copy each batch once more; on two busy cores no clear gain was measured
    (bench/feeder.py). An error inside a worker is raised by the `next()` that would have delivered that batch.
    """

    def __init__(
        self, batches: Batches, *, start: int = 0, workers: int = 1, depth: int = 4, process: bool = False
    ) -> None:
        line = self._line = _Line(start, max(depth, workers))
        remotes: list[Any] = []
        if process:
            from caffejacinto_py.data.process import Remote

            remotes = [Remote(batches) for _ in range(workers)]
        makers: list[Make] = [r.make for r in remotes] or [batches.make] * workers
        threads = [
            threading.Thread(target=_work, args=(line, m), name=f"data-{i}", daemon=True) for i, m in enumerate(makers)
        ]
        # Also runs at interpreter exit and when the feeder is forgotten: the threads hold the line, never the feeder.
        self._finish = weakref.finalize(self, _finish, line, threads, remotes)
        for thread in threads:
            thread.start()

    @property
    def position(self) -> int:
        return self._line.taken

    def next(self) -> list[np.ndarray]:
        return self._line.take()

    def close(self) -> None:
        """Stop and join the workers. Harmless when called twice."""
        self._finish()


def _work(line: _Line, make: Make) -> None:
    while (k := line.claim()) is not None:
        try:
            made: list[np.ndarray] | Exception = make(k)
        except Exception as error:  # of any kind: the solver's thread raises it
            made = error
        line.put(k, made)


def _finish(line: _Line, threads: Sequence[threading.Thread], remotes: Sequence[Any]) -> None:
    line.stop()
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join()
    for remote in remotes:
        remote.close()


class UserFeeder:
    """Arrays from the user. `kind` "memory": MemoryData, steps through them batch by batch and wraps. "input": Input,
    the same whole batch until it is replaced; zeros before.
    """

    def __init__(self, shapes: Sequence[Shape], *, kind: str, name: str = "", start: int = 0) -> None:
        self.shapes, self.kind, self.name = tuple(shapes), kind, name
        self.position = start
        self._arrays = [np.zeros(s, np.float32) for s in self.shapes] if kind == "input" else None

    def reset(self, *arrays: Any) -> None:
        """New arrays, one per top, copied as float32 where needed. "memory": any whole number of batches along axis 0.

        Raises UsageError for a wrong number of arrays or shapes that do not fit the tops.
        """
        if len(arrays) != len(self.shapes):
            raise UsageError(f"layer '{self.name}': {len(arrays)} arrays for {len(self.shapes)} tops")
        given = [np.ascontiguousarray(a, np.float32) for a in arrays]
        for i, (array, shape) in enumerate(zip(given, self.shapes)):
            if self.kind == "memory" and array.ndim != len(shape) and array.size == array.shape[0] * _count(shape[1:]):
                given[i] = array = array.reshape(array.shape[0], *shape[1:])  # labels as N,1,1,1, as Caffe takes them
            if self.kind == "input" and array.shape != shape:
                raise UsageError(f"layer '{self.name}': array {i} is {array.shape}, the top is {shape}")
            if array.shape[1:] != shape[1:] or not len(array) or len(array) % shape[0]:
                raise UsageError(
                    f"layer '{self.name}': array {i} is {array.shape}; a whole number of batches of {shape} is needed"
                )
        if len({len(a) for a in given}) > 1 and self.kind == "memory":
            raise UsageError(f"layer '{self.name}': the arrays have {[len(a) for a in given]} rows")
        self._arrays = given
        if self.kind == "memory":
            self.position = 0

    def next(self) -> list[np.ndarray]:
        if self._arrays is None:
            raise UsageError(
                f"layer '{self.name}': MemoryData has no data yet",
                hint="call reset(data, labels) before the first forward",
            )
        k, self.position = self.position, self.position + 1
        if self.kind == "input":
            return [a.copy() for a in self._arrays]
        batch = self.shapes[0][0]
        at = k * batch % len(self._arrays[0])
        return [a[at : at + batch].copy() for a in self._arrays]

    def close(self) -> None:
        self._arrays = None


def _count(shape: Shape) -> int:
    return int(np.prod(shape)) if shape else 1
