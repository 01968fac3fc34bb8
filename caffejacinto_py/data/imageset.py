"""convert_imageset: a list of image files to an LMDB of Datums."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np

from caffejacinto_py.data.convert import LmdbWriter
from caffejacinto_py.data.datasets import Report, _silent
from caffejacinto_py.data.decode import decode, resize
from caffejacinto_py.data.order import generator
from caffejacinto_py.data.sources import ImageList
from caffejacinto_py.errors import DataError, UsageError
from caffejacinto_py.schema.datum import make_datum


@dataclass(frozen=True)
class ImageOptions:
    """What the flags of convert_imageset say. height, width: 0 keeps the size (Caffe resizes only where both are
    given).
    """

    gray: bool = False
    height: int = 0
    width: int = 0
    check_size: bool = False
    encoded: bool = False
    encode_type: str = ""


def convert_imageset(
    root: str,
    listfile: str,
    out: str,
    *,
    options: ImageOptions = ImageOptions(),
    shuffle: bool = False,
    seed: int = 0,
    skip_unreadable: bool = False,
    report: Report = _silent,
) -> int:
    """One record per line of `listfile`, key "%08d_path" with the line's place in the list. Returns the record count.

    shuffle: in an order drawn from `seed`. Raises DataError naming the line of a missing or damaged image, where
    Caffe leaves it out; `skip_unreadable` leaves it out and reports it.
    """
    if bool(options.height) != bool(options.width) or min(options.height, options.width) < 0:
        raise UsageError("--resize_height and --resize_width must be given together")
    images = ImageList(listfile, root=root)
    order = generator(seed, "convert_imageset", 0, 0).permutation(len(images)) if shuffle else range(len(images))
    report(f"A total of {len(images)} images.")
    first: tuple[int, ...] | None = None
    with LmdbWriter(out) as db:
        for place, ordinal in enumerate(order):
            try:
                value, shape = _value(images, int(ordinal), options)
            except DataError as error:
                if not skip_unreadable:
                    raise
                report(f"left out: {error}")
                continue
            first = first or shape
            if options.check_size and shape != first:
                raise DataError(
                    f"{images.where(int(ordinal))} is {_by(shape)}, the first image is {_by(first)}",
                    hint="resize with --resize_height and --resize_width, or drop --check_size",
                )
            db.put(os.fsencode(f"{place:08d}_{images.names[ordinal]}"), value)
            if db.count % 1000 == 0:
                report(f"Processed {db.count} files.")
    report(f"Processed {db.count} files.")
    return db.count


def _value(images: ImageList, ordinal: int, options: ImageOptions) -> tuple[bytes, tuple[int, ...]]:
    """The Datum of one image, and the image's shape C,H,W."""
    raw, label = images.read(ordinal), int(images.labels[ordinal])
    name = images.names[ordinal]
    image = decode(raw, color=not options.gray, where=lambda: images.where(ordinal))
    if options.height:
        image = resize(image, options.height, options.width)
    shape = (image.shape[2], *image.shape[:2])
    if not (options.encoded or options.encode_type):
        return make_datum(np.ascontiguousarray(image.transpose(2, 0, 1)), label=label), shape
    kind = options.encode_type.lstrip(".").lower() or os.path.splitext(name)[1].lstrip(".").lower()
    if not kind:
        raise DataError(
            f"{images.where(ordinal)}: cannot tell the encoding from the name", hint="give --encode_type=jpg"
        )
    if not options.height and not options.gray and _same_kind(name, kind):
        return make_datum(raw, label=label), shape  # the file as it is: no second loss
    import cv2

    try:
        done, packed = cv2.imencode(f".{kind}", image)
    except cv2.error as error:
        raise UsageError(f"OpenCV cannot encode '{kind}'", hint="use --encode_type=jpg or png") from error
    if not done:
        raise DataError(f"{images.where(ordinal)}: encoding as {kind} failed")
    return make_datum(packed.tobytes(), label=label), shape


def _same_kind(name: str, kind: str) -> bool:
    extension = os.path.splitext(name)[1].lstrip(".").lower()
    return extension.replace("jpeg", "jpg") == kind.replace("jpeg", "jpg")


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
