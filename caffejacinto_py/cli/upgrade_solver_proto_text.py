"""`caffejacinto upgrade_solver_proto_text`."""

from __future__ import annotations

from pathlib import Path

import click

from caffejacinto_py.cli import options


@click.command()
@click.argument("input", type=options.FILE)
@click.argument("output", type=options.FILE)
def command(input: Path, output: Path) -> int:
    """Rewrite a solver prototxt of any age in today's form.

    The enum `solver_type` becomes the string `type`, and nets inside the solver are upgraded; what was done is printed.
    OUTPUT may be INPUT. Comments are not kept.
    """
    from caffejacinto_py.cli.running import print_upgrades
    from caffejacinto_py.schema.files import atomic_write
    from caffejacinto_py.schema.read import read_text
    from caffejacinto_py.schema.text import dumps, parse
    from caffejacinto_py.schema.upgrade import upgrade_solver

    doc = parse(read_text(input, "solver"), "SolverParameter", file=str(input))
    notices = doc.notices + upgrade_solver(doc.message, doc.locs)  # without the path: no snapshot_prefix is made up
    text = dumps(doc.message)
    with atomic_write(output, "w") as file:
        file.write(text)
    print_upgrades(notices, output)
    return 0
