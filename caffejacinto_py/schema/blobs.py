"""BlobProto <-> numpy: inside caffemodels and solver states, and alone in .binaryproto mean files.

Decode order is that of NVCaffe, which contains BVLC Caffe's: double_data, else data, else raw_data (little endian).
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from caffejacinto_py.errors import Loc, WeightsError
from caffejacinto_py.schema import wire
from caffejacinto_py.schema.files import atomic_write, open_bytes
from caffejacinto_py.schema.lazy import LazyArray
from caffejacinto_py.schema.pool import pb
from caffejacinto_py.schema.sniff import seems_by_magic, seems_other_message, seems_text
from caffejacinto_py.schema.wire import I32, I64, LEN, VARINT, Buffer, WireError

MAX_AXES = 32
_MAX_COUNT = 2**31 - 1
_RAW_TYPES = {0: "<f8", 1: "<f4", 2: "<f2"}  # enum Type: DOUBLE, FLOAT, FLOAT16
_RAW_NUMBERS = {"<f8": 0, "<f4": 1, "<f2": 2}
_ARRAYS = {5: "<f4", 6: "<f4", 8: "<f8", 9: "<f8"}
_MAX_PIECES = 1 << 16


@dataclass(frozen=True)
class Blob:
    """A decoded BlobProto. Arrays are read-only views into the file where they can be, float32, float64 or float16, and
    may be unaligned: copy (``np.array(x)``) before handing them to code that needs aligned memory.

    legacy: the shape came from num, channels, height, width and so has 4 axes.
    """

    data: np.ndarray
    diff: np.ndarray | None
    legacy: bool


def decode_blob(buf: Buffer, start: int, end: int) -> Blob:
    """The BlobProto in ``buf[start:end]``; nothing is copied when its values are packed in one piece.

    Raises WireError when values are missing, too many or of a type Caffe does not use.
    """
    sizes = [0, 0, 0, 0]
    legacy = False
    dims: list[int] = []
    pieces: dict[int, list[np.ndarray]] = {}
    raw: dict[int, tuple[int, int]] = {}
    raw_types: dict[int, int] = {}
    pos = start
    while pos < end:
        number, form, at, value, pos = wire.read_field(buf, pos, end)
        if number in _ARRAYS:
            if form not in (LEN, I32 if number < 8 else I64):
                continue
            found, pos = wire.packed_or_run(buf, _ARRAYS[number], form, at, value, pos, end)
            pieces.setdefault(number, []).append(found)
            if len(pieces[number]) > _MAX_PIECES:
                raise WireError(at, "the values are scattered over too many pieces")
        elif number <= 4 and form == VARINT:
            legacy = True
            sizes[number - 1] = wire.int32(value)
        elif number == 7 and form == LEN:
            dims += _dims(buf, value, pos)
        elif number in (10, 11) and form == VARINT:
            raw_types[number] = value
        elif number in (12, 13) and form == LEN:
            raw[number] = (value, pos)
    shape = tuple(sizes if legacy else dims)
    count = _count(shape, start)
    data = _pick(buf, pieces, raw, raw_types, double=8, single=5, raw_field=12)
    if data is None and count == 0:
        data = np.empty(0, "<f4")
    if data is None:
        raise WireError(start, f"shape {_x(shape)} needs {count} values, the file holds none")
    diff = _pick(buf, pieces, raw, raw_types, double=9, single=6, raw_field=13)
    for name, array in (("", data), (" of the diff", diff)):
        if array is not None and array.size != count:
            raise WireError(start, f"shape {_x(shape)} needs {count} values{name}, the file holds {array.size}")
    return Blob(data.reshape(shape), None if diff is None else diff.reshape(shape), legacy)


def encode_blob(
    array: np.ndarray | LazyArray,
    diff: np.ndarray | LazyArray | None = None,
    *,
    legacy: bool = False,
    raw: bool = False,
) -> list[wire.Piece]:
    """A BlobProto as pieces to be written one after the other; the array's own memory is one of them, and the values of
    a LazyArray are made when `wire.bytes_of` is asked for them.

    As C++ Caffe does: float64 becomes double_data, anything else float `data` (half and integers are converted); a
    scalar (shape ()) has no shape field. legacy: num, channels, height, width instead of a shape (4 axes at most).
    raw: raw_data with its type, as NVCaffe stores float16.
    """
    fields: list[tuple[int, list[wire.Piece]]] = []
    if legacy:
        sizes = (1,) * (4 - array.ndim) + array.shape
        fields += [(i, [wire.uint(i, size)]) for i, size in enumerate(sizes, 1)]
    elif array.ndim:
        dims = b"".join(wire.varint(d) for d in array.shape)
        fields.append((7, [wire.block(7, wire.block(1, dims))]))
    for values, single, double, kind, bulk in ((array, 5, 8, 10, 12), (diff, 6, 9, 11, 13)):
        if values is None:
            continue
        code = _code(values.dtype, half=raw)
        body = _body(values, code)
        if raw:
            fields.append((kind, [wire.uint(kind, _RAW_NUMBERS[code])]))
            fields.append((bulk, [wire.header(bulk, len(body)), body]))
        elif values.size:
            number = double if code == "<f8" else single
            fields.append((number, [wire.header(number, len(body)), body]))
    fields.sort(key=lambda f: f[0])
    return [piece for _, pieces in fields for piece in pieces]


def _body(values: np.ndarray | LazyArray, code: str) -> memoryview | wire.Later:
    """The bytes of the values, in C order."""
    if isinstance(values, LazyArray):
        size = values.size * np.dtype(code).itemsize
        return wire.Later(size, lambda: (_view(flat_little(part, code)) for part in values.parts()))
    return _view(flat_little(values, code))


def _view(flat: np.ndarray) -> memoryview:
    return memoryview(flat.data).cast("B") if flat.size else memoryview(b"")


def _code(dtype: np.dtype, *, half: bool) -> str:
    """How values are stored: float64 stays, float16 stays with `half`, all else becomes float32."""
    return "<f8" if dtype == np.float64 else "<f2" if half and dtype == np.float16 else "<f4"


def flat_little(array: np.ndarray, code: str) -> np.ndarray:
    """The values in C order as one axis of this little-endian type. No copy where the memory is already so."""
    return np.ascontiguousarray(array).reshape(-1).astype(code, copy=False)


def blob_to_array(blob: Any) -> np.ndarray:
    """The values of a BlobProto message (as in ``LayerParameter.blobs``); WeightsError when shape and values differ."""
    data = blob.SerializeToString()
    try:
        return np.array(decode_blob(data, 0, len(data)).data)
    except WireError as e:
        raise WeightsError(f"blob: {e.text}") from None


def array_to_blob(array: np.ndarray, *, legacy: bool = False) -> Any:
    """A ``pb.BlobProto`` with the array's values (and shape; legacy: num, channels, height, width)."""
    return pb.BlobProto.FromString(b"".join(wire.bytes_of(encode_blob(np.asarray(array), legacy=legacy))))


