"""`caffejacinto classify`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from caffejacinto_py.cli import options
from caffejacinto_py.errors import DataError, Loc, UsageError, near

if TYPE_CHECKING:
    import numpy as np

    from caffejacinto_py.data.transform import Transform
    from caffejacinto_py.engine.net import Net
    from caffejacinto_py.ir.graph import Graph

_BATCH = 16  # images a pass
_COLORS = {1: False, 3: True}  # channels -> force color


@click.command()
@click.argument("model", type=options.FILE)
@click.argument("weights", type=options.CommaList())
@click.argument("images", nargs=-1, required=True, type=options.FILE)
@click.option("--mean", help="A mean file (.binaryproto, .npy), or one number a channel: 104,117,123.")
@click.option("--labels", type=options.FILE, help="Names of the classes, one a line.")
@click.option("--image-dims", metavar="H,W", help="Resize images to this before the crop.  [default: the net's size]")
@click.option("--crop", type=click.Choice(["center", "ten"]), default="center", show_default=True,
              help="What the net sees: the center, or center, corners and their mirror images (mean).")  # fmt: skip
@click.option("--channel-swap", default="2,1,0", show_default=True, metavar="A,B,C",
              help="Order of channels, counted from RGB; 2,1,0 is BGR, as Caffe's nets are trained.")  # fmt: skip
@click.option("--raw-scale", type=float, default=255.0, show_default=True,
              help="What white is, before the mean is taken off.")  # fmt: skip
@click.option("--input-scale", type=float, default=1.0, show_default=True, help="Factor after the mean is taken off.")
@click.option("--top", type=click.IntRange(min=1), default=5, show_default=True, help="How many classes to show.")
@click.option("--blob", help="The output with the class scores, where there are several.")
@options.gpu
@options.dialect
@options.threads
@options.log_level
@options.as_json
def command(
    model: Path, weights: tuple[str, ...], images: tuple[Path, ...], top: int, blob: str | None, as_json: bool,
    **given: Any,
) -> int:  # fmt: skip
    """Classify images.

    MODEL is a net for deployment (its input is an Input layer or `input` fields). Prints for each of the IMAGES the
    best classes with their probabilities.

    JSON: [{"image", "classes": [{"class", "label" (or null), "probability"}]}].
    """
    from caffejacinto_py.cli.running import prepare_run

    given["log_level"] = "warning" if given["log_level"] == "info" else given["log_level"]
    log = prepare_run(given)
    names = _labels(given["labels"])
    net = _open(model, weights, min(len(images), _BATCH), given, log)
    view = _view(net.sources[0].shapes[0], given)
    scores = _scores(net, view, images, _output(net, blob))
    if names is not None and len(names) != scores.shape[1]:
        raise UsageError(f"{given['labels']} names {len(names)} classes, the net has {scores.shape[1]}")
    if (abs(scores.sum(axis=1) - 1) > 0.01).any() or (scores < 0).any():
        log.warning("These are scores, not probabilities: does the net end without a Softmax layer?")
    found = [_best(path, row, names, top) for path, row in zip(images, scores, strict=True)]
    if as_json:
        options.print_json(found)
        return 0
    for entry in found:
        click.echo(f"{entry['image']}:")
        for one in entry["classes"]:
            click.echo(f"  {one['probability']:.4f}  {one['class']}" + (f"  {one['label']}" if one["label"] else ""))
    return 0


@dataclass(frozen=True)
class View:
    """How an image becomes an input. dims: (height, width) to resize to; swap: order of channels, from BGR."""

    transform: Transform
    dims: tuple[int, int]
    swap: tuple[int, ...]
    color: bool
    ten: bool


def _labels(path: Path | None) -> list[str] | None:
    if path is None:
        return None
    try:
        names = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"cannot read the labels: {getattr(e, 'strerror', None) or e}", loc=Loc(str(path))) from None
    while names and not names[-1].strip():
        names.pop()
    return [name.strip() for name in names]


def _open(model: Path, weights: Sequence[str], batch: int, given: dict[str, Any], log: Any) -> Net:
    """The net for `batch` images, with weights."""
    from caffejacinto_py.cli import devices
    from caffejacinto_py.engine.net import Net
    from caffejacinto_py.passes import prepare
    from caffejacinto_py.schema.dialect import resolve_dialect
    from caffejacinto_py.schema.upgrade import load_net
    from caffejacinto_py.solver.build import load_weights

    device = devices.pick(given["gpu"], log=log)
    doc = load_net(model)
    dialect = resolve_dialect(doc.message, None, given["dialect"], compat=given["compat"])
    graph = prepare(doc, phase="TEST", dialect=dialect)
    layer = _input(graph, model)
    layer.input_param.shape[0].dim[0] = batch
    net = Net(prepare(doc, phase="TEST", dialect=dialect), device=device, seed=0)
    load_weights([net], weights, tolerant=dialect.ignore_shape_mismatch)
    return net


def _input(graph: Graph, model: Path) -> Any:
    """The one input layer of a net for images; its message may be changed."""
    sources = [node for node in graph.nodes if node.layer.source]
    hint = "give the deploy.prototxt: a net with an Input layer in place of its data"
    if len(sources) != 1 or sources[0].layer.source != "input" or len(sources[0].outputs) != 1:
        found = ", ".join(f"'{node.name}' ({node.type})" for node in sources) or "none"
        raise UsageError(f"{model}: classify needs a net with one input, this one has: {found}", hint=hint)
    shape = graph.shapes[sources[0].outputs[0]]
    if len(shape) != 4 or shape[1] not in _COLORS:
        raise UsageError(f"{model}: the input has shape {shape}, images are N x 3 x H x W or N x 1 x H x W")
    return sources[0].proto


def _output(net: Net, blob: str | None) -> str:
    names = [v.name for v in net.graph.outputs]
    if blob is None:
        if len(names) != 1:
            raise UsageError(f"the net has the outputs {', '.join(names)}", hint="choose one with --blob")
        return names[0]
    if blob not in names:
        raise UsageError(f"the net has no output '{blob}'", hint=near(blob, names) or f"outputs: {', '.join(names)}")
    return blob


def _view(shape: Sequence[int], given: dict[str, Any]) -> View:
    """The options as a View of a net's input shape."""
    from caffejacinto_py.data.transform import Transform

    channels, height, width = shape[1:]
    dims = _numbers(given["image_dims"], "--image-dims", int) if given["image_dims"] else [height, width]
    if len(dims) != 2 or dims[0] < height or dims[1] < width:
        text = f"--image-dims {given['image_dims']}: two sizes, at least the net's {height},{width}"
        raise UsageError(text)
    swap = _numbers(given["channel_swap"], "--channel-swap", int) if channels == 3 else [0]
    if sorted(swap) != list(range(channels)):
        raise UsageError(f"--channel-swap {given['channel_swap']}: the numbers 0, 1, 2 in some order")
    if not given["raw_scale"] > 0:
        raise UsageError(f"--raw-scale {given['raw_scale']:g}: a number above 0")
    unit = given["raw_scale"] / 255  # decoded images are 0 to 255
    mean, values = _mean(given["mean"], channels)
    transform = Transform(
        train=False,
        scale=unit * given["input_scale"],
        crop=(height, width),
        mean=None if mean is None else mean / unit,
        mean_values=tuple(v / unit for v in values),
        mean_centered=True,
    )
    from_bgr = tuple(channels - 1 - i for i in swap)
    return View(transform, (dims[0], dims[1]), from_bgr, _COLORS[channels], given["crop"] == "ten")


