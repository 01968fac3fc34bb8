"""From a source layer to its feeder, and the shapes its data has. The only place that reads the parameters of data
layers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from caffejacinto_py.data.batches import Batches, DatabaseBatches, ImageBatches, datum_image, parse_first
from caffejacinto_py.data.feeders import DirectFeeder, Feeder, ParallelFeeder, UserFeeder
from caffejacinto_py.data.order import Order, Share, generator
from caffejacinto_py.data.sources import Database, ImageList
from caffejacinto_py.data.transform import Transform, from_param
from caffejacinto_py.errors import DataError, LayerError

Shape = tuple[int, ...]
Fill = Callable[[Any, Shape, np.random.Generator], np.ndarray]
ALONE = Share()
PREFETCH = 4  # Caffe's default depth of the queue of batches
log = logging.getLogger(__name__)


def probe(layer: Any) -> list[Shape]:
    """The top shapes that the data of a source layer gives: its first record decides.

    layer: a source Layer object. Opens the files. Raises DataError for missing or damaged data, LayerError for
    parameters that contradict it.
    """
    ask = _PROBES.get(layer.source)
    if ask is None:
        raise LayerError(f"layer '{layer.name}': a '{layer.source}' source has no data to look at")
    return ask(layer)[: layer.ntop]


def make_feeder(
    layer: Any,
    *,
    shapes: Sequence[Shape],
    seed: int,
    workers: int = 1,
    start: int = 0,
    workers_kind: str = "thread",
    share: Share = ALONE,
    fill: Fill | None = None,
) -> Feeder:
    """The feeder of a source layer; see `Feeder`. Batch k is a pure function of (files, seed, k, share).

    layer: its `source` is database, images, hdf5, windows, memory, dummy or input; it knows proto, context.phase and
    context.dialect. shapes: of its tops; shapes[0][0] is the batch size of this rank. start: first batch number.
    workers: 0 prepares in the caller's thread; else so many threads (workers_kind "thread") or processes ("process").
    share: the part of one of several data-parallel feeders; their batches are disjoint.
    fill: `layers.fillers.fill`, for DummyData with fillers other than constant, uniform and gaussian.
    """
    if workers_kind not in ("thread", "process"):
        raise ValueError(f"workers_kind {workers_kind!r}")
    shapes = [tuple(s) for s in shapes]
    if layer.source in ("memory", "input"):
        return UserFeeder(shapes, kind=layer.source, name=layer.name, start=start)
    if layer.source == "dummy":
        return DirectFeeder(DummyBatches(layer, shapes, seed, fill, share), start=start)
    build = _BUILDERS.get(layer.source)
    if build is None:
        raise LayerError(f"layer '{layer.name}': no feeder for a '{layer.source}' source")
    batches, depth = build(layer, shapes, seed, share)
    if not workers:
        return DirectFeeder(batches, start=start)
    return ParallelFeeder(batches, start=start, workers=workers, depth=depth, process=workers_kind == "process")


def records(layer: Any) -> int | None:
    """How many records a source layer has before it starts again; None: it has no end, or nobody knows."""
    if layer.source == "database":
        return len(Database(layer.proto.data_param.source))
    if layer.source == "images":
        return len(ImageList(layer.proto.image_data_param.source, root=layer.proto.image_data_param.root_folder))
    return None


def disorder(layer: Any) -> tuple[str | None, str | None]:
    """Why another net would not read the same records in the same order from this layer's source, and why it would
    read them but see other pictures. None: it would."""
    wrong = None
    if layer.source in ("database", "images"):
        param = layer.proto.data_param if layer.source == "database" else layer.proto.image_data_param
        wrong = "its records are shuffled" if param.shuffle else None
        if layer.source == "images" and param.rand_skip:
            wrong = "it starts at a random record (rand_skip)"
    t = layer.proto.transform_param
    random = [name for name in ("mirror",) if getattr(t, name)]
    if layer.context.phase == "TRAIN":
        random += [name for name in ("crop_size", "crop_h") if getattr(t, name)]
    line = f"every pass sees other pictures ({', '.join(random)} at random)" if random else None
    return wrong, line


def _transform(layer: Any) -> Transform:
    return from_param(layer.proto.transform_param, phase=layer.context.phase, dialect=layer.context.dialect)


def _batch_size(layer: Any, param: Any, field: str) -> int:
    if param.batch_size <= 0:
        raise LayerError(f"layer '{layer.name}': batch_size must be above 0", field=(field, "batch_size"))
    return int(param.batch_size)


def _order(layer: Any, groups: Sequence[int], batch: int, seed: int, share: Share, **more: Any) -> Order:
    """The order of a source's records. DataError when there are not enough for all ranks."""
    count = sum(groups)
    if 0 < count < share.world:
        text = f"layer '{layer.name}': {count} records cannot be dealt out to {share.world} ranks"
        raise DataError(text, hint="train with fewer ranks")
    return Order(groups, batch=batch, seed=seed, name=_stream(layer), **share._asdict(), **more)


