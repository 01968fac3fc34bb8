"""`caffejacinto summary`."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from caffejacinto_py.cli import options
from caffejacinto_py.errors import UsageError

if TYPE_CHECKING:
    from caffejacinto_py.ir.graph import Graph


@click.command()
@click.argument("model", required=False, type=options.FILE)
@click.option("--model", "named", type=options.FILE, help="The net; the same as MODEL.")
@options.phases(default="TRAIN")
@options.state
@options.data_shape
@options.python_layers
@options.as_json
def command(
    model: Path | None,
    named: Path | None,
    phase: str,
    level: int,
    stage: tuple[str, ...],
    data_shape: tuple[int, ...] | None,
    python_layers: bool,
    as_json: bool,
) -> int:
    """List the layers of a net with shapes, parameters and MACs.

    MODEL is a net, text. Data and weights are not opened. Parameters are counted once where layers share them. MACs:
    multiply-accumulates of one forward pass over the whole batch.

    JSON: {"name", "phase", "data_shape" (what was assumed, or null), "layers": [{"name", "type", "bottoms", "tops",
    "shapes", "params", "macs"}], "params", "macs"}.
    """
    path = model or named
    if path is None:
        raise UsageError("which net? give MODEL", hint="caffejacinto summary train_val.prototxt")
    from caffejacinto_py.checking import fit
    from caffejacinto_py.schema.upgrade import load_net

    state: dict[str, Any] = {"phase": phase, "level": level, "stages": stage, "python_layers": python_layers}
    graph, assumed = fit(load_net(path), data_shape=data_shape, **state)
    found = describe(graph)
    if as_json:
        options.print_json({**found, "data_shape": assumed})
    else:
        click.echo(render(found))
        if assumed:
            click.echo(f"Data is taken as {'x'.join(map(str, assumed))}; --data-shape says otherwise.")
    return 0


def describe(graph: Graph) -> dict[str, Any]:
    """The net as `summary --json` prints it, without data_shape."""
    own: dict[str, int] = {}
    for p in graph.params:
        own[p.node] = own.get(p.node, 0) + prod(p.shape)
    layers: list[dict[str, Any]] = []
    for n in graph.nodes:
        ins, outs = [graph.shapes[v] for v in n.inputs], [graph.shapes[v] for v in n.outputs]
        layers.append(
            {
                "name": n.name,
                "type": n.type,
                "bottoms": [v.name for v in n.inputs],
                "tops": [v.name for v in n.outputs],
                "shapes": outs,
                "params": own.get(n.name, 0),
                "macs": 0 if n.layer.source else n.layer.macs(ins, outs),
            }
        )
    totals = {key: sum(int(layer[key]) for layer in layers) for key in ("params", "macs")}
    return {"name": graph.name, "phase": graph.phase, "layers": layers, **totals}


def render(found: dict[str, Any]) -> str:
    """The table of `summary`."""
    rows = [("layer", "type", "output shape", "params", "MACs")]
    for layer in found["layers"]:
        shapes = ", ".join("x".join(map(str, s)) or "scalar" for s in layer["shapes"])
        rows.append((layer["name"], layer["type"], shapes, f"{layer['params']:,}", f"{layer['macs']:,}"))
    rows.append(("total", f"{len(found['layers'])} layers", "", f"{found['params']:,}", f"{found['macs']:,}"))
    return f"{found['name'] or 'net'} ({found['phase']})\n" + options.table(rows, "lllrr")
