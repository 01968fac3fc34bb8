"""Weights as a numpy archive: arrays named ``<layer>/<blob index>``, in the order of the net."""

from __future__ import annotations

import io
import os
import re
import zipfile
import zlib

import numpy as np

from caffejacinto_py.errors import CaffeError, Loc, WeightsError
from caffejacinto_py.schema.files import atomic_write
from caffejacinto_py.schema.modelfile import LayerBlobs, ModelFile

_NAME = re.compile(r"(.+)/(\d{1,6})\.npy")
_MOST_COMPRESSION = 1100  # deflate cannot shrink more than 1032 times


def is_npz(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a zip archive, which .npz files are."""
    try:
        with open(path, "rb") as f:
            return f.read(4) == b"PK\x03\x04"
    except OSError:
        return False


def write_npz_model(path: str | os.PathLike[str], model: ModelFile) -> None:
    """Write the blobs of every layer that has some; atomic, not compressed. Blobs left to their owner are left out."""
    arrays: dict[str, np.ndarray] = {}
    for layer in model.current_layers():
        for i, blob in enumerate(layer.blobs):
            name = f"{layer.name}/{i}"
            if not layer.name or name in arrays:
                raise CaffeError(
                    f"cannot write '{os.fspath(path)}': two layers are named '{layer.name}', or one has no name",
                    hint="numpy archives go by layer name",
                )
            if blob is not None and i not in layer.shared:
                arrays[name] = np.asarray(blob)
    with atomic_write(path) as f, zipfile.ZipFile(f, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.ascontiguousarray(array).reshape(array.shape), allow_pickle=False)


def read_npz_model(path: str | os.PathLike[str]) -> ModelFile:
    """Read such an archive: layers have names and blobs, no types. Raises WeightsError for anything else."""
    path = os.fspath(path)
    found: dict[str, dict[int, np.ndarray]] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                name = _NAME.fullmatch(info.filename)
                if name is None:
                    hint = "arrays are named LAYER/INDEX, as `caffejacinto convert` writes them"
                    raise WeightsError(f"'{info.filename}' is no blob of a layer", loc=Loc(path), hint=hint)
                found.setdefault(name[1], {})[int(name[2])] = _array(archive, info, path)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError) as e:
        raise WeightsError(f"damaged numpy archive: {e}", loc=Loc(path), hint="the file may be cut short") from None
    if not found:
        raise WeightsError("the archive holds no layers", loc=Loc(path))
    layers = [LayerBlobs(name, blobs=_in_order(blobs, name, path)) for name, blobs in found.items()]
    return ModelFile("", layers, path=path, version="npz")


def _in_order(blobs: dict[int, np.ndarray], name: str, path: str) -> list[np.ndarray | None]:
    count = max(blobs) + 1
    if count > len(blobs) + 64:
        raise WeightsError(f"layer '{name}' has blob {count - 1} but only {len(blobs)} blobs", loc=Loc(path))
    return [blobs.get(i) for i in range(count)]


def _array(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: str) -> np.ndarray:
    """One member, never larger in memory than the file can hold."""
    if info.file_size > _MOST_COMPRESSION * (info.compress_size + 1024):
        raise WeightsError(f"damaged numpy archive: '{info.filename}' claims {info.file_size} bytes", loc=Loc(path))
    data = archive.read(info)
    try:
        head = io.BytesIO(data)
        version = np.lib.format.read_magic(head)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, kind = read(head)
        if kind.kind != "f":
            raise WeightsError(f"'{info.filename}' holds {kind}, blobs hold floats", loc=Loc(path))
        flat = np.frombuffer(data, kind, offset=head.tell())
        return flat.reshape(shape, order="F" if fortran else "C")
    except ValueError as e:
        raise WeightsError(f"damaged numpy archive: '{info.filename}': {e}", loc=Loc(path)) from None
