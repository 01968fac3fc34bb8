"""The protobuf wire format, bounded: every length is checked against the message around it before anything is touched.

Works on any buffer that indexes to int and slices to bytes (bytes, mmap). Offsets are absolute, so that an error names
the byte in the file. Reference: protobuf "Encoding" documentation.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from caffejacinto_py.errors import Loc, WeightsError

VARINT, I64, LEN, START_GROUP, END_GROUP, I32 = range(6)
Buffer = bytes | mmap.mmap | memoryview
Field = tuple[int, int, int, int, int]  # number, wire type, offset of the tag, value, offset behind the field


class WireError(ValueError):
    """Not a valid message; `offset` is the byte where. Callers turn it into WeightsError or DataError."""

    def __init__(self, offset: int, text: str) -> None:
        super().__init__(f"{text} (at byte {offset})")
        self.offset = offset
        self.text = text

    def within(self, what: str) -> WireError:
        """The same error, said to be inside `what`."""
        return WireError(self.offset, f"{what}: {self.text}")


def read_varint(buf: Buffer, pos: int, end: int) -> tuple[int, int]:
    """(unsigned 64-bit value, offset behind it)."""
    value = shift = 0
    start = pos
    while pos < end:
        byte = buf[pos]
        pos += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, pos
        shift += 7
        if shift > 63:
            raise WireError(start, "a number has more than 10 bytes")
    raise WireError(start, "the data ends in the middle of a number")


def read_field(buf: Buffer, pos: int, end: int) -> Field:
    """The field at `pos`: (number, wire type, pos, value, offset behind it).

    value: the unsigned number for VARINT; else the offset where the payload starts.
    """
    start = pos
    tag, pos = read_varint(buf, pos, end)
    number, wire = tag >> 3, tag & 7
    if not 0 < number < 1 << 29:
        raise WireError(start, f"field number {number} is impossible")
    if wire == LEN:
        size, pos = read_varint(buf, pos, end)
        if size > end - pos:
            raise WireError(start, f"field {number} claims {size} bytes where {end - pos} are left")
        return number, wire, start, pos, pos + size
    if wire == VARINT:
        value, pos = read_varint(buf, pos, end)
        return number, wire, start, value, pos
    size = {I32: 4, I64: 8}.get(wire, -1)
    if size < 0:
        raise WireError(start, f"field {number} has wire type {wire}, which Caffe files never use")
    if size > end - pos:
        raise WireError(start, f"the data ends inside field {number}")
    return number, wire, start, pos, pos + size


def fields(buf: Buffer, start: int, end: int) -> Iterator[Field]:
    """All fields of the message in ``buf[start:end]``, as `read_field` gives them."""
    while start < end:
        field = read_field(buf, start, end)
        yield field
        start = field[4]


def packed_or_run(buf: Buffer, code: str, form: int, at: int, value: int, pos: int, end: int) -> tuple[np.ndarray, int]:
    """The floats of a packed field, or of a run of unpacked fields, whose first was read as (at, value, pos).

    Returns (array, offset behind it). Packed values are a view into `buf`; a run is found without a Python loop.
    """
    dtype = np.dtype(code)
    if form == LEN:
        count, rest = divmod(pos - value, dtype.itemsize)
        if rest:
            raise WireError(at, f"{pos - value} bytes are not a whole number of {dtype.itemsize}-byte values")
        return np.frombuffer(buf, dtype, count, value) if count else np.empty(0, dtype), pos
    if value != at + 1:  # a tag written in more bytes than needed: legal, seen nowhere
        return np.frombuffer(buf, dtype, 1, value), pos
    record = dtype.itemsize + 1
    most, run, step = (end - at) // record, 1, 16
    while run < most:  # how many fields with the same tag follow; in growing steps, so that short runs stay cheap
        step = min(step, most - run)
        tags = np.frombuffer(buf, np.uint8, step * record, at + run * record)[::record]
        other = np.flatnonzero(tags != buf[at])
        if other.size:
            run += int(other[0])
            break
        run += step
        step *= 4
    records = np.frombuffer(buf, np.uint8, run * record, at).reshape(run, record)
    return np.frombuffer(records[:, 1:].tobytes(), dtype), at + run * record


def text(buf: Buffer, start: int, end: int) -> str:
    """A string field. Bytes that are not UTF-8 (files of old tools) come out as ``\\xNN``."""
    return bytes(buf[start:end]).decode("utf-8", "backslashreplace")


def int64(value: int) -> int:
    """The signed number behind an unsigned varint."""
    return value - (1 << 64) if value >= 1 << 63 else value


def int32(value: int) -> int:
    """The signed 32-bit number behind an unsigned varint (protobuf drops the high bits)."""
    value &= 0xFFFF_FFFF
    return value - (1 << 32) if value >= 1 << 31 else value


def varint(value: int) -> bytes:
    """Encode; negative numbers take 10 bytes, as in protobuf."""
    value &= 0xFFFF_FFFF_FFFF_FFFF
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def tag(number: int, wire: int) -> bytes:
    return varint(number << 3 | wire)


def uint(number: int, value: int) -> bytes:
    """A VARINT field."""
    return varint(number << 3) + varint(value)


def header(number: int, size: int) -> bytes:
    """Tag and length of a LEN field whose `size` payload bytes follow."""
    return varint(number << 3 | LEN) + varint(size)


def block(number: int, payload: bytes) -> bytes:
    """A LEN field: bytes or a sub-message."""
    return header(number, len(payload)) + payload


class Later:
    """Bytes whose number is known before they are, made in one piece or several."""

    def __init__(self, size: int, make: Callable[[], Iterator[bytes | memoryview]]) -> None:
        self.size = size
        self.make = make

    def __len__(self) -> int:
        return self.size


Piece = bytes | memoryview | Later  # of a file that is written piece by piece


def bytes_of(pieces: Iterable[Piece]) -> Iterator[bytes | memoryview]:
    """What the pieces are, made one after the other. ValueError when one is longer or shorter than was said."""
    for piece in pieces:
        if not isinstance(piece, Later):
            yield piece
            continue
        size = 0
        for part in piece.make():
            size += len(part)
            yield part
        if size != piece.size:
            raise ValueError(f"{size} bytes where {piece.size} were announced")


def string(number: int, value: str) -> bytes:
    return block(number, value.encode())


def damaged(error: WireError, path: str, what: str, *, size: int) -> WeightsError:
    """The WeightsError to raise for a file of `size` bytes that is not a whole `what`."""
    return WeightsError(
        f"not a whole {what}: {error.text} (at byte {error.offset} of {size})",
        loc=Loc(path),
        hint="the file may be cut short or damaged: compare its size and checksum with the original",
    )