# --- Data ------------------------------------------------------------------------------------------------------------
def _probe_database(layer: Any) -> list[Shape]:
    param = layer.proto.data_param
    database, transform = Database(param.source), _transform(layer)
    image = datum_image(parse_first(database), transform.color, lambda: database.where(0)).shape
    n = _batch_size(layer, param, "data_param")
    return [(n, *transform.shape(image)), (n,)]


def _build_database(layer: Any, shapes: Sequence[Shape], seed: int, share: Share) -> tuple[Batches, int]:
    param = layer.proto.data_param
    if param.rand_skip:
        log.warning("layer '%s': data_param.rand_skip has no effect (Caffe 1.0 ignores it too)", layer.name)
    database = Database(param.source)
    order = _order(layer, [len(database)], shapes[0][0], seed, share, shuffle=param.shuffle)
    depth = param.prefetch if param.HasField("prefetch") and param.prefetch else PREFETCH
    return DatabaseBatches(database, order, _transform(layer), shapes), depth


# --- ImageData -------------------------------------------------------------------------------------------------------
def _image_batches(layer: Any, shapes: Sequence[Shape], seed: int, share: Share, batch: int) -> ImageBatches:
    param = layer.proto.image_data_param
    if bool(param.new_height) != bool(param.new_width):
        missing = "new_width" if param.new_height else "new_height"
        raise LayerError(
            f"layer '{layer.name}': new_height and new_width must be given together",
            field=("image_data_param", missing),
        )
    images = ImageList(param.source, root=param.root_folder)
    more: dict[str, Any] = {"shuffle": param.shuffle, "rand_skip": param.rand_skip}
    order = _order(layer, [len(images)], batch, seed, share, **more)
    size = (param.new_height, param.new_width) if param.new_height else None
    short, color = param.short_side, param.is_color
    return ImageBatches(images, order, _transform(layer), shapes, size=size, short=short, color=color)


def _probe_images(layer: Any) -> list[Shape]:
    n = _batch_size(layer, layer.proto.image_data_param, "image_data_param")
    batches = _image_batches(layer, [], 0, Share(), n)
    height, width, channels = batches.image(0).shape
    return [(n, *batches.transform.shape((channels, height, width))), (n,)]


def _build_images(layer: Any, shapes: Sequence[Shape], seed: int, share: Share) -> tuple[Batches, int]:
    return _image_batches(layer, shapes, seed, share, shapes[0][0]), PREFETCH


# --- HDF5Data --------------------------------------------------------------------------------------------------------
def _hdf5_list(layer: Any) -> Any:
    from caffejacinto_py.data.hdf5 import HDF5List

    if layer.proto.HasField("transform_param"):
        raise LayerError(f"layer '{layer.name}': HDF5Data does not transform data", field=("transform_param",))
    return HDF5List(layer.proto.hdf5_data_param.source, list(layer.proto.top))


def _probe_hdf5(layer: Any) -> list[Shape]:
    n = _batch_size(layer, layer.proto.hdf5_data_param, "hdf5_data_param")
    return [(n, *shape) for shape in _hdf5_list(layer).row_shapes]


def _build_hdf5(layer: Any, shapes: Sequence[Shape], seed: int, share: Share) -> tuple[Batches, int]:
    from caffejacinto_py.data.hdf5 import HDF5Batches

    rows = _hdf5_list(layer)
    if [tuple(s[1:]) for s in shapes] != rows.row_shapes:
        raise DataError(f"{rows.source}: rows have shapes {rows.row_shapes}, the net expects {[s[1:] for s in shapes]}")
    shuffle = layer.proto.hdf5_data_param.shuffle
    order = _order(layer, rows.rows, shapes[0][0], seed, share, shuffle=shuffle)
    return HDF5Batches(rows, order, shapes), PREFETCH


