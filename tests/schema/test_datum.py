"""Datum records: exactly the bytes of C++ Caffe's tools, and bounded parsing."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from caffejacinto_py.errors import DataError
from caffejacinto_py.schema import datum as module
from caffejacinto_py.schema import pb, wire
from caffejacinto_py.schema.datum import make_datum, parse_datum
from tests.conftest import shared


def test_mnist_records_are_those_of_the_reference_databases() -> None:
    """sha256 over key + value of all records, as golden/e2e/README.md gives it for mnist_test_lmdb."""
    import gzip

    folder = shared("data")
    found = sorted(p for p in folder.rglob("t10k-*ubyte*") if p.is_file())
    if len(found) < 2:
        pytest.skip("no MNIST idx files in the reference data")
    raw = {p.name[5:11]: gzip.decompress(p.read_bytes()) if p.suffix == ".gz" else p.read_bytes() for p in found}
    images = np.frombuffer(raw["images"], np.uint8, offset=16).reshape(-1, 1, 28, 28)
    labels = np.frombuffer(raw["labels"], np.uint8, offset=8)
    digest = hashlib.sha256()
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        digest.update(b"%08d" % i + make_datum(image, label=int(label)))
    assert digest.hexdigest().startswith("59cd19dd306b9987")


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 5, 7), (3, 256, 256)])
@pytest.mark.parametrize("label", [0, 9, -1, 2**31 - 1, -(2**31)])
def test_raw(shape: tuple[int, int, int], label: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    record = make_datum(image, label=label)
    c, h, w = shape
    assert record == pb.Datum(channels=c, height=h, width=w, data=image.tobytes(), label=label).SerializeToString()
    for given_as in (record, memoryview(record)):
        datum = parse_datum(given_as)
        assert (datum.channels, datum.height, datum.width, datum.label, datum.encoded) == (c, h, w, label, False)
        assert np.array_equal(datum.array(), image)
        assert datum.float_data is None


@pytest.mark.parametrize("size", [10, 100_000])
def test_encoded(size: int) -> None:
    record = make_datum(bytes(size), label=3)
    assert record == pb.Datum(data=bytes(size), label=3, encoded=True).SerializeToString()
    datum = parse_datum(record)
    assert (datum.encoded, datum.label, len(datum.data)) == (True, 3, size)
    with pytest.raises(DataError, match="encoded"):
        datum.array()


@pytest.mark.parametrize("shape", [(2, 3, 4), (3, 100, 100)])
def test_floats(shape: tuple[int, int, int]) -> None:
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    record = make_datum(values, label=1)
    c, h, w = shape
    want = pb.Datum(channels=c, height=h, width=w, label=1, float_data=values.reshape(-1).tolist())
    assert record == want.SerializeToString()
    assert np.array_equal(parse_datum(record).array(), values)


BAD = [
    (b"", "holds no data"),
    (wire.uint(1, 1) + wire.uint(2, 2) + wire.uint(3, 2) + wire.block(4, bytes(3)), "announces 1 x 2 x 2.*holds 3"),
    (wire.uint(1, 0) + wire.uint(2, 2) + wire.uint(3, 2) + wire.block(4, b""), "holds no data"),
    (wire.uint(1, -1) + wire.uint(2, -1) + wire.uint(3, 1) + wire.block(4, b"x"), "announces -1 x -1 x 1"),
    (wire.uint(1, 2**30) + wire.uint(2, 2**30) + wire.uint(3, 2**30) + wire.block(4, b"x"), "holds 1"),
    (wire.uint(7, 1), "holds no bytes"),
    (wire.block(4, b"\xff\xd8\xff\xe0...."), "not marked `encoded`"),
    (wire.uint(1, 1) + wire.header(4, 2**31) + b"abc", "not a whole Datum"),
    (b"\xff" * 30, "not a whole Datum"),
    (wire.block(1, make_datum(np.zeros((1, 2, 2), np.uint8))), "AnnotatedDatum"),
    (wire.uint(1, 1) + wire.uint(2, 1) + wire.uint(3, 1) + wire.block(4, b"x") + wire.block(6, bytes(4)), "both"),
]


@pytest.mark.parametrize(("record", "text"), BAD)
@pytest.mark.parametrize("by_hand", [False, True])
def test_bad_records(record: bytes, text: str, by_hand: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LARGE", -1 if by_hand else 1 << 30)
    with pytest.raises(DataError, match=text):
        parse_datum(record)


def test_arrays_that_no_record_can_hold() -> None:
    with pytest.raises(DataError, match="channels x height x width"):
        make_datum(np.zeros((2, 2), np.uint8))
    with pytest.raises(DataError, match="uint8 or float"):
        make_datum(np.zeros((1, 2, 2), np.int64))


_FIELDS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from([1, 2, 3, 5, 7, 8, 9]), st.integers(0, 2**64 - 1)).map(lambda t: wire.uint(*t)),
        st.tuples(st.sampled_from([4, 6, 9]), st.binary(max_size=12)).map(lambda t: wire.block(*t)),
        st.binary(min_size=4, max_size=4).map(lambda b: wire.tag(6, wire.I32) + b),
    ),
    max_size=8,
).map(b"".join)


@given(st.one_of(_FIELDS, st.binary(max_size=40)))
def test_both_parsers_agree(record: bytes) -> None:
    """Whatever the library accepts is read the same by hand (which also refuses groups and over-long tags)."""
    try:
        want = module._by_library(record)
    except DataError:
        return
    try:
        mine = module._by_hand(record)
    except DataError as e:
        if any(text in e.text for text in ("wire type", "not a whole number", "impossible")):
            return
        raise
    for name in ("channels", "height", "width", "label", "encoded", "record_id"):
        assert getattr(mine, name) == getattr(want, name)
    assert bytes(mine.data) == bytes(want.data)
    mine_floats, want_floats = (np.empty(0, "f") if x.float_data is None else x.float_data for x in (mine, want))
    assert np.array_equal(mine_floats, want_floats, equal_nan=True)
