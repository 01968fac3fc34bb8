"""`caffejacinto calibrate`."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from caffejacinto_py.cli import options, outputs
from caffejacinto_py.errors import UsageError

if TYPE_CHECKING:
    from caffejacinto_py.compress.calibrate import Calibration, Choice, Row
    from caffejacinto_py.engine.net import Net
    from caffejacinto_py.passes.quantize import Settings
    from caffejacinto_py.schema.dialect import Dialect

METHODS = ("min-max", "percentile", "mse", "kl")
WIDTH = click.IntRange(2, 16)


def _method(name: str, **more: Any) -> Any:
    kind = click.Choice(METHODS, case_sensitive=False)
    return click.option(name, type=kind, metavar="|".join(METHODS), **more)


@click.command()
@click.option("--model", required=True, type=options.FILE, help="The float net, text.")
@click.option("--weights", required=True, type=options.CommaList(), help="Weights files, comma-separated.")
@click.option("--output-model", "--output", "output", required=True, type=options.FILE, metavar="DIR/NAME",
              help="Where DIR/NAME.prototxt and DIR/NAME.caffemodel go; DIR must be there.")  # fmt: skip
@click.option("--iterations", type=click.IntRange(min=1), default=50, show_default=True, help="Batches to observe.")
@_method("--method", default="min-max", show_default=True, help="How ranges are chosen.")
@_method("--method-weights", help="The same for weights. Default: as --method; min-max where that is kl.")
@click.option("--percentile", type=float, default=99.99, show_default=True,
              help="For the method of that name: values inside the range, in percent, above 50.")  # fmt: skip
@click.option("--bits-weights", type=WIDTH, help="Default 8, or as the net says.")
@click.option("--bits-activations", type=WIDTH, help="Default 8, or as the net says.")
@click.option("--bits-bias", type=click.IntRange(2, 32), help="Default 16, or as the net says.")
@click.option("--power2/--no-power2", default=None, help="Scales are powers of two.")
@click.option("--offset-weights/--no-offset-weights", default=None, help="Weights get an offset (asymmetric range).")
@click.option("--offset-activations/--no-offset-activations", default=None, help="Activations get one.")
@click.option("--per-channel/--no-per-channel", default=None, help="A scale for each output channel of the weights.")
@click.option("--optimize/--no-optimize", default=False, show_default=True, help="Absorb batch norm first.")
@click.option("--score/--no-score", default=True, show_default=True, help="Score the net before and after.")
@options.state
@options.running
def command(model: Path, weights: tuple[str, ...], output: Path, as_json: bool, **given: Any) -> int:
    """Choose the ranges of a quantized net from data and write it with them.

    Runs batches of the net's TEST data through the float net, chooses a range for every blob that is quantized, and
    writes the prototxt with fixed quantization parameters (quantize: true, update_quantization_param: false, a
    quantization_param in each layer) and the weights, still float. Both phases of the prototxt stay: `test` simulates
    it, `train` fine-tunes it. A net_quantization_param in the prototxt gives the defaults of the options.

    Prints each quantized blob with its range, scale, offset and signal-to-noise ratio (SQNR, dB, of that blob alone);
    then the outputs of the float and the simulated net on the same batches, as `test` with as many --iterations prints
    them.

    JSON: {"model", "weights", "method", "method_weights", "iterations", "settings", "prototxt", "caffemodel",
    "blobs": [{"layer", "kind", "index", "name", "bits", "unsigned", "low", "high", "scale", "offset", "sqnr"}],
    "score": {"float", "simulated"}}; each of the two is {"loss", "outputs": [{"name", "index", "mean"}]}. Where
    channels have their own, scale and offset are lists.
    """
    from caffejacinto_py.cli.running import prepare_run
    from caffejacinto_py.compress.calibrate import Choice, check_settings

    log = prepare_run(given)
    choice = Choice(given["method"], given["method_weights"], given["percentile"])
    files = outputs.pair(output, [model, *weights], option="--output")
    job = _Job(model, given, log)
    settings = _settings(job.settings, given)
    check_settings(settings, choice)
    job.open(weights, optimize=given["optimize"])
    score: dict[str, Any] = {}
    try:
        calibration = job.calibrate(settings, choice)
        document = job.document(calibration, settings)
        if given["score"]:
            score = job.scores(document)
    finally:
        job.close()
    job.write(document, calibration, settings, files)
    if as_json:
        options.print_json({"model": str(model), "weights": list(weights), "method": choice.method,
                            "method_weights": choice.of_weights, "iterations": given["iterations"],
                            "settings": _facts(settings), "prototxt": str(files[0]), "caffemodel": str(files[1]),
                            "blobs": [_record(row) for row in calibration.rows], "score": score or None})  # fmt: skip
        return 0
    click.echo(_table(calibration))
    if score:
        click.echo(_compare(score))
    click.echo(f"Wrote {files[0]} and {files[1]}")
    return 0


def _settings(start: Settings, given: Mapping[str, Any]) -> Settings:
    """The settings with the options that were given."""
    names = {"bits_weights": "bits_weights", "bits_activations": "bits_activations", "bits_bias": "bits_bias",
             "offset_weights": "offset_weights", "offset_activations": "offset_activations",
             "per_channel": "per_channel", "power2_weights": "power2", "power2_activations": "power2"}  # fmt: skip
    return replace(start, **{field: given[name] for field, name in names.items() if given[name] is not None})


class _Job:
    """A float net, its data, and what becomes of it."""

    def __init__(self, model: Path, given: Mapping[str, Any], log: logging.Logger) -> None:
        from caffejacinto_py.cli import devices
        from caffejacinto_py.compress.calibrate import initial_settings
        from caffejacinto_py.compress.document import float_document
        from caffejacinto_py.schema.dialect import resolve_dialect
        from caffejacinto_py.schema.upgrade import load_net
        from caffejacinto_py.solver.nets import Embedded

        self.model, self.given, self.log = model, given, log
        self.device = devices.pick(given["gpu"], log=log)
        log.info("Use %s.", "CPU" if self.device == "cpu" else self.device)
        doc = load_net(model)
        self.dialect = resolve_dialect(doc.message, None, given["dialect"], compat=given["compat"])
        log.info("Dialect: %s (%s)", self.dialect.name, self.dialect.reason)
        self.settings = initial_settings(doc.message)
        self.doc = Embedded(float_document(doc.message), doc.locs, str(model), tuple(doc.notices))
        self.feed: Any = None

    def open(self, weights: tuple[str, ...], *, optimize: bool) -> None:
        """Make the float net with its weights and its data. Raises CaffeError of every kind."""
        from caffejacinto_py.cli.optimize import report
        from caffejacinto_py.engine.net import Net
        from caffejacinto_py.passes.absorb import absorb
        from caffejacinto_py.solver import build
        from caffejacinto_py.solver.feed import Feed

        self.net = self._build(self.doc, self.dialect)
        build.load_weights([self.net], list(weights), tolerant=self.dialect.ignore_shape_mismatch)
        if not self.net.sources or any(s.layer.source in ("memory", "input") for s in self.net.sources):
            raise UsageError(f"{self.model} has no data of its own in phase TEST", hint="give it a data layer")
        self.before = self.net.graph
        if optimize:
            self.log.info("Optimizing Net %s", self.before.name)
            done = absorb(self.before, self.net.model(), shared="keep")
            report(done, self.log)
            self.net = Net(done.graph, device=self.device, seed=0)
            self.net.load(done.model)
        self.feed = Feed(self.net, seed=0, workers=self.given["workers"])

    def _build(self, doc: Any, dialect: Dialect) -> Net:
        import torch

        from caffejacinto_py.solver import build
        from caffejacinto_py.solver.nets import NetSource

        source = NetSource(doc, str(self.model), self.given["level"], self.given["stage"])
        return build.build_net(source, "TEST", dialect=dialect, device=torch.device(self.device), seed=0,
                               python_layers=self.given["python_layers"])  # fmt: skip

    def close(self) -> None:
        if self.feed is not None:
            self.feed.close()

    def calibrate(self, settings: Settings, choice: Choice) -> Calibration:
        from caffejacinto_py.compress.calibrate import calibrate, check_weights, wanted
        from caffejacinto_py.compress.observe import observe

        check_weights(self.net)
        names = wanted(self.net.graph, settings)
        self.log.info("Observing %d batches.", self.given["iterations"])
        observer = observe(self.net, self.feed, self.given["iterations"], wanted=lambda n: n.name in names)
        return calibrate(self.net, observer, settings, choice)

    def document(self, calibration: Calibration, settings: Settings) -> Any:
        from caffejacinto_py.compress.document import breaks_training, quantized_document

        message = self.doc.message
        document = quantized_document(message, self.before, self.net.graph, calibration.tables, settings)
        if self.given["optimize"]:
            broken = breaks_training(message, document, self.dialect)
            if broken is not None:
                self.log.warning("The net without what was absorbed works in phase TEST only: %s", broken)
        return document

    def scores(self, document: Any) -> dict[str, Any]:
        """Outputs of the float net, and of the written one as `test` reads it, on the batches that were observed."""
        from caffejacinto_py.compress.quantize import attach
        from caffejacinto_py.schema.dialect import resolve_dialect
        from caffejacinto_py.schema.text import dumps, parse

        doc = parse(dumps(document), "NetParameter", file=str(self.model))
        dialect = resolve_dialect(doc.message, None, self.given["dialect"], compat=self.given["compat"])
        simulated = self._build(doc, dialect)
        simulated.load(self.net.model(), ignore_shape_mismatch=dialect.ignore_shape_mismatch)
        attach(simulated)
        return {"float": self._score(self.net), "simulated": self._score(simulated)}

    def _score(self, net: Net) -> dict[str, Any]:
        from caffejacinto_py.engine.evaluate import evaluate

        self.feed.rewind()
        score = evaluate(net, self.feed, self.given["iterations"])
        outputs = [{"name": o.name, "index": o.index, "mean": o.value} for o in score.outputs]
        return {"loss": score.loss, "outputs": outputs}

    def write(self, document: Any, calibration: Calibration, settings: Settings, files: tuple[Path, Path]) -> None:
        from caffejacinto_py.compress.quantize import write_qparams
        from caffejacinto_py.schema.migrate import with_net

        net = write_qparams(self.net.graph, calibration.tables, settings=settings, fixed=True)
        outputs.write(files, document, with_net(self.net.model(), net))


def _facts(settings: Settings) -> dict[str, Any]:
    names = ("weights", "activations", "bits_weights", "bits_activations", "bits_bias", "power2_weights",
             "power2_activations", "offset_weights", "offset_activations", "per_channel", "ignored")  # fmt: skip
    return {name: getattr(settings, name) for name in names}


def _record(row: Row) -> dict[str, Any]:
    q = row.q
    return {"layer": row.layer, "kind": row.kind, "index": row.index, "name": row.name, "bits": q.bits,
            "unsigned": q.unsigned, "low": _edge(q.min, min), "high": _edge(q.max, max), "scale": _plain(q.scale),
            "offset": _plain(q.offset), "sqnr": row.sqnr}  # fmt: skip


def _plain(value: Any) -> Any:
    return value.flatten().tolist() if hasattr(value, "flatten") else float(value)


def _edge(value: Any, choose: Any) -> float:
    """Of the whole blob."""
    plain = _plain(value)
    return choose(plain) if isinstance(plain, list) else plain


def _table(calibration: Calibration) -> str:
    head = ("layer", "blob", "bits", "low", "high", "scale", "offset", "SQNR dB")
    rows = [head]
    for row in calibration.rows:
        r = _record(row)
        blob = f"top {row.name}" if row.kind == "output" else row.kind
        bits = f"{r['bits']}{'u' if r['unsigned'] else 's'}"
        rows.append((row.layer, blob, bits, f"{r['low']:.5g}", f"{r['high']:.5g}", _span(r["scale"]),
                     _span(r["offset"]), _decibels(row.sqnr)))  # fmt: skip
    return options.table(rows, "llrrrrrr")


def _decibels(value: float) -> str:
    """ "-": a blob of zeros."""
    return "-" if math.isnan(value) else "exact" if math.isinf(value) else f"{value:.1f}"


def _span(value: Any) -> str:
    """One number, or from the least to the largest of several."""
    if not isinstance(value, list):
        return f"{value:.5g}"
    low, high = min(value), max(value)
    return f"{low:.4g}" if low == high else f"{low:.4g}..{high:.4g}"


def _compare(score: Mapping[str, Any]) -> str:
    from caffejacinto_py.solver.logs import number

    rows = [("output", "float", "simulated", "difference")]
    for a, b in zip(score["float"]["outputs"], score["simulated"]["outputs"], strict=True):
        rows.append((a["name"], number(a["mean"]), number(b["mean"]), f"{b['mean'] - a['mean']:+.6g}"))
    a, b = score["float"]["loss"], score["simulated"]["loss"]
    rows.append(("(loss)", number(a), number(b), f"{b - a:+.6g}"))
    return options.table(rows, "lrrr")