def _numbers(text: str, option: str, kind: Any) -> list[Any]:
    try:
        return [kind(word) for word in text.replace("x", ",").split(",")]
    except ValueError:
        raise UsageError(f"{option} {text}: numbers with commas between them") from None


def _mean(text: str | None, channels: int) -> tuple[Any, tuple[float, ...]]:
    """(C x H x W array or None, values): a mean file, or numbers."""
    import numpy as np

    from caffejacinto_py.schema.blobs import read_blob

    if text is None:
        return None, ()
    path = Path(text)
    if not path.suffix or path.suffix.strip(".,").replace(",", "").isdecimal():
        values = tuple(_numbers(text, "--mean", float))
        if len(values) not in (1, channels):
            raise UsageError(f"--mean {text}: {len(values)} numbers for {channels} channels")
        return None, values
    if path.suffix == ".npy":
        try:
            mean = np.load(path, allow_pickle=False).astype(np.float32)
        except (OSError, ValueError) as e:
            raise DataError(f"cannot read this mean file: {e}", loc=Loc(text)) from None
    else:
        mean = np.array(read_blob(text), np.float32)
    mean = mean[0] if mean.ndim == 4 and mean.shape[0] == 1 else mean
    if mean.ndim == 1 and mean.size in (1, channels):
        return None, tuple(mean.tolist())
    if mean.ndim != 3 or mean.shape[0] != channels:
        raise DataError(f"a mean of shape {mean.shape} for images of {channels} channels", loc=Loc(text))
    return np.ascontiguousarray(mean), ()


