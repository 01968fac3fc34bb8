"""`caffejacinto test`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from caffejacinto_py.cli import options

if TYPE_CHECKING:
    import logging

    from caffejacinto_py.cli.scoring import Run
    from caffejacinto_py.compress.sparsity import Row


@click.command()
@click.option("--model", required=True, type=options.FILE, help="The net, text.")
@click.option("--weights", required=True, type=options.CommaList(), help="Weights files, comma-separated.")
@click.option("--iterations", type=click.IntRange(min=1), default=50, show_default=True, help="Batches to score.")
@click.option("--display-sparsity", is_flag=True, help="List the zeros in the weights of every convolution.")
@click.option("--optimize-net", is_flag=True, help="Absorb batch norm first, as `optimize` does.")
@click.option("--output-model", type=options.FILE, metavar="DIR/NAME",
              help="Write the tested net: DIR/NAME.prototxt, quantization included, and .caffemodel.")  # fmt: skip
@click.option("--report", type=options.FILE, metavar="DIR", help="Write DIR/report.json and DIR/report.html.")
@options.phases(default="TEST")
@options.state
@options.gpu
@options.dialect
@options.precision
@options.workers
@options.threads
@options.python_layers
@options.log_level
@options.as_json
def command(model: Path, weights: tuple[str, ...], iterations: int, display_sparsity: bool, optimize_net: bool,
            output_model: Path | None, report: Path | None, as_json: bool, **given: Any) -> int:  # fmt: skip
    """Score a net on its test data.

    Prints the mean of every output over the batches; the value of each batch goes to the log. A classifier (its scores
    go into Accuracy or SoftmaxWithLoss) also gets top-1 and top-5 where the net does not count them itself. A net with
    quantize: true is simulated.

    --report: layer by layer zeros in weights and activations, ranges, scales and signal to quantization noise; a
    simulated net is compared with itself in float on the same batches. The page needs nothing but a browser.

    JSON: {"model", "weights", "phase", "iterations", "images", "seconds", "loss", "outputs": [{"name", "index", "mean",
    "loss_weight", "per_iteration"}], "ranks": [{"scores", "k", "output", "value"}], "simulated"}; `index` counts the
    elements of all outputs. With --display-sparsity "sparsity": {"zeros", "count", "fraction", "layers"}, with
    --report "float": {"loss", "outputs", "ranks"} of a simulated net.
    """
    from caffejacinto_py.cli import outputs, scoring
    from caffejacinto_py.cli.running import open_net, prepare_run
    from caffejacinto_py.compress import sparsity
    from caffejacinto_py.solver.feed import Feed

    log = prepare_run(given)
    files = outputs.pair(output_model, [model, *weights]) if output_model is not None else None
    net, absorbed = open_net(model, weights, given, log), None
    if report is not None:
        _make_folder(report)
    if optimize_net:
        net, absorbed = scoring.absorb_into(net, log)
    run = scoring.make_run(net, measured=report is not None, absorbed=absorbed)
    feed = Feed(run.runner, seed=0, workers=given["workers"])
    try:
        scoring.score(run, feed, iterations, log)
    finally:
        feed.close()
    sparse = sparsity.measure(net) if display_sparsity or report is not None else []
    if display_sparsity:
        log.info("Sparsity of the test net:")
        for line in sparsity.lines(sparse):
            log.info("%s", line)
    facts = {"net": net.graph.name, "model": str(model), "weights": list(weights), "phase": net.phase,
             "iterations": iterations, "images": run.images}  # fmt: skip
    if report is not None:
        _report(run, facts, sparse, report, log)
    if files is not None:
        _dump(run, files, log)
    if as_json:
        options.print_json({**facts, "seconds": run.seconds, **_record(run), **_zeros(display_sparsity, sparse)})
    else:
        _print(run, sparse if display_sparsity else None)
    return 0


def _make_folder(folder: Path) -> None:
    from caffejacinto_py.errors import CaffeError
    from caffejacinto_py.schema.files import check_writable

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise CaffeError(f"--report {folder}: {e.strerror}", hint="name a folder that can be made") from e
    check_writable(folder)


def _record(run: Run) -> dict[str, Any]:
    """The scores for JSON."""
    from caffejacinto_py.compress import quantize

    assert run.scores is not None
    rows = [
        {"name": o.name, "index": o.index, "mean": o.value, "loss_weight": o.loss_weight,
         "per_iteration": o.per_iteration}
        for o in run.scores.outputs
    ]  # fmt: skip
    found = {"loss": run.scores.loss, "outputs": rows, "ranks": _ranks(run, run.scores.ranks)}
    found["simulated"] = quantize.find(run.net) is not None
    if run.exact is not None:
        means = [{"name": o.name, "index": o.index, "mean": o.value} for o in run.exact.outputs]
        found["float"] = {"loss": run.exact.loss, "outputs": means, "ranks": _ranks(run, run.exact.ranks)}
    return found


def _ranks(run: Run, values: Any) -> list[dict[str, Any]]:
    pairs = zip(run.ranks, values, strict=True)
    return [{"scores": t.scores, "k": t.k, "output": None if t.added else t.output, "value": v} for t, v in pairs]


def _zeros(wanted: bool, sparse: list[Row]) -> dict[str, Any]:
    from caffejacinto_py.compress import sparsity

    if not wanted:
        return {}
    end = sparsity.total(sparse)
    layers = [{"name": r.name, "zeros": r.zeros, "count": r.count} for r in sparse]
    return {"sparsity": {"zeros": end.zeros, "count": end.count, "fraction": end.fraction, "layers": layers}}


def _print(run: Run, sparse: list[Row] | None) -> None:
    from caffejacinto_py.compress import sparsity
    from caffejacinto_py.solver.logs import number

    assert run.scores is not None
    click.echo(f"Loss: {number(run.scores.loss)}")
    for o in run.scores.outputs:
        weighted = f" (* {number(o.loss_weight)} = {number(o.loss_weight * o.value)} loss)" if o.loss_weight else ""
        click.echo(f"{o.name} = {number(o.value)}{weighted}")
    for t, value in zip(run.ranks, run.scores.ranks, strict=True):
        if t.added:
            click.echo(f"{t.output} = {number(value)}")
    if sparse is not None:
        end = sparsity.total(sparse)
        click.echo(f"Zero weights: {end.zeros} of {end.count} ({100 * end.fraction:.3g} %)")
    if run.exact is not None:
        rows = [("output", "float", "simulated", "difference")]
        pairs = list(zip(run.exact.outputs, run.scores.outputs, strict=True))
        values = [(b.name, a.value, b.value) for a, b in pairs]
        ranked = zip(run.ranks, run.exact.ranks, run.scores.ranks, strict=True)
        values += [(t.output, a, b) for t, a, b in ranked if t.added]
        rows += [(name, number(a), number(b), f"{b - a:+.4g}") for name, a, b in values]
        click.echo(options.table(rows, "lrrr"))


def _report(run: Run, facts: dict[str, Any], sparse: list[Row], folder: Path, log: logging.Logger) -> None:
    from caffejacinto_py.compress import report_html

    assert run.meter is not None
    assert run.scores is not None
    exact = run.exact
    rows = [
        {"name": o.name, "index": o.index, "mean": o.value, "loss_weight": o.loss_weight,
         "float": exact.outputs[i].value if exact else None}
        for i, o in enumerate(run.scores.outputs)
    ]  # fmt: skip
    ranks = [
        {"scores": t.scores, "k": t.k, "value": run.scores.ranks[i], "float": exact.ranks[i] if exact else None}
        for i, t in enumerate(run.ranks)
    ]
    dialect = run.net.graph.dialect
    more: dict[str, Any] = {"dialect": dialect.name, "compat": dialect.compat.changed()}
    if run.absorbed is not None:
        more["absorbed"] = [m.node for m in run.absorbed.merged]
    if run.exact is not None:
        more["quantization"] = _settings(run)
    found = run.meter.report({**facts, **more}, sparse, outputs=rows, ranks=ranks)
    for file in report_html.write(found, folder):
        log.info("Wrote %s", file)


def _settings(run: Run) -> dict[str, Any]:
    """How the net is quantized, for people."""
    from caffejacinto_py.passes.quantize import settings_of

    s = settings_of(run.net.graph.proto)
    return {"bits of weights": s.bits_weights, "bits of activations": s.bits_activations, "bits of biases": s.bits_bias,
            "powers of two": s.power2_weights and s.power2_activations, "fixed": not s.update}  # fmt: skip


def _dump(run: Run, files: tuple[Path, Path], log: logging.Logger) -> None:
    """Write the net as it was tested. A sound simulation is written with its ranges fixed, so that a test of the files
    gives the same; the binary's way of saving leaves them open."""
    from caffejacinto_py.cli import outputs
    from caffejacinto_py.compress import quantize
    from caffejacinto_py.ir.emit import emit
    from caffejacinto_py.schema.mark import mark

    net = run.net
    fixed = net.graph.dialect.compat.quantization == "sound"
    message = quantize.dump(net, fixed=fixed)
    for kind, file in zip(("prototxt", "caffemodel"), files, strict=True):
        log.info("Snapshotting tested %s to file %s", kind, file)
    outputs.write(files, mark(emit(net.graph), net.graph.dialect.name) if message is None else message, net.model())
