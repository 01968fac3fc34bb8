"""`caffejacinto detect`."""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from caffejacinto_py.cli import options
from caffejacinto_py.errors import CaffeError, DataError, Loc, UsageError, misplaced, raise_all

if TYPE_CHECKING:
    import numpy as np

    from caffejacinto_py.pycaffe import Detector

COORDINATES = ("ymin", "xmin", "ymax", "xmax")
_AT_ONCE = 256  # windows that are held as pixels, about


class Window(NamedTuple):
    """A line of INPUT_FILE. box: ymin, xmin, ymax, xmax in pixels."""

    filename: str
    box: tuple[float, ...]
    loc: Loc


@click.command()
@click.argument("input_file", type=options.FILE)
@click.argument("output_file", type=options.FILE)
@click.option("--model-def", required=True, type=options.FILE, help="The net for deployment (deploy.prototxt).")
@click.option("--pretrained-model", required=True, type=options.FILE, help="Its weights.")
@click.option("--crop-mode", type=click.Choice(["list", "selective_search"]), default="list", show_default=True,
              help="Where windows come from: INPUT_FILE, or selective search (a package of its own).")  # fmt: skip
@click.option("--mean-file", type=options.FILE,
              help="A mean (.npy, .binaryproto): one number a channel; of an image, its average.")  # fmt: skip
@click.option("--input-scale", type=float, help="Factor after the mean is taken off.")
@click.option("--raw-scale", type=float, default=255.0, show_default=True,
              help="What white is, before the mean is taken off.")  # fmt: skip
@click.option("--channel-swap", default="2,1,0", show_default=True, metavar="A,B,C",
              help="Order of channels, counted from RGB; 2,1,0 is BGR, as Caffe's nets are trained.")  # fmt: skip
@click.option("--context-pad", type=click.IntRange(min=0), default=0, show_default=True,
              help="Surroundings on each side of a window, in pixels of the net's input.")  # fmt: skip
@options.gpu
@options.threads
@options.python_layers
@options.log_level
def command(input_file: Path, output_file: Path, crop_mode: str, **given: Any) -> int:
    """Score windows of images, as R-CNN does.

    INPUT_FILE is a CSV with the columns filename, ymin, xmin, ymax, xmax: one window a line, in pixels; ymax and xmax
    are the first row and column outside. With --crop-mode selective_search it names one image a line.

    OUTPUT_FILE gets the windows, image by image, with the scores of the net's first output. Ending .csv: columns
    filename, ymin, xmin, ymax, xmax, class0, class1 and so on. Ending .h5: the datasets filename, window (N x 4) and
    prediction (N x classes).
    """
    from caffejacinto_py.cli.running import prepare_run
    from caffejacinto_py.schema.files import check_writable

    log = prepare_run(given)
    if output_file.suffix.lower() not in (".csv", ".h5"):
        raise UsageError(f"{output_file}: the output's ending is .csv or .h5, and decides its form")
    check_writable(output_file.parent)
    windows = read_windows(input_file) if crop_mode == "list" else []
    images = read_images(input_file) if crop_mode == "selective_search" else []
    detector = _open(given, log)
    began = time.perf_counter()
    found = list(_scored(detector, windows)) if windows else detector.detect_selective_search(images)
    if not found:
        raise DataError("selective search found no windows", loc=Loc(str(input_file)))
    log.info("Scored %d windows in %.3f s.", len(found), time.perf_counter() - began)
    (_write_csv if output_file.suffix.lower() == ".csv" else _write_hdf5)(output_file, found)
    click.echo(f"Wrote {output_file}: {len(found)} windows")
    return 0


