"""One run at a time in a recipe's folder."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator

from caffejacinto_py.errors import CaffeError, Loc

NAME = ".running"  # in the folder while a run is at work in it


@contextlib.contextmanager
def locked(folder: str) -> Iterator[None]:
    """Keep other runs out of the folder, which is made where it is missing.

    The system frees the lock when its process ends, however it ends; a file of a dead run keeps nobody out. Processes
    that a run starts do not inherit it. Raises CaffeError naming the run that is at work there, and where the folder
    cannot be written.
    """
    path = os.path.join(folder, NAME)
    try:
        os.makedirs(folder, exist_ok=True)
        file = _take(path)
    except OSError as e:
        text = f"cannot lock '{folder}': {e.strerror}"
        raise CaffeError(text, loc=Loc(path), hint="name a folder that can be written to") from e
    if file is None:
        text = f"another run is at work in '{folder}': {_holder(path)}"
        raise CaffeError(text, hint="wait for it, stop it, or give this run a folder of its own: --output DIR")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)  # before the lock goes: who waits for it finds out that the file is another one
        os.close(file)


def _take(path: str) -> int | None:
    """The locked file; None where somebody else holds the lock."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _same(file, path):
                os.ftruncate(file, 0)
                os.write(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
                return file
        except (BlockingIOError, PermissionError):  # what lockf says of a lock that is held
            os.close(file)
            return None
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # its run ended between the two calls: the name stands for another file by now


def _same(file: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _holder(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as f:
            return f.read(200).strip() or "its process is just starting"
    except OSError:
        return "its process is just ending"
