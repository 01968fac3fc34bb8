"""Everything that is wrong with a prototxt, in the user's words: run only when the official parser refused the text."""

from __future__ import annotations

import re
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from caffejacinto_py.errors import Loc, PrototxtError, near
from caffejacinto_py.schema.foreign import FOREIGN
from caffejacinto_py.schema.pool import descriptor
from caffejacinto_py.schema.scan import Field, Lines, Problem, Scan
from caffejacinto_py.schema.v1_types import V1_TYPES

_LAYERS = ("layer", "layers")
_INT = re.compile(r"[-+]?\s*(?:0[xX][0-9a-fA-F]+|\d+)\Z")
_FLOAT = re.compile(r"-?\s*(?:(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?f?|inf(?:inity)?f?|nanf?)\Z", re.IGNORECASE)
_BOOLS = {"true", "false", "t", "f", "True", "False", "1", "0"}
_SIGNED = {FieldDescriptor.TYPE_INT32: 31, FieldDescriptor.TYPE_INT64: 63}
_UNSIGNED = {FieldDescriptor.TYPE_UINT32: 32, FieldDescriptor.TYPE_UINT64: 64}


@dataclass
class Findings:
    """What `examine` found: `errors` in order of place, and the unknown fields among them with their path."""

    errors: list[PrototxtError] = dataclass_field(default_factory=list)
    unknown: list[tuple[str, Loc, Field]] = dataclass_field(default_factory=list)
    other: list[PrototxtError] = dataclass_field(default_factory=list)  # errors that are no unknown field


def examine(scanned: Scan, text: str, message_name: str, file: str) -> Findings:
    """Check a scanned text against the schema; all errors in one go."""
    found = _Examiner(text, message_name, file)
    found.message(scanned.root, descriptor(message_name), "", None)
    if scanned.problem and not found.brace_reported:
        found.syntax(scanned.problem)
    out = found.out
    out.errors.sort(key=lambda e: e.loc or Loc(file))
    return out


