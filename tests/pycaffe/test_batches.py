"""Items in any number, callbacks, and what else notebooks do with a Net."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from caffejacinto_py import pycaffe as caffe
from caffejacinto_py.errors import UsageError

TEXT = """
force_backward: true
layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 3 dim: 2 } } }
layer { name: "ip" type: "InnerProduct" bottom: "data" top: "ip" inner_product_param { num_output: 2 } }
layer { name: "relu" type: "ReLU" bottom: "ip" top: "ip" }
layer { name: "out" type: "Power" bottom: "ip" top: "out" power_param { scale: 3 } }
"""
WEIGHT = np.array([[1, 2], [-1, 1]], np.float32)


@pytest.fixture
def net(tmp_path: Path) -> caffe.Net:
    (tmp_path / "n.prototxt").write_text(TEXT)
    net = caffe.Net(str(tmp_path / "n.prototxt"), caffe.TEST)
    net.params["ip"][0].data[...] = WEIGHT
    return net


@pytest.mark.parametrize("count", [1, 3, 7])
def test_forward_all(count: int, net: caffe.Net) -> None:
    x = np.arange(2 * count).reshape(count, 2) - 3.0
    found = net.forward_all(blobs=["ip"], data=x)
    want = np.maximum(x @ WEIGHT.T, 0)
    np.testing.assert_allclose(found["ip"], want)
    np.testing.assert_allclose(found["out"], 3 * want)
    found["out"][...] = 0
    assert net.forward_all(data=list(x))["out"].any(), "results are copies"


def test_forward_backward_all(net: caffe.Net) -> None:
    x = np.array([[1, 0], [0, 1], [2, 2], [-1, -1]], np.float32)
    d = np.ones((4, 2), np.float32)
    values, gradients = net.forward_backward_all(blobs=["ip"], diffs=["ip"], data=x, out=d)
    on = (x @ WEIGHT.T > 0) * 3
    np.testing.assert_allclose(values["out"], 3 * np.maximum(x @ WEIGHT.T, 0))
    np.testing.assert_allclose(gradients["ip"], on)
    np.testing.assert_allclose(gradients["data"], on @ WEIGHT)


def test_scalar_outputs_are_collected(tmp_path: Path) -> None:
    (tmp_path / "n.prototxt").write_text(TEXT + 'layer { name: "sum" type: "Reduction" bottom: "out" top: "sum" }')
    net = caffe.Net(str(tmp_path / "n.prototxt"), caffe.TEST)
    assert net.forward_all(data=np.ones((7, 2)))["sum"].shape == (3,)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda n: n.forward_all(), "needs input arrays"),
        (lambda n: n.forward_all(data=np.zeros((0, 2))), "no items"),
        (lambda n: n.forward_backward_all(data=np.zeros((4, 2)), out=np.zeros((3, 2))), "different numbers"),
        (lambda n: n.forward_all(dat=np.zeros((4, 2))), "did you mean 'data'"),
    ],
)
def test_misuse(call, words: str, net: caffe.Net) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UsageError, match=words):
        call(net)


def test_callbacks(net: caffe.Net) -> None:
    seen: list[tuple[str, int]] = []
    for moment in ("before_forward", "after_forward", "before_backward", "after_backward"):
        getattr(net, moment)(lambda i, moment=moment: seen.append((moment, i)))
    net.forward(data=np.ones((3, 2)))
    assert seen == [(m, i) for i in range(4) for m in ("before_forward", "after_forward")]
    seen.clear()
    net.backward(start="relu", end="ip")
    assert seen == [(m, i) for i in (2, 1) for m in ("before_backward", "after_backward")]


def test_callbacks_may_change_blobs(net: caffe.Net) -> None:
    def halve(layer: int) -> None:
        if net._layer_names[layer] == "relu":
            net.blobs["ip"].data[...] /= 2

    net.after_forward(halve)
    out = net.forward(data=np.ones((3, 2)))["out"]
    np.testing.assert_allclose(out, [[4.5, 0]] * 3)


def test_one_gradient_array_stays_live(net: caffe.Net) -> None:
    diff = net.params["ip"][0].diff
    net.forward(data=np.ones((3, 2)))
    net.backward(out=np.ones((3, 2)))
    assert diff.any()
    net.clear_param_diffs()
    assert not diff.any()
    assert net.params["ip"][0].diff is not None


def test_low_level_names(net: caffe.Net) -> None:
    assert net._forward(0, len(net.layers) - 1) == 0.0
    net._backward(len(net.layers) - 1, 0)
    assert net._blob_names == ["data", "ip", "out"]
    assert net.layer_dict["ip"].type == "InnerProduct"
    assert net.layers[1].blobs[0] is net.params["ip"][0]


def test_hdf5_output(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    file = tmp_path / "out.h5"
    (tmp_path / "n.prototxt").write_text(
        'layer { name: "d" type: "DummyData" top: "x" top: "y" dummy_data_param {'
        ' shape { dim: 2 dim: 3 } shape { dim: 2 } data_filler { type: "gaussian" } data_filler { value: 4 } } }'
        f'layer {{ name: "o" type: "HDF5Output" bottom: "x" bottom: "y" hdf5_output_param {{ file_name: "{file}" }} }}'
    )
    net = caffe.Net(str(tmp_path / "n.prototxt"), caffe.TEST)
    rows = []
    for _ in range(2):
        net.forward()
        rows.append(net.blobs["x"].data.copy())
    with h5py.File(file) as f:
        np.testing.assert_array_equal(f["data"], np.concatenate(rows))
        np.testing.assert_array_equal(f["label"], [4] * 4)
    again = caffe.Net(str(tmp_path / "n.prototxt"), caffe.TEST)
    again.forward()
    with h5py.File(file) as f:
        assert f["data"].shape == (2, 3), "a new net begins a new file"
