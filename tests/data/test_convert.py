"""Converters: contents to the byte, whole databases or none, and input that is not what it should be."""

from __future__ import annotations

import functools
import gzip
import hashlib
import os
from pathlib import Path

import cv2
import lmdb
import numpy as np
import pytest

from caffejacinto_py.data import convert
from caffejacinto_py.data.convert import LmdbWriter
from caffejacinto_py.data.datasets import compute_image_mean, convert_cifar, convert_mnist, make_digits, write_arrays
from caffejacinto_py.data.imageset import ImageOptions, convert_imageset
from caffejacinto_py.data.sources import Database
from caffejacinto_py.errors import CaffeError, DataError, UsageError
from caffejacinto_py.schema.blobs import read_blob
from caffejacinto_py.schema.datum import make_datum, parse_datum
from tests.conftest import shared

from .helpers import images, picture, raw_lmdb


def digest(path: object) -> str:
    """sha256 over all key and value bytes in order: the first 16 digits."""
    total = hashlib.sha256()
    with lmdb.open(str(path), readonly=True, lock=False) as env, env.begin() as txn:
        for key, value in txn.cursor():
            total.update(key + value)
    return total.hexdigest()[:16]


def records(path: object) -> list[tuple[bytes, object]]:
    with lmdb.open(str(path), readonly=True, lock=False) as env, env.begin() as txn:
        return [(k, parse_datum(v)) for k, v in txn.cursor()]


# --- the writer ------------------------------------------------------------------------------------------------------
def test_writer_grows_the_map_and_keeps_the_files_of_an_ordinary_lmdb(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(convert, "COMMIT_BYTES", 30 << 20)
    value = os.urandom(1 << 20)
    with LmdbWriter(str(tmp_path / "db")) as db:
        for i in range(150):
            db.put(b"%08d" % i, value)
    assert sorted(os.listdir(tmp_path)) == ["db"]
    assert sorted(os.listdir(tmp_path / "db")) == ["data.mdb", "lock.mdb"]
    assert len(Database(str(tmp_path / "db"))) == 150
    with Database(str(tmp_path / "db")).read([149]) as (last,):
        assert bytes(last) == value


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_writer_leaves_nothing_after_an_error(tmp_path: Path, error: type[BaseException]) -> None:
    def interrupted() -> None:
        with LmdbWriter(str(tmp_path / "db")) as db:
            for i in range(2500):
                db.put(b"%08d" % i, b"x" * 100)
            raise error

    with pytest.raises(error):
        interrupted()
    assert os.listdir(tmp_path) == []


def test_writer_refuses(tmp_path: Path) -> None:
    raw_lmdb(tmp_path / "db", 2)
    before = digest(tmp_path / "db")
    with pytest.raises(DataError, match="exists already") as info:
        LmdbWriter(str(tmp_path / "db") + "/")
    assert "rm -r" in str(info.value.hint)
    assert digest(tmp_path / "db") == before
    with pytest.raises(CaffeError, match="No such file") as info2:
        LmdbWriter(str(tmp_path / "no" / "db"))
    assert "mkdir -p" in str(info2.value.hint)
    with pytest.raises(DataError, match="no records"), LmdbWriter(str(tmp_path / "none")):
        pass
    with pytest.raises(DataError, match="key of 600 bytes"), LmdbWriter(str(tmp_path / "long")) as db:
        db.put(b"k" * 600, b"")
    twice = LmdbWriter(str(tmp_path / "twice"))
    twice.put(b"k", b"1")
    with pytest.raises(DataError, match="two records"), twice:
        twice.put(b"k", b"2")
    with pytest.raises(UsageError, match="leveldb"):
        convert.check_backend("leveldb")
    assert os.listdir(tmp_path) == ["db"]


def test_writer_names_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: LmdbWriter) -> None:
        raise self._failed(lmdb.DiskError("mdb_txn_commit: No space left on device"))

    monkeypatch.setattr(LmdbWriter, "_commit", full)
    with pytest.raises(CaffeError, match="No space left") as info, LmdbWriter(str(tmp_path / "db")) as db:
        db.put(b"k", b"v")
    assert "MiB are free" in str(info.value.hint)
    assert os.listdir(tmp_path) == []