def _scores(net: Net, view: View, images: Sequence[Path], blob: str) -> np.ndarray:
    """Class scores, one row an image."""
    import numpy as np
    import torch

    source = net.sources[0]
    batch = np.zeros(source.shapes[0], np.float32)
    size = len(batch)
    rows: list[np.ndarray] = []

    def flush(count: int) -> None:
        with torch.no_grad():
            out = net({source.tops[0]: torch.from_numpy(batch)}).outputs[blob]
        found = out.float().cpu().numpy()
        if not found.ndim or found.shape[0] != size:
            raise UsageError(f"the output '{blob}' of shape {found.shape} has no row for each of {size} images")
        rows.extend(found.reshape(size, -1)[:count].copy())

    count = 0
    for path in images:
        for crop in _crops(path, view):
            batch[count % size] = crop
            count += 1
            if count % size == 0:
                flush(size)
    if count % size:
        flush(count % size)
    return np.stack(rows).reshape(len(images), -1, rows[0].size).mean(axis=1)


def _crops(path: Path, view: View) -> np.ndarray:
    """What the net sees of an image: N x C x H x W, one or ten."""
    import numpy as np

    from caffejacinto_py.data.decode import decode, resize

    try:
        data = path.read_bytes()
    except OSError as e:
        raise DataError(f"cannot read this image: {e.strerror}", loc=Loc(str(path))) from None
    image = resize(decode(data, color=view.color, where=lambda: str(path)).astype(np.float32), *view.dims)
    full = np.ascontiguousarray(image.transpose(2, 0, 1)[list(view.swap)])
    height, width = view.transform.crop or view.dims
    ys, xs = view.dims[0] - height, view.dims[1] - width
    places = [(ys // 2, xs // 2)]
    if view.ten:
        places += [(0, 0), (0, xs), (ys, 0), (ys, xs)]
    cuts = np.stack([full[:, y : y + height, x : x + width] for y, x in places])
    out = np.empty(cuts.shape, np.float32)
    view.transform.apply(cuts, np.zeros((len(cuts), 8)), out, decoded=True)
    return np.concatenate([out, out[:, :, :, ::-1]]) if view.ten else out


def _best(path: Path, scores: np.ndarray, names: list[str] | None, top: int) -> dict[str, Any]:
    order = (-scores).argsort(kind="stable")[:top]
    classes = [{"class": int(i), "label": names[i] if names else None, "probability": float(scores[i])} for i in order]
    return {"image": str(path), "classes": classes}
