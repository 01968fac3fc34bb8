"""`caffejacinto quantize`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from caffejacinto_py.cli import options
from caffejacinto_py.errors import UsageError

if TYPE_CHECKING:
    from caffejacinto_py.compress.search import Found, Trial
    from caffejacinto_py.engine.net import Net

# the names before Ristretto's commit fc109ba stand for those of today
_MODES = {
    "dynamic_fixed_point": "dynamic_fixed_point",
    "minifloat": "minifloat",
    "integer_power_of_2_weights": "integer_power_of_2_weights",
    "fixed_point": "dynamic_fixed_point",
    "mini_floating_point": "minifloat",
    "power_of_2_weights": "integer_power_of_2_weights",
}
_MODE = click.Choice(list(_MODES), case_sensitive=False)


@click.command()
@click.option("--search", is_flag=True, help="Search the shortest words; --trimming_mode implies it.")
@click.option("--model", type=options.FILE, help="The net, text, with an Accuracy layer in its TEST phase.")
@click.option("--weights", type=options.CommaList(), default=(), help="Its weights, comma-separated.")
@click.option("--model_quantized", type=options.FILE, help="Where the net with Ristretto's layers goes, text.")
@click.option("--trimming_mode", type=_MODE, metavar="dynamic_fixed_point|minifloat|integer_power_of_2_weights",
              help="Kind of numbers. Default: dynamic_fixed_point.")  # fmt: skip
@click.option("--iterations", type=click.IntRange(min=1), default=50, show_default=True, help="Batches for a score.")
@click.option("--error_margin", type=click.FloatRange(0, 100), default=2, show_default=True,
              help="How many points the score may fall.")  # fmt: skip
@click.option("--per-layer", is_flag=True, help="Then narrow single layers; dynamic fixed point only.")
@click.option(
    "--score", metavar="BLOB", help="Output to keep up, larger being better. Default: the strictest accuracy."
)
@click.option("--ranges", type=click.Choice(["TRAIN", "TEST"], case_sensitive=False), default="TRAIN",
              show_default=True, help="Phase whose data give the ranges.")  # fmt: skip
@click.option("--range-iterations", type=click.IntRange(min=1), default=10, show_default=True,
              help="Batches for the ranges.")  # fmt: skip
@click.option("--solver", type=options.FILE, hidden=True)
@options.state
@options.running
def command(as_json: bool, **given: Any) -> int:
    """Search the shortest words for a net: Ristretto's `quantize`.

    Scores the net, takes the ranges of each convolution and inner product from training data, and tries words of 16, 8,
    4, 2 and 1 bits for the weights of convolutions, the weights of inner products, and all activations, each on its
    own, as long as the score stays within --error_margin. Then all together: what fails is widened, the group first
    that costs least, until the whole passes. minifloat: one format for all. integer_power_of_2_weights: exponents -8 to
    -1 and 8-bit activations, or what passes in their place.

    Writes the net with layers of Ristretto; its weights stay as they are, and fine-tuning starts from them. Exit code 0
    also where nothing passes; the output says so.

    JSON: {"mode", "metric", "baseline", "score", "passed", "margin", "model_quantized", "layers": [{"name", "type",
    fields of quantization_param}], "trials": [{"step", "what", "words", "score", "passed"}]}.
    """
    if given["solver"] or not (given["search"] or given["trimming_mode"]):
        raise UsageError("quantize needs --search", hint=_instead(given["solver"]))
    for name in ("model", "weights", "model_quantized"):
        if not given[name]:
            raise UsageError(f"--search needs --{name}")
    given["trimming_mode"] = given["trimming_mode"] or "dynamic_fixed_point"
    found = _search(given, as_json)
    if as_json:
        options.print_json(found)
    return 0


def _instead(solver: Path | None) -> str:
    train = f"caffejacinto train --solver {solver}" if solver else "caffejacinto train"
    return f"for training with quantize: true in the net: `{train}`; for ranges without training: `calibrate`"


def _search(given: dict[str, Any], quiet: bool) -> dict[str, Any]:
    from caffejacinto_py.cli.running import prepare_run
    from caffejacinto_py.compress import search
    from caffejacinto_py.passes.ristretto import shorten, shortened_document
    from caffejacinto_py.schema.files import atomic_write
    from caffejacinto_py.schema.text import dumps
    from caffejacinto_py.schema.upgrade import load_net
    from caffejacinto_py.solver.feed import Feed

    target: Path = given["model_quantized"]
    _check_target(target, [given["model"], *map(Path, given["weights"])])
    log = prepare_run(given)
    doc = load_net(given["model"])
    net = _open(doc, "TEST", given, log)
    blob = search.score_blob(net.graph, given["score"])
    parts = _ranges(doc, net, given, log)
    feed = Feed(net, seed=0, workers=given["workers"])
    try:
        scorer = search.Scorer(net, feed, given["iterations"], blob, given["error_margin"])
        log.info("%s = %.6g in float32, over %d batches", blob, scorer.baseline, given["iterations"])
        scorer.told = lambda t: log.info("%s", _line(t))
        found = search.search(_MODES[given["trimming_mode"]], scorer, parts, per_layer=given["per_layer"])
    finally:
        feed.close()
    message = shortened_document(doc.message, net.graph, shorten(net.graph, found.plan))
    with atomic_write(target, "w") as f:
        f.write(dumps(message))
    types = {layer.name: layer.type for layer in message.layer}
    if not quiet:
        click.echo(_report(found, types, given["error_margin"]))
        click.echo(f"Wrote {target}")
    if not found.passed:
        log.warning("The score is more than %g points below the original: fine-tune the net.", given["error_margin"])
    elif not found.plan:
        log.warning("Nothing could be shortened within the margin; %s is the net as it was.", target)
    return _as_dict(found, types, given)


def _check_target(target: Path, inputs: list[Path]) -> None:
    from caffejacinto_py.schema.files import check_writable

    if target.is_dir():
        raise UsageError(f"--model_quantized {target}: a directory", hint=f"{target / 'quantized.prototxt'}")
    for path in inputs:
        if target.exists() and path.exists() and target.samefile(path):
            raise UsageError(f"--model_quantized {target} would replace a file that is read", hint="name another file")
    check_writable(target.parent)


def _open(doc: Any, phase: str, given: dict[str, Any], log: Any) -> Net:
    import torch

    from caffejacinto_py.cli import devices
    from caffejacinto_py.compress.calibrate import check_weights
    from caffejacinto_py.schema.dialect import resolve_dialect
    from caffejacinto_py.solver import build
    from caffejacinto_py.solver.nets import NetSource

    device = torch.device(devices.pick(given["gpu"], log=log))
    dialect = resolve_dialect(doc.message, None, given["dialect"], compat=given["compat"])
    log.info("Dialect: %s (%s)", dialect.name, dialect.reason)
    source = NetSource(doc, str(given["model"]), given["level"], given["stage"])
    made: dict[str, Any] = {"dialect": dialect, "device": device, "seed": 0, "python_layers": given["python_layers"]}
    net = build.build_net(source, phase, **made)
    if net.hook is not None:
        text = f"{given['model']}: the net quantizes by itself (quantize, or stored quantization parameters)"
        raise UsageError(text, hint="search with the float net")
    build.load_weights([net], list(given["weights"]), tolerant=dialect.ignore_shape_mismatch)
    check_weights(net)
    return net


def _ranges(doc: Any, net: Net, given: dict[str, Any], log: Any) -> Any:
    """Ranges from a net of its own, so that nothing that training passes change is scored."""
    import torch

    from caffejacinto_py.compress import search
    from caffejacinto_py.solver.feed import Feed

    torch.manual_seed(0)
    ranged = _open(doc, given["ranges"].upper(), given, log)
    feed = Feed(ranged, seed=0, workers=given["workers"])
    try:
        observer = search.watch(ranged, feed, given["range_iterations"])
    finally:
        feed.close()
    return search.find_parts(net.graph, ranged, observer)


def _line(t: Trial) -> str:
    words = ", ".join(f"{k} {v}" for k, v in t.words.items())
    return f"{t.step} ({t.what}): {words}: {t.score:.6g}{'' if t.passed else ', too low'}"


def _report(found: Found, types: dict[str, str], margin: float) -> str:
    rows = [("step", "what", "words", found.metric, "")]
    for t in found.trials:
        words = " ".join(f"{k}={v}" for k, v in t.words.items())
        rows.append((t.step, t.what, words, f"{t.score:.4f}", "" if t.passed else "too low"))
    fields = list(dict.fromkeys(f for plan in found.plan.values() for f in plan if f != "precision"))
    layers = [("layer", "type", *fields)]
    for part in found.parts:
        plan = found.plan.get(part.name, {})
        layers.append((part.name, types[part.name], *(str(plan.get(f, "-")) for f in fields)))
    verdict = f"within {margin:g} points" if found.passed else f"more than {margin:g} points lower"
    return "\n".join(
        [
            options.table(rows, "lllrl"),
            "",
            options.table(layers, "ll" + "r" * len(fields)),
            "",
            f"{found.metric}: {found.baseline:.4f} in float32, {found.score:.4f} in short words: {verdict}",
        ]
    )


def _as_dict(found: Found, types: dict[str, str], given: dict[str, Any]) -> dict[str, Any]:
    layers = [{"name": p.name, "type": types[p.name], **found.plan.get(p.name, {})} for p in found.parts]
    return {
        **{key: getattr(found, key) for key in ("mode", "metric", "baseline", "score", "passed")},
        "margin": given["error_margin"],
        "model_quantized": str(given["model_quantized"]),
        "layers": layers,
        "trials": [asdict(t) for t in found.trials],
    }
