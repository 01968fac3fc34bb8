"""Where records come from: LMDB, image lists, HDF5 files. Random access by record ordinal; opened lazily, in the
process that reads.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import lmdb
import numpy as np

from caffejacinto_py.data import lmdb_check
from caffejacinto_py.errors import DataError, Loc


def relative_hint(path: str) -> str | None:
    """Caffe takes relative paths from the working directory; say so when such a path is not there."""
    return None if os.path.isabs(path) else f"relative paths are taken from the working directory, {os.getcwd()}"


def _missing(text: str, path: str) -> DataError:
    error = DataError(text, hint=relative_hint(path))
    error.missing = path
    return error


def _damaged(path: str, what: str) -> DataError:
    return DataError(f"{path}: the LMDB is damaged: {what}", hint="copy or convert it again")


class _Environment:
    """One open LMDB. LMDB allows each file to be open once in a process, so train and test nets share it through
    `_OPEN`.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.env = _open(path)
        self._keys: list[bytes] | None = None
        self._lock = threading.Lock()

    def keys(self) -> list[bytes]:
        with self._lock:
            if self._keys is None:
                self._keys = self._list_keys()
            return self._keys

    def _list_keys(self) -> list[bytes]:
        """All keys. A damaged tree may hold more or fewer than the header says, or go round in circles."""
        count = self.env.stat()["entries"]
        try:
            with self.env.begin() as txn:
                keys = list(islice(txn.cursor().iternext(keys=True, values=False), count + 1))
        except lmdb.Error as error:
            raise _damaged(self.path, str(error)) from error
        if len(keys) != count:
            raise _damaged(self.path, f"its keys do not match the {count} records it announces")
        return keys


# Not state of ours but of the operating system process: LMDB itself forbids a second open of the same file.
_OPEN: weakref.WeakValueDictionary[tuple[int, str], _Environment] = weakref.WeakValueDictionary()
_OPEN_LOCK = threading.Lock()


def _environment(path: str) -> _Environment:
    with _OPEN_LOCK:
        place = (os.getpid(), os.path.realpath(path))
        found = _OPEN.get(place)
        if found is None:
            for (pid, real), inherited in list(_OPEN.items()):
                if pid != place[0] and real == place[1]:
                    inherited.env.close()  # a fork brought it here; this closes the copy of this process only
            found = _OPEN[place] = _Environment(path)
        return found


def _open(path: str) -> lmdb.Environment:
    """Open read-only without a lock file (works on read-only media and on a database that another program has open)."""
    _check_directory(path)
    lmdb_check.check(path)
    try:
        env = lmdb.open(path, readonly=True, lock=False, readahead=False, create=False, max_dbs=0)
    except lmdb.Error as error:
        raise DataError(f"{path}: not a readable LMDB: {error}", hint="is it whole, and written by LMDB?") from error
    if not env.stat()["entries"]:
        env.close()
        raise DataError(f"{path}: the LMDB is empty", hint="was the conversion interrupted?")
    return env


def _check_directory(path: str) -> None:
    if not path:
        raise DataError("no source is given", hint='set data_param { source: "path/to/lmdb" }')
    if not os.path.exists(path):
        raise _missing(f"{path}: no such database", path)
    if not os.path.isdir(path):
        raise DataError(
            f"{path}: a database is a directory, this is a file",
            hint="name the directory that holds data.mdb",
        )
    names = os.listdir(path)
    if "data.mdb" not in names:
        if "CURRENT" in names or any(n.startswith("MANIFEST-") or n.endswith((".ldb", ".sst")) for n in names):
            raise DataError(
                f"{path}: this is a LevelDB, and only LMDB can be read",
                hint="convert the original images again with --backend=lmdb and set data_param { backend: LMDB }",
            )
        raise DataError(f"{path}: not an LMDB: no data.mdb inside", hint="was the conversion interrupted?")
    if os.path.isfile(data := os.path.join(path, "data.mdb")) and not os.path.getsize(data):
        raise DataError(f"{path}: data.mdb is empty (0 bytes)", hint="was the conversion or the copy interrupted?")


