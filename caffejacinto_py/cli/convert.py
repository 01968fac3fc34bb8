"""`caffejacinto convert`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from caffejacinto_py.cli import options
from caffejacinto_py.errors import UsageError

if TYPE_CHECKING:
    from caffejacinto_py.schema.batch_norm import Converted
    from caffejacinto_py.schema.modelfile import ModelFile

_KINDS = {".caffemodel": "binaryproto", ".binaryproto": "binaryproto", ".h5": "hdf5", ".hdf5": "hdf5", ".npz": "npz"}


@click.command()
@click.argument("input", type=options.FILE)
@click.argument("output", type=options.FILE)
@click.option("--model", type=options.FILE, help="The net of the weights, text: where --bn or layer types need it.")
@click.option("--bn", type=click.Choice(["bvlc", "nvcaffe"], case_sensitive=False), metavar="bvlc|nvcaffe",
              help="Bring the BatchNorm layers into this form.")  # fmt: skip
@click.option("--model-out", type=options.FILE, help="With --bn: where the changed net goes, text.")
@click.option("--half", is_flag=True, help="Weights of products in float16, as NVCaffe stores them.")
def command(input: Path, output: Path, model: Path | None, bn: str | None, model_out: Path | None, half: bool) -> int:
    """Convert weights: caffemodel, HDF5, npz; BatchNorm forms.

    The ending of OUTPUT decides its format: .caffemodel, .h5, .npz (arrays named LAYER/INDEX). INPUT may be any of
    them, and of any age: V0 and V1 files become today's. HDF5 and npz files hold no layer types; --model gives them.

    --bn nvcaffe merges each Scale layer into the BatchNorm before it (NVCaffe's five blobs, scale_bias: true), --bn
    bvlc takes them apart again; sums are divided by the correction factor, and the factor is 1 afterwards. The net
    changes with the weights: --model-out gets it. Without --model it is the net stored in the .caffemodel.

    --half: weights of layers that multiply in float16 (docs/precision.md) become halves, statistics do not. Caffes of
    NVIDIA's family read such a .caffemodel; it loads here into nets of any type. Without --half halves become float32,
    which every Caffe reads.
    """
    from caffejacinto_py.schema.weights import write_model

    kind = _KINDS.get(output.suffix.lower())
    if kind is None:
        raise UsageError(f"OUTPUT {output}: unknown format '{output.suffix}'", hint=f"end it in {', '.join(_KINDS)}")
    if model_out is not None and bn is None:
        raise UsageError("--model-out goes with --bn: only that changes the net")
    if bn is not None and model is not None and model_out is None:
        raise UsageError("--bn changes the net too", hint="say where the changed net goes: --model-out NEW.prototxt")
    weights = _read(input)
    done = None
    if bn is not None:
        weights, done = _convert(weights, model, bn)
    elif model is not None:
        weights = _with_types(weights, model)
    if half:
        _halve(weights, kind)
    if kind == "npz":
        from caffejacinto_py.schema.npz import write_npz_model

        write_npz_model(output, weights)
    else:
        write_model(output, weights, format=kind, raw=half)
    if done is not None:
        _report(done, model_out)
    blobs = sum(len(layer.blobs) for layer in weights.layers)
    click.echo(f"Wrote {output}: {blobs} blobs of {sum(bool(x.blobs) for x in weights.layers)} layers")
    return 0


def _halve(weights: ModelFile, kind: str) -> None:
    from caffejacinto_py.layers import registry
    from caffejacinto_py.schema.halves import halve

    if kind != "binaryproto":
        raise UsageError("--half: only .caffemodel files hold halves", hint="end OUTPUT in .caffemodel")
    if not any(layer.type for layer in weights.layers):
        raise UsageError("--half: these weights hold no layer types", hint="give the net as --model NET.prototxt")
    done = halve(weights, lambda type: registry.known(type) and registry.find(type).narrows == "weights")
    click.echo(f"{done.blobs} blobs in float16")
    for name, i in done.kept:
        click.echo(f"note: layer '{name}', blob {i} stays in float32: a value is beyond 65504", err=True)
    if done.lost:
        click.echo(f"note: {done.lost} weights are below 6e-8 and became zero", err=True)


def _read(path: Path) -> ModelFile:
    from caffejacinto_py.schema.migrate import upgrade_model
    from caffejacinto_py.schema.npz import is_npz, read_npz_model
    from caffejacinto_py.schema.weights import read_model

    model = read_npz_model(path) if is_npz(path) else read_model(path)
    if not model.old:
        return model
    upgraded, notices = upgrade_model(model)
    for notice in notices:
        click.echo(notice)
    return upgraded


def _convert(weights: ModelFile, model: Path | None, form: str) -> tuple[ModelFile, Converted]:
    from caffejacinto_py.schema.batch_norm import convert_blobs, convert_net
    from caffejacinto_py.schema.upgrade import load_net

    if model is None and weights.version in ("HDF5", "npz"):
        raise UsageError("--bn needs the net, and these weights hold none", hint="give it as --model NET.prototxt")
    net: Any = load_net(model).message if model is not None else weights.net()
    done = convert_net(net, form)
    if not done.norms:
        raise UsageError("--bn: the net has no BatchNorm layers")
    return convert_blobs(weights, done), done


def _with_types(weights: ModelFile, model: Path) -> ModelFile:
    """The weights in the layers of a prototxt that have the same names; its other layers are left out."""
    from caffejacinto_py.schema.migrate import with_net
    from caffejacinto_py.schema.upgrade import load_net

    net = load_net(model).message
    names = {layer.name for layer in weights.layers}
    kept = {layer.name: layer for layer in reversed(net.layer) if layer.name in names}
    missing = names - set(kept)
    if missing:
        text = f"{model} has no layer '{min(missing)}', which the weights have"
        raise UsageError(text, hint="is it the net of these weights?")
    messages = list(reversed(kept.values()))
    del net.layer[:]
    net.layer.extend(messages)
    return with_net(weights, net)


def _report(done: Converted, model_out: Path | None) -> None:
    """Write the changed net; say what happened to it."""
    from caffejacinto_py.schema.files import atomic_write
    from caffejacinto_py.schema.text import dumps

    if model_out is not None:
        text = dumps(done.net)
        with atomic_write(model_out, "w") as file:
            file.write(text)
        click.echo(f"Wrote {model_out}")
    parts = [f"{len(done.norms)} BatchNorm layers in the form of {done.form}"]
    if done.merged:
        parts.append(f"{len(done.merged)} Scale layers merged into them")
    if done.split:
        parts.append(f"{len(done.split)} Scale layers split off")
    click.echo("; ".join(parts))
    for notice in done.notices:
        click.echo(f"note: {notice}", err=True)
