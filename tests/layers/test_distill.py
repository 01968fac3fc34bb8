"""DistillSoftmaxLoss, FeatureHintLoss, AttentionTransferLoss, Teacher: the papers' formulas; refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from caffejacinto_py.errors import LayerError
from tests.layers.harness import Arrays, Case, build, check_layer, layer_of


def softmax(x: np.ndarray, axis: int) -> np.ndarray:
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def distilled(ins: Arrays, t: float, axis: int, *, entropy: bool, keep: Any = 1.0, count: float) -> np.ndarray:
    p, q = softmax(ins[0] / t, axis), softmax(ins[1].reshape(ins[0].shape) / t, axis)
    each = (q * ((np.log(q) if entropy else 0) - np.log(p))).sum(axis)
    return np.asarray(t * t * (each * keep).sum() / count)


@pytest.mark.parametrize("divergence", ["KL", "CROSS_ENTROPY"])
@pytest.mark.parametrize("t", [1, 4])
def test_distill_of_vectors(divergence: str, t: int) -> None:
    text = f'type: "DistillSoftmaxLoss" distill_softmax_loss_param {{ temperature: {t} divergence: {divergence} }}'
    check_layer(
        Case(
            text,
            [(5, 4), (5, 4, 1, 1)],
            lambda ins, _: [distilled(ins, t, 1, entropy=divergence == "KL", count=5)],
            compiled=True,
        )
    )


@pytest.mark.parametrize(("normalization", "count"), [("VALID", None), ("FULL", 24), ("BATCH_SIZE", 2), ("NONE", 1)])
def test_distill_of_places_with_ignored_labels(normalization: str, count: float | None) -> None:
    """Ignored places count nothing, and get no gradient."""

    def oracle(ins: Arrays, _: Arrays) -> list[np.ndarray]:
        keep = (ins[2] != 1).reshape(2, 3, 4)
        return [distilled(ins, 2, 1, entropy=True, keep=keep, count=count or keep.sum())]

    text = 'type: "DistillSoftmaxLoss" distill_softmax_loss_param { temperature: 2 } '
    text += f"loss_param {{ ignore_label: 1 normalization: {normalization} }}"
    ins = [(2, 5, 3, 4), (2, 5, 3, 4), (2, 1, 3, 4)]
    check_layer(Case(text, ins, oracle, labels={2: 4}))
    x = torch.randn(ins[0], dtype=torch.float64, requires_grad=True)
    label = torch.randint(0, 4, ins[2]).double()
    build(text, ins)(x, torch.randn(ins[1], dtype=torch.float64), label)[0].backward()
    assert x.grad is not None
    zero = (x.grad == 0).all(1, keepdim=True)
    assert torch.equal(zero, label == 1)


def test_distill_where_everything_is_ignored_is_zero() -> None:
    built = build('type: "DistillSoftmaxLoss" loss_param { ignore_label: 1 }', [(2, 3), (2, 3), (2,)])
    assert built(torch.randn(2, 3), torch.randn(2, 3), torch.ones(2))[0].item() == 0


def test_distill_on_another_axis_and_its_gradient() -> None:
    text = 'type: "DistillSoftmaxLoss" distill_softmax_loss_param { axis: -1 temperature: 3 }'
    check_layer(Case(text, [(2, 3, 4), (2, 3, 4)], lambda ins, _: [distilled(ins, 3, 2, entropy=True, count=6)]))
    s = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    t = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    build(text, [s.shape, t.shape])(s, t)[0].backward()
    want = 3 / 6 * ((s / 3).softmax(-1) - (t / 3).softmax(-1)).detach()
    torch.testing.assert_close(s.grad, want)
    assert t.grad is None, "the teacher learns nothing"


def test_probabilities_are_as_good_as_scores() -> None:
    s, t = torch.randn(3, 5), torch.randn(3, 5) * 3
    text = 'type: "DistillSoftmaxLoss" distill_softmax_loss_param { temperature: 5 %s }'
    scores = build(text % "", [s.shape, s.shape])(s, t)[0]
    assert build(text % "probabilities: true", [s.shape, s.shape])(s, t.softmax(1))[0].item() == pytest.approx(scores)
    hard = torch.eye(5)[:3]
    assert build(text % "probabilities: true", [s.shape, s.shape])(s, hard)[0].isfinite()


HINTS = {
    "L2": lambda d: (d**2).sum() / 2,
    "L1": lambda d: np.abs(d).sum(),
    "SMOOTH_L1": lambda d: np.where(np.abs(d) < 0.25, 2 * d**2, np.abs(d) - 0.125).sum(),
}


@pytest.mark.parametrize("norm", HINTS)
@pytest.mark.parametrize(("normalization", "count"), [("", 3), ("BATCH_SIZE", 3), ("FULL", 72), ("NONE", 1)])
def test_hints(norm: str, normalization: str, count: int) -> None:
    text = f'type: "FeatureHintLoss" feature_hint_loss_param {{ norm: {norm} sigma: 2 }}'
    if normalization:
        text += f" loss_param {{ normalization: {normalization} }}"
    ins = [(3, 4, 2, 3), (3, 4, 2, 3)]
    check_layer(Case(text, ins, lambda b, _: [np.asarray(HINTS[norm](b[0] - b[1]) / count)]))


@pytest.mark.parametrize("power", [2, 1, 4])
@pytest.mark.parametrize(("normalization", "count"), [("FULL", 18), ("BATCH_SIZE", 3)])
def test_attention(power: int, normalization: str, count: int) -> None:
    def oracle(ins: Arrays, _: Arrays) -> list[np.ndarray]:
        maps = [(np.abs(x) ** power).mean(1).reshape(3, -1) for x in ins]
        a, b = (m / np.linalg.norm(m, axis=1, keepdims=True) for m in maps)
        return [np.asarray(((a - b) ** 2).sum() / count)]

    text = f'type: "AttentionTransferLoss" attention_transfer_loss_param {{ power: {power} }}'
    text += f" loss_param {{ normalization: {normalization} }}"
    check_layer(Case(text, [(3, 4, 2, 3), (3, 7, 2, 3)], oracle, kinks=[0]))


def test_attention_of_a_dead_map_is_finite() -> None:
    ins = [(2, 3, 2, 2), (2, 3, 2, 2)]
    x = torch.zeros(ins[0], dtype=torch.float64, requires_grad=True)
    (loss,) = build('type: "AttentionTransferLoss"', ins)(x, torch.rand(ins[1], dtype=torch.float64))
    loss.backward()
    assert loss.isfinite()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(
    ("text", "ins", "words", "hint"),
    [
        ('type: "DistillSoftmaxLoss"', [(2, 3), (2, 4)], "student's blob 'b0' is (2, 3), the teacher's 'b1' (2, 4)",
         "same classes"),
        ('type: "DistillSoftmaxLoss" distill_softmax_loss_param { temperature: 0 }', [(2, 3), (2, 3)], "positive", ""),
        ('type: "DistillSoftmaxLoss" distill_softmax_loss_param { axis: 2 }', [(2, 3), (2, 3)], "axis 2", ""),
        ('type: "DistillSoftmaxLoss" loss_param { ignore_label: 0 }', [(2, 3), (2, 3)], "needs the labels", ""),
        ('type: "DistillSoftmaxLoss"', [(2, 3), (2, 3), (2,)], "ignored places", "ignore_label"),
        ('type: "DistillSoftmaxLoss" loss_param { ignore_label: 0 }', [(2, 3), (2, 3), (3,)], "2 labels", "shape (2,)"),
        ('type: "FeatureHintLoss"', [(2, 8, 5, 5), (2, 32, 5, 5)], "one shape",
         "a Convolution with num_output: 32 kernel_size: 1"),
        ('type: "FeatureHintLoss"', [(2, 8), (2, 32)], "one shape", "InnerProduct with num_output: 32"),
        ('type: "FeatureHintLoss"', [(2, 8, 5, 5), (2, 8, 9, 9)], "one shape", "to (9, 9) places"),
        ('type: "FeatureHintLoss" feature_hint_loss_param { sigma: 0 }', [(2, 8), (2, 8)], "sigma", ""),
        ('type: "AttentionTransferLoss"', [(2, 8, 5, 5), (2, 8, 4, 5)], "places must agree", "resolution"),
        ('type: "AttentionTransferLoss"', [(2, 8), (2, 8)], "(N, C, H, W)", ""),
        ('type: "AttentionTransferLoss" attention_transfer_loss_param { power: 0.5 }', [(2, 8, 5, 5)] * 2, "power", ""),
    ],
)  # fmt: skip
def test_refusals(text: str, ins: list[tuple[int, ...]], words: str, hint: str) -> None:
    with pytest.raises(LayerError) as e:
        layer_of(text, bottoms=len(ins)).shapes(ins)
    assert words in e.value.text
    assert hint in (e.value.hint or "")
    assert e.value.field


# --- Teacher ---------------------------------------------------------------------------------------------------------
def test_a_teacher_s_tops() -> None:
    shapes = [(4, 10), (4, 50, 4, 4)]
    made = layer_of('type: "Teacher" top: "teacher/ip2" top: "conv2"', bottoms=0, teacher=lambda layer: shapes)
    assert made.shapes([]) == shapes
    assert made.assumed(2) == [None, None], "without a teacher the readers decide"
    assert made.read() == (None, ("ip2", "conv2"))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "blobs"),
    [
        ('top: "big/ip2" teacher_param { teacher: "big" }', ("big", ("ip2",))),
        ('top: "big/ip2" teacher_param { teacher: "small" }', ("small", ("big/ip2",))),
        ('top: "x" top: "y" teacher_param { blob: "a/b" blob: "c" }', (None, ("a/b", "c"))),
    ],
)
def test_names_of_a_teacher_s_blobs(text: str, blobs: Any) -> None:
    assert layer_of('type: "Teacher" ' + text, bottoms=0).read() == blobs  # type: ignore[attr-defined]


def test_a_teacher_layer_without_a_teacher() -> None:
    with pytest.raises(LayerError, match="there is none") as e:
        layer_of('type: "Teacher" top: "t/ip2"', bottoms=0).shapes([])
    assert "--teacher" in str(e.value.hint)
    with pytest.raises(LayerError, match="1 blobs for 2 tops"):
        layer_of('type: "Teacher" top: "a" top: "b" teacher_param { blob: "c" }', bottoms=0).shapes([])