class Database:
    """A read-only LMDB of serialized records, in key order.

    Raises DataError for a path that is missing, empty, truncated, a LevelDB or no LMDB at all; at the first access,
    not here.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._held: tuple[int, _Environment] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_held": None}

    def _environment(self) -> _Environment:
        held = self._held
        if held is None or held[0] != os.getpid():  # an environment does not survive a fork
            held = self._held = (os.getpid(), _environment(self.path))
        return held[1]

    def __len__(self) -> int:
        return int(self._environment().env.stat()["entries"])

    def key(self, ordinal: int) -> str:
        """The key of a record, as error messages show it."""
        return self._environment().keys()[ordinal].decode("utf-8", "replace")

    def where(self, ordinal: int) -> str:
        return f"{self.path}: record '{self.key(ordinal)}'"

    @contextmanager
    def read(self, ordinals: Sequence[int] | np.ndarray) -> Iterator[list[memoryview]]:
        """The values of these records; they point into the file and live as long as the `with` block."""
        environment = self._environment()
        keys = environment.keys()
        wanted = [keys[i] for i in np.asarray(ordinals).tolist()]  # plain ints: numpy's are slow as an index
        try:
            with environment.env.begin(buffers=True) as txn:
                get = txn.get
                values = [get(key) for key in wanted]
                if any(v is None for v in values):  # `None in` compares bytes: slow
                    raise _damaged(self.path, "a record is listed and not found")
                yield values  # type: ignore[misc]  # none is None
        except lmdb.Error as error:
            raise _damaged(self.path, str(error)) from error

    def close(self) -> None:
        self._held = None


class ImageList:
    """A text file with `path label` per line: the label stands after the last blank, so paths may contain blanks
    (BVLC Caffe).

    Raises DataError with the line for a missing or non-integer label. Empty lines are skipped.
    """

    def __init__(self, path: str, *, root: str = "") -> None:
        self.path, self.root = path, root
        self.names: list[str] = []
        self.lines: list[int] = []
        labels: list[int] = []
        try:
            with open(path, encoding="utf-8-sig", errors="surrogateescape") as f:
                for number, line in enumerate(f, 1):
                    parts = line.rstrip().rsplit(None, 1)
                    if not parts:
                        continue
                    if len(parts) < 2 or not _is_int(parts[1]):
                        raise DataError(
                            f"expected 'path label' with an integer label, found {line.strip()[:80]!r}",
                            loc=Loc(path, number, 1),
                            hint="a line is the path of an image, a space, and the number of its class",
                        )
                    self.names.append(parts[0])
                    self.lines.append(number)
                    labels.append(int(parts[1]))
        except OSError as error:
            raise _missing(f"{path}: cannot read the image list: {error.strerror}", path) from error
        if not labels:
            raise DataError(f"{path}: the image list is empty", hint="was writing it interrupted?")
        self.labels = np.array(labels, np.float32)

    def __len__(self) -> int:
        return len(self.names)

    def where(self, ordinal: int) -> str:
        return f"{self.path}:{self.lines[ordinal]}: image '{self.file(ordinal)}'"

    def file(self, ordinal: int) -> str:
        """Caffe glues root_folder and path together without a separator."""
        return self.root + self.names[ordinal]

    def read(self, ordinal: int) -> bytes:
        try:
            with open(self.file(ordinal), "rb") as f:
                return f.read()
        except OSError as error:
            hint = relative_hint(self.file(ordinal))
            if self.root and not self.root.endswith("/"):
                hint = f"root_folder '{self.root}' does not end in '/', and Caffe joins it to the path as it is"
            raise DataError(f"{self.where(ordinal)}: {error.strerror}", hint=hint) from error


def _is_int(text: str) -> bool:
    try:
        int(text)
    except ValueError:
        return False
    return True
