"""Things that C++ Caffe's own users and tests take for granted, on the net that its tests use."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from caffejacinto_py import pycaffe as caffe
from caffejacinto_py.schema import pb

NET = """
name: 'testnet' force_backward: true
layer { type: 'DummyData' name: 'data' top: 'data' top: 'label'
  dummy_data_param { num: 5 channels: 2 height: 3 width: 4 num: 5 channels: 1 height: 1 width: 1
    data_filler { type: 'gaussian' std: 1 } data_filler { type: 'constant' value: 3 } } }
layer { type: 'Convolution' name: 'conv' bottom: 'data' top: 'conv'
  convolution_param { num_output: 11 kernel_size: 2 pad: 3 weight_filler { type: 'gaussian' std: 1 } }
  param { decay_mult: 1 } param { decay_mult: 0 } }
layer { type: 'InnerProduct' name: 'ip' bottom: 'conv' top: 'ip_blob'
  inner_product_param { num_output: 13 weight_filler { type: 'gaussian' std: 2.5 } } }
layer { type: 'SoftmaxWithLoss' name: 'loss' bottom: 'ip_blob' bottom: 'label' top: 'loss' }
"""
SOLVER = """
net: 'n.prototxt' test_iter: 2 test_interval: 10 base_lr: 0.01 momentum: 0.9 weight_decay: 0.0005 lr_policy: 'inv'
gamma: 0.0001 power: 0.75 display: 100 max_iter: 20 snapshot_after_train: false snapshot_prefix: "model" random_seed: 1
"""
LABELS = np.full((5, 1, 1, 1), 12)


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("n.prototxt").write_text(NET)
    Path("s.prototxt").write_text(SOLVER)


def test_backward_of_one_layer_without_a_forward() -> None:
    net = caffe.Net("n.prototxt", caffe.TRAIN)
    diff = np.random.default_rng(0).random((5, 13)).astype(np.float32)
    net.blobs["ip_blob"].diff[...] = diff
    found = net.backward(start="ip", end="ip")
    want = (diff @ net.params["ip"][0].data).reshape(net.blobs["conv"].shape)
    np.testing.assert_allclose(found["conv"], want, rtol=1e-4, atol=1e-5)


def test_constant_data_is_the_users() -> None:
    """A constant is filled once: labels written over it stay, in forward as in training."""
    net = caffe.Net("n.prototxt", caffe.TRAIN)
    assert (net.blobs["label"].data == 3).all()
    net.blobs["label"].data[...] = LABELS
    first = net.forward() and net.blobs["data"].data.copy()
    net.forward()
    assert (net.blobs["data"].data != first).any()
    np.testing.assert_array_equal(net.blobs["label"].data, LABELS)
    solver = caffe.SGDSolver("s.prototxt")
    assert (solver.net.blobs["label"].data == 3).all()
    solver.net.blobs["label"].data[...] = LABELS
    scores = []
    solver.add_callback(lambda: None, lambda: scores.append(solver.net.params["ip"][1].diff.copy()))
    solver.step(3)
    np.testing.assert_array_equal(solver.net.blobs["label"].data, LABELS)
    for score in scores:  # in every iteration the bias of the one class is pulled up, and of no other
        assert score[12] <= 0
        assert (np.delete(score, 12) >= 0).all()


def test_solve_and_outlive() -> None:
    solver = caffe.SGDSolver("s.prototxt")
    assert solver.iter == 0
    solver.solve()
    assert solver.iter == 20
    assert not list(Path().glob("model_iter*"))
    nets = [solver.net, *solver.test_nets]
    assert len(nets) == 2
    del solver
    total = 0.0
    for net in nets:
        total += sum(p.data.sum() + p.diff.sum() for blobs in net.params.values() for p in blobs)
        total += sum(b.data.sum() + b.diff.sum() for b in net.blobs.values())
    assert np.isfinite(total)


def test_update_by_hand() -> None:
    solver = caffe.SGDSolver("s.prototxt")
    data = solver.net.layers[1].blobs[0].data[...]
    data[...] = 0
    solver.net.layers[1].blobs[0].diff[...] = 1
    solver.apply_update()
    np.testing.assert_allclose(data, -0.01, atol=1e-7)


def test_legacy_order_of_arguments() -> None:
    net = caffe.Net("n.prototxt", caffe.TRAIN)
    net.save("w.caffemodel")
    for other in (
        caffe.Net("n.prototxt", "w.caffemodel", caffe.TRAIN),
        caffe.Net("n.prototxt", 1, weights="w.caffemodel"),
    ):
        for name, blobs in net.params.items():
            for mine, theirs in zip(blobs, other.params[name]):
                np.testing.assert_array_equal(mine.data, theirs.data)


def test_inputs_of_layers_are_tops() -> None:
    data = caffe.layers.DummyData(ntop=2, shape=dict(dim=1))
    with pytest.raises(TypeError, match=r"^Silence input 0 is not a Top \(type is <(type|class) 'tuple'>\)$"):
        caffe.layers.Silence(data, ntop=0)
    Path("q.prototxt").write_text(str(caffe.to_proto(caffe.layers.Silence(*data, ntop=0))))
    assert caffe.Net("q.prototxt", caffe.TEST).forward() == {}


def test_blobs_without_a_shape() -> None:
    assert caffe.io.blobproto_to_array(pb.BlobProto(data=[123])) == 123
    with pytest.raises(ValueError, match="no shape"):
        caffe.io.blobproto_to_array(pb.BlobProto(data=[1, 2]))
