"""Data sources: layers without bottoms. The engine feeds their tops, so they have no module.

With `Context.probe` the data itself gives the shapes; without it (nothing may be opened) the fields do, and what they
cannot tell is left to the consumers: see `Source.assumed`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from caffejacinto_py.layers.base import Layer, Shape
from caffejacinto_py.layers.registry import layer
from caffejacinto_py.schema import pb


class Source(Layer):
    """Base of all sources."""

    def check(self) -> None:
        """Raise LayerError for fields that are missing or contradict each other."""

    def assumed(self, ntop: int) -> list[Shape | None]:
        """Top shapes by the fields alone; None: the consumer of that top decides (`Layer.expects`), else (batch,)."""
        raise NotImplementedError(self.type)

    def constants(self) -> list[float | None]:
        """For each top the value that it holds until somebody writes into it; None: filled anew for every batch."""
        return [None] * self.ntop

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        self.check()
        if self.context.probe:
            return [tuple(s) for s in self.context.probe(self)]
        found = self.assumed(self.ntop)
        batch = next((s[0] for s in found if s), 1)
        return [(self.fallback() or (batch,)) if s is None else s for s in found]

    def _positive(self, *names: str) -> None:
        for name in names:
            if getattr(self.param, name) < 1:
                given = self.param.HasField(name)
                text = f"{name} must be at least 1" if given else f"{self.field} needs {name}"
                raise self.fail(text, str(self.field), name)

    def _source(self) -> None:
        if not self.param.source:
            raise self.fail(f"{self.field} needs source", str(self.field), "source")


class Files(Source):
    """Base of the sources that read files: batch_size and source are required."""

    def check(self) -> None:
        self._source()
        self._positive("batch_size")
        self._transform()

    def _transform(self) -> None:
        t = self.proto.transform_param
        if t.HasField("mean_file") and t.mean_value:
            text = "give mean_file or mean_value, not both"
            raise self.fail(text, "transform_param", "mean_value", 0)
        if t.HasField("crop_h") != t.HasField("crop_w"):
            given = "crop_h" if t.HasField("crop_h") else "crop_w"
            raise self.fail("give crop_h and crop_w, or neither", "transform_param", given)
        if t.force_color and t.force_gray:
            raise self.fail("give force_color or force_gray, not both", "transform_param", "force_gray")

    def assumed(self, ntop: int) -> list[Shape | None]:
        self.check()
        image: Shape = (self.param.batch_size, self._channels(), *self._size())
        return [image, None][:ntop]

    def _channels(self) -> int:
        t = self.proto.transform_param
        if t.force_gray:
            return 1
        if t.force_color:
            return 3
        return len(t.mean_value) if len(t.mean_value) > 1 else self.context.data_shape[0]

    def _size(self) -> tuple[int, int]:
        """Height and width after the transformation: the crop, else the resize, else what the data has."""
        t = self.proto.transform_param
        if t.crop_h and t.crop_w:
            return t.crop_h, t.crop_w
        if t.crop_size:
            return t.crop_size, t.crop_size
        r = t.resize_param
        if t.HasField("resize_param") and r.height and r.width:
            return r.height, r.width
        return self._stored_size()

    def _stored_size(self) -> tuple[int, int]:
        return self.context.data_shape[-2], self.context.data_shape[-1]


@layer("Data", v1="DATA", bottoms=(0, 0), tops=(1, 2), field="data_param")
class Data(Files):
    """Records of a database, in key order, batch after batch, wrapping around.

    Tops: data (batch, C, H, W); optionally label (batch). data_param: source (directory), batch_size, both required;
    backend. transform_param: crop, mirror, mean, scale and so on. Source: BVLC data_layer.
    """

    quantizes = "source"

    source = "database"

    def assumed(self, ntop: int) -> list[Shape | None]:
        """Without labels the records may be anything, such as another net's features: the reader decides."""
        t = self.proto.transform_param
        told = bool(t.crop_size or t.crop_h or t.HasField("resize_param") or t.mean_value or t.force_color)
        found = super().assumed(ntop)
        return found if ntop > 1 or told or t.force_gray else [None]

    def fallback(self) -> Shape | None:
        return super().assumed(1)[0] if self.ntop == 1 else None


