"""`caffejacinto optimize`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from caffejacinto_py.cli import options

if TYPE_CHECKING:
    from caffejacinto_py.compress.verify import Difference
    from caffejacinto_py.ir.graph import Graph
    from caffejacinto_py.passes.absorb import Absorbed
    from caffejacinto_py.schema.weights import ModelFile


@click.command()
@click.option("--model", required=True, type=options.FILE, help="The net, text.")
@click.option("--weights", required=True, type=options.CommaList(), help="Weights files, comma-separated.")
@click.option("--output-model", "--output", "output", required=True, type=options.FILE, metavar="DIR/NAME",
              help="Where DIR/NAME.prototxt and DIR/NAME.caffemodel go.")  # fmt: skip
@click.option(
    "--keep-identity", is_flag=True, help="Keep what was absorbed as layers that change nothing, as Caffe does."
)
@click.option(
    "--keep-shared", is_flag=True, help="Keep what stands before or behind shared weights, instead of an error."
)
@click.option(
    "--verify/--no-verify", default=True, show_default=True, help="Run both nets on random input and compare."
)
@options.state
@options.gpu
@options.dialect
@options.data_shape
@options.threads
@options.python_layers
@options.log_level
@options.as_json
def command(model: Path, weights: tuple[str, ...], output: Path, keep_identity: bool, keep_shared: bool, verify: bool,
            as_json: bool, **given: Any) -> int:  # fmt: skip
    """Absorb batch norm: write a net with fewer layers that computes the same in phase TEST.

    A BatchNorm (Scale, Bias, BN) goes into the weights of the Convolution, Deconvolution or InnerProduct before it, or
    of the one behind it where no padding is in the way. The log says for every such layer that stays, why. Dropout,
    which does nothing in phase TEST, is left out. The files hold the layers of phase TEST. Data is not needed where the
    net says its shape.

    --verify: every blob that both nets have is compared in float64 on normal random numbers; a difference above a
    thousandth of its range is an error, and nothing is written (with --compat optimize=binary a warning).
    Quantize after this, not before. --gpu is accepted; the work is done on the CPU.

    JSON: {"absorbed": [{"layer", "into", "before"}], "kept": [{"layer", "type", "reason"}], "dropped": [names],
    "layers": [before, after], "difference", "files"}.
    """
    from caffejacinto_py.cli import outputs
    from caffejacinto_py.cli.running import prepare_run
    from caffejacinto_py.passes.absorb import absorb
    from caffejacinto_py.schema.upgrade import load_net

    log = prepare_run(given)
    files = outputs.pair(output, [model, *weights])
    graph = open_graph(load_net(model), given, log)
    held = _weights(graph, weights)
    log.info("Optimizing Net %s", graph.name)
    done = absorb(graph, held, keep_identity=keep_identity, shared="keep" if keep_shared else "error")
    report(done, log)
    difference = _verify(graph, held, done, log) if verify else None
    for kind, file in zip(("prototxt", "caffemodel"), files, strict=True):
        log.info("Snapshotting optimized %s to file %s", kind, file)
    outputs.write(files, _message(done.graph), done.model)
    sizes = [len(graph.nodes), len(done.graph.nodes)]
    if as_json:
        options.print_json(
            {
                "absorbed": [{"layer": m.node, "into": m.into, "before": m.before} for m in done.merged],
                "kept": [{"layer": k.node, "type": k.type, "reason": k.reason} for k in done.kept],
                "dropped": list(done.dropped),
                "layers": sizes,
                "difference": difference.value if difference else None,
                "files": [str(f) for f in files],
            }
        )
        return 0
    click.echo(f"{len(done.merged)} layers absorbed, {len(done.kept)} kept, {sizes[0]} -> {sizes[1]} layers")
    if difference is not None:
        click.echo(
            f"Largest difference of {difference.blobs} blobs on random input: {difference.value:.2g} of its range"
        )
    for file in files:
        click.echo(f"Wrote {file}")
    return 0


def open_graph(doc: Any, given: dict[str, Any], log: Any) -> Graph:
    """The TEST net of a document; its data is opened for shapes where it is there."""
    from caffejacinto_py.checking import fit
    from caffejacinto_py.data import probe
    from caffejacinto_py.errors import InputError, ManyErrors, PrototxtError
    from caffejacinto_py.passes import prepare
    from caffejacinto_py.schema.dialect import resolve_dialect

    dialect = resolve_dialect(doc.message, None, given["dialect"], compat=given["compat"])
    log.info("Dialect: %s (%s)", dialect.name, dialect.reason)
    state: dict[str, Any] = {"phase": "TEST", "level": given["level"], "stages": given["stage"], "dialect": dialect,
                             "python_layers": given["python_layers"]}  # fmt: skip
    if given["data_shape"] is None:
        try:
            return prepare(doc, probe=probe, **state)
        except (PrototxtError, ManyErrors):
            raise
        except InputError as e:  # a database or mean file
            log.info("The data cannot be opened, its shape is assumed: %s", e)
    graph, shape = fit(doc, data_shape=given["data_shape"], **state)
    if shape:
        log.info("Data is taken as %s; --data-shape says otherwise.", "x".join(map(str, shape)))
    return graph


def _weights(graph: Graph, names: tuple[str, ...]) -> ModelFile:
    """The weights files as one, a later one over an earlier one; layers of today's form."""
    from caffejacinto_py.schema.weights import ModelFile, read_model

    found: dict[str, Any] = {}
    path, dialect = "", None
    for name in names:
        model = read_model(name)
        found.update((e.name, e) for e in reversed(model.current_layers()) if e.blobs)
        path, dialect = model.path, model.dialect
    return ModelFile(graph.name, list(found.values()), ", ".join(names) if len(names) > 1 else path, dialect)