# --- MNIST -----------------------------------------------------------------------------------------------------------
MNIST = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz", "c24e9fc29a113e74", 60000),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz", "59cd19dd306b9987", 10000),
}


@pytest.mark.parametrize("part", [pytest.param("train", marks=pytest.mark.slow), "test"])
def test_mnist_equals_the_reference_byte_for_byte(tmp_path: Path, part: str) -> None:
    """The checksums are those of the LMDBs that C++ Caffe trained from (golden/e2e)."""
    pixels, labels, want, count = MNIST[part]
    folder = shared("data/mnist")
    assert convert_mnist(str(folder / pixels), str(folder / labels), str(tmp_path / "db")) == count
    assert digest(tmp_path / "db") == want


def idx(data: np.ndarray, magic: int) -> bytes:
    return magic.to_bytes(4, "big") + b"".join(n.to_bytes(4, "big") for n in data.shape) + data.tobytes()


@pytest.fixture
def mnist(tmp_path: Path) -> tuple[np.ndarray, Path, Path]:
    made = images(20, 1, 6, 5)[:, 0]
    (tmp_path / "images").write_bytes(idx(made, 2051))
    (tmp_path / "labels.gz").write_bytes(gzip.compress(idx(np.arange(20, dtype=np.uint8), 2049)))
    return made, tmp_path / "images", tmp_path / "labels.gz"


def test_mnist_plain_and_gzipped(tmp_path: Path, mnist: tuple[np.ndarray, Path, Path]) -> None:
    made, pixels, labels = mnist
    assert convert_mnist(str(pixels), str(labels), str(tmp_path / "db"), limit=12) == 12
    for i, (key, datum) in enumerate(records(tmp_path / "db")):
        assert key == b"%08d" % i
        assert datum.label == i  # type: ignore[attr-defined]
        np.testing.assert_array_equal(datum.array()[0], made[i])  # type: ignore[attr-defined]


def test_bad_mnist_files(tmp_path: Path, mnist: tuple[np.ndarray, Path, Path]) -> None:
    _, pixels, labels = mnist
    whole, packed = pixels.read_bytes(), labels.read_bytes()
    run = functools.partial(convert_mnist, str(pixels), str(labels), str(tmp_path / "db"))
    with pytest.raises(DataError, match="not an image file") as info:
        convert_mnist(str(labels), str(pixels), str(tmp_path / "db"))
    assert "IMAGES LABELS OUT" in str(info.value.hint)
    for broken, message in [(whole[:-1], "truncated"), (whole[:10], "truncated"), (whole[:2], "magic"), (b"", "magic")]:
        pixels.write_bytes(broken)
        with pytest.raises(DataError, match=message):
            run()
    pixels.write_bytes(whole)
    for broken in (packed[:-9], packed[:20] + b"\xff\xff" + packed[22:]):
        labels.write_bytes(broken)
        with pytest.raises(DataError, match=r"damaged gzip|truncated"):
            run()
    labels.write_bytes(idx(np.zeros(19, np.uint8), 2049))
    with pytest.raises(DataError, match=r"20 images, .* 19 labels"):
        run()
    labels.unlink()
    with pytest.raises(DataError, match="No such file"):
        run()
    assert not (tmp_path / "db").exists()


# --- CIFAR -----------------------------------------------------------------------------------------------------------
def cifar(folder: Path, n: int = 4) -> np.ndarray:
    folder.mkdir()
    raw = np.random.default_rng(0).integers(0, 256, (6 * n, 3073), np.uint8)
    raw[:, 0] %= 10
    for i, name in enumerate([f"data_batch_{k}.bin" for k in range(1, 6)] + ["test_batch.bin"]):
        (folder / name).write_bytes(raw[i * n : (i + 1) * n].tobytes())
    return raw


def test_cifar(tmp_path: Path) -> None:
    raw = cifar(tmp_path / "in")
    (tmp_path / "out").mkdir()
    assert convert_cifar(str(tmp_path / "in"), str(tmp_path / "out")) == (20, 4)
    train, test = (records(tmp_path / "out" / f"cifar10_{p}_lmdb") for p in ("train", "test"))
    assert [k for k, _ in train] == [b"%05d" % i for i in range(20)]
    for (_, datum), want in zip([*train, *test], raw, strict=True):
        assert datum.label == want[0]  # type: ignore[attr-defined]
        assert datum.array().tobytes() == want[1:].tobytes()  # type: ignore[attr-defined]


