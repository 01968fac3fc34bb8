"""Nets written as expressions: what prototxt they give."""

from __future__ import annotations

import numpy as np
import pytest
from google.protobuf import text_format

from caffejacinto_py import pycaffe as caffe
from caffejacinto_py.errors import UsageError
from caffejacinto_py.pycaffe.net_spec import param_name_dict
from caffejacinto_py.schema import pb

L, P = caffe.layers, caffe.params

LENET = """
layer { name: "data" type: "DummyData" top: "data" top: "label"
  dummy_data_param { shape { dim: 2 dim: 1 dim: 28 dim: 28 } shape { dim: 2 } } }
layer { name: "conv1" type: "Convolution" bottom: "data" top: "conv1" param { lr_mult: 1 } param { lr_mult: 2 }
  convolution_param { kernel_size: 5 num_output: 20 weight_filler { type: "xavier" } } }
layer { name: "pool1" type: "Pooling" bottom: "conv1" top: "pool1" pooling_param { kernel_size: 2 stride: 2 pool: AVE } }
layer { name: "relu1" type: "ReLU" bottom: "pool1" top: "pool1" }
layer { name: "ip" type: "InnerProduct" bottom: "pool1" top: "ip" include { phase: TEST } inner_product_param { num_output: 10 } }
layer { name: "quiet" type: "Silence" bottom: "label" }
"""  # noqa: E501


def lenet() -> caffe.NetSpec:
    n = caffe.NetSpec()
    n.data, n.label = L.DummyData(shape=[dict(dim=[2, 1, 28, 28]), dict(dim=2)], ntop=2)
    n.conv1 = L.Convolution(
        n.data,
        kernel_size=5,
        num_output=20,
        weight_filler=dict(type="xavier"),
        param=[dict(lr_mult=1), dict(lr_mult=2)],
    )
    n.pool1 = L.Pooling(n.conv1, kernel_size=2, stride=2, pool=P.Pooling.AVE)
    n.relu1 = L.ReLU(n.pool1, in_place=True)
    n["ip"] = L.InnerProduct(n.relu1, inner_product_param=dict(num_output=10), include=dict(phase=caffe.TEST))
    n.quiet = L.Silence(n.label, ntop=0)
    return n


def test_lenet() -> None:
    assert lenet().to_proto() == text_format.Parse(LENET, pb.NetParameter())


def test_automatic_names() -> None:
    data, label = L.DummyData(shape=dict(dim=[1, 2]), ntop=2)
    ip = L.InnerProduct(data, num_output=2)
    loss = L.SoftmaxWithLoss(L.InnerProduct(ip, num_output=2), label)
    net = caffe.to_proto(loss)
    assert [layer.name for layer in net.layer] == ["DummyData1", "InnerProduct1", "InnerProduct2", "SoftmaxWithLoss1"]
    assert list(net.layer[0].top) == ["DummyData1", "DummyData2"]
    assert loss.to_proto() == net
    assert caffe.to_proto(ip, L.Silence(label, ntop=0)).layer[-1].name == "Silence1"


def test_values() -> None:
    x = L.Input(shape=dict(dim=np.array([1, 3, 8, 8])))
    conv = L.Convolution(
        x, kernel_size=[3, 5], num_output=np.int64(4), engine="CAFFE", weight_filler={"std": np.float32(0.5)}
    )
    made = conv.to_proto().layer[1].convolution_param
    assert list(made.kernel_size) == [3, 5]
    assert (made.num_output, made.engine, made.weight_filler.std) == (4, pb.ConvolutionParameter.CAFFE, 0.5)
    filler = pb.FillerParameter(type="msra")
    assert L.Scale(x, filler=filler, loss_weight=2).to_proto().layer[1].scale_param.filler == filler
    assert list(L.Scale(x, loss_weight=2).to_proto().layer[1].loss_weight) == [2]
    assert L.Slice(x, slice_point=(1, 2), ntop=3)[2].to_proto().layer[1].slice_param.slice_point == [1, 2]
    assert L.BatchNorm(x, use_global_stats=False).to_proto().layer[1].batch_norm_param.HasField("use_global_stats")
    assert L.Pooling(x, pooling_param={}).to_proto().layer[1].HasField("pooling_param")
    python = L.Python(x, module="m", layer="C", param_str="{}", ntop=0)
    assert caffe.to_proto(python).layer[1].python_param.layer == "C"
    assert L.Deconvolution(x, num_output=3).to_proto().layer[1].convolution_param.num_output == 3


def test_every_message_names_one_field() -> None:
    names = param_name_dict()
    assert names["Convolution"] == "convolution"
    assert names["HDF5Data"] == "hdf5_data"
    fields = [f.message_type.name for f in pb.LayerParameter.DESCRIPTOR.fields if f.name.endswith("_param")]
    assert len(fields) == len(set(fields)), "two fields with one message: the lookup by message would be ambiguous"


def test_changes_afterwards() -> None:
    n = lenet()
    n.update("conv1", {"num_output": 7})
    del n.quiet
    assert n.keys() == ["data", "label", "conv1", "pool1", "relu1", "ip"]
    assert len(n.vals()) == 6
    assert "quiet" not in n
    assert n.to_proto().layer[1].convolution_param.num_output == 7
    with pytest.raises(AttributeError, match="no top 'quiet'"):
        n.quiet  # noqa: B018


def test_misuse() -> None:
    x = L.Input(shape=dict(dim=1))
    for bad in ("data", lenet().to_proto(), (x, x)):
        with pytest.raises(TypeError, match="ReLU input 1 is not a Top"):
            L.ReLU(x, bad)
    with pytest.raises(UsageError, match=r"ReLU has no parameter 'negative_slop'.*negative_slope"):
        L.ReLU(x, negative_slop=1).to_proto()
    with pytest.raises(AttributeError, match="FillerParameter has no field 'typ'"):
        L.Scale(x, filler=dict(typ="xavier")).to_proto()
    with pytest.raises(UsageError, match=r"no value 'MAXX'.*'MAX'"):
        L.Pooling(x, pool="MAXX").to_proto()
    with pytest.raises(AttributeError, match=r"PoolingParameter\.MXA"):
        P.Pooling.MXA  # noqa: B018
    with pytest.raises(TypeError):
        L.Pooling(x, kernel_size="three").to_proto()


def test_the_text_is_a_net(tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "n.prototxt"
    path.write_text(str(lenet().to_proto()))
    net = caffe.Net(str(path), caffe.TEST)
    assert net.forward()["ip"].shape == (2, 10)
