"""HDF5Data: rows of datasets in a list of HDF5 files. Needs the extra `hdf5`."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from caffejacinto_py.data.order import Order
from caffejacinto_py.data.sources import relative_hint
from caffejacinto_py.errors import DataError, Loc

Shape = tuple[int, ...]


class HDF5List:
    """The files that a text file lists, one path per line, and their datasets, one per top name.

    rows: row count of each file. row_shapes: shape of one row, per dataset. Raises DataError for a missing file or
    dataset, for datasets whose row counts or row shapes differ, and for anything that is not numbers.
    """

    def __init__(self, source: str, names: Sequence[str]) -> None:
        self.source, self.names = source, tuple(names)
        self.files = _listed(source)
        self.rows: list[int] = []
        self.row_shapes: list[Shape] = []
        self._loaded: dict[int, list[np.ndarray]] = {}
        self._lock = threading.Lock()
        for i, path in enumerate(self.files):
            with _opened(path) as file:
                datasets = [_dataset(file, path, name) for name in self.names]
                shapes = [tuple(d.shape[1:]) for d in datasets]
                counts = {d.shape[0] for d in datasets}
            if len(counts) != 1 or counts == {0}:
                found = ", ".join(f"'{n}' {d.shape[0]}" for n, d in zip(self.names, datasets)) if file else str(counts)
                raise DataError(f"{path}: the datasets need one common row count above 0, found {found}")
            if i and shapes != self.row_shapes:
                raise DataError(f"{path}: rows have shapes {shapes}, those of {self.files[0]} have {self.row_shapes}")
            self.row_shapes = shapes
            self.rows.append(counts.pop())
        self.starts = np.concatenate(([0], np.cumsum(self.rows)))

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_lock"} | {"_loaded": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def read(self, ordinals: np.ndarray, out: Sequence[np.ndarray]) -> None:
        """Copy these rows, counted over all files, into one array per dataset."""
        files = np.searchsorted(self.starts, ordinals, side="right") - 1
        for f in np.unique(files):
            here = np.flatnonzero(files == f)
            for array, data in zip(out, self._file(int(f))):
                array[here] = data[ordinals[here] - self.starts[f]]

    def _file(self, f: int) -> list[np.ndarray]:
        """A whole file in memory, as Caffe does it; the one before it is kept too, for batches that span both."""
        with self._lock:
            if f not in self._loaded:
                path = self.files[f]
                with _opened(path) as file:
                    try:
                        arrays = [np.asarray(_dataset(file, path, n)[...], np.float32) for n in self.names]
                    except OSError as error:
                        raise DataError(
                            f"{path}: cannot read a dataset: {error}", hint="copy the file again"
                        ) from error
                while len(self._loaded) > 1:
                    del self._loaded[next(iter(self._loaded))]
                self._loaded[f] = arrays
            return self._loaded[f]


class HDF5Batches:
    """HDF5Data layer: one top per dataset, rows in order across the files, wrapping around inside a batch."""

    def __init__(self, rows: HDF5List, order: Order, shapes: Sequence[Shape]) -> None:
        self.rows, self.order, self.shapes = rows, order, tuple(shapes)

    def make(self, k: int) -> list[np.ndarray]:
        out = [np.empty(s, np.float32) for s in self.shapes]
        self.rows.read(self.order.records(k), out)
        return out


def _listed(source: str) -> list[str]:
    if not source:
        raise DataError("no source is given", hint='set hdf5_data_param { source: "list.txt" }')
    try:
        with open(source, "rb") as f:
            head = f.read(8)
        if head == b"\x89HDF\r\n\x1a\n":
            raise DataError(
                f"{source}: this is an HDF5 file; the source is a text file that lists HDF5 files",
                hint=f"echo {source} > list.txt and name list.txt",
            )
        with open(source, encoding="utf-8", errors="surrogateescape") as text:
            files = text.read().split()
    except OSError as error:
        raise DataError(f"{source}: cannot read the list: {error.strerror}", hint=relative_hint(source)) from error
    if not files:
        raise DataError(f"{source}: the list of HDF5 files is empty")
    for number, path in enumerate(files, 1):
        if not os.path.exists(path):
            raise DataError(f"no such HDF5 file: {path}", loc=Loc(source, number, 1), hint=relative_hint(path))
    return files


def _opened(path: str) -> Any:
    try:
        import h5py
    except ImportError as error:
        raise DataError("HDF5Data needs h5py", hint="pip install 'caffejacinto-py[hdf5]'") from error
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise DataError(f"{path}: not a readable HDF5 file: {error}") from error


def _dataset(file: Any, path: str, name: str) -> Any:
    import h5py

    found = file.get(name)
    if not isinstance(found, h5py.Dataset):
        raise DataError(
            f"{path}: no dataset '{name}'",
            hint=f"datasets are found by the top names of the layer; this file has {', '.join(sorted(file)) or 'none'}",
        )
    if found.ndim < 1 or found.dtype.kind not in "fiu":
        raise DataError(f"{path}: dataset '{name}' is {found.dtype} of shape {found.shape}; numbers in rows are needed")
    return found