class _Examiner:
    def __init__(self, text: str, message_name: str, file: str) -> None:
        self.root = descriptor(message_name)
        self.text = text
        self.lines = Lines(text, file)
        self.out = Findings()
        self.brace_reported = False
        self.swapped = False
        self.layers: list[Field] = []  # the layers we are in

    def message(self, field: Field, schema: Descriptor, path: str, name: str | None) -> None:
        """All fields of one message. `name`: the field's own name; None for the file."""
        is_layer = name in _LAYERS
        if is_layer:
            self.layers.append(field)
        known = schema.fields_by_name
        for key, group in list(field.children.items()):
            spec = known.get(key)
            if spec is None:
                self.unknown(group, key, schema, path, name)
                continue
            repeated = _is_repeated(spec)
            if len(group) > 1 and not repeated:
                where = self.lines.loc(group[0].start)
                self.bad(
                    group[1], f"'{key}' is given {len(group)} times, first in line {where.line}", "keep one of them"
                )
            for index, child in enumerate(group):
                if spec.message_type is not None:
                    if child.value is not None:
                        self.bad(child, f"'{key}' is a message, not a value", f"write '{key} {{ ... }}'")
                    else:
                        below = f"{path}{key}[{index}]." if repeated else f"{path}{key}."
                        self.message(child, spec.message_type, below, key)
                elif child.value is None:
                    self.bad(child, f"'{key}' is a value, not a message", f"write '{key}: {_example(spec)}'")
                else:
                    self.scalar(child, spec)
        if is_layer:
            self.layers.pop()

    def unknown(self, group: list[Field], key: str, schema: Descriptor, path: str, name: str | None) -> None:
        if key in _LAYERS and self.layers and group[0].value is None:
            return self.missing_brace(group)
        if name is None and self.swap(group[0], key):
            return None
        # a list is one field
        group = [c for i, c in enumerate(group) if c.whole is None or i == 0 or c.whole is not group[i - 1].whole]
        for index, child in enumerate(group):
            hint = _unknown_hint(key, schema, self.root)
            error = self.error(child, f"{_owner(name, schema)} has no field '{key}'", hint)
            self.out.errors.append(error)
            suffix = f"[{index}]" if len(group) > 1 else ""
            self.out.unknown.append((f"{path}{key}{suffix}", self.lines.loc(child.start), child))
        return None

    def missing_brace(self, group: list[Field]) -> None:
        """A layer inside a layer: report the one that was not closed, then go on as if it had been."""
        outer = self.layers[-1]
        opened = self.lines.loc(outer.start)
        self.brace_reported = True  # the end of the file then lacks one too: say it once
        text = f"a new '{group[0].name}' starts inside {_layer_name(outer) or 'the layer before'}"
        self.bad(group[0], text, f"a '}}' is missing in the layer opened at line {opened.line}", prefix=False)
        spec = self.root.fields_by_name.get(group[0].name)
        saved, self.layers = self.layers, []
        for child in group:
            if spec is not None and spec.message_type is not None:
                self.message(child, spec.message_type, f"{child.name}.", child.name)
        self.layers = saved

    def swap(self, field: Field, key: str) -> bool:
        """A top-level field of the other kind of file: one error says it all."""
        other = {"NetParameter": "SolverParameter", "SolverParameter": "NetParameter"}.get(self.root.name)
        if other is None or key not in descriptor(other).fields_by_name:
            return False
        if not self.swapped:
            self.swapped = True
            hint = (
                "this looks like a solver file: use --solver"
                if other == "SolverParameter"
                else "this looks like a net: use --model, or name it in the solver's 'net' field"
            )
            what = "a net" if other == "SolverParameter" else "a solver"
            self.bad(field, f"{what} has no field '{key}'", hint)
        return True

    def scalar(self, field: Field, spec: FieldDescriptor) -> None:
        value = field.value or ""
        quoted = value[:1] in ("'", '"')
        kind = spec.cpp_type
        if kind == FieldDescriptor.CPPTYPE_STRING:
            if not quoted:
                hint = f'quote it: {spec.name}: "{_modern_type(spec, value)}"'
                self.bad(field, f"'{spec.name}' is a string but {value} has no quotes", hint)
            else:
                self.string(field, value)
        elif kind == FieldDescriptor.CPPTYPE_ENUM:
            self.enum(field, spec, value, quoted)
        elif quoted:
            self.bad(field, f"'{spec.name}' is {_kind(spec)}, not a string", "remove the quotes")
        elif kind == FieldDescriptor.CPPTYPE_BOOL:
            if value not in _BOOLS:
                self.bad(field, f"'{spec.name}' is true or false, not {value}", near(value, ("true", "false")))
        elif kind in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
            if not _FLOAT.match(value) and not _INT.match(value):
                self.bad(field, f"'{spec.name}' is a number, not {value}")
        else:
            self.integer(field, spec, value)

    def string(self, field: Field, value: str) -> None:
        for bad in (c for c in value if "\ud800" <= c <= "\udfff"):
            self.bad(
                field,
                f"'{field.name}' holds byte 0x{ord(bad) & 0xFF:02x}, which is not UTF-8",
                "save the file as UTF-8",
            )
            return

    def enum(self, field: Field, spec: FieldDescriptor, value: str, quoted: bool) -> None:
        enum: Any = spec.enum_type
        names = list(enum.values_by_name)
        if not quoted and (value in names or (_INT.match(value) and int(value, 0) in enum.values_by_number)):
            return
        bare = value.strip("'\"")
        if quoted and bare in names:
            hint: str | None = f"remove the quotes: {spec.name}: {bare}"
        elif enum.full_name.endswith("V1LayerParameter.LayerType"):
            hint = "string types belong to 'layer {', not 'layers {'" if quoted else near(bare, names)
        else:
            hint = near(bare, names)
            if not hint or len(names) <= 8:
                hint = (hint + " " if hint else "") + f"one of: {', '.join(names)}"
        self.bad(field, f"'{spec.name}' has no value {value}", hint)

    def integer(self, field: Field, spec: FieldDescriptor, value: str) -> None:
        if not _INT.match(value):
            self.bad(field, f"'{spec.name}' is {_kind(spec)}, not {value[:40]}")
            return
        bits = _SIGNED.get(spec.type)
        low, high = (-(1 << bits), (1 << bits) - 1) if bits else (0, (1 << _UNSIGNED[spec.type]) - 1)
        digits = value.replace(" ", "").lstrip("+")
        # longer than any 64-bit literal: no need (and on some interpreters no permission) to convert it
        number = int(digits, 16 if "x" in digits.lower() else 10) if len(digits) < 30 else high + 1
        if not low <= number <= high:
            self.bad(field, f"'{spec.name}' is out of range: {value[:40]} is not in {low}..{high}")

    def syntax(self, problem: Problem) -> None:
        hint = None
        if problem.opened is not None:
            opened = self.lines.loc(problem.opened.start)
            hint = f"'{problem.opened.name}' is opened at line {opened.line}"
        elif problem.text.startswith("'}'"):
            hint = "a layer above closes too early, or this '}' is too many"
        elif "not closed on its line" in problem.text:
            hint = "a quote is missing, here or before"
        elif problem.offset == 0:
            hint = 'a prototxt starts with a field such as name: "net", or with a # comment'
        at = Field("", problem.offset)
        self.bad(at, problem.text, hint, prefix=False)

    def error(self, field: Field, text: str, hint: str | None, *, prefix: bool = True) -> PrototxtError:
        layer = _layer_name(self.layers[-1]) if prefix and self.layers else None
        return PrototxtError(f"{layer}: {text}" if layer else text, loc=self.lines.loc(field.start), hint=hint)

    def bad(self, field: Field, text: str, hint: str | None = None, *, prefix: bool = True) -> None:
        error = self.error(field, text, hint, prefix=prefix)
        self.out.errors.append(error)
        self.out.other.append(error)


