"""`caffejacinto lowprecision`."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from caffejacinto_py.cli import options

if TYPE_CHECKING:
    from collections.abc import Sequence

    from caffejacinto_py.compress.lowprecision import LayerFormats
    from caffejacinto_py.compress.observe import Stats
    from caffejacinto_py.engine.evaluate import Score
    from caffejacinto_py.engine.net import Net


@click.command()
@click.option("--model", required=True, type=options.FILE, help="The plain net, text, with data for phase TEST.")
@click.option("--weights", required=True, type=options.CommaList(), help="Its weights files, comma-separated.")
@click.option("--output", required=True, type=options.FILE, metavar="DIR/NAME", help="Where the files go; see below.")
@click.option("--deploy", type=options.FILE, help="A deploy form of the net, to be rewritten with the same formats.")
@click.option("--bits", type=int, default=16, show_default=True, help="Bits of weights and activations, with sign.")
@click.option("--bits-weights", type=int, default=None, help="Bits of weights, instead of --bits.")
@click.option("--bits-activations", type=int, default=None, help="Bits of activations, instead of --bits.")
@click.option("--iterations", type=click.IntRange(min=1), default=10, show_default=True, help="Batches to look at.")
@click.option("--criterion", default="abs-max", show_default=True, metavar="abs-max|percentile|mse",
              help="How formats are chosen: nothing clipped; --percentile kept; least squared error.")  # fmt: skip
@click.option("--percentile", type=float, default=99.9, show_default=True, help="Of the magnitudes, for that.")
@click.option("--legacy-qmf", is_flag=True, help="ADaPTION's own rule, which takes the biases for the weights.")
@click.option("--round-bias", is_flag=True, help="Round biases too, to the format of the weights.")
@click.option("--stochastic", is_flag=True, help="Layers round stochastically.")
@click.option("--tune-iterations", type=click.IntRange(min=1), default=1000, show_default=True,
              help="max_iter of the solver.")  # fmt: skip
@options.state
@options.running
def command(model: Path, weights: tuple[str, ...], output: Path, as_json: bool, **given: Any) -> int:
    """Convert a net to the fixed-point layers of ADaPTION.

    Looks at the weights and, over --iterations test batches, at the activations, and gives every Convolution and
    InnerProduct a format: bd bits before the point (sign included), ad bits after it. Writes DIR/NAME.prototxt (the
    layers of all phases, LPAct behind each of them but the last), NAME.caffemodel (4 blobs a layer),
    NAME_solver.prototxt for fine-tuning and, with --deploy, NAME_deploy.prototxt. Prints the formats, what the
    rounding costs (SQNR in dB), the zeros among the activations (behind the ReLU) before and after it, and the outputs
    of both nets on the same batches.

    JSON: {"model", "weights", "iterations", "criterion", "outputs": [{"name", "float", "low_precision"}], "layers":
    [{"name", "type", "weights": {"bd", "ad", "max", "sqnr"}, "activations": {"layer", "bd", "ad", "max", "sqnr",
    "rounded", "zeros", "zeros_rounded"}}], "zeros", "zeros_rounded", "written"}.
    """
    from caffejacinto_py.cli.running import open_net, prepare_run
    from caffejacinto_py.compress.lowprecision import Settings, analyse
    from caffejacinto_py.solver.feed import Feed

    settings = Settings(
        bits_weights=given["bits"] if given["bits_weights"] is None else given["bits_weights"],
        bits_activations=given["bits"] if given["bits_activations"] is None else given["bits_activations"],
        criterion=given["criterion"],
        percentile=given["percentile"],
        legacy=given["legacy_qmf"],
        round_bias=given["round_bias"],
        stochastic=given["stochastic"],
    )
    settings.check()
    output = _target(output, [model, *weights, *filter(None, [given["deploy"]])])
    log = prepare_run(given)
    net = open_net(model, weights, {**given, "phase": "TEST"}, log)
    _fed(net)
    _point_at_norms(net, log)
    feed = Feed(net, seed=0, workers=given["workers"])
    try:
        formats, before = analyse(net, feed, given["iterations"], settings)
    finally:
        feed.close()
    texts = _texts(net, model, output, given, formats)
    low, zeros, after = _measure(net, texts[0], formats, given)
    written = _write(low, texts, weights, output)
    found = describe(formats, zeros, before, after)
    about = {"model": str(model), "weights": list(weights), "iterations": given["iterations"]}
    about["criterion"] = "legacy-qmf" if settings.legacy else settings.criterion
    if as_json:
        options.print_json({**about, **found, "written": written})
        return 0
    click.echo(render(found))
    click.echo(f"Wrote {', '.join(written)}")
    click.echo(f"Fine-tune: caffejacinto train --solver={output}_solver.prototxt --weights={output}.caffemodel")
    return 0


def _target(output: Path, inputs: Sequence[str | Path]) -> Path:
    """DIR/NAME of --output; none of the files it stands for may be read."""
    from caffejacinto_py.cli import outputs

    stem = outputs.stem_of(output)
    files = [_named(stem, e) for e in (".prototxt", ".caffemodel", "_solver.prototxt", "_deploy.prototxt")]
    outputs.keep_inputs(files, inputs, said=f"--output {output}")
    return stem


def _point_at_norms(net: Net, log: logging.Logger) -> None:
    """Batch norm behind a rounded convolution is better absorbed before."""
    norms = [n for n in net.graph.nodes if n.layer.quantizes == "norm"]
    if norms:
        text = (
            "layer '%s' (%s) stays as it is, behind a rounded convolution; `caffejacinto optimize` absorbs batch norm"
        )
        log.warning(text, norms[0].name, norms[0].type)


def _fed(net: Net) -> None:
    """The net must have data of its own."""
    from caffejacinto_py.errors import LayerError

    for source in net.sources:
        if source.layer.source in ("input", "memory"):
            text = f"layer '{source.node.name}' ({source.layer.type}) has no data that could be looked at"
            hint = "give --model the net with its data layers (train_val), and this one as --deploy"
            raise LayerError(text, loc=source.node.loc, hint=hint)


def _texts(
    net: Net, model: Path, output: Path, given: dict[str, Any], formats: Sequence[LayerFormats]
) -> list[tuple[Path, str]]:
    """The prototxt files to write: path and text."""
    from caffejacinto_py.compress.lp_net import rewrite, tuning_solver
    from caffejacinto_py.errors import UsageError
    from caffejacinto_py.schema.text import dumps
    from caffejacinto_py.schema.upgrade import load_net

    found = [(_named(output, ".prototxt"), dumps(rewrite(load_net(model).message, net.graph, formats)))]
    solver = tuning_solver(str(found[0][0]), str(_named(output, "_tuned")), test_iter=given["iterations"],
                           max_iter=given["tune_iterations"])  # fmt: skip
    found.append((_named(output, "_solver.prototxt"), solver))
    if given["deploy"] is not None:
        deploy = load_net(given["deploy"]).message
        missing = [f.layer for f in formats if f.layer not in {layer.name for layer in deploy.layer}]
        if missing:
            text = f"{given['deploy']} has no layer '{missing[0]}', which {model} has"
            raise UsageError(text, hint="is it a form of the same net?")
        found.append((_named(output, "_deploy.prototxt"), dumps(rewrite(deploy, net.graph, formats))))
    return found


def _measure(
    net: Net, written: tuple[Path, str], formats: Sequence[LayerFormats], given: dict[str, Any]
) -> tuple[Net, dict[str, Stats], Score]:
    """The low-precision net with the weights of the plain one, its activations and outputs on the same batches."""
    from caffejacinto_py.compress.lowprecision import watch
    from caffejacinto_py.compress.lp_net import act_name
    from caffejacinto_py.schema.dialect import resolve_dialect
    from caffejacinto_py.schema.text import parse
    from caffejacinto_py.solver import build
    from caffejacinto_py.solver.feed import Feed
    from caffejacinto_py.solver.nets import NetSource

    doc = parse(written[1], "NetParameter", file=str(written[0]))
    dialect = resolve_dialect(doc.message, None, given["dialect"] or net.graph.dialect.name, compat=given["compat"])
    source = NetSource(doc, doc.file, given["level"], given["stage"])
    more: dict[str, Any] = {"dialect": dialect, "device": net.device, "python_layers": given["python_layers"]}
    low = build.build_net(source, "TEST", seed=0, **more)
    low.load(net.model())
    names = {n.name for n in net.graph.nodes}
    places = {f.layer: f.activation if f.last or f.activation != f.layer else act_name(f.layer, names) for f in formats}
    feed = Feed(low, seed=0, workers=given["workers"])
    try:
        seen, score = watch(low, feed, given["iterations"], list(places.values()))
    finally:
        feed.close()
    return low, {name: seen[place] for name, place in places.items()}, score


def _write(low: Net, texts: Sequence[tuple[Path, str]], weights: tuple[str, ...], output: Path) -> list[str]:
    """All files, the weights last. Returns their names."""
    from caffejacinto_py.compress.lp_net import convert
    from caffejacinto_py.schema.files import atomic_write, check_writable
    from caffejacinto_py.schema.migrate import upgrade_model
    from caffejacinto_py.schema.weights import read_model, write_model
    from caffejacinto_py.solver.build import split_names

    output.parent.mkdir(parents=True, exist_ok=True)
    check_writable(output.parent)
    plain = [upgrade_model(read_model(name))[0] for name in split_names(weights)]
    for path, text in texts:
        with atomic_write(path, "w") as file:
            file.write(text)
    target = _named(output, ".caffemodel")
    write_model(target, convert(low.model(), *plain))
    return [str(path) for path, _ in texts] + [str(target)]


def _named(output: Path, ending: str) -> Path:
    return output.with_name(output.name + ending)


def describe(formats: Sequence[LayerFormats], zeros: dict[str, Stats], before: Score, after: Score) -> dict[str, Any]:
    """What was found, as `--json` prints it."""
    rows = []
    for f in formats:
        w, a = f.weight_stats, f.activation_stats
        noise = f.quality()
        act = {"layer": f.activation, "bd": f.activations.bd, "ad": f.activations.ad, "max": max(-a.min, a.max),
               "sqnr": noise[1], "rounded": not f.last, "zeros": a.sparsity,
               "zeros_rounded": zeros[f.layer].sparsity}  # fmt: skip
        weights = {"bd": f.weights.bd, "ad": f.weights.ad, "max": max(-w.min, w.max), "sqnr": noise[0]}
        rows.append({"name": f.layer, "type": f.type, "weights": weights, "activations": act})
    inner = [f for f in formats if not f.last]
    both = [(f.activation_stats.zeros, zeros[f.layer].zeros, f.activation_stats.count) for f in inner]
    count = sum(n for _, _, n in both) or 1
    outputs = [{"name": a.name, "float": a.value, "low_precision": b.value}
               for a, b in zip(before.outputs, after.outputs, strict=True)]  # fmt: skip
    shares = {"zeros": sum(a for a, _, _ in both) / count, "zeros_rounded": sum(b for _, b, _ in both) / count}
    return {"outputs": outputs, "layers": rows, **shares}


def render(found: dict[str, Any]) -> str:
    """The table, and the outputs below it (the first 20)."""
    rows = [("layer", "weights", "max", "dB", "activations", "max", "dB", "zeros %", "rounded %")]
    for layer in found["layers"]:
        w, a = layer["weights"], layer["activations"]
        form = f"Q{a['bd']}.{a['ad']}" if a["rounded"] else "-"
        rows.append((layer["name"], f"Q{w['bd']}.{w['ad']}", f"{w['max']:.4g}", _db(w["sqnr"]), form, f"{a['max']:.4g}",
                     _db(a["sqnr"]) if a["rounded"] else "-", f"{100 * a['zeros']:.2f}",
                     f"{100 * a['zeros_rounded']:.2f}"))  # fmt: skip
    rows.append(("all rounded", "", "", "", "", "", "", f"{100 * found['zeros']:.2f}",
                 f"{100 * found['zeros_rounded']:.2f}"))  # fmt: skip
    lines = [options.table(rows, "llrrlrrrr")]
    for out in found["outputs"][:20]:
        lines.append(f"{out['name']}: float {out['float']:.6g}, low precision {out['low_precision']:.6g}")
    return "\n".join(lines)


def _db(value: float) -> str:
    return f"{value:.1f}" if math.isfinite(value) else "exact"
