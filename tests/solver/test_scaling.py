"""Loss scaling: every loss gets it, nothing but float16 needs it, steps that overflow are skipped, resume goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from caffejacinto_py.engine import precision
from caffejacinto_py.errors import CaffeError, PrototxtError
from caffejacinto_py.schema.text import parse
from caffejacinto_py.solver import Solver, scaling

HALF = "default_forward_type: FLOAT16 default_backward_type: FLOAT16"
LOSSES = {
    "EuclideanLoss": "type: 'EuclideanLoss' bottom: 'ip' bottom: 'target'",
    "L1Loss": "type: 'L1Loss' bottom: 'ip' bottom: 'target'",
    "SmoothL1Loss": "type: 'SmoothL1Loss' bottom: 'ip' bottom: 'target'",
    "SigmoidCrossEntropyLoss": "type: 'SigmoidCrossEntropyLoss' bottom: 'ip' bottom: 'target'",
    "SoftmaxWithLoss": "type: 'SoftmaxWithLoss' bottom: 'ip' bottom: 'label'",
    "HingeLoss": "type: 'HingeLoss' bottom: 'ip' bottom: 'label'",
}
NET = """
{head}
layer {{ name: 'in' type: 'DummyData' top: 'data' top: 'target' top: 'label' dummy_data_param {{
  shape {{ dim: 4 dim: 3 dim: 6 dim: 6 }} shape {{ dim: 4 dim: 5 }} shape {{ dim: 4 }}
  data_filler {{ type: 'gaussian' std: 1 }} data_filler {{ type: 'constant' value: 0.25 }}
  data_filler {{ type: 'constant' value: 2 }} }} }}
layer {{ name: 'conv' type: 'Convolution' bottom: 'data' top: 'conv'
  convolution_param {{ num_output: 4 kernel_size: 3 weight_filler {{ type: 'xavier' }} }} }}
{norm}
layer {{ name: 'ip' type: 'InnerProduct' bottom: 'conv' top: 'ip'
  inner_product_param {{ num_output: 5 weight_filler {{ type: 'xavier' }} }} }}
layer {{ name: 'loss' top: 'loss' {loss} }}
layer {{ name: 'rest' type: 'Silence' bottom: 'target' bottom: 'label' }}
"""


@pytest.fixture
def every_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """This CPU computes float16, slowly."""
    monkeypatch.setattr(precision, "missing", lambda kind, device: None)


def solver(head: str = "", fields: str = "", loss: str = "EuclideanLoss", norm: str = "", **options: Any) -> Solver:
    net = NET.format(head=head, loss=LOSSES[loss], norm=norm)
    base = "base_lr: 0.05 lr_policy: 'fixed' momentum: 0.9 max_iter: 100 random_seed: 3 solver_mode: CPU"
    text = f"net_param {{ {net} }} {base} {fields}"
    torch.manual_seed(0)
    return Solver(parse(text, "SolverParameter", file="s.prototxt"), device="cpu", workers=0, **options)


def gradients(s: Solver) -> list[torch.Tensor]:
    s.clear_grads()
    s.forward_backward()
    return [b.param.grad.clone() for b in s.net.learnable if b.param.grad is not None]


@pytest.mark.usefixtures("every_type")
@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_do_not_depend_on_the_scale(loss: str) -> None:
    """NVCaffe's Euclidean and L1 gradients are 1/1024 of this."""
    one = solver(HALF, loss=loss)
    many = solver(f"{HALF} global_grad_scale: 1024", loss=loss)
    full = solver(f"{HALF} global_grad_scale: 1024", loss=loss, precision="fp32")
    assert (one.scaling.active, many.scaling.active, full.scaling.active) == (False, True, False)
    for a, b, c in zip(gradients(one), gradients(many), gradients(full), strict=True):
        assert a.dtype == b.dtype == torch.float32
        size = float(c.abs().max())
        assert float((b - c).abs().max()) < 4e-3 * size  # rounding of float16, 5e-4 at each layer
        assert float((a - b).abs().max()) < 4e-3 * size


@pytest.mark.usefixtures("every_type")
def test_the_scale_saves_small_gradients() -> None:
    """A loss of 1e-8 has gradients below the smallest float16."""
    found = []
    for head in (HALF, f"{HALF} global_grad_scale: 1e6"):
        s = solver(head)
        s.scaling.backward(s.net(s.feed.next()).loss * 1e-8)
        s.scaling.finish(0)
        grad = s.net.params["conv"][0].grad
        assert grad is not None
        found.append(float(grad.abs().sum()))
    assert found[1] > 0
    assert found[0] == 0


@pytest.mark.usefixtures("every_type")
def test_clipping_and_iter_size_see_unscaled_gradients() -> None:
    fields = "clip_gradients: 0.5 iter_size: 2"
    plain, scaled = solver("", fields), solver(f"{HALF} global_grad_scale: 512", fields)
    for s in (plain, scaled):
        s.step(3)
    for a, b in zip(plain.net.parameters(), scaled.net.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=2e-3)