def _is_repeated(spec: Any) -> bool:
    """`label` left the API in protobuf 7, `is_repeated` came in 6."""
    return spec.is_repeated if hasattr(spec, "is_repeated") else spec.label == FieldDescriptor.LABEL_REPEATED


def _layer_name(field: Field) -> str | None:
    name = field.first("name")
    return f"layer {name.value!s}".replace('"', "'") if name and name.value else None


def _owner(name: str | None, schema: Descriptor) -> str:
    if name is None:
        return {"NetParameter": "a net", "SolverParameter": "a solver"}.get(schema.name, f"a {schema.name}")
    return f"'{name}'"


def _unknown_hint(key: str, schema: Descriptor, root: Descriptor) -> str | None:
    foreign = FOREIGN.get(schema.name, {}).get(key)
    if foreign:
        return foreign
    inside = [f.name for f in schema.fields if f.message_type and key in f.message_type.fields_by_name]
    inside = [n for n in inside if not n.startswith("lp_")]
    guess = near(key, schema.fields_by_name)
    if inside and not (guess and schema.name != "LayerParameter"):
        some = ", ".join(f"'{n}'" for n in inside[:4])
        return f"'{key}' belongs inside {some}" + (" or others" if len(inside) > 4 else "")
    if guess:
        return guess
    layer = descriptor("LayerParameter").fields_by_name
    if key in layer and schema.name != "LayerParameter":
        return f"'{key}' belongs to the layer, outside this message"
    owners = [f.name for f in layer.values() if f.message_type and key in f.message_type.fields_by_name]
    return f"'{key}' is a field of '{owners[0]}'" if owners else "none of the known Caffe forks has it"


def _kind(spec: FieldDescriptor) -> str:
    if spec.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return "true or false"
    if spec.cpp_type in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
        return "a number"
    return "a whole number >= 0" if spec.type in _UNSIGNED else "a whole number"


def _example(spec: FieldDescriptor) -> str:
    if spec.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return '"..."'
    return next(iter(spec.enum_type.values_by_name)) if spec.enum_type else "..."


def _modern_type(spec: FieldDescriptor, value: str) -> str:
    """What to put between the quotes: `type: DATA` in a `layer` means "Data"."""
    if spec.full_name.endswith(".LayerParameter.type"):
        return V1_TYPES.get(value, value)
    return value
