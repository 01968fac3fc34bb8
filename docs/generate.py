"""Write docs/cli.md from the commands themselves. `--check`: fail if it is not up to date."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import click

from caffejacinto_py.cli.group import VERBS, cli

TARGET = Path(__file__).with_name("cli.md")
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


def main() -> int:
    text = generate()
    if "--check" in sys.argv[1:]:
        if not TARGET.is_file() or TARGET.read_text() != text:
            print(f"{TARGET} is not up to date: run `make docs`", file=sys.stderr)
            return 1
        return 0
    TARGET.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
