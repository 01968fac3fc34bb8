"""V1 and V0 caffemodels, which no tool writes any more: made by protobuf from our schema, and by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from caffejacinto_py.errors import WeightsError
from caffejacinto_py.schema import pb, wire
from caffejacinto_py.schema.v1_types import V1_TYPES
from caffejacinto_py.schema.weights import read_model, write_model
from tests.schema.weights_helpers import saved

F = np.arange(6, dtype=np.float32)


def _blob(blobs: object) -> None:
    blob = blobs.add()  # type: ignore[attr-defined]
    blob.num, blob.channels, blob.height, blob.width = 1, 1, 2, 3
    blob.data.extend(F.tolist())


def _v1() -> bytes:
    net = pb.NetParameter(name="old")
    conv = net.layers.add(name="conv1", type="CONVOLUTION", bottom=["data"], top=["conv1"], blobs_lr=[1, 2])
    conv.convolution_param.num_output = 2
    _blob(conv.blobs)
    _blob(conv.blobs)
    net.layers.add(name="loss", type="SOFTMAX_LOSS", bottom=["conv1", "label"])
    return net.SerializeToString()


def _v0() -> bytes:
    net = pb.NetParameter(name="oldest", input=["data"], input_dim=[1, 1, 5, 5])
    pad = net.layers.add(bottom=["data"], top=["pad"])
    pad.layer.name, pad.layer.type, pad.layer.pad = "pad1", "padding", 1
    conv = net.layers.add(bottom=["pad"], top=["conv1"])
    conv.layer.name, conv.layer.type, conv.layer.num_output, conv.layer.kernelsize = "conv1", "conv", 2, 3
    conv.layer.blobs_lr.extend([1, 2])
    _blob(conv.layer.blobs)
    ip = net.layers.add(bottom=["conv1"], top=["ip"])
    ip.layer.name, ip.layer.type, ip.layer.num_output = "ip", "innerproduct", 3
    return net.SerializeToString()


def test_v1(tmp_path: Path) -> None:
    model = read_model(saved(tmp_path / "a", _v1()))
    assert (model.version, model.name) == ("V1", "old")
    conv, loss = model.layers
    assert (conv.name, conv.type, conv.bottoms, conv.tops) == ("conv1", "Convolution", ["data"], ["conv1"])
    assert conv.legacy == [True, True]
    assert all(b.shape == (1, 1, 2, 3) and np.array_equal(b.reshape(-1), F) for b in conv.blobs)
    assert loss.type == "SoftmaxWithLoss"
    assert conv.proto.convolution_param.num_output == 2
    assert [p.lr_mult for p in conv.proto.param] == [1, 2]
    assert len(model.net().layer) == 2


def test_every_v1_type_number(tmp_path: Path) -> None:
    for name, number in pb.V1LayerParameter.LayerType.items():
        data = wire.block(2, wire.string(4, "l") + wire.uint(5, number))
        assert read_model(saved(tmp_path / "a", data)).layers[0].type == V1_TYPES[name]
    data = wire.block(2, wire.string(4, "l") + wire.uint(5, 77))
    assert read_model(saved(tmp_path / "a", data)).layers[0].type == "77"


def test_v0(tmp_path: Path) -> None:
    model = read_model(saved(tmp_path / "a", _v0()))
    assert model.version == "V0"
    assert [(x.name, x.type) for x in model.layers] == [
        ("pad1", "padding"), ("conv1", "Convolution"), ("ip", "InnerProduct"),
    ]  # fmt: skip
    conv = model.layer("conv1")
    assert conv.bottoms == ["pad"]
    assert np.array_equal(conv.blobs[0].reshape(-1), F)
    assert list(conv.proto.convolution_param.pad) == [1]
    assert list(conv.proto.bottom) == ["data"]
    with pytest.raises(WeightsError, match="no counterpart"):
        _ = model.layer("pad1").proto


@pytest.mark.parametrize("make", [_v1, _v0])
def test_old_files_are_written_as_v2(make: object, tmp_path: Path) -> None:
    model = read_model(saved(tmp_path / "a", make()))  # type: ignore[operator]
    write_model(tmp_path / "b", model)
    back = read_model(tmp_path / "b")
    assert back.version == "V2"
    new = back.layer("conv1")
    assert new.type == "Convolution"
    assert new.proto == model.layer("conv1").proto
    assert all(np.array_equal(a, b) for a, b in zip(new.blobs, model.layer("conv1").blobs, strict=True))
    net = pb.NetParameter.FromString((tmp_path / "b").read_bytes())
    assert not net.layers
    assert "pad1" not in [x.name for x in net.layer]


def test_an_old_net_that_cannot_be_upgraded_still_gives_its_weights(tmp_path: Path) -> None:
    net = pb.NetParameter()
    layer = net.layers.add()
    layer.layer.name, layer.layer.type = "x", "unheard_of"
    _blob(layer.layer.blobs)
    model = read_model(saved(tmp_path / "a", net.SerializeToString()))
    assert model.layers[0].blobs[0].size == 6
    with pytest.raises(WeightsError, match="cannot be upgraded"):
        model.net()


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    """The weights load; the message says what is wrong when it is asked for."""
    data = wire.block(2, wire.block(4, b"a\x90") + wire.uint(5, 18) + wire.block(2, b"\x90"))
    layer = read_model(saved(tmp_path / "a", data)).layers[0]
    assert (layer.name, layer.bottoms) == ("a\\x90", ["\\x90"])
    for broken in (data, wire.block(100, wire.block(1, b"a") + wire.block(3, b"\x90"))):
        with pytest.raises(WeightsError, match="not valid"):
            _ = read_model(saved(tmp_path / "a", broken)).layers[0].proto
