"""What a file seems to be, from its first bytes: for errors that say more than "cannot parse"."""

from __future__ import annotations

import re

from caffejacinto_py.schema import wire
from caffejacinto_py.schema.wire import LEN, VARINT, Buffer, WireError

_HDF5 = b"\x89HDF\r\n\x1a\n"
_MAGIC: tuple[tuple[bytes, str, str | None], ...] = (
    (_HDF5, "an HDF5 file", None),
    (b"PK\x03\x04", "a zip archive (PyTorch .pt and .npz files are such)", "unpack it, or convert it to a caffemodel"),
    (b"\x80\x02", "a Python pickle (an old PyTorch .pt or .pth file)", "convert it to a caffemodel"),
    (b"\x1f\x8b", "a gzip file", "unpack it with gunzip or tar -xzf"),
    (b"BZh", "a bzip2 file", "unpack it with bunzip2"),
    (b"\xfd7zXZ\0", "an xz file", "unpack it with unxz"),
    (b"7z\xbc\xaf", "a 7z archive", "unpack it"),
    (b"Rar!", "a rar archive", "unpack it"),
    (b"\x93NUMPY", "a numpy .npy file", None),
    (b"\xff\xd8\xff", "a JPEG image", None),
    (b"\x89PNG", "a PNG image", None),
    (b"%PDF", "a PDF document", None),
    (b"SQLite format", "an SQLite database", None),
    (b"version https://git-lfs", "a git-lfs pointer, not the file itself", "run `git lfs pull`"),
)


def is_hdf5(buf: Buffer) -> bool:
    """Whether the HDF5 signature is at one of its allowed places."""
    return any(buf[at : at + 8] == _HDF5 for at in (0, 512, 1024, 2048))


def seems_by_magic(buf: Buffer) -> tuple[str, str | None] | None:
    """(what the file seems to be, hint) when the first bytes leave no doubt, else None."""
    if len(buf) == 0:
        return "empty", "the download or the program that wrote it failed; the disk may have been full"
    head = bytes(buf[:4096])
    for magic, what, hint in _MAGIC:
        if head.startswith(magic):
            return what, hint
    if not head.strip(b"\0"):
        return "nothing but zero bytes", "the copy or download was interrupted"
    return None


def seems_text(buf: Buffer) -> tuple[str, str | None] | None:
    """(what, hint) when the file is text: ask only after binary parsing failed, a net's name can look like anything."""
    head = bytes(buf[:4096])
    if re.match(rb"\s*<(!doctype|html|\?xml|head|script)", head, re.IGNORECASE):
        return "a web page (a download that failed)", "download the file itself, not the page about it"
    try:
        content = head.decode()
    except UnicodeDecodeError as e:
        if e.start < len(head) - 4:
            return None
        content = head[: e.start].decode()
    if re.search(r"[\x00-\x08\x0e-\x1f\x7f]", content):
        return None
    if re.search(r"^\s*(base_lr|lr_policy|max_iter|train_net|net)\s*:", content, re.MULTILINE):
        return "a solver prototxt (text)", "give it as --solver"
    if re.search(r"^\s*(layers?\s*\{|name\s*:|input\s*:)", content, re.MULTILINE):
        return "a net prototxt (text)", "the weights are in the .caffemodel beside it; give this as --model"
    return "a text file", None


def seems_other_message(buf: Buffer) -> str | None:
    """Which other Caffe message the first fields look like; None when they look like a net or like nothing."""
    wires: dict[int, int] = {}
    try:
        for number, kind, _, _, _ in wire.fields(buf, 0, len(buf)):
            wires.setdefault(number, kind)
            if len(wires) > 6 or number > 9:
                break
    except WireError:
        return None
    if wires.get(1) == VARINT and wires.get(2, LEN) == LEN and set(wires) <= set(range(1, 7)) and wires.get(3) == LEN:
        return "a solver state (.solverstate)"
    if (wires.get(5) == LEN or wires.get(8) == LEN) and set(wires) <= set(range(1, 10)) and wires.get(1) != LEN:
        return "a single blob (a mean file, .binaryproto)"
    if wires.get(1) == LEN and (wires.get(100) == LEN or wires.get(2) == LEN):
        return "a net (.caffemodel)"
    if set(wires) == {1, 2} and wires[1] == VARINT:
        return "a solver state (.solverstate)"
    return None
