"""Weights files: `read_model` and `write_model`, binary .caffemodel and HDF5."""

from __future__ import annotations

import os

import numpy as np

from caffejacinto_py.errors import CaffeError, UsageError
from caffejacinto_py.schema import wire
from caffejacinto_py.schema.blobs import encode_blob
from caffejacinto_py.schema.caffemodel import parse_model
from caffejacinto_py.schema.files import atomic_write, open_bytes
from caffejacinto_py.schema.lazy import as_array
from caffejacinto_py.schema.modelfile import LayerBlobs, ModelFile, shapes_match
from caffejacinto_py.schema.retag import head_from_schema
from caffejacinto_py.schema.sniff import is_hdf5

__all__ = ["LayerBlobs", "ModelFile", "read_model", "shapes_match", "write_model"]

FORMATS = ("binaryproto", "hdf5")
_LIMIT = 2**31 - 1  # protobuf's, in C++ and Python


def read_model(path: str | os.PathLike[str]) -> ModelFile:
    """Read weights of any fork and age: .caffemodel (V2, V1, V0) or HDF5; the content decides, not the name.

    Blobs of a binary file are read-only views into the mapped file, so reading takes milliseconds and the memory is
    paid when values are used. They may be unaligned: copy before use (``np.array(blob)``). Raises WeightsError when the
    file is missing, damaged (with the byte offset) or something else (saying what it seems to be).
    """
    path = os.fspath(path)
    buf = open_bytes(path, what="weights file")
    if is_hdf5(buf):
        from caffejacinto_py.schema.hdf5 import read_hdf5_model

        return read_hdf5_model(path)
    return parse_model(buf, path)


def write_model(
    path: str | os.PathLike[str],
    model: ModelFile,
    *,
    format: str = "binaryproto",
    diffs: bool = False,
    raw: bool = False,
    dialect: str | None = None,
) -> None:
    """Write weights that C++ Caffe reads; the file appears complete or not at all.

    binaryproto: `data` and `shape` (float64: `double_data`), which every fork reads; byte for byte what protobuf would
    write. hdf5: datasets ``/data/<layer>/<index>``, without the blobs that an earlier layer owns.
    diffs: the diffs too (snapshot_diff).
    raw: raw_data as NVCaffe stores it, which keeps float16 (only its family reads it).
    dialect: the fork whose field numbers the layer messages get; None: those of `model.dialect`.

    Raises UsageError for an unknown format, CaffeError when the disk refuses or the file would pass protobuf's 2 GiB.
    """
    if format not in FORMATS:
        raise UsageError(f"no weights format '{format}'", hint=f"one of {', '.join(FORMATS)}")
    if format == "hdf5":
        from caffejacinto_py.schema.hdf5 import write_hdf5_model

        write_hdf5_model(path, model, diffs=diffs)
        return
    dialect = model.dialect if dialect is None else dialect
    layers = model.current_layers()
    _check_size(path, sum(_about(layer, diffs) for layer in layers))
    before, after = _head(model, dialect)
    with atomic_write(path) as f:
        written = f.write(before)
        for layer in layers:
            pieces = _layer(layer, dialect=dialect, diffs=diffs, raw=raw)
            size = sum(map(len, pieces))
            written += f.write(wire.header(100, size)) + size
            _check_size(path, written)
            f.writelines(wire.bytes_of(pieces))
        f.write(after)


def _head(model: ModelFile, dialect: str | None) -> tuple[bytes, bytes]:
    """The net's own fields before and behind the layers."""
    head = head_from_schema(model.head, dialect)
    before = [wire.string(1, model.name)] if model.name else []
    after: list[bytes] = []
    for number, _, at, _, end in wire.fields(head, 0, len(head)):
        (before if number < 100 else after).append(head[at:end])
    return b"".join(before), b"".join(after)


def _layer(layer: LayerBlobs, *, dialect: str | None, diffs: bool, raw: bool) -> list[wire.Piece]:
    """The pieces of one LayerParameter: fields below 7, the blobs, the fields above. Arrays are not copied."""
    fields = layer.fields(dialect)
    split = len(fields)
    for number, _, at, _, _ in wire.fields(fields, 0, len(fields)):
        if number > 7:
            split = at
            break
    pieces: list[wire.Piece] = [fields[:split]]
    for i, array in enumerate(layer.blobs):
        if array is None:
            raise CaffeError(
                f"layer '{layer.name}', blob {i} is shared and its values are not in this model",
                hint="write HDF5, or load the weights into the net and save them from there",
            )
        diff = layer.diffs[i] if diffs and i < len(layer.diffs) else None
        blob = encode_blob(as_array(array), None if diff is None else as_array(diff), raw=raw)
        pieces += [wire.header(7, sum(map(len, blob))), *blob]
    pieces.append(fields[split:])
    return pieces


def _about(layer: LayerBlobs, diffs: bool) -> int:
    """A lower bound of the bytes a layer takes, known without touching the values."""
    arrays = layer.blobs + (layer.diffs if diffs else [])
    return sum(
        a.size * (8 if a.dtype == np.float64 else 2 if a.dtype == np.float16 else 4) for a in arrays if a is not None
    )


def _check_size(path: str | os.PathLike[str], size: int) -> None:
    if size > _LIMIT:
        raise CaffeError(
            f"cannot write '{os.fspath(path)}': {size / 2**30:.2f} GiB, and protobuf files end at 2 GiB",
            hint="write HDF5: `snapshot_format: HDF5` in the solver, or a file name that ends in .h5",
        )