@layer("ImageData", v1="IMAGE_DATA", bottoms=(0, 0), tops=(2, 2), field="image_data_param")
class ImageData(Files):
    """Images named by a text file, one `path label` a line.

    Tops: data (batch, C, H, W), label (batch). image_data_param: source (the list, required), batch_size (1),
    root_folder, new_height and new_width (both or neither: resize), is_color (true), shuffle, rand_skip. Source: BVLC
    image_data_layer.
    """

    quantizes = "source"

    source = "images"

    def check(self) -> None:
        super().check()
        if bool(self.param.new_height) != bool(self.param.new_width):
            given = "new_height" if self.param.new_height else "new_width"
            raise self.fail("give new_height and new_width, or neither", "image_data_param", given)

    def _channels(self) -> int:
        return 3 if self.param.is_color else 1

    def _stored_size(self) -> tuple[int, int]:
        if self.param.new_height:
            return self.param.new_height, self.param.new_width
        return super()._stored_size()


@layer("HDF5Data", v1="HDF5_DATA", bottoms=(0, 0), tops=(1, None), field="hdf5_data_param")
class HDF5Data(Files):
    """Rows of HDF5 files: one dataset a top, named like the top.

    Tops: (batch, ...) as the datasets have it. hdf5_data_param: source (text file that lists the HDF5 files),
    batch_size, both required; shuffle (false). transform_param is refused, as in Caffe. Source: BVLC hdf5_data_layer.
    """

    quantizes = "source"

    source = "hdf5"

    def _transform(self) -> None:
        if self.proto.HasField("transform_param"):
            raise self.fail("HDF5Data does not transform its data: remove transform_param", "transform_param")

    def assumed(self, ntop: int) -> list[Shape | None]:
        self.check()
        return [(self.param.batch_size, *self.context.data_shape), *[None] * (ntop - 1)]


@layer("WindowData", v1="WINDOW_DATA", bottoms=(0, 0), tops=(2, 2), field="window_data_param")
class WindowData(Files):
    """Windows of images, cropped and warped to a square: a share of each batch shows objects (R-CNN).

    Tops: data (batch, 3, crop_size, crop_size), BGR; label (batch). Each batch draws its windows at random: first
    batch - int(batch * fg_fraction) background windows (label 0), then the foreground ones.
    window_data_param: source (the window file: `# number`, path, channels, height, width, count, then a line
    `class overlap x1 y1 x2 y2` a window), batch_size, both required; fg_threshold (0.5): foreground windows overlap an
    object at least so much; bg_threshold (0.5): background windows less; fg_fraction (0.25); context_pad (0): so many
    pixels of the crop show what is around the window; crop_mode ("warp", or "square": keeps the aspect); scale (1);
    root_folder; cache_images (false): keep the files in memory. transform_param: crop_size (required), mirror, and
    mean_file (its centre) or mean_value; what lies outside the image is the mean. Its scale has no effect, nor have
    crop_size, mean_file and mirror in window_data_param. Source: BVLC window_data_layer.

    Deviation: a window belongs to the block in which it stands, whatever number the block has.
    """

    quantizes = "source"

    source = "windows"

    def check(self) -> None:
        super().check()
        p, t, at = self.param, self.proto.transform_param, "window_data_param"
        if t.HasField("crop_h") or t.force_gray:
            text, given = "WindowData gives square images in color", "force_gray" if t.force_gray else "crop_h"
            raise self.fail(text, "transform_param", given, hint="use crop_size alone")
        if not t.crop_size:
            raise self.fail(
                "the size of the warped windows is missing",
                "transform_param",
                hint="transform_param { crop_size: 227 }",
            )
        if len(t.mean_value) not in (0, 1, 3):
            raise self.fail("give 1 or 3 mean_value", "transform_param", "mean_value", 0)
        if 2 * p.context_pad >= t.crop_size:
            text = f"context_pad {p.context_pad} on both sides leaves nothing of crop_size {t.crop_size}"
            raise self.fail(text, at, "context_pad")
        if p.crop_mode not in ("warp", "square"):
            raise self.fail(f"crop_mode is 'warp' or 'square', not '{p.crop_mode}'", at, "crop_mode")
        if not 0 <= p.fg_fraction <= 1:
            raise self.fail(f"fg_fraction must be in 0..1, not {p.fg_fraction:g}", at, "fg_fraction")

    def assumed(self, ntop: int) -> list[Shape | None]:
        self.check()
        n, size = self.param.batch_size, self.proto.transform_param.crop_size
        shapes: list[Shape | None] = [(n, 3, size, size), (n,)]
        return shapes[:ntop]


