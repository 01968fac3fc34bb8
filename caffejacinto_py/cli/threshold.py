"""`caffejacinto threshold`."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from caffejacinto_py.cli import devices, options
from caffejacinto_py.errors import UsageError

if TYPE_CHECKING:
    import torch

    from caffejacinto_py.compress.sparsity import Fractions, Limits, Pruned, Weight
    from caffejacinto_py.ir.graph import Graph
    from caffejacinto_py.schema.modelfile import ModelFile

_FRACTIONS = {"low": 0.4, "mid": 0.8, "high": 0.9}
_MAXRATIO, _VALUE_MAX, _STEP = 1e-3, 1e-4, 1e-8
_SHARE = click.FloatRange(0, 1)
_POSITIVE = click.FloatRange(min=0)
_FORMATS = {".caffemodel": "binaryproto", ".h5": "hdf5", ".hdf5": "hdf5"}


@click.command()
@click.option("--model", required=True, type=options.FILE, help="The net, text.")
@click.option("--weights", required=True, type=options.FILE, help="Its weights.")
@click.option("--output", type=options.FILE,
              help="NAME.caffemodel (or .h5): the weights alone; NAME or NAME.prototxt: NAME.prototxt and "
              "NAME.caffemodel.  [default: WEIGHTS_threshold.caffemodel]")  # fmt: skip
@click.option("--threshold_fraction_low", "low", type=_SHARE,
              help="Zeros wanted where input or output channels are fewer than 32.  [default: 0.4]")  # fmt: skip
@click.option("--threshold_fraction_mid", "mid", type=_SHARE, help="Zeros wanted elsewhere.  [default: 0.8]")
@click.option("--threshold_fraction_high", "high", type=_SHARE,
              help="Zeros wanted from 256 input and 512 output channels on.  [default: 0.9]")  # fmt: skip
@click.option("--threshold_value_maxratio", "maxratio", type=_POSITIVE,
              help="No threshold above this times max |w|.  [default: 0.001; with --target: none]")  # fmt: skip
@click.option("--threshold_value_max", "value_max", type=_POSITIVE,
              help="No threshold above this.  [default: 0.0001; with --target: none]")  # fmt: skip
@click.option("--threshold_step_factor", "step", type=click.FloatRange(0, 1, min_open=True), default=_STEP,
              show_default=True, help="Grid of the thresholds, relative to the largest weight.")  # fmt: skip
@click.option("--target", type=click.FloatRange(0, 1, max_open=True),
              help="Find the thresholds: this share of all counted weights shall be zero.")  # fmt: skip
@click.option("--per-channel", is_flag=True, help="A threshold for each output channel instead of each layer.")
@click.option("--layer-type", "also", multiple=True, metavar="TYPE",
              help="Treat layers of this type too, such as InnerProduct; repeatable.")  # fmt: skip
@options.state
@options.gpu
@options.dialect
@options.data_shape
@options.python_layers
@options.log_level
@options.as_json
def command(model: Path, weights: Path, output: Path | None, as_json: bool, **given: Any) -> int:
    """Set small weights of convolutions to zero, in a weights file.

    Convolutions take part that have a kernel above 2x2, at least 32 input or output channels, and are not depthwise.
    Counted are the weights of all convolutions but one right before a softmax. The usual limits of the threshold are
    those of caffe-jacinto's tool and so low that few weights become zero: give --target, or both limits.

    JSON: {"model", "weights", "output": [paths], "per_channel", "fractions": {"low", "mid", "high"}, "layers":
    [{"name", "class" (low, mid, high, or null: left alone), "ni", "no", "max" (largest magnitude before), "threshold"
    ([smallest, largest] of its channels), "before", "after" (zeros), "count", "counted"}], "before", "after", "count"
    (of the counted layers, shared weights once)}.
    """
    from caffejacinto_py.cli import outputs
    from caffejacinto_py.cli.optimize import open_graph
    from caffejacinto_py.compress import sparsity
    from caffejacinto_py.schema.mark import mark
    from caffejacinto_py.schema.upgrade import load_net
    from caffejacinto_py.solver import logs

    logs.setup(given["log_level"])
    log = logging.getLogger(logs.LOGGER)
    limits, fractions = _settings(given)
    files = _files(output or weights.with_name(f"{weights.stem}_threshold.caffemodel"))
    outputs.keep_inputs(files, [model, weights], said=f"--output {output}")
    device = devices.pick(given["gpu"].split(",")[0] if given["gpu"] else None, log=log)
    doc = load_net(model)
    graph = open_graph(doc, given, log)
    stored = _read(weights, log)
    tensors = _tensors(graph, stored, given["also"], device)
    found = sparsity.find(graph, tensors, also=given["also"])
    if given["target"] is not None:
        fractions = sparsity.aim(found, given["target"], limits, per_channel=given["per_channel"])
    done = sparsity.prune(found, fractions, limits, per_channel=given["per_channel"])
    rows = sparsity.count([w for w in found if w.counted])
    for line in (*sparsity.prune_lines(done, per_channel=given["per_channel"]), *sparsity.lines(rows)):
        log.info("%s", line)
    _put(stored, tensors)
    _write(files, stored, mark(doc.message, graph.dialect.name))
    result = _result(done, fractions)
    if as_json:
        names = {"model": str(model), "weights": str(weights), "output": [str(f) for f in files]}
        options.print_json({**names, "per_channel": given["per_channel"], **result})
    else:
        click.echo(_render(result))
        click.echo(f"Wrote {' and '.join(str(f) for f in files)}")
    return 0


def _settings(given: dict[str, Any]) -> tuple[Limits, Fractions]:
    """What the options say, with the defaults of the mode."""
    from caffejacinto_py.compress.sparsity import Fractions, Limits

    for name, value in given.items():
        if isinstance(value, float) and math.isnan(value):
            raise UsageError(f"--{'target' if name == 'target' else 'threshold_...'}: nan is no number to aim at")
    chosen = [name for name in _FRACTIONS if given[name] is not None]
    aiming = given["target"] is not None
    if aiming and chosen:
        text = f"give --target or --threshold_fraction_{chosen[0]}, not both"
        raise UsageError(text, hint="--target finds the fractions itself")
    defaults = {"maxratio": 1.0 if aiming else _MAXRATIO, "value_max": math.inf if aiming else _VALUE_MAX}
    values = {name: default if given[name] is None else given[name] for name, default in defaults.items()}
    wanted = {name: default if given[name] is None else given[name] for name, default in _FRACTIONS.items()}
    return Limits(**values, step=given["step"]), Fractions(**wanted)


def _files(output: Path) -> list[Path]:
    """What will be written: weights alone, or weights and net. Raises CaffeError where they cannot be."""
    from caffejacinto_py.schema.files import check_writable

    if output.is_dir():
        raise UsageError(f"--output {output}: this is a directory", hint=f"name a file: {output}/sparse.caffemodel")
    check_writable(output.parent)
    if output.suffix.lower() in _FORMATS:
        return [output]
    stem = output.with_suffix("") if output.suffix.lower() == ".prototxt" else output
    return [stem.with_name(stem.name + ".caffemodel"), stem.with_name(stem.name + ".prototxt")]


def _read(weights: Path, log: logging.Logger) -> ModelFile:
    from caffejacinto_py.schema.migrate import upgrade_model
    from caffejacinto_py.schema.weights import read_model

    model = read_model(weights)
    if model.old:
        model, notices = upgrade_model(model)
        for notice in notices:
            log.info("%s", notice)
    return model


def _tensors(graph: Graph, stored: ModelFile, also: Sequence[str], device: str) -> dict[str, torch.Tensor]:
    """Blob 0 of every layer that takes part, float32, by layer name; users of a shared weight get its owner's tensor.

    Raises WeightsError for what is missing, of another shape or no number.
    """
    import numpy as np
    import torch

    from caffejacinto_py.compress import sparsity
    from caffejacinto_py.errors import WeightsError, near
    from caffejacinto_py.schema.weights import shapes_match

    nodes = {n.name: n for n in graph.nodes if sparsity.takes_part(graph, n, also) is not None}
    kinds = {n.type for n in graph.nodes if sparsity.prunable(graph, n) is not None}
    for kind in also:
        if kind not in kinds:
            text = f"--layer-type {kind}: the net has no layer of this type with weights that can be made sparse"
            raise UsageError(text, hint=near(kind, kinds))
    entries = {entry.name: entry for entry in stored.layers}
    found: dict[str, torch.Tensor] = {}
    for p in graph.params:
        users = [name for name, index in p.users if index == 0 and name in nodes]
        if not users:
            continue
        entry = entries.get(p.node)
        if entry is None or not entry.blobs or entry.blobs[0] is None:
            hint = near(p.node, entries) or "is this the file of this net?"
            raise WeightsError(f"{stored.path} has no weights for layer '{p.node}'", hint=hint)
        array = entry.blobs[0]
        if not shapes_match(array.shape, bool(entry.legacy and entry.legacy[0]), p.shape):
            text = f"{stored.path}: layer '{p.node}': shape {array.shape} in the file, {p.shape} in the net"
            raise WeightsError(text, hint="is this the file of this net? For other input sizes: --data-shape")
        if not np.isfinite(array).all():
            bad = int((~np.isfinite(array)).sum())
            text = f"{stored.path}: layer '{p.node}': {bad} of {array.size} weights are NaN or infinite"
            raise WeightsError(text, hint="the training diverged: use an earlier snapshot")
        tensor = torch.from_numpy(np.array(array, np.float32)).reshape(p.shape).to(device)
        found |= dict.fromkeys(users, tensor)
    return found


def _put(stored: ModelFile, tensors: dict[str, torch.Tensor]) -> None:
    """Weights back into the file's layers, in their shape and type there."""
    for entry in stored.layers:
        if entry.name in tensors and entry.blobs and entry.blobs[0] is not None:
            old = entry.blobs[0]
            entry.blobs[0] = tensors[entry.name].cpu().numpy().reshape(old.shape).astype(old.dtype)


