"""`caffejacinto upgrade_net_proto_binary`."""

from __future__ import annotations

from pathlib import Path

import click

from caffejacinto_py.cli import options


@click.command()
@click.argument("input", type=options.FILE)
@click.argument("output", type=options.FILE)
def command(input: Path, output: Path) -> int:
    """Rewrite a binary net (.caffemodel) of any age in today's form.

    The blobs stay as they are; what was upgraded in the net around them is printed. OUTPUT may be INPUT.
    """
    from caffejacinto_py.cli.running import print_upgrades
    from caffejacinto_py.errors import Loc, WeightsError
    from caffejacinto_py.schema.migrate import upgrade_model
    from caffejacinto_py.schema.weights import read_model, write_model

    model = read_model(input)
    if model.version == "HDF5":
        hint = "`caffejacinto convert` makes a .caffemodel of it"
        raise WeightsError("an HDF5 file has no net in it, there is nothing to upgrade", loc=Loc(str(input)), hint=hint)
    upgraded, notices = upgrade_model(model)
    write_model(output, upgraded)
    print_upgrades(notices, output)
    return 0
