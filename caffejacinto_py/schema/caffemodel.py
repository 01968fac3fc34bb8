"""Reading a binary NetParameter: names and blobs by hand off the wire, everything else kept as bytes.

The blobs are views into the buffer, so a 500 MB file takes milliseconds. Layer messages of the three ages are read:
V2 (`layer`), V1 (`layers`) and V0 (`layers` around another `layer`). Source: bvlc util/upgrade_proto.cpp, net.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from caffejacinto_py.errors import Loc, WeightsError
from caffejacinto_py.schema import wire
from caffejacinto_py.schema.blobs import decode_blob
from caffejacinto_py.schema.dialect import DIALECTS
from caffejacinto_py.schema.modelfile import LayerBlobs, ModelFile
from caffejacinto_py.schema.pool import pb
from caffejacinto_py.schema.retag import head_to_schema, uses_old_quantization
from caffejacinto_py.schema.sniff import seems_by_magic, seems_other_message, seems_text
from caffejacinto_py.schema.v1_types import V1_TYPES
from caffejacinto_py.schema.wire import LEN, VARINT, Buffer, WireError

_NAMES_V2 = {1: "name", 2: "type", 3: "bottom", 4: "top", 7: "blobs"}
_NAMES_V1 = {4: "name", 5: "kind", 2: "bottom", 3: "top", 6: "blobs", 1: "inner"}
_NAMES_V0 = {1: "name", 2: "type", 50: "blobs"}
_HINT = "a .caffemodel, or a .caffemodel.h5, is wanted here"


class _Layer:
    """A layer message taken apart: strings, places of the blobs, and the rest as bytes."""

    def __init__(self) -> None:
        self.name = self.type = ""
        self.bottoms: list[str] = []
        self.tops: list[str] = []
        self.blobs: list[tuple[int, int]] = []
        self.rest: list[bytes] = []
        self.forms: dict[int, int] = {}
        self.old = False  # V0


def parse_model(buf: Buffer, path: str) -> ModelFile:
    """A binary caffemodel. Raises WeightsError saying which byte is wrong, or what else the file seems to be."""
    seems = seems_by_magic(buf)
    if seems is None:
        try:
            return _parse(buf, path)
        except WireError as e:
            seems = seems_text(buf)
            if seems is None:
                other = seems_other_message(buf)
                seems = (other, _HINT) if other and not other.startswith("a net") else None
            if seems is None:
                raise wire.damaged(e, path, "caffemodel", size=len(buf)) from None
    text = "the file is empty" if seems[0] == "empty" else f"not a caffemodel: it seems to be {seems[0]}"
    raise WeightsError(text, loc=Loc(path), hint=seems[1])


def _parse(buf: Buffer, path: str) -> ModelFile:
    model = ModelFile("", [], path=path)
    head: list[bytes] = []
    numbers: set[int] = set()
    marks: set[str] = set()
    old: list[bytes] = []
    for number, form, at, value, end in wire.fields(buf, 0, len(buf)):
        if form == LEN and number == 1:
            model.name = wire.text(buf, value, end)
        elif form == LEN and number == 100:
            model.layers.append(_v2(buf, value, end, marks))
        elif form == LEN and number == 2:
            entry, rest, is_v0 = _v1(buf, value, end, model)
            model.layers.append(entry)
            old.append(wire.block(2, rest))
            model.version = "V0" if is_v0 or model.version == "V0" else "V1"
        else:
            head.append(bytes(buf[at:end]))
            numbers.add(min(number, 1000))
    if not model.layers:
        raise WireError(len(buf), "no layers in it")
    if old and len(old) < len(model.layers):
        raise WireError(0, "both old `layers` and new `layer` messages in one net")
    model.head = b"".join(head)
    if old:
        model.old = wire.string(1, model.name) + model.head + b"".join(old)
    model.dialect = _marked(head) or _dialect(marks, numbers)
    model.head = head_to_schema(model.head, model.dialect)
    for layer in model.layers:
        if layer.stored is not None:
            layer.stored = (layer.stored[0], model.dialect)
    return model


def _v2(buf: Buffer, start: int, end: int, marks: set[str]) -> LayerBlobs:
    found = _take_apart(buf, start, end, _NAMES_V2)
    entry = _entry(buf, found)
    entry.stored = (b"".join(found.rest), None)
    _mark(found, entry.stored[0], marks)
    return entry


def _v1(buf: Buffer, start: int, end: int, model: ModelFile) -> tuple[LayerBlobs, bytes, bool]:
    """(layer, its message without blobs, whether it is V0)."""
    found = _take_apart(buf, start, end, _NAMES_V1)
    entry = _entry(buf, found)
    entry.upgrade = partial(_upgraded, model, entry)
    return entry, b"".join(found.rest), found.old


def _upgraded(model: ModelFile, entry: LayerBlobs) -> object:
    return model.upgraded_layer(entry.name)


def _take_apart(buf: Buffer, start: int, end: int, names: dict[int, str]) -> _Layer:
    found = _Layer()
    _collect(buf, start, end, names, found, found.rest.append)
    return found


def _collect(
    buf: Buffer, start: int, end: int, names: dict[int, str], found: _Layer, keep: Callable[[bytes], None]
) -> None:
    for number, form, at, value, stop in wire.fields(buf, start, end):
        what = names.get(number) if form == LEN or names.get(number) == "kind" else None
        if what == "blobs":
            found.blobs.append((value, stop))
            continue
        if what == "inner":  # V0: the layer proper is inside
            inner: list[bytes] = []
            _collect(buf, value, stop, _NAMES_V0, found, inner.append)
            found.type = _v0_type(found.type)
            found.old = True
            keep(wire.block(number, b"".join(inner)))
            continue
        if what == "name":
            found.name = wire.text(buf, value, stop)
        elif what == "type":
            found.type = wire.text(buf, value, stop)
        elif what == "bottom":
            found.bottoms.append(wire.text(buf, value, stop))
        elif what == "top":
            found.tops.append(wire.text(buf, value, stop))
        elif what == "kind" and form == VARINT:
            found.type = _v1_type(value)
        found.forms[number] = form
        keep(bytes(buf[at:stop]))


def _entry(buf: Buffer, found: _Layer) -> LayerBlobs:
    blobs, diffs, legacy = [], [], []
    for i, (start, end) in enumerate(found.blobs):
        try:
            blob = decode_blob(buf, start, end)
        except WireError as e:
            raise e.within(f"layer '{found.name}', blob {i}") from None
        blobs.append(blob.data)
        legacy.append(blob.legacy)
        if blob.diff is not None and blob.diff.size == blob.data.size:
            diffs.append(blob.diff)
    if len(diffs) != len(blobs):
        diffs = []
    return LayerBlobs(found.name, found.type, blobs, diffs=diffs, legacy=legacy, bottoms=found.bottoms, tops=found.tops)


def _v1_type(value: int) -> str:
    """The type string of a V1 enum value; a number nobody defined stays a number."""
    known = pb.V1LayerParameter.DESCRIPTOR.enum_types_by_name["LayerType"].values_by_number
    return V1_TYPES[known[value].name] if value in known else str(value)


def _v0_type(name: str) -> str:
    """The type string of a V0 type name; unknown ones (padding) stay as they are."""
    from caffejacinto_py.schema.upgrade_v0 import _TYPES as V0_TYPES

    return V1_TYPES.get(V0_TYPES.get(name, ""), name)


def _mark(found: _Layer, rest: bytes, marks: set[str]) -> None:
    """Note what in a layer shows the fork that wrote it."""
    forms = found.forms
    if any(forms.get(n) == VARINT for n in (145, 146, 147, 148, 149)):
        marks.add("nv")  # stamped on every layer by NVCaffe's Net::Init
    if 8403 in forms or 8404 in forms:
        marks.add("old" if uses_old_quantization(rest) else "jacinto")
    if any(n in forms for n in range(200, 208)):
        marks.add("ssd")
    if forms.get(149) == LEN and found.type.endswith("Ristretto"):
        marks.add("ristretto")
    if forms.get(147) == LEN and found.type.startswith("LP"):
        marks.add("adaption")


def _marked(head: list[bytes]) -> str | None:
    """The dialect that the file says it has (`schema.mark`)."""
    number = pb.NetParameter.DESCRIPTOR.fields_by_name["dialect"].number
    found = ""
    for data in head:
        for at, form, _, value, end in wire.fields(data, 0, len(data)):
            if at == number and form == LEN:
                found = wire.text(data, value, end)
    return found if found in DIALECTS else None


def _dialect(marks: set[str], numbers: set[int]) -> str | None:
    if "old" in marks:
        return "jacinto-0.16"
    if "jacinto" in marks or numbers & {200, 201}:
        return "jacinto"
    if "nv" in marks or numbers & set(range(11, 21)):
        return "nvcaffe"
    for name in ("ssd", "ristretto", "adaption"):
        if name in marks:
            return name
    return None
