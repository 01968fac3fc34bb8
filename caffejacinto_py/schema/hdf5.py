"""HDF5 weights and solver states in C++ Caffe's layout.

Weights: ``/data/<layer>/<blob index>``, ``/diff/...`` on request; a layer name with "/" becomes nested groups; a blob
that an earlier layer owns is left out. State: ``/iter``, ``/learned_net``, ``/current_step``, ``/history/<index>``.
Source: bvlc net.cpp (ToHDF5, CopyTrainedLayersFromHDF5), sgd_solver.cpp, util/hdf5.cpp.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from caffejacinto_py.errors import CaffeError, Loc, WeightsError
from caffejacinto_py.schema.files import atomic_path
from caffejacinto_py.schema.modelfile import LayerBlobs, ModelFile

_MOST_COMPRESSION = 1100  # deflate cannot shrink more than 1032 times


def read_hdf5_model(path: str) -> ModelFile:
    """Read HDF5 weights into memory. WeightsError when damaged, not made by Caffe, or h5py is missing."""
    with _opened(path) as file:
        data = _group(file, "data", path)
        diffs = _group(file, "diff", path) if "diff" in file else None
        layers = []
        for name, group in _layers(data, ""):
            blobs = _arrays(group, path)
            entry = LayerBlobs(name, blobs=blobs)
            if diffs is not None and name in diffs:
                found = _arrays(diffs[name], path)
                entry.diffs = found if len(found) == len(blobs) else []
            layers.append(entry)
    if not layers:
        raise WeightsError("the group /data holds no layers", loc=Loc(path))
    return ModelFile("", layers, path=path, version="HDF5")


def write_hdf5_model(path: str | os.PathLike[str], model: ModelFile, *, diffs: bool = False) -> None:
    """Write HDF5 weights, atomically: float32 (float64 stays). Shared blobs are left out, their diffs not (as C++)."""
    h5py = _h5py(os.fspath(path))
    with atomic_path(path) as temporary, _said(path), h5py.File(temporary, "w", libver="earliest") as file:
        data = file.create_group("data")
        diff = file.create_group("diff") if diffs else None
        for layer in model.layers:
            if not layer.name:
                raise CaffeError("a layer without a name cannot be written as HDF5", hint="write a binary caffemodel")
            group = data.require_group(layer.name)
            for i, array in enumerate(layer.blobs):
                if array is not None and i not in layer.shared:
                    _save(group, str(i), array)
            if diff is not None:
                group = diff.require_group(layer.name)
                for i, array in enumerate(layer.diffs):
                    _save(group, str(i), array)


def read_hdf5_state(path: str) -> tuple[int, str, int, list[np.ndarray]]:
    """(iter, learned_net, current_step, history) of a .solverstate.h5."""
    with _opened(path) as file:
        if "iter" not in file:
            hint = "this seems to be a weights file" if "data" in file else None
            raise WeightsError("not a solver state: there is no /iter", loc=Loc(path), hint=hint)
        history = _arrays(_group(file, "history", path), path)
        if any(h is None for h in history):
            raise WeightsError("the history has gaps", loc=Loc(path))
        return _int(file, "iter", path), _text(file), _int(file, "current_step", path), history


def write_hdf5_state(
    path: str | os.PathLike[str], *, iter: int, learned_net: str, current_step: int, history: list[np.ndarray]
) -> None:
    """Write a .solverstate.h5, atomically."""
    h5py = _h5py(os.fspath(path))
    with atomic_path(path) as temporary, _said(path), h5py.File(temporary, "w", libver="earliest") as file:
        file.create_dataset("iter", data=np.array([iter], "<i4"))
        encoded = learned_net.encode() + b"\0"  # C++ reads up to the NUL, so it must be in the dataset
        kind = h5py.h5t.C_S1.copy()
        kind.set_size(len(encoded))
        kind.set_strpad(h5py.h5t.STR_NULLTERM)
        plain = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plain.set_obj_track_times(False)  # equal states are equal files, whenever they are written
        text = h5py.h5d.create(file.id, b"learned_net", kind, h5py.h5s.create(h5py.h5s.SCALAR), plain)
        text.write(h5py.h5s.ALL, h5py.h5s.ALL, np.array(encoded, f"S{len(encoded)}"), kind)
        file.create_dataset("current_step", data=np.array([current_step], "<i4"))
        group = file.create_group("history")
        for i, array in enumerate(history):
            _save(group, str(i), array)


def _h5py(path: str) -> Any:
    try:
        import h5py
    except ImportError:
        raise CaffeError(
            f"'{path}' is HDF5, and h5py is not installed", hint="pip install 'caffejacinto[hdf5]' (or h5py)"
        ) from None
    return h5py


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Any]:
    h5py = _h5py(path)
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError, MemoryError, UnicodeError) as e:
        raise WeightsError(f"damaged HDF5 file: {e}", loc=Loc(path), hint="the file may be cut short") from None


@contextlib.contextmanager
def _said(path: str | os.PathLike[str]) -> Iterator[None]:
    """h5py's complaints other than OSError (names that clash) as CaffeError."""
    try:
        yield
    except (ValueError, RuntimeError, TypeError) as e:
        raise CaffeError(f"cannot write '{os.fspath(path)}': {e}", hint="layer names must not clash as paths") from e