class Described(Source):
    """Base of the sources whose shapes stand in the prototxt: nothing has to be opened."""

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        self.check()
        return self.described()

    def described(self) -> list[Shape]:
        raise NotImplementedError(self.type)

    def assumed(self, ntop: int) -> list[Shape | None]:
        return list(self.shapes([]))

    def _dims(self, shape: Any, *at: str | int) -> Shape:
        dims = tuple(int(d) for d in shape.dim)
        for i, d in enumerate(dims):
            if d < 1:
                raise self.fail(f"dim {d} of shape {dims} must be at least 1", *at, "dim", i)
        return dims

    def _one_or_all(self, given: list[Shape]) -> list[Shape]:
        return given * self.ntop if len(given) == 1 else given


@layer("Input", bottoms=(0, 0), tops=(1, None), field="input_param")
class Input(Described):
    """Blobs that the caller fills. input_param: shape, one for all tops or one a top. Source: BVLC input_layer.

    Deviation: Caffe accepts no shape at all and waits for a reshape; here a shape is required.
    """

    quantizes = "input"

    source = "input"

    def check(self) -> None:
        n = len(self.param.shape)
        if n == 0:
            raise self.fail(
                "input_param has no shape",
                "input_param",
                hint="write e.g. input_param { shape { dim: 1 dim: 3 dim: 224 dim: 224 } }",
            )
        if n not in (1, self.ntop):
            text = f"{n} shapes for {self.ntop} tops: give one for all or one a top"
            raise self.fail(text, "input_param", "shape", 0)

    def described(self) -> list[Shape]:
        return self._one_or_all([self._dims(s, "input_param", "shape", i) for i, s in enumerate(self.param.shape)])


@layer("MemoryData", v1="MEMORY_DATA", bottoms=(0, 0), tops=(2, 2), field="memory_data_param")
class MemoryData(Described):
    """Arrays handed over by the program. Tops: data (batch, C, H, W), label (batch).

    memory_data_param: batch_size, channels, height, width, all required: the size after transform_param.
    Source: BVLC memory_data_layer.
    """

    quantizes = "source"

    source = "memory"

    def check(self) -> None:
        self._positive("batch_size", "channels", "height", "width")

    def described(self) -> list[Shape]:
        p = self.param
        return [(p.batch_size, p.channels, p.height, p.width), (p.batch_size,)]


@layer("DummyData", v1="DUMMY_DATA", bottoms=(0, 0), tops=(1, None), field="dummy_data_param")
class DummyData(Described):
    """Blobs filled by fillers: constants once, random ones anew for every batch.

    dummy_data_param: data_filler, none (constant 0), one for all tops or one a top; shape, one for all or one a top;
    or the deprecated num, channels, height, width, each one for all or one a top. Source: BVLC dummy_data_layer.
    """

    quantizes = "source"

    source = "dummy"

    def check(self) -> None:
        p, n, at = self.param, self.ntop, "dummy_data_param"
        if len(p.data_filler) not in (0, 1, n):
            text = f"{len(p.data_filler)} data_filler for {n} tops: give none, one for all or one a top"
            raise self.fail(text, at, "data_filler", 0)
        old = [f for f in ("num", "channels", "height", "width") if getattr(p, f)]
        if old and p.shape:
            raise self.fail("give shape, or num, channels, height and width, not both", at, old[0], 0)
        if not old and not p.shape:
            raise self.fail("dummy_data_param has no shape", at, hint="write e.g. shape { dim: 10 dim: 3 }")
        for name in ("num", "channels", "height", "width") if old else ("shape",):
            found = len(getattr(p, name))
            if found not in (1, n):
                raise self.fail(f"{found} {name} for {n} tops: give one for all or one a top", at, name)

    def constants(self) -> list[float | None]:
        fillers = list(self.param.data_filler) or [pb.FillerParameter()]
        values = [f.value if f.type == "constant" else None for f in fillers]
        return values * self.ntop if len(values) == 1 else values

    def described(self) -> list[Shape]:
        p, at = self.param, "dummy_data_param"
        if p.shape:
            return self._one_or_all([self._dims(s, at, "shape", i) for i, s in enumerate(p.shape)])
        columns = [[*c] * self.ntop if len(c) == 1 else [*c] for c in (p.num, p.channels, p.height, p.width)]
        for name, column in zip(("num", "channels", "height", "width"), columns):
            if min(column) < 1:
                raise self.fail(f"{name} must be at least 1", at, name, 0)
        return [tuple(int(v) for v in s) for s in zip(*columns)]
