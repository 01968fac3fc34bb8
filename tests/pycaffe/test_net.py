"""The behaviour that pycaffe users rely on, on small nets with answers worked out here."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest

from caffejacinto_py import pycaffe as caffe
from caffejacinto_py.errors import CaffeError, UsageError, WeightsError

TEXT = """
name: "tiny" force_backward: true
layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 2 dim: 3 } } }
layer { name: "ip" type: "InnerProduct" bottom: "data" top: "ip"
  inner_product_param { num_output: 4 weight_filler { type: "xavier" } bias_filler { type: "constant" value: 0.5 } } }
layer { name: "relu" type: "ReLU" bottom: "ip" top: "ip" }
layer { name: "a" type: "Power" bottom: "ip" top: "a" power_param { scale: 2 } }
layer { name: "b" type: "Power" bottom: "ip" top: "b" power_param { scale: 3 shift: 1 } }
"""


@pytest.fixture
def path(tmp_path: Path) -> str:
    file = tmp_path / "net.prototxt"
    file.write_text(TEXT)
    return str(file)


@pytest.fixture
def net(path: str) -> caffe.Net:
    return caffe.Net(path, caffe.TEST)


X = np.array([[1, -2, 3], [0.5, 0, -1]], np.float32)


def test_what_a_net_lists(net: caffe.Net) -> None:
    split = ["ip_relu_0_split_0", "ip_relu_0_split_1"]
    assert list(net.blobs) == ["data", "ip", *split, "a", "b"]
    assert net._layer_names == ["data", "ip", "relu", "ip_relu_0_split", "a", "b"]
    assert (net.inputs, net.outputs) == (["data"], ["a", "b"])
    assert net.top_names["ip_relu_0_split"] == split
    assert net.bottom_names["relu"] == ["ip"]
    assert [layer.type for layer in net.layers][1] == "InnerProduct"
    assert net.layer_dict["ip"].blobs is net.params["ip"]
    assert set(net.blob_loss_weights.values()) == {0.0}


def test_blob(net: caffe.Net) -> None:
    blob = net.blobs["data"]
    assert blob.shape == (2, 3)
    assert (blob.num, blob.channels, blob.height, blob.width, blob.count) == (2, 3, 1, 1, 6)
    assert blob.data.dtype == np.float32
    assert blob.data.flags.writeable
    assert blob.diff.shape == (2, 3)


def test_forward_and_views_stay_live(net: caffe.Net) -> None:
    view = net.blobs["a"].data
    weight, bias = (b.data for b in net.params["ip"])
    out = net.forward(data=X, blobs=["ip"])
    hidden = np.maximum(X @ weight.T + bias, 0)
    assert set(out) == {"a", "b", "ip"}
    np.testing.assert_allclose(view, 2 * hidden, rtol=1e-6)
    weight[...] = 0
    bias[...] = 7
    net.forward()
    np.testing.assert_allclose(view, 14)
    np.testing.assert_allclose(out["b"], 22)


def test_arrays_outlive_the_net(path: str) -> None:
    net = caffe.Net(path, caffe.TEST)
    out = net.forward(data=X)["a"]
    weight = net.params["ip"][0].data
    copies = out.copy(), weight.copy()
    del net
    gc.collect()
    np.testing.assert_array_equal(out, copies[0])
    np.testing.assert_array_equal(weight, copies[1])


def test_start_takes_what_the_user_wrote(net: caffe.Net) -> None:
    net.forward(data=X)
    net.blobs["ip"].data[...] = [[-1, 2, -3, 4]] * 2
    out = net.forward(start="relu")
    np.testing.assert_allclose(out["a"], [[0, 4, 0, 8]] * 2)
    out = net.forward(start="relu", end="relu")
    assert list(out) == ["ip"]
    net.blobs["ip"].data[...] = -5
    np.testing.assert_allclose(net.forward(end="ip")["ip"], X @ net.params["ip"][0].data.T + 0.5, rtol=1e-5, atol=1e-6)


def test_backward(net: caffe.Net) -> None:
    net.forward(data=X)
    weight = net.params["ip"][0].data
    on = (X @ weight.T + 0.5 > 0).astype(np.float32)
    ones = np.ones((2, 4), np.float32)
    out = net.backward(a=ones, b=2 * ones, diffs=["ip"])
    np.testing.assert_allclose(out["ip"], 8 * on, rtol=1e-6)
    np.testing.assert_allclose(net.blobs["ip_relu_0_split_1"].diff, 6)
    np.testing.assert_allclose(out["data"], 8 * on @ weight, rtol=1e-5)
    np.testing.assert_allclose(net.params["ip"][0].diff, 8 * on.T @ X, rtol=1e-5)


def test_parameter_gradients_accumulate_and_others_do_not(net: caffe.Net) -> None:
    net.forward(data=X)
    ones = np.ones((2, 4), np.float32)
    net.backward(a=ones, b=ones)
    first, bottom = net.params["ip"][1].diff.copy(), net.blobs["data"].diff.copy()
    net.backward()
    np.testing.assert_allclose(net.params["ip"][1].diff, 2 * first)
    np.testing.assert_allclose(net.blobs["data"].diff, bottom)
    net.clear_param_diffs()
    assert not net.params["ip"][1].diff.any()


def test_backward_in_pieces(net: caffe.Net) -> None:
    net.forward(data=X)
    ones = np.ones((2, 4), np.float32)
    net.backward(a=ones, b=ones)
    whole = net.blobs["data"].diff.copy()
    out = net.backward(end="relu")
    assert list(out) == ["ip"]
    net.blobs["ip"].diff[...] *= 2
    net.backward(start="ip")
    np.testing.assert_allclose(net.blobs["data"].diff, 2 * whole, rtol=1e-6)


def test_reshape_of_an_input(net: caffe.Net) -> None:
    bias = net.params["ip"][1].data
    bias[...] = 1
    net.blobs["data"].reshape(5, 3)
    net.reshape()
    assert net.blobs["a"].shape == (5, 4)
    net.blobs["data"].reshape(1, 3)
    net.blobs["data"].data[...] = 0
    np.testing.assert_allclose(net.forward()["a"], [[2, 2, 2, 2]])
    bias[...] = 2
    np.testing.assert_allclose(net.forward()["a"], [[4, 4, 4, 4]])


def test_reshape_that_changes_a_parameter_is_refused(net: caffe.Net) -> None:
    net.blobs["data"].reshape(2, 4)
    with pytest.raises(CaffeError, match=r"layer 'ip'"):
        net.forward()


@pytest.mark.parametrize("ending", ["caffemodel", "h5"])
def test_save_and_load(ending: str, path: str, tmp_path: Path) -> None:
    net = caffe.Net(path, caffe.TRAIN)
    file = tmp_path / f"x.{ending}"
    net.save_hdf5(file) if ending == "h5" else net.save(str(file))
    other = caffe.Net(path, caffe.TEST)
    other.params["ip"][0].data[...] = 9
    view = other.params["ip"][0].data
    other.copy_from(str(file))
    np.testing.assert_array_equal(view, net.params["ip"][0].data)
    third = caffe.Net(path, str(file), caffe.TEST)
    fourth = caffe.Net(path, phase=caffe.TEST, weights=str(file))
    for loaded in (third, fourth):
        np.testing.assert_array_equal(loaded.params["ip"][0].data, view)
    with pytest.raises(WeightsError):
        other.copy_from(path)


def test_share_with(path: str) -> None:
    one, two = caffe.Net(path, caffe.TRAIN), caffe.Net(path, caffe.TEST)
    two.share_with(one)
    one.params["ip"][1].data[...] = 3
    assert (two.params["ip"][1].data == 3).all()
    one.params["ip"][1].diff[...] = 1
    assert not two.params["ip"][1].diff.any()


def test_net_surgery_through_flat(net: caffe.Net) -> None:
    net.params["ip"][0].data.flat = np.arange(12)
    np.testing.assert_array_equal(net.params["ip"][0].data, np.arange(12).reshape(4, 3))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda n: n.forward(dta=X), "do not match"),
        (lambda n: n.forward(data=X[:1]), "batch size"),
        (lambda n: n.forward(end="rlu"), "did you mean 'relu'"),
        (lambda n: n.forward(blobs=["ipp"]), "did you mean 'ip'"),
        (lambda n: n.backward(a=X), "do not match"),
        (lambda n: n.blobs["data"].reshape(-1, 3), "cannot have the shape"),
    ],
)
def test_misuse(call, words: str, net: caffe.Net) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UsageError, match=words):
        call(net)


@pytest.mark.parametrize("args", [(), (2,), ("x", "y", "z", 1, 2)])
def test_bad_arguments(args: tuple, path: str) -> None:
    with pytest.raises(UsageError):
        caffe.Net(path, *args)


def test_level_and_stages(tmp_path: Path) -> None:
    rules = ['include { stage: "deploy" }', "include { min_level: 2 }"]
    extra = "".join(f'layer {{ name: "x{i}" type: "TanH" bottom: "a" top: "x{i}" {r} }}\n' for i, r in enumerate(rules))
    (tmp_path / "n.prototxt").write_text(TEXT + extra)
    path = str(tmp_path / "n.prototxt")
    assert caffe.Net(path, caffe.TEST, level=2).outputs == ["b", "x1"]
    assert caffe.Net(path, caffe.TEST, stages=["deploy", "other"]).outputs == ["b", "x0"]
    assert caffe.Net(path, caffe.TEST, 3, ["deploy"]).outputs == ["b", "x0", "x1"]


def test_memory_data(tmp_path: Path) -> None:
    (tmp_path / "n.prototxt").write_text(
        'layer { name: "m" type: "MemoryData" top: "d" top: "l"'
        " memory_data_param { batch_size: 2 channels: 1 height: 1 width: 2 } }"
    )
    net = caffe.Net(str(tmp_path / "n.prototxt"), caffe.TEST)
    data = np.arange(8, dtype=np.float32).reshape(4, 1, 1, 2)
    net.set_input_arrays(data, np.arange(4, dtype=np.float32))
    net.forward()
    np.testing.assert_array_equal(net.blobs["d"].data, data[:2])
    net.forward()
    np.testing.assert_array_equal(net.blobs["l"].data, [2, 3])
