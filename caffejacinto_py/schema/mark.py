"""The dialect that a net says it has: field `dialect` of a NetParameter, in text the comment `# dialect: bvlc` on top.

C++ Caffe refuses text fields that it does not know and reads over comments; in binary files it reads over such fields.
"""

from __future__ import annotations

import re
from typing import Any

from caffejacinto_py.errors import Loc, PrototxtError, near
from caffejacinto_py.schema.dialect import DIALECTS, resolve_dialect
from caffejacinto_py.schema.modelfile import ModelFile
from caffejacinto_py.schema.pool import pb

_TOP = re.compile(r"(?:[ \t\r]*(?:#[^\n]*)?\n)*")  # blank lines and comments before the first field
_MARK = re.compile(r"^[ \t]*#[ \t]*dialect:[ \t]*(\S+)[ \t\r]*$", re.MULTILINE)
_HDF5 = "HDF5"


def mark(net: Any, dialect: str) -> Any:
    """The NetParameter, marked in place where its fields alone would be read in another dialect than `dialect`.

    A mark that says `dialect` already stays, since its author wanted it.
    """
    if net.dialect != dialect:
        net.ClearField("dialect")
        if resolve_dialect(net).name != dialect:
            net.dialect = dialect
    return net


def mark_model(model: ModelFile, dialect: str) -> ModelFile:
    """The same for weights, in place; their other fields are written in the numbers of `dialect` then.

    Raises WeightsError where the stored fields are not valid. HDF5 files have no place for a mark.
    """
    if model.version == _HDF5:
        return model
    before = model.net()
    net = type(before)()
    net.CopyFrom(before)
    if mark(net, dialect).dialect == before.dialect:
        return model
    head = pb.NetParameter.FromString(model.head)
    head.ClearField("dialect")
    if net.dialect:
        head.dialect = net.dialect
    model.head = head.SerializeToString(deterministic=True)
    model.dialect = dialect
    return model


def header(net: Any) -> str:
    """What a prototxt of this NetParameter begins with; "" without a mark."""
    return f"# dialect: {net.dialect}\n" if net.dialect else ""


def read_header(net: Any, text: str, file: str, loc: Loc | None) -> None:
    """Give the NetParameter the mark on top of its text. loc: of its field `dialect`, which wins where it is there.

    Raises PrototxtError for a dialect that does not exist.
    """
    if not net.dialect:
        top = _TOP.match(text)
        found = _MARK.search(text, 0, top.end() if top else 0)
        if found is None:
            return
        net.dialect = found[1]
        start = text.rfind("\n", 0, found.start(1)) + 1
        loc = Loc(file, text.count("\n", 0, found.start(1)) + 1, found.start(1) - start + 1)
    if net.dialect not in DIALECTS:
        known = f"one of: {', '.join(DIALECTS)}"
        guess = near(net.dialect, DIALECTS)
        text = f"unknown dialect '{net.dialect}'"
        raise PrototxtError(text, loc=loc, hint=f"{guess} {known}" if guess else known)
