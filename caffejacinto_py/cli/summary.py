"""`caffejacinto summary`."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from caffejacinto_py.cli import options
from caffejacinto_py.errors import PrototxtError, UsageError, near

if TYPE_CHECKING:
    from caffejacinto_py.ir.graph import Graph
    from caffejacinto_py.passes.memory import Memory


@click.command()
@click.argument("model", required=False, type=options.FILE)
@click.option("--model", "named", type=options.FILE, help="The net; the same as MODEL.")
@options.phases(default="TRAIN")
@options.state
@options.data_shape
@click.option("--memory", is_flag=True, help="Bytes instead: weights, gradients, history, and what layers keep.")
@click.option("--batch", type=click.IntRange(min=1), help="Batch size, in place of the net's.")
@click.option("--solver", type=options.FILE, help="For --memory: the solver that decides the history.  [SGD]")
@click.option("--precision", is_flag=True, help="The number types of the layers instead.")
@options.python_layers
@options.as_json
def command(
    model: Path | None,
    named: Path | None,
    phase: str,
    level: int,
    stage: tuple[str, ...],
    data_shape: tuple[int, ...] | None,
    memory: bool,
    batch: int | None,
    solver: Path | None,
    precision: bool,
    python_layers: bool,
    as_json: bool,
) -> int:
    """List the layers of a net with shapes, parameters and MACs.

    MODEL is a net, text. Data and weights are not opened. Parameters are counted once where layers share them. MACs:
    multiply-accumulates of one forward pass over the whole batch.

    --memory works from shapes, in the number types that the net asks for. SAVED is what a training pass keeps of a
    layer for its gradient, memory that layers share counted once; in phase TEST nothing is kept, and LIVE, the most
    blobs at one time, counts instead. The framework, the workspace of kernels and data that wait are not in it. See
    docs/memory.md.

    --precision: what the net asks for, by NVCaffe's rules, and what each layer runs in. See docs/precision.md.

    JSON: {"name", "phase", "data_shape" (what was assumed, or null), "layers": [{"name", "type", "bottoms", "tops",
    "shapes", "params", "macs"}], "params", "macs"}. With --memory: {"name", "phase", "data_shape", "batch", "solver"
    (its type), "history_type", "layers": [{"name", "type", "params", "tops", "saved"}], "params", "gradients",
    "history", "inputs", "saved", "live", "total"}, all in bytes. With --precision: {"name", "phase", "base",
    "layers": [{"layer", "type", "forward_type", "backward_type", "forward_math", "backward_math", "runs", "why"}],
    "notes"}.
    """
    path = model or named
    if path is None:
        raise UsageError("which net? give MODEL", hint="caffejacinto summary train_val.prototxt")
    if solver is not None and not memory:
        raise UsageError("--solver goes with --memory")
    if precision and memory:
        raise UsageError("--precision and --memory are two tables: ask for one")
    from caffejacinto_py.checking import fit
    from caffejacinto_py.passes.memory import with_batch
    from caffejacinto_py.schema.upgrade import load_net

    state: dict[str, Any] = {"phase": phase, "level": level, "stages": stage, "python_layers": python_layers}
    graph, assumed = fit(load_net(path), data_shape=data_shape, **state)
    if batch is not None:
        graph = with_batch(graph, batch)
    if precision:
        types = types_of(graph)
        options.print_json(types) if as_json else click.echo(render_types(types))
        return 0
    found = bytes_of(graph, *_solver_types(solver)) if memory else describe(graph)
    if as_json:
        options.print_json({**found, "data_shape": assumed})
    else:
        click.echo(render_bytes(found) if memory else render(found))
        if assumed:
            click.echo(f"Data is taken as {'x'.join(map(str, assumed))}; --data-shape says otherwise.")
    return 0


def _solver_types(path: Path | None) -> tuple[str, str]:
    """(type, history_type) of the solver; SGD in float32 where none is given."""
    from caffejacinto_py.passes.memory import HISTORY, HISTORY_TYPES
    from caffejacinto_py.schema.upgrade import load_solver

    if path is None:
        return "SGD", HISTORY_TYPES[0]
    doc = load_solver(path)
    kind, history = str(doc.message.type), str(doc.message.history_type)
    if kind not in HISTORY:
        text = f"the solver type '{kind}' is not known"
        raise PrototxtError(text, loc=doc.locs.find(("type",)), hint=near(kind, HISTORY))
    if history not in HISTORY_TYPES:
        text = f"the history_type '{history}' is not known"
        raise PrototxtError(text, loc=doc.locs.find(("history_type",)), hint=f"one of {', '.join(HISTORY_TYPES)}")
    return kind, history


def bytes_of(graph: Graph, solver: str = "SGD", history: str = "float32") -> dict[str, Any]:
    """The net as `summary --memory --json` prints it, without data_shape."""
    from dataclasses import asdict

    from caffejacinto_py.passes.memory import account, batch_of
    from caffejacinto_py.passes.storages import asked

    found: Memory = account(graph, solver=solver, history=history, numbers=asked(graph))
    head = {"name": graph.name, "batch": batch_of(graph), "solver": solver, "history_type": history}
    return {**head, **asdict(found), "total": found.total}


def render_bytes(found: dict[str, Any]) -> str:
    """The table of `summary --memory`."""
    rows = [("layer", "type", "params", "tops", "saved")]
    for layer in found["layers"]:
        rows.append((layer["name"], layer["type"], *(options.size(layer[k]) for k in ("params", "tops", "saved"))))
    train = found["phase"] == "TRAIN"
    rule = found["solver"] if found["history_type"] == "float32" else f"{found['solver']}, {found['history_type']}"
    lines = [
        f"{found['name'] or 'net'} ({found['phase']}), batch {found['batch']}",
        options.table(rows, "llrrr"),
        f"weights      {options.size(found['params'])}",
    ]
    if train:
        lines += [
            f"gradients    {options.size(found['gradients'])}",
            f"history      {options.size(found['history'])} ({rule})",
            f"activations  {options.size(found['saved'])} kept for backward",
        ]
    lines += [f"live         {options.size(found['live'])} at most in a forward pass"]
    return "\n".join([*lines, f"total        {options.size(found['total'])}"])


def types_of(graph: Graph) -> dict[str, Any]:
    """The net as `summary --precision --json` prints it."""
    from dataclasses import asdict

    from caffejacinto_py.passes.precision import resolve

    table = resolve(graph)
    rows = [{k: v for k, v in asdict(row).items() if k != "last"} for row in table.rows.values()]
    return {"name": graph.name, "phase": graph.phase, "base": table.base, "layers": rows, "notes": list(table.notes)}


def render_types(found: dict[str, Any]) -> str:
    """The table of `summary --precision`."""
    rows = [("layer", "type", "forward", "backward", "math", "runs in", "why")]
    for r in found["layers"]:
        math = f"{r['forward_math']}/{r['backward_math']}"
        rows.append((r["layer"], r["type"], r["forward_type"], r["backward_type"], math, r["runs"], r["why"]))
    head = f"{found['name'] or 'net'} ({found['phase']}): weights, history and inputs in {found['base']}"
    return "\n".join([head, options.table(rows, "lllllll"), *found["notes"]])


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
