"""`caffejacinto upgrade_net_proto_text`."""

from __future__ import annotations

from pathlib import Path

import click

from caffejacinto_py.cli import options


@click.command()
@click.argument("input", type=options.FILE)
@click.argument("output", type=options.FILE)
def command(input: Path, output: Path) -> int:
    """Rewrite a net prototxt of any age in today's form.

    V0 and V1 `layers`, `input` fields, transforms inside data parameters and old BatchNorm multipliers are upgraded;
    what was done is printed. OUTPUT may be INPUT. Comments are not kept.
    """
    from caffejacinto_py.cli.running import print_upgrades
    from caffejacinto_py.schema.files import atomic_write
    from caffejacinto_py.schema.text import dumps
    from caffejacinto_py.schema.upgrade import load_net

    doc = load_net(input)
    text = dumps(doc.message)
    with atomic_write(output, "w") as file:
        file.write(text)
    print_upgrades(doc.notices, output)
    return 0
