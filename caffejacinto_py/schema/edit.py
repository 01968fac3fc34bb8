"""Set one field of a message from text, typed by the schema: what `--set path.to.field=value` does."""

from __future__ import annotations

import re
from typing import Any

from google.protobuf import text_format

from caffejacinto_py.errors import UsageError, near

_STEP = re.compile(r"([A-Za-z_]\w*)(?:\[(-?\d{1,9})\])?(?:\.|\Z)")


def set_field(message: Any, *assignments: str) -> None:
    """Apply ``path=value`` assignments in order, in place; on an error the message is as it was.

    A repeated message is chosen by index (``layer[0].phase=TEST``) or by its name
    (``layer.conv1.param[0].lr_mult=2``; of several layers with one name all are set). A value given to a whole repeated
    field replaces all of it; ``[1, 2]`` gives several. Strings need no quotes. Raises UsageError with the nearest name
    where a part of the path is unknown.
    """
    work = type(message)()
    work.CopyFrom(message)
    for assignment in assignments:
        path, equals, value = assignment.partition("=")
        if not equals or not path.strip():
            raise UsageError(f"'{assignment}' is no assignment", hint="write path.to.field=value")
        _set(work, path.strip(), value.strip(), path.strip())
    message.CopyFrom(work)


def _set(message: Any, path: str, value: str, whole: str) -> None:
    """Walk one step of `path` in `message`; the last step assigns."""
    step = _STEP.match(path)
    if step is None:
        raise UsageError(f"--set {whole}: cannot read '{path}'", hint="write path.to.field=value")
    name, index, rest = step[1], step[2], path[step.end() :]
    known = message.DESCRIPTOR.fields_by_name
    spec = known.get(name)
    if spec is None:
        kind = message.DESCRIPTOR.name
        raise UsageError(f"--set {whole}: {kind} has no field '{name}'", hint=near(name, known))
    repeated = hasattr(getattr(message, name), "append")
    if not rest:
        _assign(message, spec, index, value, whole, repeated)
    elif spec.message_type is None:
        raise UsageError(f"--set {whole}: '{name}' is a value and has no field '{rest}'")
    elif not repeated:
        if index is not None:
            raise UsageError(f"--set {whole}: '{name}' is not repeated", hint=f"write '{name}' without [{index}]")
        _set(getattr(message, name), rest, value, whole)
    elif index is not None:
        _set(_item(getattr(message, name), name, index, whole), rest, value, whole)
    else:
        targets, rest = _by_name(getattr(message, name), name, rest, whole)
        for target in targets:
            _set(target, rest, value, whole)


def _item(items: Any, name: str, index: str, whole: str) -> Any:
    if not -len(items) <= int(index) < len(items):
        raise UsageError(f"--set {whole}: there is no '{name}[{index}]', there are {len(items)}")
    return items[int(index)]


def _by_name(items: Any, name: str, rest: str, whole: str) -> tuple[list[Any], str]:
    """The items whose `name` begins `rest`; names may hold dots, so the longest that fits wins."""
    if len(items) == 1 and "name" not in items[0].DESCRIPTOR.fields_by_name:
        return [items[0]], rest
    names = {item.name for item in items if "name" in item.DESCRIPTOR.fields_by_name and item.name}
    fits = [n for n in names if rest.startswith(n + ".")]
    if fits:
        chosen = max(fits, key=len)
        return [item for item in items if item.name == chosen], rest[len(chosen) + 1 :]
    if not names:
        raise UsageError(f"--set {whole}: there are {len(items)} '{name}'", hint=f"choose one by index: {name}[0]")
    if rest in names:
        raise UsageError(f"--set {whole}: '{name}' is a message", hint=f"write {name}.{rest}.field=value")
    wrong = rest.split(".")[0]
    raise UsageError(f"--set {whole}: no '{name}' is named '{wrong}'", hint=near(wrong, names) or f"or {name}[0]")


def _assign(message: Any, spec: Any, index: str | None, value: str, whole: str, repeated: bool) -> None:
    if index is not None and not repeated:
        raise UsageError(f"--set {whole}: '{spec.name}' is not repeated", hint=f"write '{spec.name}' without [{index}]")
    fresh = type(message)()
    text = _literal(spec, value)
    try:
        text_format.Parse(f"{spec.name}: {text}", fresh)
    except (text_format.ParseError, ValueError) as error:
        raise UsageError(f"--set {whole}={value}: {_wanted(spec)}", hint=_choice(spec, value)) from error
    if [s.name for s, _ in fresh.ListFields()] not in ([spec.name], []):
        raise UsageError(f"--set {whole}={value}: one value was expected")
    if index is None:
        message.ClearField(spec.name)
        message.MergeFrom(fresh)
        return
    held, new = getattr(message, spec.name), getattr(fresh, spec.name)
    _item(held, spec.name, index, whole)
    if len(new) != 1:
        raise UsageError(f"--set {whole}={value}: one value was expected")
    if spec.message_type is not None:
        held[int(index)].CopyFrom(new[0])
    else:
        held[int(index)] = new[0]


def _literal(spec: Any, value: str) -> str:
    """The value as text format; a bare word for a string field gets quotes."""
    bare = spec.cpp_type == spec.CPPTYPE_STRING and value[:1] not in ("'", '"', "[")
    if not bare:
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def _wanted(spec: Any) -> str:
    if spec.message_type is not None:
        return f"'{spec.name}' is a message; set one of its fields, or write {spec.name}={{ field: value }}"
    if spec.enum_type is not None:
        return f"'{spec.name}' has no such value"
    kinds = {spec.CPPTYPE_BOOL: "true or false", spec.CPPTYPE_FLOAT: "a number", spec.CPPTYPE_DOUBLE: "a number"}
    return (
        f"'{spec.name}' is {kinds.get(spec.cpp_type, 'a string' if spec.cpp_type == 9 else 'a whole number in range')}"
    )


def _choice(spec: Any, value: str) -> str | None:
    if spec.enum_type is None:
        return None
    names = list(spec.enum_type.values_by_name)
    return near(value, names) or f"one of: {', '.join(names[:12])}"