@pytest.mark.parametrize("broken", ["missing", "cut", "label", "exists"])
def test_bad_cifar_writes_nothing(tmp_path: Path, broken: str) -> None:
    cifar(tmp_path / "in")
    (tmp_path / "out").mkdir()
    last = tmp_path / "in" / "test_batch.bin"
    if broken == "missing":
        last.unlink()
    elif broken == "cut":
        os.truncate(last, 3073 * 2 + 5)
    elif broken == "label":
        last.write_bytes(b"\x0a" + last.read_bytes()[1:])
    else:
        raw_lmdb(tmp_path / "out" / "cifar10_test_lmdb", 2)
    kept = os.listdir(tmp_path / "out")
    with pytest.raises(DataError, match=r"test_batch.bin|cifar10_test_lmdb"):
        convert_cifar(str(tmp_path / "in"), str(tmp_path / "out"))
    assert os.listdir(tmp_path / "out") == kept


def reference_cifar(name: str, strips: int) -> tuple[np.ndarray, list[int]]:
    """The first records of a batch file: strips of 500 RGB images as images N,3,32,32, and labels."""
    folder = shared("data/cifar10")
    rgb = [cv2.imread(str(folder / f"{name}_{i:02d}.webp"))[:, :, ::-1].reshape(500, 32, 32, 3) for i in range(strips)]
    labels = (folder / f"{name}.labels").read_bytes()[: 500 * strips]
    return np.concatenate(rgb).transpose(0, 3, 1, 2), list(labels)


def test_cifar_records_equal_the_reference(tmp_path: Path) -> None:
    write_arrays(str(tmp_path / "db"), *reference_cifar("test_batch", 2))
    assert digest(tmp_path / "db") == "f7b691bb5de8339d"


@pytest.mark.slow
def test_all_cifar_records_and_their_mean_equal_the_reference(tmp_path: Path) -> None:
    write_arrays(str(tmp_path / "db"), *reference_cifar("data_batch_1", 20))
    assert digest(tmp_path / "db") == "ea348e6b39502c07"
    compute_image_mean(str(tmp_path / "db"), str(tmp_path / "mean.binaryproto"))
    golden = shared("golden/e2e/cifar10_quick/mean.binaryproto")  # written by C++ Caffe's compute_image_mean
    assert (tmp_path / "mean.binaryproto").read_bytes() == golden.read_bytes()


# --- image sets ------------------------------------------------------------------------------------------------------
@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    (folder / "sub dir").mkdir(parents=True)
    for i in range(4):
        cv2.imwrite(str(folder / f"sub dir/{i}.png"), picture(i))
    cv2.imwrite(str(folder / "4.jpg"), picture(4))
    (folder / "list").write_text("".join(f"sub dir/{i}.png {i}\n" for i in range(4)) + "4.jpg 4\n")
    return folder


def imageset(folder: Path, out: Path, **options: object) -> list:  # type: ignore[type-arg]
    known = {k: options.pop(k) for k in ("shuffle", "seed", "skip_unreadable", "report") if k in options}
    convert_imageset(f"{folder}/", str(folder / "list"), str(out), options=ImageOptions(**options), **known)  # type: ignore[arg-type]
    return records(out)


def test_imageset_raw(tmp_path: Path, pictures: Path) -> None:
    found = imageset(pictures, tmp_path / "db")
    assert [k for k, _ in found][:2] == [b"00000000_sub dir/0.png", b"00000001_sub dir/1.png"]
    assert [d.label for _, d in found] == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(found[1][1].array(), picture(1).transpose(2, 0, 1))
    gray = imageset(pictures, tmp_path / "gray", gray=True, height=10, width=6)[0][1]
    want = cv2.resize(cv2.imread(str(pictures / "sub dir/0.png"), cv2.IMREAD_GRAYSCALE), (6, 10))
    np.testing.assert_array_equal(gray.array()[0], want)