def read_windows(path: Path) -> list[Window]:
    """The windows of a CSV, those of an image together, images in order of first appearance. All lie inside of images
    that can be read. Raises DataError, ManyErrors.
    """
    rows = csv.reader(io.StringIO(_text(path), newline=""), skipinitialspace=True)
    head = [name.strip() for name in next(rows, [])]
    missing = [name for name in ("filename", *COORDINATES) if name not in head]
    if missing:
        text = f"the first line names no column {', '.join(missing)}"
        raise DataError(text, loc=Loc(str(path), 1, 1), hint="it reads: filename,ymin,xmin,ymax,xmax")
    errors: list[CaffeError] = []
    images: dict[str, list[Window]] = {}
    try:
        for row in rows:
            if not any(cell.strip() for cell in row):
                continue
            try:
                window = _window(row, head, Loc(str(path), rows.line_num, 1))
            except DataError as e:
                errors.append(e)
            else:
                images.setdefault(window.filename, []).append(window)
    except csv.Error as e:
        raise DataError(f"this is no CSV: {e}", loc=Loc(str(path), rows.line_num, 1)) from None
    for windows in images.values():
        errors.extend(_outside(windows, path))
    raise_all(sorted(errors, key=lambda e: e.loc or Loc(str(path))))
    if not images:
        raise DataError("there are no windows in this file", loc=Loc(str(path)))
    return [window for windows in images.values() for window in windows]


def read_images(path: Path) -> list[str]:
    """The image names of a text file, one a line; all are there."""
    lines = [(n, line.strip()) for n, line in enumerate(_text(path).splitlines(), 1) if line.strip()]
    raise_all([_absent(name, Loc(str(path), n, 1)) for n, name in lines if not Path(name).is_file()])
    if not lines:
        raise DataError("there are no image names in this file", loc=Loc(str(path)))
    return [name for _, name in lines]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"cannot read this list: {getattr(e, 'strerror', None) or e}", loc=Loc(str(path))) from None


def _window(row: Sequence[str], head: Sequence[str], loc: Loc) -> Window:
    if len(row) != len(head):
        raise DataError(f"{len(row)} values under {len(head)} columns", loc=loc)
    cells = dict(zip(head, row, strict=True))
    box = []
    for name in COORDINATES:
        try:
            box.append(float(cells[name]))
        except ValueError:
            raise DataError(f"{name} '{cells[name]}' is not a number", loc=loc) from None
        if not math.isfinite(box[-1]):
            raise DataError(f"{name} '{cells[name]}' is not a place in an image", loc=loc)
    if not cells["filename"].strip():
        raise DataError("the filename is empty", loc=loc)
    return Window(cells["filename"].strip(), tuple(box), loc)


def _outside(windows: Sequence[Window], path: Path) -> Iterator[CaffeError]:
    """What is wrong with the windows of one image, or with the image."""
    from caffejacinto_py.pycaffe.io import load_image

    name, loc = windows[0].filename, windows[0].loc
    if not Path(name).is_file():
        yield _absent(name, loc)
        return
    try:
        height, width = load_image(name).shape[:2]
    except DataError:
        yield DataError(f"cannot read '{name}' as an image", loc=loc)
        return
    for _, (top, left, bottom, right), loc in windows:
        size = f"{name} is {height} high and {width} wide"
        if top < 0 or left < 0 or bottom > height or right > width:
            yield DataError(f"window {top:g},{left:g},{bottom:g},{right:g} lies outside of its image: {size}", loc=loc)
        elif int(top) >= int(bottom) or int(left) >= int(right):
            text = f"window {top:g},{left:g},{bottom:g},{right:g} is empty"
            yield DataError(text, loc=loc, hint="the order is ymin,xmin,ymax,xmax")


def _absent(name: str, loc: Loc) -> DataError:
    hint = misplaced(name, loc.file)
    return DataError(f"there is no image '{name}'", loc=loc, hint=hint)


def _open(given: dict[str, Any], log: Any) -> Detector:
    """The Detector that the options describe."""
    from caffejacinto_py import pycaffe
    from caffejacinto_py.cli import devices

    height, width = _input_size(given["model_def"], python_layers=given["python_layers"])
    if given["context_pad"] and height != width:
        raise UsageError(f"--context-pad needs a net with a square input, this one is {height} x {width}")
    swap = [word.strip() for word in given["channel_swap"].split(",")]
    if sorted(swap) != ["0", "1", "2"]:
        raise UsageError(f"--channel-swap {given['channel_swap']}: the numbers 0, 1, 2 in some order")
    for option in ("raw_scale", "input_scale"):
        value = given[option]
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise UsageError(f"--{option.replace('_', '-')} {value:g}: a number above 0")
    mean = _mean(given["mean_file"]) if given["mean_file"] else None
    device = devices.pick(given["gpu"], log=log)
    if device == "cpu":
        pycaffe.set_mode_cpu()
    else:
        pycaffe.set_device(int(device.partition(":")[2]))
        pycaffe.set_mode_gpu()
    return pycaffe.Detector(
        given["model_def"],
        given["pretrained_model"],
        mean=mean,
        input_scale=given["input_scale"],
        raw_scale=given["raw_scale"],
        channel_swap=[int(word) for word in swap],
        context_pad=given["context_pad"],
    )


