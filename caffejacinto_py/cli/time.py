"""`caffejacinto time`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from caffejacinto_py.cli import options, time_precision
from caffejacinto_py.errors import DataError, ManyErrors, UsageError

if TYPE_CHECKING:
    import torch

    from caffejacinto_py.engine.net import Net
    from caffejacinto_py.engine.timing import LayerTime
    from caffejacinto_py.ir.graph import Graph


@click.command()
@click.option("--model", type=options.FILE, help="The net, text.")
@click.option("--solver", type=options.FILE, help="A solver: its training net is measured.")
@click.option("--weights", type=options.CommaList(), default=(), help="Weights files, comma-separated.")
@click.option("--iterations", type=click.IntRange(min=1), default=50, show_default=True, help="Passes to average.")
@options.phases(default="TRAIN")
@options.state
@options.data_shape
@options.gpu
@options.dialect
@click.option("--precision", type=options.CommaList(), default=(), metavar="TYPE,TYPE",
              help="Number types: fp32, tf32, fp16, bf16, fp64; several: compared. See docs/precision.md.")  # fmt: skip
@options.threads
@options.python_layers
@options.log_level
@options.as_json
def command(
    model: Path | None, solver: Path | None, weights: tuple[str, ...], iterations: int, as_json: bool, **given: Any
) -> int:
    """Measure each layer's forward and backward time.

    Needs no data: where a source cannot be opened, random inputs take its place, and the log says so. Layers are
    measured one by one, the whole net as it trains (in place where legal), which takes less than the sum of the layers.
    One batch is used again and again: reading data is not part of it.

    --precision with one type: as in `train`. With several, the whole net is measured in each of them, in turns: times,
    the measured ratio to the first one, and the bytes that a pass keeps for its gradient.

    JSON: {"name", "phase", "device", "iterations", "batch", "random_inputs", "layers": [{"name", "type", "forward_ms",
    "backward_ms", "share", "macs"}], "forward_ms", "backward_ms", "total_ms", "macs", "images_per_second"}; share: of
    the time of all layers, 0 to 1.
    With several types: {"name", "phase", "device", "iterations", "batch", "random_inputs", "precisions": [{"precision",
    "runs", "forward_ms", "backward_ms", "total_ms", "ratio", "kept_bytes"}]}.
    """
    import torch

    from caffejacinto_py.cli import devices
    from caffejacinto_py.cli.running import prepare_run
    from caffejacinto_py.engine.timing import time_layers, time_net
    from caffejacinto_py.solver.build import load_weights

    if (model is None) == (solver is None):
        raise UsageError("which net? give --model or --solver, not both")
    log = prepare_run(given)
    graph, random = _graph(model, solver, given, log)
    device = devices.pick(given["gpu"], log=log)
    nets = _nets(graph, torch.device(device), given["precision"], log)
    net = next(iter(nets.values()))
    load_weights(list(nets.values()), weights, tolerant=graph.dialect.ignore_shape_mismatch)
    batch = _random_batch(net) if random else _first_batch(net)
    log.info("*** Benchmark begins ***")
    log.info("Testing for %d iterations.", iterations)
    if len(nets) > 1:
        facts = {"name": graph.name, "phase": net.phase, "batch": _batch_size(net), "random_inputs": random}
        rows = time_precision.compare(nets, batch, iterations)
        several = {**facts, "device": device, "iterations": iterations, "precisions": rows}
        options.print_json(several) if as_json else click.echo(time_precision.render(several))
        return 0
    forward, backward = time_net(net, batch, iterations)
    layers = time_layers(net, batch, iterations)
    found = _result(net, layers, forward, backward)
    found |= {"device": device, "iterations": iterations, "random_inputs": random}
    if as_json:
        options.print_json(found)
    else:
        click.echo(render(found))
    return 0


def _nets(graph: Graph, device: torch.device, names: Sequence[str], log: Any) -> dict[str, Net]:
    """The net in each of the types, with equal weights; "" is what the net says."""
    from caffejacinto_py.engine.net import Net
    from caffejacinto_py.engine.precision import DTYPES, choose

    nets = {}
    for name in names or ("",):
        table, lines = choose(graph, device, name.lower() or None)
        for line in (*table.notes, *lines):
            log.warning("%s", line)
        nets[name.lower()] = Net(graph, device=device, seed=0, dtype=DTYPES[table.base], types=table)
    return nets


def _graph(model: Path | None, solver: Path | None, given: dict[str, Any], log: Any) -> tuple[Graph, bool]:
    """The shaped graph, and whether its data could not be opened."""
    from caffejacinto_py.checking import fit
    from caffejacinto_py.data import probe
    from caffejacinto_py.passes import prepare
    from caffejacinto_py.schema.dialect import resolve_dialect
    from caffejacinto_py.schema.upgrade import load_net, load_solver
    from caffejacinto_py.solver.nets import NetFiles, train_source

    level, stages, param = given["level"], given["stage"], None
    if model is not None:
        doc: Any = load_net(model)
    else:
        opened = load_solver(str(solver))
        param = opened.message
        where = lambda *path: opened.locs.find(path)  # noqa: E731
        source = train_source(param, where, NetFiles(where), level=level or None, stages=stages)
        doc, level, stages = source.doc, source.level, source.stages
    dialect = resolve_dialect(doc.message, param, given["dialect"], compat=given["compat"])
    state = {"phase": given["phase"], "level": level, "stages": stages, "dialect": dialect}
    state["python_layers"] = given["python_layers"]
    if given["data_shape"] is None:
        try:
            graph = prepare(doc, probe=probe, **state)
            return graph, all(n.layer.source in ("input", "memory") for n in graph.nodes if n.layer.source)
        except (DataError, ManyErrors) as e:
            reason = e.errors[0] if isinstance(e, ManyErrors) else e
            if not isinstance(reason, DataError):
                raise
            log.warning("The data cannot be opened: %s", reason)
    graph, assumed = fit(doc, data_shape=given["data_shape"], **state)
    shape = f" of {'x'.join(map(str, assumed))} (--data-shape says otherwise)" if assumed else ""
    log.warning("Random inputs%s take the place of the data.", shape)
    return graph, True


def _random_batch(net: Net) -> dict[str, torch.Tensor]:
    """Normal noise for images, zeros for labels (a class that every net has)."""
    import torch

    generator = torch.Generator().manual_seed(0)
    batch = {}
    for source in net.sources:
        for name, shape in zip(source.tops, source.shapes, strict=True):
            image = len(shape) > 1 and any(d > 1 for d in shape[1:])
            batch[name] = torch.randn(shape, generator=generator) if image else torch.zeros(shape)
    return batch


def _first_batch(net: Net) -> dict[str, torch.Tensor]:
    from caffejacinto_py.solver.feed import Feed

    feed = Feed(net, seed=0)
    try:
        return feed.next()
    finally:
        feed.close()


def _result(net: Net, layers: list[LayerTime], forward: float, backward: float) -> dict[str, Any]:
    whole = sum(t.forward + t.backward for t in layers) or 1.0
    rows = []
    for t in layers:
        ins, outs = ([net.graph.shapes[v] for v in vs] for vs in (t.node.inputs, t.node.outputs))
        rows.append(
            {
                "name": t.node.name,
                "type": t.node.type,
                "forward_ms": t.forward * 1e3,
                "backward_ms": t.backward * 1e3,
                "share": (t.forward + t.backward) / whole,
                "macs": t.node.layer.macs(ins, outs),
            }
        )
    batch = _batch_size(net)
    return {
        "name": net.graph.name,
        "phase": net.phase,
        "batch": batch,
        "layers": rows,
        "forward_ms": forward * 1e3,
        "backward_ms": backward * 1e3,
        "total_ms": (forward + backward) * 1e3,
        "macs": sum(row["macs"] for row in rows),
        "images_per_second": batch / (forward + backward),
    }


def _batch_size(net: Net) -> int:
    return next((s.shapes[0][0] for s in net.sources if s.shapes and s.shapes[0]), 0)


def render(found: dict[str, Any]) -> str:
    """The table of `time` and Caffe's closing lines."""
    rows = [("layer", "type", "forward ms", "backward ms", "share", "MACs")]
    for r in found["layers"]:
        times = (f"{r['forward_ms']:.3f}", f"{r['backward_ms']:.3f}", f"{100 * r['share']:.1f}%")
        rows.append((r["name"], r["type"], *times, f"{r['macs']:,}"))
    total = found["total_ms"] * found["iterations"]
    return "\n".join(
        [
            f"{found['name'] or 'net'} ({found['phase']}), batch {found['batch']}, {found['device']}",
            options.table(rows, "llrrrr"),
            f"Average Forward pass: {found['forward_ms']:.3f} ms.",
            f"Average Backward pass: {found['backward_ms']:.3f} ms.",
            f"Average Forward-Backward: {found['total_ms']:.3f} ms ({found['images_per_second']:.1f} img/s).",
            f"Total Time: {total:.1f} ms.",
            f"MACs of a forward pass: {found['macs']:,}",
        ]
    )