@pytest.mark.usefixtures("every_type")
def test_a_step_that_overflows_is_skipped_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    s = solver(f"{HALF} global_grad_scale_adaptive: true")
    assert s.scaling.scale == 65536
    s.scaling.scale = 64.0
    s.step(1)
    s.scaling.scale = 2.0**40  # float16 ends at 65504
    before = [p.detach().clone() for p in s.net.parameters()]
    history = [h.clone() for g in s.rule.groups for h in g.history[0]]
    with caplog.at_level("WARNING"):
        s.step(1)
    assert s.iter == 2
    assert (s.scaling.skipped, s.scaling.scale) == (1, 2.0**39)
    assert all(torch.equal(a, b) for a, b in zip(before, s.net.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(history, (h for g in s.rule.groups for h in g.history[0])))
    assert "Iteration 1: gradients are not finite at scale 1.09951e+12: no update (1 so far)" in caplog.text
    s.scaling.scale = 1024.0
    s.step(1)
    assert not all(torch.equal(a, b) for a, b in zip(before, s.net.parameters()))


@pytest.mark.usefixtures("every_type")
def test_the_dynamic_scale_doubles_after_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "PATIENCE", 2)
    s = solver(HALF + " global_grad_scale_adaptive: true")
    s.scaling.scale = 64.0
    s.step(5)
    assert s.scaling.scale == 256.0


@pytest.mark.usefixtures("every_type")
def test_a_fixed_scale_that_never_fits_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "ENOUGH", 3)
    s = solver(HALF + " global_grad_scale: 1e30")
    with pytest.raises(CaffeError, match="3 iterations in a row") as caught:
        s.step(10)
    assert s.iter == 2
    assert "global_grad_scale_adaptive" in str(caught.value.hint)


@pytest.mark.usefixtures("every_type")
def test_it_is_shown_and_resumed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fields = f"display: 1 snapshot_prefix: '{tmp_path}/s'"
    s = solver(HALF + " global_grad_scale_adaptive: true", fields)
    with caplog.at_level("INFO"):
        s.step(1)
    assert "Iteration 0, lr = 0.05, gs = 65536" in caplog.text
    s.scaling.scale, s.scaling.skipped = 512.0, 7
    _, state = s.snapshot()
    again = solver(HALF + " global_grad_scale_adaptive: true", fields)
    again.restore(state)
    assert again.scaling.state() == s.scaling.state()
    s.step(2)
    again.step(2)
    assert all(torch.equal(a, b) for a, b in zip(s.net.parameters(), again.net.parameters()))


@pytest.mark.usefixtures("every_type")
@pytest.mark.parametrize(("first", "then"), [("fp16", "fp32"), ("fp32", "bf16"), ("fp32", "fp64"), ("fp64", "fp32")])
def test_a_run_goes_on_in_another_type(first: str, then: str, tmp_path: Path) -> None:
    """A GPU's run on a CPU that lacks the type, say. NVCaffe's BatchNorm has a buffer that counts passes."""
    fields = f"snapshot_prefix: '{tmp_path}/s'"
    norm = "layer { name: 'bn' type: 'BatchNorm' bottom: 'conv' top: 'conv' }"
    one = solver("", fields, norm=norm, precision=first, dialect="nvcaffe")
    one.step(3)
    _, state = one.snapshot()
    two = solver("", fields, norm=norm, precision=then, dialect="nvcaffe")
    two.restore(state)
    assert two.iter == 3
    passes = [b for name, b in two.net.named_buffers() if name.endswith("passes")]
    assert [int(p) for p in passes] == [3]
    for a, b in zip(one.net.parameters(), two.net.parameters(), strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-6, atol=1e-7)
    two.step(1)


@pytest.mark.usefixtures("every_type")
def test_who_gets_a_scale(caplog: pytest.LogCaptureFixture) -> None:
    assert solver(precision="fp16").scaling.dynamic  # from the command line: dynamic
    assert not solver(HALF).scaling.active  # as NVCaffe
    assert solver("global_grad_scale: 8", precision="fp16").scaling.scale == 8
    with caplog.at_level("INFO"):
        assert not solver("global_grad_scale: 1000", precision="bf16").scaling.active
    assert "global_grad_scale has no effect: no layer runs in FLOAT16" in caplog.text


def test_without_float16_nothing_is_scaled() -> None:
    """float32 in place of float16: the same numbers as without a scale, bit for bit."""
    a, b = solver(), solver(f"{HALF} global_grad_scale: 1000", precision="fp32")
    for x, y in zip(gradients(a), gradients(b), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("value", ["0", "-2", "nan", "inf"])
def test_a_scale_that_is_none(value: str) -> None:
    with pytest.raises(PrototxtError, match="global_grad_scale must be positive"):
        solver(f"global_grad_scale: {value}")
