"""`caffejacinto draw_net`."""

from __future__ import annotations

from pathlib import Path

import click

from caffejacinto_py.cli import options


@click.command()
@click.argument("model", type=options.FILE)
@click.argument("output", type=options.FILE)
@click.option("--rankdir", type=click.Choice(["LR", "RL", "TB", "BT"]), default="LR", show_default=True,
              help="Direction of the picture.")  # fmt: skip
@options.phases("ALL", default="ALL")
@click.option("--display-lrm", is_flag=True, help="Show the learning-rate multipliers of each layer.")
def command(model: Path, output: Path, rankdir: str, phase: str, display_lrm: bool) -> int:
    """Draw a net: DOT text, or a picture where Graphviz is installed.

    The ending of OUTPUT decides the kind: .dot and .gv are text and need nothing else; .png, .svg, .pdf and the other
    kinds that Graphviz knows need its program `dot`.
    """
    from caffejacinto_py.export.dot import render, to_dot
    from caffejacinto_py.schema.files import atomic_write
    from caffejacinto_py.schema.upgrade import load_net

    kind = output.suffix.lstrip(".").lower() or "dot"
    net = load_net(model, unknown="collect").message
    text = to_dot(net, rankdir, phase=None if phase == "ALL" else phase, display_lrm=display_lrm)
    picture = render(text, kind)
    with atomic_write(output) as file:
        file.write(picture)
    click.echo(f"Wrote {output}")
    return 0
