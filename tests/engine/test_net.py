"""The Net: losses, sharing, freezing, gradients, weights in and out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from google.protobuf import text_format

from caffejacinto_py.engine.net import Net
from caffejacinto_py.errors import LayerError, UsageError, WeightsError
from caffejacinto_py.passes import prepare
from caffejacinto_py.schema import pb
from caffejacinto_py.schema.weights import read_model, write_model

TEXT = """
name: 'small'
layer { name: 'in' type: 'Input' top: 'data' top: 'label' input_param { shape { dim: 4 dim: 3 dim: 8 dim: 8 } shape { dim: 4 } } }
layer { name: 'conv' type: 'Convolution' bottom: 'data' top: 'conv' param { lr_mult: 1 } param { lr_mult: 2 decay_mult: 0 }
  convolution_param { num_output: 6 kernel_size: 3 pad: 1 weight_filler { type: 'msra' } } }
layer { name: 'relu' type: 'ReLU' bottom: 'conv' top: 'conv' }
layer { name: 'drop' type: 'Dropout' bottom: 'conv' top: 'conv' }
layer { name: 'pool' type: 'Pooling' bottom: 'conv' top: 'pool' pooling_param { kernel_size: 2 stride: 2 } }
layer { name: 'ip' type: 'InnerProduct' bottom: 'pool' top: 'ip' inner_product_param { num_output: 5 weight_filler { type: 'xavier' } } }
layer { name: 'acc' type: 'Accuracy' bottom: 'ip' bottom: 'label' top: 'acc' include { phase: TEST } }
layer { name: 'loss' type: 'SoftmaxWithLoss' bottom: 'ip' bottom: 'label' top: 'loss' loss_weight: 0.5 }
"""  # noqa: E501


def net(text: str = TEXT, phase: str = "TRAIN", **options) -> Net:
    return Net(prepare(text_format.Parse(text, pb.NetParameter()), phase=phase), seed=1, **options)


def batch(dtype=torch.float32) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {"data": torch.randn(4, 3, 8, 8, generator=g, dtype=dtype), "label": torch.tensor([0.0, 1, 2, 4])}


def test_forward_weighs_the_loss_and_names_the_outputs():
    n = net(phase="TEST")
    result = n(batch())
    assert sorted(result.outputs) == ["acc", "loss"]
    assert torch.allclose(result.loss, 0.5 * result.outputs["loss"])
    assert result.loss.shape == ()


def test_same_seed_same_weights_and_layouts_agree():
    a, b = net(layout="nchw"), net(layout="channels_last")
    assert b.params["conv"][0].is_contiguous(memory_format=torch.channels_last)
    for name in a.params:
        for p, q in zip(a.params[name], b.params[name], strict=True):
            assert torch.equal(p, q)
    a.eval(), b.eval()
    torch.testing.assert_close(a(batch()).loss, b(batch()).loss)


def test_in_place_changes_nothing():
    results = []
    for inplace in (False, True):
        n = net(inplace=inplace)
        torch.manual_seed(3)
        n(batch()).loss.backward()
        results.append([p.param.grad.clone() for p in n.learnable])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_test_net_shares_parameters_by_reference():
    train = net()
    test = net(phase="TEST", share=train)
    assert test.params["conv"][0] is train.params["conv"][0]
    with torch.no_grad():
        train.params["ip"][1].fill_(7)
    assert test.params["ip"][1][0] == 7
    assert not test.training
    assert train.training


def test_learnable_is_in_caffes_order_with_multipliers():
    found = [(p.node, p.index, p.lr_mult, p.decay_mult) for p in net().learnable]
    assert found == [("conv", 0, 1, 1), ("conv", 1, 2, 0), ("ip", 0, 1, 1), ("ip", 1, 1, 1)]


def test_frozen_blobs_get_no_gradient():
    n = net(TEXT.replace("param { lr_mult: 1 }", "param { lr_mult: 0 }"))
    n(batch()).loss.backward()
    assert n.params["conv"][0].grad is None
    assert n.params["conv"][1].grad is not None


def test_run_goes_layer_by_layer_and_from_the_middle():
    n = net(inplace=False).eval()
    whole = n(batch())
    blobs = {name: n.feed(name, batch()) for name in ("data", "label")}
    names = [node.name for node, _ in n.run(blobs)]
    assert names == ["conv", "relu", "drop", "pool", "ip", "loss"]
    torch.testing.assert_close(blobs["loss"], whole.outputs["loss"])
    blobs["pool"] = torch.zeros_like(blobs["pool"])
    assert [node.name for node, _ in n.run(blobs, start="ip")] == ["ip", "loss"]
    assert torch.equal(blobs["ip"], n.params["ip"][1].expand(4, 5))
    with pytest.raises(UsageError, match=r"no layer 'ipp'.*did you mean 'ip'"):
        list(n.run(blobs, start="ipp"))


FUSED = TEXT.replace(
    "layer { name: 'relu'",
    """layer { name: 'bn' type: 'BatchNorm' bottom: 'conv' top: 'bn' }
    layer { name: 'sc' type: 'Scale' bottom: 'bn' top: 'sc' scale_param { bias_term: true filler { value: 0.7 } } }
    layer { name: 'side' type: 'Convolution' bottom: 'sc' top: 'side' convolution_param { num_output: 6 kernel_size: 1
      weight_filler { type: 'xavier' } } }
    layer { name: 'sum' type: 'Eltwise' bottom: 'sc' bottom: 'side' top: 'conv2' }
    layer { name: 'relu'""",
).replace("bottom: 'conv' top: 'conv' }\nlayer { name: 'drop'", "bottom: 'conv2' top: 'conv3' }\nlayer { name: 'drop'")
FUSED = FUSED.replace("type: 'Dropout' bottom: 'conv' top: 'conv'", "type: 'Dropout' bottom: 'conv3' top: 'conv3'")
FUSED = FUSED.replace("bottom: 'conv' top: 'pool'", "bottom: 'conv3' top: 'pool'")


@pytest.mark.parametrize("phase", ["TRAIN", "TEST"])
def test_the_fast_road_equals_layer_by_layer(phase):
    """Fused, in place and with reused slots on one side, every layer by itself on the other."""
    fast, slow = net(FUSED, phase), net(FUSED, phase, inplace=False)
    assert len(fast.plan.fast) == len(fast.plan.steps) - 1, "the Scale layer is done by BatchNorm"
    assert fast.graph.node("sum").inplace == 1
    torch.manual_seed(5)
    loss = fast(batch()).loss
    torch.manual_seed(5)
    blobs = {name: slow.feed(name, batch()) for name in ("data", "label")}
    for _ in slow.run(blobs):
        pass
    torch.testing.assert_close(loss, 0.5 * blobs["loss"])
    for name in ("bn", "sc"):
        for p, q in zip(fast.params[name], slow.params[name], strict=True):
            torch.testing.assert_close(p, q)
    if phase == "TRAIN":
        loss.backward()
        (0.5 * blobs["loss"]).backward()
        for a, b in zip(fast.learnable, slow.learnable, strict=True):
            assert (a.param.grad is None) == (b.param.grad is None)
            if a.param.grad is not None:
                torch.testing.assert_close(a.param.grad, b.param.grad, rtol=1e-4, atol=1e-6)


def test_a_gradient_cut_between_fused_layers_is_cut():
    n = net(FUSED.replace("name: 'sc' type", "name: 'sc' propagate_down: false type"))
    n(batch()).loss.backward()
    assert n.params["conv"][0].grad is None
    assert n.params["sc"][0].grad is not None


def test_missing_input_is_named():
    with pytest.raises(UsageError, match="input blob 'label' is missing"):
        net()({"data": batch()["data"]})


def test_float64_and_compile_agree_with_eager():
    n = net(dtype=torch.float64).eval()
    assert n(batch(torch.float64)).loss.dtype == torch.float64


@pytest.mark.slow
def test_works_under_torch_compile():
    n = net().eval()
    torch.testing.assert_close(torch.compile(n)(batch()).loss, n(batch()).loss)


# --- weights -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_weights_round_trip_bit_for_bit(tmp_path, layout):
    a = net(layout=layout)
    write_model(tmp_path / "a.caffemodel", a.model())
    b = Net(a.graph, seed=2, layout="nchw")
    report = b.load(read_model(tmp_path / "a.caffemodel"))
    assert sorted(report.loaded) == ["conv", "ip"]
    assert not report.untouched
    for p, q in zip(a.learnable, b.learnable, strict=True):
        assert torch.equal(p.param, q.param)


def test_weights_that_do_not_fit_change_nothing(tmp_path):
    a = net()
    path = tmp_path / "a.caffemodel"
    write_model(path, a.model())
    b = net(TEXT.replace("num_output: 5", "num_output: 7"))
    before = [p.param.detach().clone() for p in b.learnable]
    with pytest.raises(WeightsError, match=r"layer 'ip', blob 0: shape \(5, 96\) in the file, \(7, 96\) in the net"):
        b.load(read_model(path))
    assert all(torch.equal(p.param, q) for p, q in zip(b.learnable, before, strict=True))
    report = b.load(read_model(path), ignore_shape_mismatch=True)
    assert len(report.warnings) == 2
    assert torch.equal(b.params["conv"][0], a.params["conv"][0])


def test_layers_of_other_names_are_left_alone(tmp_path):
    a = net()
    write_model(tmp_path / "a.caffemodel", a.model())
    b = net(TEXT.replace("'ip'", "'ip_new'"))
    before = b.params["ip_new"][0].detach().clone()
    report = b.load(read_model(tmp_path / "a.caffemodel"))
    assert (report.loaded, report.ignored, report.untouched) == (["conv"], ["ip"], ["ip_new"])
    assert torch.equal(before, b.params["ip_new"][0])


def test_blobs_in_the_prototxt_replace_fillers():
    text = TEXT.replace("layer { name: 'ip'", "layer { name: 'ip' blobs { shape { dim: 5 dim: 96 } data: 0.25 }")
    message = text_format.Parse(text, pb.NetParameter())
    message.layer[5].blobs[0].data[:] = np.full(480, 0.25)
    n = Net(prepare(message, phase="TRAIN"), seed=1)
    assert torch.equal(n.params["ip"][0], torch.full((5, 96), 0.25))


def test_shared_blobs_survive_binaryproto_and_hdf5(tmp_path):
    twin = """layer { name: 'ip2' type: 'InnerProduct' bottom: 'pool' top: 'ip2' param { name: 'w' } param { name: 'b' }
        inner_product_param { num_output: 5 weight_filler { type: 'xavier' } } }"""
    text = TEXT.replace("inner_product_param {", "param { name: 'w' } param { name: 'b' } inner_product_param {") + twin
    a = net(text)
    assert a.params["ip2"][0] is a.params["ip"][0]
    assert len(a.learnable) == 4
    for format in ("binaryproto", "hdf5"):
        path = tmp_path / f"a.{format}"
        write_model(path, a.model(), format=format)
        b = Net(a.graph, seed=2)
        b.load(read_model(path))
        assert torch.equal(b.params["ip2"][0], a.params["ip"][0])


def test_a_blob_shared_in_another_shape_learns_from_both_layers(tmp_path):
    text = """
    layer { name: 'in' type: 'Input' top: 'a' top: 'b' input_param { shape { dim: 2 dim: 3 dim: 3 dim: 3 }
      shape { dim: 2 dim: 27 } } }
    layer { name: 'c' type: 'Convolution' bottom: 'a' top: 'c' param { name: 'w' } convolution_param { num_output: 4
      kernel_size: 3 bias_term: false weight_filler { type: 'xavier' } } }
    layer { name: 'i' type: 'InnerProduct' bottom: 'b' top: 'i' param { name: 'w' share_mode: PERMISSIVE }
      inner_product_param { num_output: 4 bias_term: false } }
    layer { name: 'l' type: 'Reduction' bottom: 'c' top: 'l' loss_weight: 1 }
    layer { name: 'm' type: 'Reduction' bottom: 'i' top: 'm' loss_weight: 1 }"""
    a = net(text)
    x = {"a": torch.randn(2, 3, 3, 3), "b": torch.randn(2, 27)}
    for _ in range(2):  # a second pass sees what an update changed
        a(x).loss.backward()
        (w,) = a.learnable
        expected = x["a"].sum(0) + x["b"].sum(0).reshape(3, 3, 3)
        torch.testing.assert_close(w.param.grad, expected.expand(4, 3, 3, 3))
        with torch.no_grad():
            w.param.sub_(w.param.grad)
        w.param.grad = None
    torch.testing.assert_close(a(x).outputs["m"], (x["b"] @ w.param.reshape(4, 27).T).sum())
    write_model(tmp_path / "a.caffemodel", a.model())
    model = read_model(tmp_path / "a.caffemodel")
    assert [entry.blobs[0].shape for entry in model.layers if entry.blobs] == [(4, 3, 3, 3), (4, 27)]
    b = Net(a.graph, seed=2)
    b.load(model)
    assert torch.equal(b.learnable[0].param, w.param)


@pytest.mark.parametrize(
    "change", [("dim: 8 dim: 8", "dim: 80000 dim: 800000"), ("num_output: 5", "num_output: 2000000000")]
)
def test_nets_larger_than_the_machine_are_refused(change):
    with pytest.raises(LayerError, match=r"GiB, more than the .* of this machine") as caught:
        net(TEXT.replace(*change))
    assert "mistyped" in caught.value.hint
