"""Batches made in another process: a child runs `serve`, the parent's worker thread talks to it through `Remote`.

A plain subprocess, not multiprocessing: it needs no `if __name__ == "__main__"` in the user's script, does not copy a
parent that may hold a GPU and threads, and ends by itself when its input closes, whatever becomes of the parent. The
batch travels through an unnamed shared file mapping; the pipe carries batch numbers and errors only.
"""

from __future__ import annotations

import mmap
import os
import pickle
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence

import cv2
import numpy as np

from caffejacinto_py.data.batches import Batches
from caffejacinto_py.errors import DataError

_COMMAND = "from caffejacinto_py.data.process import serve; serve()"
_ITEM = struct.Struct("<q")
_DONE, _FAILED = b"\x00", b"\x01"


class Remote:
    """A worker process that makes batches. Used by one thread at a time."""

    def __init__(self, batches: Batches) -> None:
        self.shapes = batches.shapes
        size = 4 * sum(int(np.prod(s)) for s in self.shapes)
        folder = "/dev/shm" if os.path.isdir("/dev/shm") else None
        with tempfile.TemporaryFile(dir=folder) as file:
            file.truncate(max(size, 1))
            self._map = mmap.mmap(file.fileno(), max(size, 1))
            path = os.pathsep.join(p or os.getcwd() for p in sys.path)
            self._child = subprocess.Popen(
                [sys.executable, "-c", _COMMAND],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=[file.fileno()],
                env={**os.environ, "PYTHONPATH": path},
            )
            self._write(pickle.dumps((batches, file.fileno(), max(size, 1))))
            self._read_reply()  # it holds the mapping from here on

    def make(self, k: int) -> list[np.ndarray]:
        self._write(pickle.dumps(k))
        self._read_reply()
        return [a.copy() for a in _views(self._map, self.shapes)]

    def close(self) -> None:
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe:
                try:
                    pipe.close()
                except BrokenPipeError:
                    pass
        try:
            self._child.wait(5)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._map.close()

    def _write(self, message: bytes) -> None:
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(_ITEM.pack(len(message)) + message)
            self._child.stdin.flush()
        except BrokenPipeError:
            raise self._died() from None

    def _read_reply(self) -> None:
        assert self._child.stdout is not None
        status = self._child.stdout.read(1)
        if status == _DONE:
            return
        if status != _FAILED:
            raise self._died()
        raise pickle.loads(_receive(self._child.stdout))

    def _died(self) -> DataError:
        code = self._child.wait()
        why = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        return DataError(f"a data worker process ended unexpectedly ({why})", hint="was the machine out of memory?")


def serve() -> None:
    """The child: receive the Batches, then make one batch per number received, until the input closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent decides
    reply = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not get into the replies
    requests = sys.stdin.buffer
    cv2.setNumThreads(1)  # the workers are the parallelism
    batches, descriptor, size = pickle.loads(_receive(requests))
    shared = mmap.mmap(descriptor, size)
    os.close(descriptor)
    views = _views(shared, batches.shapes)
    message = _DONE
    while True:
        try:
            reply.write(message)
            reply.flush()
            number = _receive(requests)
        except BrokenPipeError:
            return
        if not number:
            return
        try:
            for view, array in zip(views, batches.make(pickle.loads(number))):
                view[...] = array
            message = _DONE
        except Exception as error:  # travels to the parent, which raises it
            body = pickle.dumps(error)
            message = _FAILED + _ITEM.pack(len(body)) + body


def _receive(pipe: object) -> bytes:
    head = pipe.read(_ITEM.size)  # type: ignore[attr-defined]
    if len(head) < _ITEM.size:
        return b""
    return pipe.read(_ITEM.unpack(head)[0])  # type: ignore[attr-defined]


def _views(buffer: mmap.mmap, shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
    views, at = [], 0
    for shape in shapes:
        count = int(np.prod(shape))
        views.append(np.frombuffer(buffer, np.float32, count, at).reshape(shape))
        at += 4 * count
    return views