def _group(file: Any, name: str, path: str) -> Any:
    found = file.get(name)
    if not _is_group(found):
        known = ", ".join(sorted(file)[:8])
        hint = (
            f"it holds: {known}; data files for HDF5Data look like this" if found is not None else f"it holds: {known}"
        )
        raise WeightsError(f"not written by Caffe: there is no group /{name}", loc=Loc(path), hint=hint)
    return found


def _is_group(item: Any) -> bool:
    return item is not None and hasattr(item, "keys") and not hasattr(item, "dtype")


def _layers(group: Any, prefix: str, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Groups that are layers: those that hold blobs, and leaves without any."""
    if depth > 32:
        raise ValueError("groups are nested too deeply")
    for name in group:
        item = group.get(name)
        if not _is_group(item):
            continue
        inner = [_is_group(item.get(n)) for n in item]
        if not all(inner) or not inner:
            yield prefix + name, item
        if any(inner):
            yield from _layers(item, prefix + name + "/", depth + 1)


def _arrays(group: Any, path: str) -> list[Any]:
    """The datasets "0", "1", ... of a group; None where one is left out."""
    numbered = {int(n): group[n] for n in group if n.isdecimal() and not _is_group(group.get(n))}
    if len(numbered) and max(numbered) > len(numbered) + 1000:
        raise WeightsError(f"{group.name}: blob {max(numbered)} of {len(numbered)}", loc=Loc(path))
    return [_array(numbered[i], path) if i in numbered else None for i in range(max(numbered, default=-1) + 1)]


def _array(dataset: Any, path: str) -> np.ndarray:
    if dataset.dtype.kind not in "fiu":
        raise WeightsError(f"{dataset.name} holds {dataset.dtype}, not numbers", loc=Loc(path))
    if dataset.shape is None:
        raise WeightsError(f"{dataset.name} is empty", loc=Loc(path))
    size = dataset.size * dataset.dtype.itemsize
    stored = dataset.id.get_storage_size()
    if size > stored * (_MOST_COMPRESSION if dataset.compression or dataset.chunks else 1):
        raise WeightsError(f"{dataset.name} claims {size} bytes, the file has {stored} of it", loc=Loc(path))
    code = np.float64 if dataset.dtype.kind == "f" and dataset.dtype.itemsize == 8 else np.float32
    array = np.empty(dataset.shape, code)
    if array.size:
        dataset.read_direct(array)
    return array


def _save(group: Any, name: str, array: np.ndarray) -> None:
    array = np.asarray(array)
    group.create_dataset(name, data=array if array.dtype == np.float64 else array.astype(np.float32, copy=False))


def _int(file: Any, name: str, path: str) -> int:
    found = file.get(name)
    if found is None or _is_group(found) or found.size != 1 or found.dtype.kind not in "iu":
        raise WeightsError(f"not a solver state: /{name} is not one integer", loc=Loc(path))
    return int(np.asarray(found).reshape(-1)[0])


def _text(file: Any) -> str:
    found = file.get("learned_net")
    if found is None or _is_group(found):
        return ""
    value = found[()]
    if isinstance(value, np.ndarray):
        value = value.reshape(-1)[0] if value.size else b""
    return value.split(b"\0")[0].decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)
