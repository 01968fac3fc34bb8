"""Write docs/cli.md from the commands, docs/layers.md from the layer registry, docs/compat.md from the switches.

`--check`: fail where one is old.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from caffejacinto_py.cli.group import VERBS, cli
from caffejacinto_py.layers import registry
from caffejacinto_py.layers.base import Layer
from caffejacinto_py.schema import pb
from caffejacinto_py.schema.compat import SWITCHES

FOLDER = Path(__file__).parent
HEAD = """# Command line

Generated from the program by `make docs`; do not edit.

`caffejacinto VERB ...`, or `python -m caffejacinto_py VERB ...`. Options may be written `-name x`, `--name x` or
`--name=x`, with `_` or `-`, before or after the verb. Results go to stdout, logs to stderr in glog's shape. `--debug`
shows the traceback of an error.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | failed while running |
| 2 | usage |
| 3 | prototxt, weights or data invalid |
| 4 | a comparison found differences |
| 5 | another rank of the training ended or did not answer |
| 130 | stopped by Ctrl-C |

| verb | what it does |
|---|---|
"""


def generate() -> str:
    """The text of docs/cli.md. Made from the options, so that it is the same under every click."""
    parts = [HEAD + "".join(f"| [{verb}](#{verb}) | {text} |\n" for verb, text in VERBS.items())]
    parent = click.Context(cli, info_name="caffejacinto")
    for verb in VERBS:
        command = cli.get_command(parent, verb)
        assert command is not None
        parts.append(section(verb, command))
    return "".join(parts)


def section(verb: str, command: click.Command) -> str:
    """One verb: usage, help, options."""
    arguments = [p for p in command.params if isinstance(p, click.Argument)]
    words = [usage(p) for p in arguments]
    text = inspect.cleandoc(command.help or "")
    rows = [row(p) for p in command.params if isinstance(p, click.Option) and not p.hidden]
    table = "| option | value | default | |\n|---|---|---|---|\n" + "".join(rows)
    return f"\n## {verb}\n\n`{' '.join(['caffejacinto', verb, '[OPTIONS]', *words])}`\n\n{text}\n\n{table}"


def usage(argument: click.Argument) -> str:
    name = (argument.metavar or argument.name or "").upper()
    if argument.nargs == -1 and not name.endswith("..."):
        name += "..."
    return name if argument.required else f"[{name}]"


def row(option: click.Option) -> str:
    """One option as a row of the table."""
    names = ", ".join(f"`{o}`" for o in (*option.opts, *option.secondary_opts))
    if option.is_flag:
        value = ""
    elif isinstance(option.type, click.Choice):
        value = ", ".join(str(c) for c in option.type.choices)
    else:
        value = option.metavar or (
            "N" if isinstance(option.type, (click.types.IntParamType)) else option.type.name.upper()
        )
    given = option.default
    plain = isinstance(given, (str, int, float)) and not isinstance(given, bool)
    default = f"`{given}`" if plain else "required" if option.required else ""
    cells = (names, value, default, option.help or "")
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


# messages that layers have besides their own
COMMON = ("TransformationParameter", "LossParameter", "ParamSpec", "NetStateRule")
LAYERS_HEAD = """# Layers

Generated from the layer registry by `make docs`; do not edit.