def _message(graph: Graph) -> Any:
    """The net as a NetParameter; what it says of quantization stays."""
    from caffejacinto_py.ir.emit import emit
    from caffejacinto_py.schema.mark import mark

    net = emit(graph)
    if graph.proto.HasField("quantize"):
        net.quantize = graph.proto.quantize
    if graph.proto.HasField("net_quantization_param"):
        net.net_quantization_param.CopyFrom(graph.proto.net_quantization_param)
    return mark(net, graph.dialect.name)


def report(done: Absorbed, log: Any) -> None:
    """Log what was absorbed, left out and kept, and why."""
    taken: dict[str, list[str]] = {}
    types = {m.into: m.type for m in done.merged}
    for m in done.merged:
        taken.setdefault(m.into, []).append(m.node)
    for into, names in taken.items():
        log.info("Optimizing layer: %s %s (%s)", types[into], into, ", ".join(names))
    if done.dropped:
        log.info("Left out, do nothing in phase TEST: %s", ", ".join(done.dropped))
    for k in done.kept:
        log.info("%sKept: %s %s: %s", f"{k.loc}: " if k.loc else "", k.type, k.node, k.reason)


def _verify(graph: Graph, held: ModelFile, done: Absorbed, log: Any) -> Difference:
    """Raises ComparisonError where the nets differ, but for what the binary is known to change."""
    from caffejacinto_py.compress import verify
    from caffejacinto_py.errors import CaffeError, ComparisonError

    try:
        found = verify.compare(graph, held, done)
    except CaffeError as e:
        e.hint = e.hint or "--no-verify writes the files without running the nets"
        raise
    text = f"blob '{found.blob}' of layer '{found.layer}' differs by {found.value:.2g} of its range on random input"
    if found.value <= verify.TOLERANCE:
        log.info("Verified %d blobs: %s", found.blobs, text)
    elif graph.dialect.compat.optimize == "binary":
        log.warning("The nets differ, as asked for with --compat optimize=binary: %s", text)
    else:
        raise ComparisonError(f"the optimized net does not compute the same: {text}", hint="please report this net")
    return found
