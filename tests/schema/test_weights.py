"""Caffemodels: real files, files made by hand, and what is written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from caffejacinto_py.errors import CaffeError, Loc, UsageError, WeightsError
from caffejacinto_py.schema import pb, wire
from caffejacinto_py.schema.weights import LayerBlobs, ModelFile, read_model, shapes_match, write_model
from tests.conftest import SHARED, shared
from tests.schema.weights_helpers import by_protobuf, net_of, saved, shape

REAL = sorted(str(p.relative_to(SHARED)) for p in SHARED.glob("**/*.caffemodel"))
F = np.arange(6, dtype=np.float32)


def test_reference_files_are_there() -> None:
    shared("caffemodels")
    assert len(REAL) > 80


@pytest.mark.parametrize("name", REAL)
def test_real_files_read_as_protobuf_reads_them_and_rewrite_byte_for_byte(name: str, tmp_path: Path) -> None:
    path = shared(name)
    data = path.read_bytes()
    model = read_model(path)
    net = pb.NetParameter.FromString(data)
    assert [x.name for x in model.layers] == [x.name for x in net.layer]
    raw = b"".join(b.raw_data for x in net.layer for b in x.blobs) != b""  # NVCaffe's storage
    for mine, theirs in zip(model.layers, net.layer, strict=True):
        assert mine.type == theirs.type
        assert mine.bottoms == theirs.bottom
        assert mine.tops == theirs.top
        assert [b.shape for b in mine.blobs] == [tuple(b.shape.dim) for b in theirs.blobs]
        for blob, message in zip(mine.blobs, theirs.blobs, strict=True):
            assert blob.dtype == np.float32
            assert not blob.flags.writeable
            want = np.frombuffer(message.raw_data, "<f4") if raw else np.array(message.data, np.float32)
            assert np.array_equal(blob.reshape(-1), want)
    again = tmp_path / "again.caffemodel"
    write_model(again, model, raw=raw)
    assert again.read_bytes() == data
    for layer in model.layers:  # and after the messages were parsed into our schema
        assert layer.proto.name == layer.name
        assert not layer.proto.blobs
        assert pb.LayerParameter.FromString(layer.proto.SerializeToString()) == layer.proto
    write_model(again, model, raw=raw)
    assert again.read_bytes() == data


def test_raw_files_are_written_so_that_every_fork_reads_them(tmp_path: Path) -> None:
    """NVCaffe stores raw_data; we write data and shape, and the values are the same."""
    path = shared("golden/e2e/jacintonet_tiny/init.caffemodel")
    model = read_model(path)
    assert model.dialect == "nvcaffe"
    write_model(tmp_path / "a", model)
    net = pb.NetParameter.FromString((tmp_path / "a").read_bytes())
    assert all(b.data and not b.raw_data for x in net.layer for b in x.blobs)
    for old, new in zip(model.layers, read_model(tmp_path / "a").layers, strict=True):
        assert all(np.array_equal(a, b) and a.shape == b.shape for a, b in zip(old.blobs, new.blobs, strict=True))


def test_dialects_of_real_files() -> None:
    assert read_model(shared("caffemodels/lenet_mnist/lenet_iter_10000.caffemodel")).dialect is None
    folder = "golden/jacinto/quantization"
    assert read_model(shared(f"{folder}/plain_w8a8_wnooffset.final.caffemodel")).dialect == "jacinto"
    assert read_model(shared(f"{folder}/plain.caffemodel")).dialect == "nvcaffe"
    sparse = read_model(shared("caffemodels/lenet5_mnist_dns_sparse/caffe_lenet5_sparse.caffemodel"))
    assert sparse.layer("conv1").type == "CConvolution"
    with pytest.raises(KeyError):
        sparse.layer("conv9")


def _model() -> ModelFile:
    rng = np.random.default_rng(0)
    proto = pb.LayerParameter(name="conv", type="Convolution", bottom=["data"], top=["conv"])
    proto.param.add(lr_mult=2)
    proto.include.add(phase=0)
    proto.convolution_param.num_output = 4
    conv = [rng.normal(size=(4, 3, 2, 2)).astype(np.float32), rng.normal(size=4).astype(np.float32)]
    layers = [
        LayerBlobs("conv", "Convolution", conv, diffs=[x * 2 for x in conv], proto=proto),
        LayerBlobs("scalar", "Scale", [np.float32(3).reshape(())], diffs=[np.float32(4).reshape(())]),
        LayerBlobs("double", "Bias", [rng.normal(size=5)], diffs=[rng.normal(size=5)], bottoms=["a"], tops=["b"]),
        LayerBlobs("empty", "Embed", [np.empty((0, 3), np.float32)], diffs=[np.empty((0, 3), np.float32)]),
        LayerBlobs("none", "ReLU"),
    ]
    return ModelFile("net", layers)


@pytest.mark.parametrize("diffs", [False, True])
def test_written_bytes_are_protobufs(diffs: bool, tmp_path: Path) -> None:
    model = _model()
    write_model(tmp_path / "a", model, diffs=diffs)
    assert (tmp_path / "a").read_bytes() == by_protobuf(model, diffs=diffs)
    back = read_model(tmp_path / "a")
    for old, new in zip(model.layers, back.layers, strict=True):
        assert old.name == new.name
        assert old.type == new.type
        assert len(new.diffs) == (len(old.blobs) if diffs and old.name != "empty" else 0)
        for a, b in zip(old.blobs + (old.diffs if new.diffs else []), new.blobs + new.diffs, strict=True):
            assert a.dtype == b.dtype
            assert a.shape == b.shape
            assert np.array_equal(a, b)
    assert back.layers[0].proto == model.layers[0].proto
    assert [x.name for x in back.net().layer] == [x.name for x in model.layers]


def test_what_lies_oddly_in_memory_is_written_right(tmp_path: Path) -> None:
    arrays = [F.reshape(2, 3).T, F[::2], F.astype(">f4"), np.arange(4), F.astype(np.float16)]
    write_model(tmp_path / "a", ModelFile("n", [LayerBlobs("l", "X", arrays)]))
    for old, new in zip(arrays, read_model(tmp_path / "a").layers[0].blobs, strict=True):
        assert new.dtype == np.float32
        assert new.shape == old.shape
        assert np.array_equal(old, new)


def test_half_stays_half_with_raw(tmp_path: Path) -> None:
    arrays: list[np.ndarray] = [F.astype(np.float16), F, F.astype(np.float64)]
    write_model(tmp_path / "a", ModelFile("n", [LayerBlobs("l", "X", arrays)]), raw=True)
    back = read_model(tmp_path / "a").layers[0].blobs
    assert [b.dtype for b in back] == [np.float16, np.float32, np.float64]
    assert all(np.array_equal(a, b) for a, b in zip(arrays, back, strict=True))
    message = pb.NetParameter.FromString((tmp_path / "a").read_bytes()).layer[0].blobs[0]
    assert message.raw_data == arrays[0].tobytes()
    assert message.raw_data_type == 2


def test_decode_order_and_encodings(tmp_path: Path) -> None:
    single = b"".join(wire.tag(5, wire.I32) + x.tobytes() for x in F)
    double = b"".join(wire.tag(8, wire.I64) + x.tobytes() for x in F.astype("<f8") + 1)
    split = wire.block(5, F[:2].tobytes()) + wire.tag(5, wire.I32) + F[2].tobytes() + wire.block(5, F[3:].tobytes())
    half = wire.uint(10, 2) + wire.block(12, (F + 2).astype("<f2").tobytes())
    dims = wire.block(7, wire.uint(1, 2) + wire.uint(1, 3))  # unpacked
    packed = wire.block(5, F.tobytes())
    cases = [
        (single + dims, F), (dims + double, F + 1), (split + dims, F), (half + dims, F + 2),
        (packed + half + dims, F), (packed + double + dims, F + 1), (b"\xad\x00" + F[0].tobytes() + shape(1), F[:1]),
    ]  # fmt: skip
    model = read_model(saved(tmp_path / "a", net_of(*(c for c, _ in cases))))
    for blob, (_, want) in zip(model.layers[0].blobs, cases, strict=True):
        assert blob.shape == ((2, 3) if blob.size == 6 else (1,))
        assert np.array_equal(blob.reshape(-1), want)


def test_many_unpacked_values_are_fast(tmp_path: Path) -> None:
    values = np.arange(1_000_000, dtype="<f4")
    records = np.empty(values.size, [("tag", "u1"), ("value", "<f4")])
    records["tag"], records["value"] = 0x2D, values
    model = read_model(saved(tmp_path / "a", net_of(records.tobytes() + shape(1000, 1000))))
    assert np.array_equal(model.layers[0].blobs[0].reshape(-1), values)


def test_legacy_shapes(tmp_path: Path) -> None:
    legacy = b"".join(wire.uint(i, d) for i, d in enumerate((1, 1, 2, 3), 1)) + wire.block(5, F.tobytes())
    partly = wire.uint(2, 6) + wire.block(5, b"")  # num, height and width absent: 0
    scalar = wire.block(5, F[:1].tobytes())
    (layer,) = read_model(saved(tmp_path / "a", net_of(legacy, partly, scalar))).layers
    assert [b.shape for b in layer.blobs] == [(1, 1, 2, 3), (0, 6, 0, 0), ()]
    assert layer.legacy == [True, True, False]


@pytest.mark.parametrize(
    ("file", "legacy", "target", "fits"),
    [
        ((2, 3), False, (2, 3), True),
        ((1, 1, 2, 3), False, (2, 3), False),
        ((1, 1, 2, 3), True, (2, 3), True),
        ((1, 1, 1, 3), True, (3,), True),
        ((1, 1, 1, 1), True, (), True),
        ((3, 1, 1, 1), True, (3,), False),
        ((1, 1, 2, 3), True, (1, 1, 1, 2, 3), False),
        ((4, 3, 2, 2), True, (4, 3, 2, 2), True),
    ],
)
def test_shapes_match(file: tuple[int, ...], legacy: bool, target: tuple[int, ...], fits: bool) -> None:
    assert shapes_match(file, legacy, target) is fits


@pytest.mark.parametrize(
    ("blob", "text"),
    [
        (wire.block(5, F.tobytes()) + shape(2, 4), "layer 'l', blob 0: shape 2 x 4 needs 8 values, the file holds 6"),
        (shape(2, 4), "needs 8 values, the file holds none"),
        (b"", "needs 1 values, the file holds none"),
        (wire.block(5, F.tobytes() + b"\0") + shape(6), "not a whole number"),
        (wire.block(5, F.tobytes()) + shape(2**31, 2**31), "impossible"),
        (wire.block(5, b"") + shape(2**62, 0), "impossible"),
        (wire.block(5, F.tobytes()) + shape(-6), "impossible"),
        (wire.block(5, F.tobytes()) + shape(*[1] * 40), "more than 32 axes"),
        (wire.uint(10, 3) + wire.block(12, F.tobytes()) + shape(6), "other than FLOAT, FLOAT16 and DOUBLE"),
        (wire.block(12, F.tobytes()) + shape(6), "other than FLOAT, FLOAT16 and DOUBLE"),
        (wire.block(5, F.tobytes()) + wire.block(6, F[:5].tobytes()) + shape(6), "6 values of the diff"),
    ],
)
def test_blobs_that_do_not_fit_their_shape(blob: bytes, text: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "a", net_of(blob))
    with pytest.raises(WeightsError, match=text) as e:
        read_model(path)
    assert e.value.loc == Loc(str(path))
    assert "at byte" in e.value.text


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "the file is empty"),
        (b"name: 'x'\nlayer { name: 'a' type: 'ReLU' }\n", "net prototxt"),
        (b"\nlayers {\n  name: 'a' }\n", "net prototxt"),
        (b"# mine\nnet: 'a.prototxt'\nbase_lr: 0.1\n", "solver prototxt"),
        (b"hello\n", "a text file"),
        (b"PK\x03\x04aaaa", "zip archive"),
        (b"\x80\x02}q\x00.", "pickle"),
        (b"\x1f\x8b\x08\x00", "gzip"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"\n <HTML><body>404", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git-lfs"),
        (bytes(5000), "zero bytes"),
        (wire.uint(1, 10) + wire.string(2, "x") + wire.block(3, b"") + wire.uint(4, 0), "solver state"),
        (b"".join(wire.uint(i, 1) for i in (1, 2, 3, 4)) + wire.block(5, bytes(4)), "mean file"),
        (wire.string(1, "n"), "no layers in it"),
        (wire.header(100, 2**31 - 10) + b"x" * 90, "claims 2147483638 bytes where 90 are left"),
        (wire.header(100, 2**64 - 1) + b"x" * 90, "where 90 are left"),
        (b"\xff" * 40, "more than 10 bytes"),
        (net_of() + wire.tag(100, 3), "wire type 3"),
        (wire.block(2, wire.string(4, "a")) + wire.block(100, wire.string(1, "b")), "both old"),
    ],
)
def test_what_is_not_a_caffemodel(data: bytes, text: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "weights.caffemodel", data)
    with pytest.raises(WeightsError, match=text) as e:
        read_model(path)
    assert e.value.loc == Loc(str(path))
    assert e.value.exit_code == 3


def test_a_net_may_have_any_name(tmp_path: Path) -> None:
    """Name and length byte of this one look like the start of a web page."""
    name = "html" + "x" * 56
    write_model(tmp_path / "a", ModelFile(name, [LayerBlobs("l", "ReLU")]))
    assert (tmp_path / "a").read_bytes().startswith(b"\n<html")
    assert read_model(tmp_path / "a").name == name


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    write_model(tmp_path / "whole", _model())
    data = (tmp_path / "whole").read_bytes()
    ends = {len(wire.string(1, "net"))}  # a cut between two layers cannot be seen
    ends |= {end for _, _, _, _, end in wire.fields(data, 0, len(data))}
    for cut in range(len(data)):
        if cut not in ends:
            with pytest.raises(WeightsError):
                read_model(saved(tmp_path / "cut", data[:cut]))


def test_writing_refuses_clearly(tmp_path: Path) -> None:
    huge = np.lib.stride_tricks.as_strided(F, (1 << 29,), (0,))  # 2 GiB that need no memory
    path = tmp_path / "a"
    with pytest.raises(CaffeError, match=r"2\.00 GiB") as e:
        write_model(path, ModelFile("n", [LayerBlobs("l", "X", [huge])]))
    assert e.value.hint is not None
    assert "HDF5" in e.value.hint
    with pytest.raises(UsageError, match="no weights format"):
        write_model(path, _model(), format="onnx")
    with pytest.raises(CaffeError, match="blob 0 is shared"):
        write_model(path, ModelFile("n", [LayerBlobs("l", "X", [None])]))
    assert not list(tmp_path.iterdir())
