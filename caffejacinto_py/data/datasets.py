"""Data sets to LMDBs: MNIST idx files, CIFAR-10 binary batches, lists of images, scikit-learn's digits; and the mean
image.
"""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Callable, Iterable
from contextlib import ExitStack

import numpy as np

from caffejacinto_py.data.batches import datum_image, parse_record
from caffejacinto_py.data.convert import LmdbWriter, refuse_existing
from caffejacinto_py.data.sources import Database, relative_hint
from caffejacinto_py.errors import DataError
from caffejacinto_py.schema.datum import make_datum

Report = Callable[[str], None]
_IDX_IMAGES, _IDX_LABELS = 2051, 2049
_CIFAR_RECORD = 1 + 3 * 32 * 32


def _silent(text: str) -> None:
    pass


def write_arrays(
    path: str, images: np.ndarray, labels: Iterable[int], *, key: str = "%08d", report: Report = _silent
) -> int:
    """An LMDB of raw Datums: images N,C,H,W uint8, one label each, keys from the record number. Returns the record
    count.
    """
    with LmdbWriter(path) as db:
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            db.put((key % i).encode(), make_datum(image, label=int(label)))
            if db.count % 10000 == 0:
                report(f"Processed {db.count} files.")
    report(f"Wrote {db.count} records to {path}")
    return db.count


# --- MNIST -----------------------------------------------------------------------------------------------------------
def convert_mnist(images: str, labels: str, out: str, *, limit: int | None = None, report: Report = _silent) -> int:
    """The LMDB of a pair of idx files (plain or .gz): keys "%08d" in file order, 1 channel. Returns the record count.

    limit: only the first so many. Raises DataError for a missing, truncated or swapped file, or counts that differ.
    """
    pixels = _idx(images, _IDX_IMAGES, axes=3)
    classes = _idx(labels, _IDX_LABELS, axes=1)
    if len(pixels) != len(classes):
        raise DataError(
            f"{images} has {len(pixels)} images, {labels} has {len(classes)} labels", hint="do they belong together?"
        )
    report(f"A total of {len(pixels)} items. Rows: {pixels.shape[1]} Cols: {pixels.shape[2]}")
    return write_arrays(out, pixels[:limit, None], classes[:limit].tolist(), report=report)


def _idx(path: str, magic: int, *, axes: int) -> np.ndarray:
    """An idx file: big-endian magic number, one size per axis, then bytes."""
    raw = _contents(path)
    kinds = {_IDX_IMAGES: "an image file", _IDX_LABELS: "a label file"}
    head = 4 + 4 * axes
    found = int.from_bytes(raw[:4], "big")
    if len(raw) < 4 or found != magic:
        hint = f"this is {kinds[found]}: the order is IMAGES LABELS OUT" if found in kinds else None
        raise DataError(f"{path}: not {kinds[magic]} of MNIST (magic number {found}, not {magic})", hint=hint)
    sizes = [int.from_bytes(raw[i : i + 4], "big") for i in range(4, head, 4)]
    count = int(np.prod(sizes, dtype=object))
    if len(raw) != head + count:
        raise DataError(
            f"{path}: truncated or damaged: {len(raw)} bytes, its header says {head + count}", hint="download it again"
        )
    return np.frombuffer(raw, np.uint8, count, head).reshape(sizes)


def _contents(path: str) -> bytes:
    try:
        with open(path, "rb") as f:
            packed = f.read(2) == b"\x1f\x8b"
        with gzip.open(path) if packed else open(path, "rb") as f:
            return f.read()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: damaged gzip file: {error}", hint="download it again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot read: {error.strerror}", hint=relative_hint(path)) from error


# --- CIFAR-10 --------------------------------------------------------------------------------------------------------
def convert_cifar(folder: str, out: str, *, report: Report = _silent) -> tuple[int, int]:
    """`out`/cifar10_train_lmdb (data_batch_1..5.bin) and `out`/cifar10_test_lmdb (test_batch.bin): keys "%05d", file
    order.

    Channels R, G, B as stored. Returns both record counts. Raises DataError for missing or truncated files, before
    writing.
    """
    train = np.concatenate([_cifar(folder, f"data_batch_{i}.bin") for i in range(1, 6)])
    test = _cifar(folder, "test_batch.bin")
    places = [os.path.join(out, f"cifar10_{part}_lmdb") for part in ("train", "test")]
    counts = []
    with ExitStack() as stack:  # both are opened, so both are checked, before the first record is written
        databases = [stack.enter_context(LmdbWriter(p)) for p in places]
        for db, records in zip(databases, (train, test)):
            report(f"Writing {db.path}")
            for i, record in enumerate(records):
                db.put(b"%05d" % i, make_datum(record[1:].reshape(3, 32, 32), label=int(record[0])))
            counts.append(db.count)
    return counts[0], counts[1]