def _input_size(model: Path, *, python_layers: bool) -> tuple[int, int]:
    """Height and width of the one input of a net for color images. Refuses Python layers unless they are allowed."""
    from caffejacinto_py.passes import prepare
    from caffejacinto_py.schema.upgrade import load_net

    graph = prepare(load_net(model), phase="TEST", python_layers=python_layers)
    sources = [node for node in graph.nodes if node.layer.source]
    if len(sources) != 1 or sources[0].layer.source != "input" or len(sources[0].outputs) != 1:
        found = ", ".join(f"'{node.name}' ({node.type})" for node in sources) or "none"
        hint = "give the deploy.prototxt: a net with an Input layer in place of its data"
        raise UsageError(f"{model}: detect needs a net with one input, this one has: {found}", hint=hint)
    shape = graph.shapes[sources[0].outputs[0]]
    if len(shape) != 4 or shape[1] != 3:
        raise UsageError(f"{model}: the input has shape {shape}, color images are N x 3 x H x W")
    return shape[2], shape[3]


def _mean(path: Path) -> np.ndarray:
    """One value a channel; a mean image is averaged, because a window may come from anywhere in an image."""
    import numpy as np

    from caffejacinto_py.schema.blobs import read_blob

    if path.suffix == ".npy":
        try:
            mean = np.load(path, allow_pickle=False).astype(np.float32)
        except (OSError, ValueError, EOFError) as e:
            raise DataError(f"cannot read this mean file: {e}", loc=Loc(str(path))) from None
    else:
        mean = np.array(read_blob(path), np.float32)
    shape = mean.shape
    mean = mean[0] if mean.ndim == 4 and len(mean) == 1 else mean
    if mean.ndim not in (1, 3) or len(mean) not in (1, 3) or not mean.size:
        raise DataError(f"a mean of shape {shape}, it is 3 x H x W or 3 values", loc=Loc(str(path)))
    return mean.reshape(len(mean), -1).mean(axis=1)


def _scored(detector: Detector, windows: Sequence[Window]) -> Iterator[dict[str, Any]]:
    """As detect_windows, some windows at a time: the pixels of all may not fit into memory."""
    batch = detector.blobs[detector.inputs[0]].num
    step = max(_AT_ONCE // batch, 1) * batch
    for start in range(0, len(windows), step):
        images: dict[str, list[tuple[float, ...]]] = {}
        for window in windows[start : start + step]:
            images.setdefault(window.filename, []).append(window.box)
        yield from detector.detect_windows(images.items())


def _write_csv(path: Path, found: Sequence[dict[str, Any]]) -> None:
    from caffejacinto_py.schema.files import atomic_write

    classes = [f"class{i}" for i in range(found[0]["prediction"].size)]
    with atomic_write(path, "w") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(["filename", *COORDINATES, *classes])
        for row in found:
            scores = (str(score) for score in row["prediction"].ravel())  # the shortest text that is this float32
            out.writerow([row["filename"], *_plain(row["window"]), *scores])


def _plain(box: Iterable[float]) -> list[float]:
    """Whole numbers without a point, as they were read."""
    return [int(v) if float(v).is_integer() else float(v) for v in box]


def _write_hdf5(path: Path, found: Sequence[dict[str, Any]]) -> None:
    import h5py
    import numpy as np

    from caffejacinto_py.schema.files import atomic_path

    with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
        names = np.array([row["filename"] for row in found], object)
        file.create_dataset("filename", data=names, dtype=h5py.string_dtype())
        file["window"] = np.array([row["window"] for row in found], np.float64)
        file["prediction"] = np.stack([row["prediction"].ravel() for row in found])