# --- WindowData ------------------------------------------------------------------------------------------------------
def _probe_windows(layer: Any) -> list[Shape]:
    from caffejacinto_py.data.windows import WindowFile

    param, size = layer.proto.window_data_param, layer.proto.transform_param.crop_size
    WindowFile(param.source, fg=param.fg_threshold, bg=param.bg_threshold, first=True)
    n = _batch_size(layer, param, "window_data_param")
    return [(n, 3, size, size), (n,)]


def _build_windows(layer: Any, shapes: Sequence[Shape], seed: int, share: Share) -> tuple[Batches, int]:
    from caffejacinto_py.data.windows import Warp, WindowBatches, WindowFile, center

    param, transform = layer.proto.window_data_param, _transform(layer)
    for name in ("scale", "crop_size", "mean_file", "mirror"):  # Caffe reads scale in one place, the others in another
        place, other = ("transform_param", "window_data_param")[:: 1 if name == "scale" else -1]
        if getattr(layer.proto, place).HasField(name):
            log.warning("layer '%s': %s.%s has no effect, %s { %s } has", layer.name, place, name, other, name)
    file = WindowFile(param.source, fg=param.fg_threshold, bg=param.bg_threshold)
    size = shapes[0][-1]
    values = np.array(transform.mean_values, np.float32)[:, None, None] if transform.mean_values else None
    batches = WindowBatches(
        file,
        Order([1], batch=shapes[0][0], seed=seed, name=_stream(layer), **share._asdict()),
        Warp(size, param.context_pad, param.crop_mode == "square"),
        shapes,
        fg_fraction=param.fg_fraction,
        mirror=transform.mirror,
        mean=values if transform.mean is None else center(transform.mean, size),
        scale=param.scale,
        root=param.root_folder,
        cache=param.cache_images,
    )
    return batches, PREFETCH


# --- DummyData -------------------------------------------------------------------------------------------------------
class DummyBatches:
    """DummyData: no, one, or one filler per top (none: zeros). Constant tops are the same every batch, others are
    drawn anew.
    """

    def __init__(self, layer: Any, shapes: Sequence[Shape], seed: int, fill: Fill | None, share: Share = ALONE) -> None:
        fillers = list(layer.proto.dummy_data_param.data_filler)
        if len(fillers) not in (0, 1, len(shapes)):
            raise LayerError(
                f"layer '{layer.name}': {len(fillers)} data_filler entries for {len(shapes)} tops",
                field=("dummy_data_param", "data_filler"),
                hint="give none, one for all tops, or one per top",
            )
        self.shapes, self.seed, self.fill, self.name, self.share = tuple(shapes), seed, fill, _stream(layer), share
        self.fillers = fillers * len(shapes) if len(fillers) == 1 else fillers or [None] * len(shapes)

    def make(self, k: int) -> list[np.ndarray]:
        rng = generator(self.seed, self.name, 4, self.share.first + k * self.share.world + self.share.rank)
        return [np.ascontiguousarray(self._top(f, s, rng), np.float32) for f, s in zip(self.fillers, self.shapes)]

    def _top(self, filler: Any, shape: Shape, rng: np.random.Generator) -> np.ndarray:
        if filler is None:
            return np.zeros(shape, np.float32)
        if self.fill is not None:
            return self.fill(filler, shape, rng)
        if filler.type == "constant":
            return np.full(shape, filler.value, np.float32)
        if filler.type == "uniform":
            return rng.uniform(filler.min, filler.max, shape)
        if filler.type == "gaussian" and filler.sparse < 0:
            return rng.normal(filler.mean, filler.std, shape)
        raise LayerError(f"DummyData with a '{filler.type}' filler needs make_feeder(fill=...)")


def _stream(layer: Any) -> str:
    """Names the random streams of a layer: train and test nets often use one layer name twice."""
    return f"{layer.context.phase}/{layer.name}"


_PROBES: dict[str, Callable[[Any], list[Shape]]] = {
    "database": _probe_database,
    "images": _probe_images,
    "hdf5": _probe_hdf5,
    "windows": _probe_windows,
}
_BUILDERS: dict[str, Callable[..., tuple[Batches, int]]] = {
    "database": _build_database,
    "images": _build_images,
    "hdf5": _build_hdf5,
    "windows": _build_windows,
}