def _cifar(folder: str, name: str) -> np.ndarray:
    path = os.path.join(folder, name)
    raw = _contents(path)
    if not raw or len(raw) % _CIFAR_RECORD:
        raise DataError(
            f"{path}: {len(raw)} bytes are no whole number of records of {_CIFAR_RECORD}", hint="download it again"
        )
    records = np.frombuffer(raw, np.uint8).reshape(-1, _CIFAR_RECORD)
    if records[:, 0].max() > 9:
        raise DataError(
            f"{path}: label {records[:, 0].max()} in a CIFAR-10 file", hint="take the 'binary version' of CIFAR-10"
        )
    return records


# --- digits ----------------------------------------------------------------------------------------------------------
def make_digits(
    out: str, *, size: int = 28, test: int = 360, seed: int = 0, report: Report = _silent
) -> tuple[int, int]:
    """`out`/digits_train_lmdb and `out`/digits_test_lmdb: scikit-learn's 1,797 bundled digits, enlarged from 8x8, 10
    classes.

    size: pixels a side (28 as MNIST, so that LeNet works). The split is a fixed permutation of the seed. Returns both
    counts. Raises DataError without scikit-learn (extra `demo`).
    """
    import cv2

    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            "the digits come with scikit-learn, which is not installed", hint="pip install 'caffejacinto-py[demo]'"
        ) from error
    digits = load_digits()
    if not 0 < test < len(digits.images):
        raise DataError(f"{test} test images of {len(digits.images)}")
    grey = [
        cv2.resize(d.astype(np.float32) * (255 / 16), (size, size), interpolation=cv2.INTER_CUBIC)
        for d in digits.images
    ]
    images = np.clip(np.rint(np.stack(grey)), 0, 255).astype(np.uint8)[:, None]
    order = np.random.default_rng(seed).permutation(len(images))
    try:
        os.makedirs(out, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot make the directory '{out}': {error.strerror}") from error
    counts = []
    places = [os.path.join(out, f"digits_{part}_lmdb") for part in ("train", "test")]
    for path in places:  # both, before the first is written
        refuse_existing(path)
    for path, chosen in zip(places, (order[test:], order[:test])):
        counts.append(write_arrays(path, images[chosen], digits.target[chosen].tolist(), report=report))
    return counts[0], counts[1]


# --- mean ------------------------------------------------------------------------------------------------------------
def compute_image_mean(database: str, out: str | None = None, *, report: Report = _silent) -> np.ndarray:
    """The mean image of an LMDB: C,H,W float32; with `out`, written as a .binaryproto with shape 1,C,H,W.

    Encoded records are decoded as stored. Sums are exact integers (Caffe adds float32: the same up to 65,793
    records). Raises DataError for records of different sizes.
    """
    from caffejacinto_py.schema.blobs import write_blob

    source = Database(database)
    total: np.ndarray | None = None
    for start in range(0, len(source), 100):
        ordinals = range(start, min(start + 100, len(source)))
        with source.read(ordinals) as values:
            for i, value in zip(ordinals, values):
                image = datum_image(parse_record(source, i, value), None, lambda i=i: source.where(i))  # type: ignore[misc]
                if total is None:
                    total = np.zeros(image.shape, np.int64 if image.dtype == np.uint8 else np.float64)
                if image.shape != total.shape:
                    raise DataError(
                        f"{source.where(i)} is {image.shape}, {source.where(0)} is {total.shape}",
                        hint="a mean image needs records of one size: convert with --resize_height and --resize_width",
                    )
                total = total + image if image.dtype != np.uint8 else np.add(total, image, out=total)
        if (start + 100) % 10000 == 0:
            report(f"Processed {start + 100} files.")
    assert total is not None
    mean = (total.astype(np.float32) / np.float32(len(source))).astype(np.float32)
    if out:
        write_blob(out, mean[None])
        report(f"Write to {out}")
    return mean