Every layer type of this version, with what the class itself says: formula, bottoms and tops with their axes, blobs in
the order of a caffemodel, options, and where forks differ. *Forks*: who has the type; "all" are BVLC Caffe, NVCaffe,
caffe-jacinto, SSD, ADaPTION and Ristretto; "caffejacinto" is this program. *V1*: its name in old
`layers { type: ... }`. The fields of all parameter messages with their defaults are [below](#parameters). A field that
is listed and of no effect here is accepted all the same, so that files of every fork parse.

| type | other spellings | forks | bottoms | tops | parameters |
|---|---|---|---|---|---|
"""


def layers_page() -> str:
    """The text of docs/layers.md."""
    importlib.import_module("caffejacinto_py.layers")
    spellings: dict[type[Layer], list[str]] = {}
    for name in registry.types():
        spellings.setdefault(registry.find(name), []).append(name)
    classes = sorted(spellings, key=lambda c: (c.type.lower(), c.type))
    anchors: dict[type[Layer], str] = {}
    for cls in classes:  # of headings that differ in case only, the later ones get a number
        same = sum(a.type.lower() == cls.type.lower() for a in anchors)
        anchors[cls] = cls.type.lower() + (f"-{same}" if same else "")
    parts = [LAYERS_HEAD]
    for cls in classes:
        other = ", ".join(n for n in spellings[cls] if n != cls.type)
        cells = (
            f"[{cls.type}](#{cls.type.lower()})",
            other,
            cls.forks,
            counts(cls.bottoms),
            tops(cls),
            param_link(cls),
        )
        parts.append("| " + " | ".join(cells) + " |\n")
    parts += [layer_section(cls, spellings[cls]) for cls in classes]
    parts.append("\n# Parameters\n\nFields of the parameter messages; `repeated` ones may be given several times.\n")
    names = messages({message_of(cls.field) for cls in classes if cls.field} | set(COMMON))
    parts += [message_section(name) for name in sorted(names)]
    return "".join(parts)


def messages(names: set[str]) -> set[str]:
    """These messages and those inside them."""
    found: set[str] = set()
    todo = sorted(names)
    while todo:
        name = todo.pop()
        if name not in found and hasattr(pb, name):
            found.add(name)
            kinds = (field.message_type for field in getattr(pb, name).DESCRIPTOR.fields)
            todo += [kind.name for kind in kinds if kind is not None]
    return found


def counts(pair: tuple[int, int | None]) -> str:
    least, most = pair
    return f"{least} or more" if most is None else str(least) if least == most else f"{least} to {most}"


def tops(cls: type[Layer]) -> str:
    return "as many as bottoms" if cls.equal_counts else counts(cls.tops)


def message_of(field: str) -> str:
    return str(pb.LayerParameter.DESCRIPTOR.fields_by_name[field].message_type.name)


def param_link(cls: type[Layer]) -> str:
    return f"[{cls.field}](#{message_of(cls.field).lower()})" if cls.field else ""


def traits(cls: type[Layer]) -> Iterator[str]:
    """What the class says as data, in words."""
    if cls.loss_top:
        yield "a loss: top 0 has loss_weight 1 unless the file says otherwise"
    if cls.source:
        yield "a source: it has no bottoms and is fed with data"
    if cls.may_inplace:
        yield "works in place where that is safe"
    if cls.forbids_inplace:
        yield "top and bottom must not have one name"


def layer_section(cls: type[Layer], names: list[str]) -> str:
    """One type: facts, then its docstring."""
    other = ", ".join(f"`{n}`" for n in names if n != cls.type)
    facts = [f"forks: {cls.forks}", f"bottoms: {counts(cls.bottoms)}", f"tops: {tops(cls)}"]
    facts += [f"also written {other}"] if other else []
    facts += [f"V1: `{cls.v1}`"] if cls.v1 else []
    facts += [f"parameters: {param_link(cls)}"] if cls.field else []
    facts += list(traits(cls))
    text = inspect.cleandoc(cls.__doc__ or "")
    return f"\n## {cls.type}\n\n" + "".join(f"- {fact}\n" for fact in facts) + f"\n```text\n{text}\n```\n"


def message_section(name: str) -> str:
    """One parameter message: every field with type and default, from the schema itself."""
    rows = []
    for field in getattr(pb, name).DESCRIPTOR.fields:
        cells = (f"`{field.name}`", kind_of(field), default_of(field))
        rows.append("| " + " | ".join(cells) + " |\n")
    return f"\n## {name}\n\n| field | type | default |\n|---|---|---|\n" + "".join(rows)


def kind_of(field: Any) -> str:
    names = {1: "double", 2: "float", 3: "int64", 4: "uint64", 5: "int32", 8: "bool", 9: "string", 12: "bytes",
             13: "uint32", 17: "sint32", 18: "sint64"}  # fmt: skip
    if field.message_type is not None:
        name = field.message_type.name
        name = f"[{name}](#{name.lower()})" if hasattr(pb, name) else name
    elif field.enum_type is not None:
        name = ", ".join(v.name for v in field.enum_type.values)
    else:
        name = names[field.type]
    return f"repeated {name}" if many(field) else name


def default_of(field: Any) -> str:
    """The default that the schema declares; empty: none, the layer decides."""
    if many(field) or field.message_type is not None or not field.has_default_value:
        return ""
    value = field.default_value
    if field.enum_type is not None:
        return f"`{field.enum_type.values_by_number[value].name}`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value:.7g}`" if isinstance(value, float) else f"`{value}`"


def many(field: Any) -> bool:
    """Repeated; asked in the way that every protobuf from 4.25 on answers."""
    return isinstance(field.default_value, list)


COMPAT_HEAD = """# Compat switches

Generated from `caffejacinto_py/schema/compat.py` by `make docs`; do not edit.

Where a C++ binary computes what its documentation does not promise, or what costs accuracy, this program does the sound
thing. These switches give the binary's numbers back: `--compat SWITCH=VALUE` of the verbs that run nets (repeatable, or
with commas), `caffejacinto_py.pycaffe.set_compat(SWITCH="VALUE")` in Python. A run logs every switch that is
set. The first value is the default.

| switch | values | |
|---|---|---|
"""


def compat_page() -> str:
    """The text of docs/compat.md."""
    rows = [f"| `{name}` | {', '.join(f'`{v}`' for v in s.values)} | {s.text} |\n" for name, s in SWITCHES.items()]
    return COMPAT_HEAD + "".join(rows)


def main() -> int:
    stale = 0
    for name, text in (("cli.md", generate()), ("layers.md", layers_page()), ("compat.md", compat_page())):
        target = FOLDER / name
        if "--check" not in sys.argv[1:]:
            target.write_text(text)
        elif not target.is_file() or target.read_text() != text:
            print(f"{target} is not up to date: run `make docs`", file=sys.stderr)
            stale += 1
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
