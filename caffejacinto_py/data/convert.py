"""Writing LMDBs that C++ Caffe reads: the directory appears whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from types import TracebackType

import lmdb

from caffejacinto_py.errors import CaffeError, DataError, UsageError

COMMIT_RECORDS = 1000  # records a transaction, as Caffe's tools
COMMIT_BYTES = 64 << 20
MAX_KEY = 511  # LMDB's limit, compiled in


def check_backend(backend: str) -> None:
    """Only LMDB is written. Raises UsageError for leveldb or anything else."""
    if backend.lower() != "lmdb":
        raise UsageError(f"backend '{backend}' is not supported", hint="use lmdb, and data_param { backend: LMDB }")


def refuse_existing(path: str) -> None:
    """Raise DataError where something is at `path` already."""
    if os.path.lexists(path):
        raise DataError(
            f"{path}: exists already, and a database is never overwritten", hint=f"remove it first: rm -r '{path}'"
        )


class LmdbWriter:
    """``with LmdbWriter(path) as db: db.put(key, value)``: an ordinary LMDB directory (data.mdb, lock.mdb).

    Written under a temporary name beside `path`, flushed, then renamed; on any error nothing stays. Refuses a path
    that exists. The map grows as needed. Raises DataError for keys that are too long, equal or empty, and when the
    disk is full.
    """

    def __init__(self, path: str) -> None:
        self.path = path.rstrip("/") or path
        refuse_existing(self.path)
        self.parent = os.path.dirname(os.path.abspath(self.path))
        self.count = 0
        self._pending: list[tuple[bytes, bytes]] = []
        self._bytes = 0
        try:
            self._folder = tempfile.mkdtemp(
                prefix=f".{os.path.basename(self.path)[:200]}.", suffix=".tmp", dir=self.parent
            )
        except OSError as error:
            hint = f"mkdir -p '{self.parent}'" if error.errno == errno.ENOENT else None
            raise CaffeError(f"cannot write '{path}': {error.strerror}", hint=hint) from error
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(self._folder, 0o777 & ~mask)
        # Nothing reads this file before the rename, so it is flushed once, at the end.
        self._env = lmdb.open(self._folder, map_size=1 << 26, sync=False, metasync=False, mode=0o664)

    def put(self, key: bytes, value: bytes) -> None:
        """Append one record. Records are read back in the byte order of their keys."""
        if not 0 < len(key) <= MAX_KEY:
            raise DataError(
                f"{self.path}: record {self.count} has a key of {len(key)} bytes, LMDB allows 1 to {MAX_KEY}",
                hint="use shorter paths in the list (put the common part into ROOTFOLDER)",
            )
        self._pending.append((key, value))
        self._bytes += len(value)
        self.count += 1
        if len(self._pending) >= COMMIT_RECORDS or self._bytes >= COMMIT_BYTES:
            self._commit()

    def _commit(self) -> None:
        while self._pending:
            try:
                with self._env.begin(write=True) as txn:
                    for key, value in self._pending:
                        if not txn.put(key, value, overwrite=False):
                            raise DataError(f"{self.path}: two records have the key {key!r}")
            except lmdb.MapFullError:  # the whole transaction is gone; try it again in a larger map
                self._env.set_mapsize(self._env.info()["map_size"] * 2)
                continue
            except lmdb.Error as error:
                raise self._failed(error) from error
            self._pending, self._bytes = [], 0

    def _failed(self, error: lmdb.Error) -> CaffeError:
        free = shutil.disk_usage(self.parent).free >> 20
        return CaffeError(f"cannot write '{self.path}': {error}", hint=f"{free} MiB are free in {self.parent}")

    def __enter__(self) -> LmdbWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._commit()
                if not self.count:
                    raise DataError(f"{self.path}: there are no records to write")
                try:
                    self._env.sync(True)
                except lmdb.Error as failure:
                    raise self._failed(failure) from failure
                self._env.close()
                self._publish()
        finally:
            self._env.close()
            shutil.rmtree(self._folder, ignore_errors=True)  # gone already where it was renamed

    def _publish(self) -> None:
        try:
            os.rename(self._folder, self.path)
        except OSError as error:
            raise CaffeError(f"cannot write '{self.path}': {error.strerror}") from error
        folder = os.open(self.parent, os.O_RDONLY)
        with contextlib.suppress(OSError):  # some network file systems cannot flush a directory
            os.fsync(folder)
        os.close(folder)
