"""Read a prototxt file as text, and say what it is where it is none."""

from __future__ import annotations

import re
from pathlib import Path

from caffejacinto_py.errors import Loc, PrototxtError, near

_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1f\x7f]")
_LITERAL = re.compile(r""""(?:[^"\n\\]|\\.)*"|'(?:[^'\n\\]|\\.)*'|#[^\n]*""")
_UNDECODED = re.compile("[\udc80-\udcff]")
_MAGIC = (
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (b"PK\x03\x04", "a zip file (perhaps PyTorch weights)"),
    (b"\x1f\x8b", "a gzip file"),
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
)
_MAX_BYTES = 256 << 20


def read_text(path: str | Path, role: str) -> str:
    """The text of a net or solver file (`role`: "net" or "solver"), newline and BOM cleaned up.

    Bytes that are not UTF-8 are fine in comments. PrototxtError: missing, a directory, empty, binary.
    """
    file = str(path)
    data = _read(Path(path), file, role)
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise PrototxtError("this is UTF-16 text", loc=Loc(file), hint="save the file as UTF-8")
    if not data.strip():
        raise PrototxtError("the file is empty", loc=Loc(file), hint="was writing or copying it interrupted?")
    if _CONTROL.search(data[:65536]):
        raise _binary(data, file, role)
    text = data.decode("utf-8-sig", errors="surrogateescape")
    return text if text.isascii() else _LITERAL.sub(_clean_comment, text)


def _read(path: Path, file: str, role: str) -> bytes:
    try:
        if path.is_dir():
            raise PrototxtError(f"this is a directory, not a {role} file", loc=Loc(file))
        if path.is_file() and path.stat().st_size > _MAX_BYTES:
            raise PrototxtError(f"this is too big for a {role} file (over {_MAX_BYTES >> 20} MiB)", loc=Loc(file))
        return path.read_bytes()
    except FileNotFoundError:
        hint = near(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else None
        missing = "no such file" if path.parent.is_dir() else f"no such directory: {path.parent}"
        raise PrototxtError(missing, loc=Loc(file), hint=hint) from None
    except (OSError, ValueError) as error:
        raise PrototxtError(f"cannot read: {getattr(error, 'strerror', None) or error}", loc=Loc(file)) from None


def _clean_comment(found: re.Match[str]) -> str:
    return _UNDECODED.sub("?", found[0]) if found[0][0] == "#" else found[0]


def _binary(data: bytes, file: str, role: str) -> PrototxtError:
    for magic, what in _MAGIC:
        if data.startswith(magic):
            hint = "weights belong to --weights" if what.startswith("an HDF5") else f"give the {role} as prototxt text"
            return PrototxtError(f"this is {what}, not a {role} text", loc=Loc(file), hint=hint)
    # NetParameter.name, layers, layer are length-delimited; SolverState.iter is a varint
    if data[:1] == b"\x08":
        hint = "it looks like a .solverstate: use --snapshot"
    elif data[:1] in (b"\x0a", b"\x12") or data[:2] == b"\xa2\x06":
        hint = "it looks like a .caffemodel: use --weights"
    else:
        hint = f"give the {role} as prototxt text"
    return PrototxtError(f"this is a binary file, not a {role} text", loc=Loc(file), hint=hint)