def read_blob(path: str | os.PathLike[str]) -> np.ndarray:
    """The array of a .binaryproto file, e.g. an image mean: (1, channels, height, width) by Caffe's tools.

    Raises WeightsError when the file is missing, damaged or something else.
    """
    path = os.fspath(path)
    buf = open_bytes(path, what="binaryproto file")
    seems = seems_by_magic(buf)
    try:
        if seems is None:
            other = seems_other_message(buf)
            if other is None or "blob" in other:
                return decode_blob(buf, 0, len(buf)).data
            seems = other, None
    except WireError as e:
        seems = seems_text(buf)
        if seems is None:
            raise WeightsError(f"not a whole binaryproto file: {e}", loc=Loc(path)) from None
    raise WeightsError(f"not a binaryproto file: it seems to be {seems[0]}", loc=Loc(path), hint=seems[1])


def write_blob(path: str | os.PathLike[str], array: np.ndarray, *, legacy: bool = True) -> None:
    """Write a .binaryproto file, atomically.

    legacy: with num, channels, height, width as compute_image_mean does; arrays of fewer axes get leading ones.
    """
    array = np.asarray(array)
    if legacy and array.ndim > 4:
        raise WeightsError(f"a mean file has 4 axes (num, channels, height, width), the array has {array.ndim}")
    with atomic_write(path) as f:
        f.writelines(wire.bytes_of(encode_blob(array, legacy=legacy)))


def _dims(buf: Buffer, start: int, end: int) -> list[int]:
    dims: list[int] = []
    for number, form, at, value, stop in wire.fields(buf, start, end):
        if number == 1 and form == VARINT:
            dims.append(wire.int64(value))
        elif number == 1 and form == LEN:
            while value < stop and len(dims) <= MAX_AXES:
                dim, value = wire.read_varint(buf, value, stop)
                dims.append(wire.int64(dim))
        if len(dims) > MAX_AXES:
            raise WireError(at, f"a blob has more than {MAX_AXES} axes")
    return dims


def _count(shape: tuple[int, ...], at: int) -> int:
    """The number of values of a shape; WireError when an axis is negative or the count is beyond Caffe's int."""
    if len(shape) > MAX_AXES:
        raise WireError(at, f"a blob has more than {MAX_AXES} axes")
    if any(d < 0 for d in shape) or math.prod(d for d in shape if d) > _MAX_COUNT:
        raise WireError(at, f"shape {_x(shape)} is impossible")
    return math.prod(shape)


def _pick(
    buf: Buffer, pieces: dict[int, list[np.ndarray]], raw: dict[int, tuple[int, int]], raw_types: dict[int, int],
    *, double: int, single: int, raw_field: int,
) -> np.ndarray | None:  # fmt: skip
    """The values by Caffe's precedence: double, float, raw; None when there are none."""
    for number in (double, single):
        found = [p for p in pieces.get(number, ()) if p.size]
        if found:
            return found[0] if len(found) == 1 else np.concatenate(found)
    if raw_field in raw:
        start, end = raw[raw_field]
        code = _RAW_TYPES.get(raw_types.get(raw_field - 2, -1))
        if code is None:
            raise WireError(start, "raw_data of a type other than FLOAT, FLOAT16 and DOUBLE")
        count, rest = divmod(end - start, np.dtype(code).itemsize)
        if rest:
            raise WireError(start, f"raw_data of {end - start} bytes is not a whole number of values")
        return np.frombuffer(buf, code, count, start) if count else np.empty(0, code)
    empty = pieces.get(single) or pieces.get(double)
    return empty[0] if empty else None


def _x(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) if shape else "()"