def _write(files: list[Path], stored: ModelFile, net: Any) -> None:
    from caffejacinto_py.schema.files import atomic_write
    from caffejacinto_py.schema.text import dumps
    from caffejacinto_py.schema.weights import write_model

    text = dumps(net)
    write_model(files[0], stored, format=_FORMATS[files[0].suffix.lower()])
    for path in files[1:]:
        with atomic_write(path, "w") as f:
            f.write(text)


def _result(done: Sequence[Pruned | Weight], fractions: Fractions) -> dict[str, Any]:
    """What `--json` prints of the layers."""
    from caffejacinto_py.compress.sparsity import Pruned, distinct

    layers: list[dict[str, Any]] = []
    weights = [one.weight if isinstance(one, Pruned) else one for one in done]
    for one, w in zip(done, weights, strict=True):
        zeros = int((w.param == 0).sum())
        row: dict[str, Any] = {"name": w.name, "class": w.kind, "ni": w.sizes.ni, "no": w.sizes.no,
                               "max": float(w.param.abs().max()), "threshold": None, "before": zeros, "after": zeros,
                               "count": w.param.numel(), "counted": w.counted}  # fmt: skip
        if isinstance(one, Pruned):
            t = one.found
            row.update(max=float(t.largest.max()), threshold=[float(t.value.min()), float(t.value.max())],
                       before=one.before, after=one.after)  # fmt: skip
        layers.append(row)
    once = {w.name for w in distinct(w for w in weights if w.counted)}
    totals = {key: sum(r[key] for r in layers if r["name"] in once) for key in ("before", "after", "count")}
    return {"fractions": fractions._asdict(), "layers": layers, **totals}


def _render(result: dict[str, Any]) -> str:
    """The table on stdout."""
    rows: list[tuple[str, ...]] = [
        ("layer", "class", "ni", "no", "max |w|", "threshold", "weights", "zero before", "after")
    ]
    for r in result["layers"]:
        low, high = r["threshold"] or (None, None)
        between = "" if low is None else f"{low:.4g}" if low == high else f"{low:.4g}..{high:.4g}"
        name = r["name"] if r["counted"] else r["name"] + " (not counted)"
        share = [f"{r[key] / r['count']:.3f}" for key in ("before", "after")]
        sizes = (str(r["ni"]), str(r["no"]), f"{r['max']:.4g}", between, f"{r['count']:,}")
        rows.append((name, r["class"] or "-", *sizes, *share))
    count = max(result["count"], 1)
    share = [f"{result[key] / count:.3f}" for key in ("before", "after")]
    rows.append(("total", "", "", "", "", "", f"{result['count']:,}", *share))
    return options.table(rows, "llrrrrrrr")