def test_imageset_encoded(tmp_path: Path, pictures: Path) -> None:
    found = imageset(pictures, tmp_path / "db", encoded=True)
    assert all(d.encoded for _, d in found)
    assert bytes(found[4][1].data) == (pictures / "4.jpg").read_bytes()  # not compressed twice
    small = imageset(pictures, tmp_path / "small", encoded=True, height=5, width=5)
    assert cv2.imdecode(np.frombuffer(small[4][1].data, np.uint8), -1).shape == (5, 5, 3)
    as_jpg = imageset(pictures, tmp_path / "jpg", encode_type="jpg")
    assert all(bytes(d.data[:2]) == b"\xff\xd8" for _, d in as_jpg)


def test_imageset_shuffle(tmp_path: Path, pictures: Path) -> None:
    orders = [
        [d.label for _, d in imageset(pictures, tmp_path / f"{s}{t}", shuffle=True, seed=s)]
        for s in (1, 2)
        for t in "ab"
    ]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert sorted(orders[0]) == [0, 1, 2, 3, 4]


def test_imageset_refuses_bad_images(tmp_path: Path, pictures: Path) -> None:
    with (pictures / "list").open("a") as f:
        f.write("gone.png 5\n")
    with pytest.raises(DataError, match=r"list:6: image .*gone.png': No such file"):
        imageset(pictures, tmp_path / "db")
    assert not (tmp_path / "db").exists()
    lines: list[str] = []
    found = imageset(pictures, tmp_path / "db", skip_unreadable=True, report=lines.append)
    assert len(found) == 5
    assert any("left out" in line and "gone.png" in line for line in lines)
    cv2.imwrite(str(pictures / "gone.png"), picture(height=7))
    with pytest.raises(DataError, match="is 3x7x24, the first image is 3x20x24"):
        imageset(pictures, tmp_path / "sizes", check_size=True)
    with pytest.raises(UsageError, match="together"):
        imageset(pictures, tmp_path / "half", height=5)
    with pytest.raises(UsageError, match="cannot encode 'nope'"):
        imageset(pictures, tmp_path / "kind", encode_type="nope")


# --- mean, digits ----------------------------------------------------------------------------------------------------
def test_mean_of_raw_encoded_and_float_records(tmp_path: Path) -> None:
    stored = raw_lmdb(tmp_path / "raw", 250)
    mean = compute_image_mean(str(tmp_path / "raw"), str(tmp_path / "m.binaryproto"))
    np.testing.assert_allclose(mean, stored.mean(0), rtol=1e-6)
    assert read_blob(str(tmp_path / "m.binaryproto")).shape == (1, 3, 8, 9)
    with LmdbWriter(str(tmp_path / "mixed")) as db:
        db.put(b"0", make_datum(cv2.imencode(".png", picture(0))[1].tobytes()))
        db.put(b"1", make_datum(picture(1).transpose(2, 0, 1).astype(np.float32)))
    want = (picture(0).astype(float) + picture(1)).transpose(2, 0, 1) / 2
    np.testing.assert_allclose(compute_image_mean(str(tmp_path / "mixed")), want)
    with LmdbWriter(str(tmp_path / "sizes")) as db:
        db.put(b"a", make_datum(images(1)[0]))
        db.put(b"b", make_datum(images(1, height=5)[0]))
    with pytest.raises(DataError, match=r"'b' is .*'a' is"):
        compute_image_mean(str(tmp_path / "sizes"))


def test_digits(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    assert make_digits(str(tmp_path / "out")) == (1437, 360)
    train, test = (records(tmp_path / "out" / f"digits_{p}_lmdb") for p in ("train", "test"))
    shapes = {(d.channels, d.height, d.width) for _, d in train + test}
    assert shapes == {(1, 28, 28)}
    assert {d.label for _, d in test} == set(range(10))
    both = [bytes(d.data) for _, d in train + test]
    assert len(set(both)) > 1790
    first = digest(tmp_path / "out" / "digits_train_lmdb")
    make_digits(str(tmp_path / "again"))
    assert digest(tmp_path / "again" / "digits_train_lmdb") == first
    make_digits(str(tmp_path / "seed"), seed=1)
    assert digest(tmp_path / "seed" / "digits_train_lmdb") != first
    with pytest.raises(DataError, match="exists already"):
        make_digits(str(tmp_path / "out"))
