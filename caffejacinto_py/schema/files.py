"""Files that are either whole or absent: atomic writing, and opening for reading with errors that say what to do."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from typing import IO

from caffejacinto_py.errors import CaffeError, InputError, Loc, WeightsError, near

_SMALL = 1 << 20  # below this a file is read, above it is mapped


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO]:
    """``with atomic_write(path) as f:`` the file appears complete under `path`, or not at all.

    Written under a temporary name in the same directory, flushed to the disk, renamed; the directory is flushed too, so
    that not even a power cut leaves half a file. If the body or the disk fails, the temporary file is removed and what
    was at `path` before is untouched. A symbolic link is followed; a device or pipe is written directly.

    mode: "wb", "w+b" or "w" (UTF-8). Raises CaffeError naming the path when the operating system refuses.
    """
    if set(mode) - set("wbt+") or "w" not in mode:
        raise ValueError(f"atomic_write: mode {mode!r}")
    encoding = None if "b" in mode else "utf-8"
    target = os.path.realpath(path)
    with _explained(path):
        special = os.path.exists(target) and not stat.S_ISREG(os.stat(target).st_mode)
        if special:
            with open(path, mode, encoding=encoding) as f:
                yield f
            return
        temporary = _temporary(target)
        try:
            with open(os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), mode, encoding=encoding) as f:
                yield f
                f.flush()
                os.fsync(f.fileno())
            _publish(temporary, target)
        except BaseException:
            _remove(temporary)
            raise


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[str]:
    """As `atomic_write`, for libraries that open files by name (HDF5): yields the temporary name to write to."""
    target = os.path.realpath(path)
    with _explained(path):
        temporary = _temporary(target)
        try:
            with open(os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), "rb"):
                pass
            yield temporary
            with open(temporary, "rb+") as f:
                os.fsync(f.fileno())
            _publish(temporary, target)
        except BaseException:
            _remove(temporary)
            raise


def check_writable(directory: str | os.PathLike[str]) -> None:
    """Make sure that files can be created in `directory` (before hours of training); nothing stays there.

    Raises CaffeError when the directory is missing, is not a directory or refuses.
    """
    directory = os.fspath(directory) or "."
    if not os.path.isdir(directory):
        what = "is not a directory" if os.path.exists(directory) else "does not exist"
        hint = "name a directory" if os.path.exists(directory) else f"mkdir -p '{directory}'"
        raise CaffeError(f"cannot write into '{directory}': it {what}", hint=hint)
    temporary = _temporary(os.path.join(directory, "probe"))
    with _explained(directory):
        try:
            with open(os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), "wb") as f:
                f.write(b"\0")
        finally:
            _remove(temporary)


def open_bytes(
    path: str | os.PathLike[str], *, what: str = "file", error: type[InputError] = WeightsError
) -> bytes | mmap.mmap:
    """The content of a file as a read-only buffer: small files in memory, large ones mapped (nothing is copied).

    A mapped file must not be changed in place while the buffer lives; `atomic_write` over it is fine.
    Raises `error` when the file is missing, is not a regular file or cannot be read.
    """
    path = os.fspath(path)
    loc = Loc(path)
    try:
        with open(path, "rb") as f:
            status = os.fstat(f.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise error(f"this is not a regular file, so it cannot be read as a {what}", loc=loc)
            if status.st_size < _SMALL:
                return f.read()
            return mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise error(f"no such {what}", loc=loc, hint=_similar(path) or _relative(path)) from None
    except IsADirectoryError:
        raise error(f"this is a directory, not a {what}", loc=loc, hint="name a file in it") from None
    except (OSError, ValueError) as e:
        raise error(f"cannot read this {what}: {getattr(e, 'strerror', None) or e}", loc=loc) from None


def _similar(path: str) -> str | None:
    """A hint for a missing file: a similar name in its directory, or the nearest directory that is missing."""
    folder, name = os.path.split(path)
    try:
        return near(name, os.listdir(folder or "."))
    except OSError:
        return f"the directory '{folder}' does not exist" if folder else None


def _relative(path: str) -> str | None:
    return None if os.path.isabs(path) else f"relative paths are taken from the working directory, {os.getcwd()}"


def _temporary(target: str) -> str:
    folder, name = os.path.split(target)
    return os.path.join(folder, f".{name[:200]}.{secrets.token_hex(6)}.tmp")


def _publish(temporary: str, target: str) -> None:
    os.replace(temporary, target)
    folder = os.open(os.path.dirname(target) or ".", os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot flush a directory
            raise
    finally:
        os.close(folder)


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


@contextlib.contextmanager
def _explained(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns an OSError into a CaffeError that names the path and what to do."""
    path = os.fspath(path)
    try:
        yield
    except OSError as e:
        raise CaffeError(f"cannot write '{path}': {e.strerror or e}", hint=_advice(e, path)) from e


def _advice(e: OSError, path: str) -> str | None:
    folder = path if os.path.isdir(path) else os.path.dirname(path) or "."
    if e.errno in (errno.ENOSPC, errno.EDQUOT):
        free = f": {shutil.disk_usage(folder).free >> 20} MiB are free there" if os.path.isdir(folder) else ""
        return f"free some space or write elsewhere{free}; an older file at this path is unchanged"
    if e.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"the directory '{folder}' must be writable for you"
    if e.errno == errno.ENOENT:
        return "write elsewhere" if os.path.isdir(folder) else f"mkdir -p '{folder}'"
    if e.errno == errno.EISDIR:
        return "this is a directory: give a file name"
    return None
