"""Batch k of each kind of source, as a pure function of (files, seed, k). Objects here can be pickled to a worker
process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from caffejacinto_py.data.decode import decode, resize, resize_short_side
from caffejacinto_py.data.order import Order
from caffejacinto_py.data.sources import Database, ImageList
from caffejacinto_py.data.stack import RawLayout
from caffejacinto_py.data.transform import Transform
from caffejacinto_py.errors import DataError
from caffejacinto_py.schema.datum import Datum, parse_datum

Shape = tuple[int, ...]


class Batches(Protocol):
    """What a feeder runs: `make(k)` returns one new float32 C-contiguous array per top. Safe to call from several
    threads.
    """

    @property
    def shapes(self) -> Sequence[Shape]: ...

    def make(self, k: int) -> list[np.ndarray]: ...


class DatabaseBatches:
    """Data layer: Datum records of an LMDB. Tops: images N,C,h,w and, if two, labels N."""

    def __init__(self, database: Database, order: Order, transform: Transform, shapes: Sequence[Shape]) -> None:
        self.database, self.order, self.transform, self.shapes = database, order, transform, tuple(shapes)
        self._layout: RawLayout | None = None  # set by the first batch, where records are raw
        self._looked = False

    def make(self, k: int) -> list[np.ndarray]:
        ordinals = self.order.records(k)
        n = len(ordinals)
        out = np.empty(self.shapes[0], np.float32)
        labels = np.empty(n, np.float32)
        draws = self.order.draws(k, self.transform.draws) if self.transform.random else np.empty((n, 1))
        with self.database.read(ordinals) as values:
            stacked = self._stack(values)
            if stacked:
                raw, labels[:] = stacked
                self._check(raw.shape[1:], ordinals[0])
                self.transform.apply(raw, draws, out)
            else:
                datums = [parse_record(self.database, ordinals[i], v) for i, v in enumerate(values)]
                labels[:] = [d.label for d in datums]
                self._one_by_one(datums, ordinals, draws, out)
        return [out, labels][: len(self.shapes)]

    def _stack(self, values: list[memoryview]) -> tuple[np.ndarray, list[int]] | None:
        """All records as one uint8 array, and labels, where all are raw bytes of the size of the first record."""
        if not self._looked:
            first = parse_first(self.database)
            raw = not first.encoded and first.float_data is None and not self.transform.random_resize
            self._layout = RawLayout((first.channels, first.height, first.width)) if raw else None
            self._looked = True
        return self._layout.stack(values) if self._layout else None

    def _one_by_one(self, datums: list[Datum], ordinals: np.ndarray, draws: np.ndarray, out: np.ndarray) -> None:
        transform = self.transform
        for i, (datum, ordinal) in enumerate(zip(datums, ordinals)):
            image = datum_image(datum, transform.color, lambda o=ordinal: self.database.where(o))  # type: ignore[misc]
            if transform.random_resize:
                image = transform.resized(image.transpose(1, 2, 0), draws[i]).transpose(2, 0, 1)
            self._check(image.shape, ordinal)
            transform.apply([image], draws[i : i + 1], out[i : i + 1], decoded=datum.encoded)

    def _check(self, image: Shape, ordinal: int) -> None:
        want = tuple(self.shapes[0][1:])
        fits = image[0] == want[0] and all(
            a >= b if self.transform.crop else a == b for a, b in zip(image[1:], want[1:])
        )
        if not fits:
            raise _size_error(self.database.where(ordinal), image, want, self.database.where(0), self.transform)


def parse_record(database: Database, ordinal: int, value: memoryview) -> Datum:
    """A record; DataError naming the database and the key when it is damaged."""
    try:
        return parse_datum(value)
    except DataError as error:
        raise DataError(f"{database.where(ordinal)}: {error.text}", hint=error.hint) from error


def parse_first(database: Database) -> Datum:
    """The first record, which decides the shapes; its data is a copy."""
    with database.read([0]) as (value,):
        return parse_record(database, 0, memoryview(bytes(value)))


def datum_image(datum: Datum, color: bool | None, where: Any) -> np.ndarray:
    """The image of a record as C,H,W: uint8, or float32 where it holds floats. Raises DataError naming the record."""
    if datum.encoded:
        return decode(datum.data, color=color, where=where).transpose(2, 0, 1)
    return datum.array()


def _size_error(where: str, image: Shape, want: Shape, first: str, transform: Transform) -> DataError:
    by = "x".join(map(str, image))
    wanted = "x".join(map(str, want))
    hint = "convert with --resize_height and --resize_width, or set transform_param { crop_size }"
    if image[0] != want[0]:
        hint = "set transform_param { force_color: true } or force_gray for encoded images, or convert with one of them"
    if transform.crop:
        return DataError(
            f"{where} is {by}, too small for a batch of {wanted} crops ({first} gave the shape)", hint=hint
        )
    return DataError(f"{where} is {by}, but {first} gave the net {wanted}", hint=hint)


class ImageBatches:
    """ImageData layer: image files named in a list. Tops: images N,C,h,w and labels N.

    size: (new_height, new_width) or None; short: NVCaffe's short_side; color: is_color.
    """

    def __init__(
        self,
        images: ImageList,
        order: Order,
        transform: Transform,
        shapes: Sequence[Shape],
        *,
        size: tuple[int, int] | None = None,
        short: int = 0,
        color: bool = True,
    ) -> None:
        self.images, self.order, self.transform, self.shapes = images, order, transform, tuple(shapes)
        self.size, self.short, self.color = size, short, color

    def image(self, ordinal: int) -> np.ndarray:
        """One image after the resize of image_data_param: uint8 H,W,C."""
        image = decode(self.images.read(ordinal), color=self.color, where=lambda: self.images.where(ordinal))
        if self.size:
            return resize(image, *self.size)
        return resize_short_side(image, self.short) if self.short else image

    def make(self, k: int) -> list[np.ndarray]:
        ordinals = self.order.records(k)
        out = np.empty(self.shapes[0], np.float32)
        draws = self.order.draws(k, self.transform.draws)
        want = tuple(self.shapes[0][1:])
        for i, ordinal in enumerate(ordinals):
            image = self.transform.resized(self.image(int(ordinal)), draws[i]).transpose(2, 0, 1)
            crop = self.transform.crop
            if image.shape != want and not (crop and image.shape[1] >= crop[0] and image.shape[2] >= crop[1]):
                where, first = self.images.where(int(ordinal)), self.images.where(0)
                error = _size_error(where, image.shape, want, first, self.transform)
                error.hint = error.hint if crop else "set image_data_param { new_height new_width }, or a crop_size"
                raise error
            self.transform.apply([image], draws[i : i + 1], out[i : i + 1], decoded=True)
        return [out, self.images.labels[ordinals]][: len(self.shapes)]
