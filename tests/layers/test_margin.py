"""MarginInnerProduct, LabelSpecificAdd, CenterLoss: formulas of the papers, gradients of the sources, refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from caffejacinto_py.errors import DataError, LayerError
from tests.layers.harness import Arrays, Case, build, check_layer, layer_of

N, K, C = 5, 3, 4
RNG = np.random.default_rng(7)
X, W = RNG.normal(size=(N, K)), RNG.normal(size=(C, K))
LABEL = np.array([0.0, 3, 1, 3, 2])
TYPES = {1: "SINGLE", 2: "DOUBLE", 3: "TRIPLE", 4: "QUADRUPLE"}


def psi(cosine: float, m: int) -> float:
    """By its definition, with angles."""
    theta = math.acos(min(max(cosine, -1), 1))
    k = min(math.floor(m * theta / math.pi), m - 1)
    return (-1) ** k * math.cos(m * theta) - 2 * k


def scores(x: np.ndarray, w: np.ndarray, label: np.ndarray, m: int, lam: float) -> np.ndarray:
    w = w / np.linalg.norm(w, axis=1, keepdims=True)
    y = x @ w.T
    if m > 1:
        for n, c in enumerate(label.astype(int)):
            length = np.linalg.norm(x[n])
            y[n, c] = (length * psi(y[n, c] / length, m) + lam * y[n, c]) / (1 + lam)
    return y


def margin(m: int, fields: str = "") -> str:
    return f'type: "MarginInnerProduct" margin_inner_product_param {{ num_output: {C} type: {TYPES[m]} {fields} }}'


@pytest.mark.parametrize("m", TYPES)
def test_margin_scores(m: int) -> None:
    lam = 1000 * (1 + 0.5) ** -2
    fields = "base: 1000 gamma: 0.5 power: 2 lambda_min: 5"
    check_layer(
        Case(
            margin(m, fields),
            [(N, K), (N,)],
            lambda ins, blobs: [scores(ins[0], blobs[0], ins[1], m, lam), np.array([lam])],
            tops=2,
            bottoms=[X, LABEL],
            blobs=[W],
            labels={1: C},
            gradient=False,
        )
    )


def test_psi_falls_without_jumps() -> None:
    from caffejacinto_py.layers.modules.margin import psi as ours

    c = torch.linspace(-1, 1, 2001, dtype=torch.float64)
    for m in (2, 3, 4):
        value, slope = ours(c, m)
        assert ((value[1:] - value[:-1]) > -1e-9).all()
        assert (value[1:] - value[:-1]).abs().max() < 0.02
        assert value[-1] == pytest.approx(1)
        assert value[0] == pytest.approx(1 - 2 * m if m % 2 == 0 else -(2 * m - 1))
        np.testing.assert_allclose(value[::50].numpy(), [psi(v, m) for v in c[::50].tolist()], atol=1e-7)
        middle = (value[2:] - value[:-2]) / (c[2:] - c[:-2])
        assert (slope[1:-1] - middle).abs().median() < 1e-3


@pytest.mark.parametrize("m", TYPES)
def test_margin_gradients_are_sphereface_s(m: int) -> None:
    """Formulas of the C++ code: coefficients of w and x for the label's class, divided by their norm."""
    lam = 3.0
    built = build(margin(m, f"base: {lam}"), [(N, K), (N,)], blobs=[W])
    x = torch.tensor(X, requires_grad=True)
    (y,) = built(x, torch.tensor(LABEL))
    top = RNG.normal(size=(N, C))
    y.backward(torch.tensor(top))
    w = W / np.linalg.norm(W, axis=1, keepdims=True)
    np.testing.assert_allclose(built.blobs[0].detach().numpy(), w, rtol=1e-12)
    np.testing.assert_allclose(built.blobs[0].grad.numpy(), top.T @ X, rtol=1e-12)
    want = np.zeros_like(X)
    for n, j in np.ndindex(N, C):
        length = np.linalg.norm(X[n])
        c = X[n] @ w[j] / length
        s = np.sign(c)
        if j != LABEL[n] or m == 1:
            want[n] += top[n, j] * w[j]
            continue
        if m == 2:
            a, b = 4 * s * c, -(2 * s * c**2 + 1) / length
        elif m == 3:
            s1 = np.sign(abs(c) - 0.5)
            s2 = s * (1 + s1) - 2
            a, b = s1 * (12 * c**2 - 3), -(8 * s1 * c**3 - s2) / length
        else:
            s3 = s * np.sign(2 * c**2 - 1)
            s4 = 2 * s + s3 - 3
            a, b = s3 * (32 * c**3 - 16 * c), -(s3 * (24 * c**4 - 8 * c**2 - 1) - s4) / length
        size = math.hypot(a, b)
        want[n] += top[n, j] * ((a * w[j] + b * X[n]) / size + lam * w[j]) / (1 + lam)
    np.testing.assert_allclose(x.grad.numpy(), want, rtol=1e-10, atol=1e-12)


def test_lambda_goes_on_and_is_kept() -> None:
    text = margin(2, "base: 10 gamma: 1 power: 1 lambda_min: 2 iteration: 1")
    built = build(text, [(N, K), (N,)], tops=2, blobs=[W])
    found = [built(torch.tensor(X), torch.tensor(LABEL))[1].item() for _ in range(5)]
    assert found == pytest.approx([10 / 3, 10 / 4, 2, 2, 2])
    assert dict(built.module.named_buffers())["iteration"].item() == 6


def test_margin_of_nothing_is_nothing() -> None:
    (y,) = build(margin(4), [(1, K), (1,)], blobs=[W])(torch.zeros(1, K, dtype=torch.float64), torch.zeros(1))
    assert (y == 0).all()


def add(fields: str, ins, oracle, **kw) -> Case:
    text = f'type: "LabelSpecificAdd" label_specific_add_param {{ {fields} }}'
    return Case(text, ins, oracle, labels={1: C}, **kw)


def plus(bias: float, both: bool = False):
    def oracle(ins: Arrays, _: Arrays) -> Arrays:
        y = ins[0].copy()
        for n, c in enumerate(ins[1].astype(int).ravel()):
            y[n, c] += bias if y[n, c] > -bias else 0
        return [y, np.array([bias])] if both else [y]

    return oracle


ADD = {
    "minus": add("bias: -0.25", [(6, C), (6,)], plus(-0.25), kinks=[0.25], phases_agree=False, compiled=True),
    "plus": add("bias: 0.5", [(6, C), (6, 1, 1, 1)], plus(0.5), kinks=[-0.5], phases_agree=False),
    "test": add(
        "bias: -0.25 transform_test: true", [(6, C), (6,)], lambda i, _: i[:1], phase="TEST", phases_agree=False
    ),
    "four_axes": add("", [(6, C, 1, 1), (6,)], lambda i, _: i[:1]),
    "annealed": add(
        "bias_base: -0.5 bias_gamma: 0.5 bias_power: 2 bias_min: -2 bias_max: 1 iteration: 1",
        [(6, C), (6,)], plus(-0.5 + 1.5**2 - 1, both=True), tops=2, kinks=[-0.75], gradient=False, phases_agree=False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ADD)
def test_label_specific_add(name: str) -> None:
    check_layer(ADD[name])


def test_annealed_bias_goes_on_in_training_only() -> None:
    fields = "bias_base: -1 bias_gamma: 1 bias_min: -5 bias_max: 1.5"
    text = f'type: "LabelSpecificAdd" label_specific_add_param {{ {fields} }}'
    built = build(text, [(1, 2), (1,)], tops=2)
    x, label = torch.zeros(1, 2, dtype=torch.float64), torch.zeros(1)
    assert [built(x, label)[1].item() for _ in range(4)] == [-1, 0, 1, 1.5]
    built.module.eval()
    assert torch.equal(built(x, label)[0], x)
    built.module.train()
    assert built(x, label)[1].item() == 1.5


CENTER = 'type: "CenterLoss" center_loss_param { num_output: 4 }'


def center(ins: Arrays, blobs: Arrays) -> Arrays:
    x = ins[0].reshape(ins[0].shape[0], -1)
    return [np.asarray(((x - blobs[0][ins[1].astype(int).ravel()]) ** 2).sum() / x.shape[0] / 2)]


def test_center_loss() -> None:
    ins = [(N, K), (N,)]
    check_layer(Case(CENTER, ins, center, bottoms=[X, LABEL], labels={1: C}, gradient=False, compiled=True))
    check_layer(Case(CENTER, [(3, 2, 2, 1), (3, 1)], center, labels={1: C}, gradient=False))
    assert [b.shape for b in layer_of(CENTER, bottoms=2).blobs([(3, 2, 2, 1), (3,)])] == [(4, 4)]


def test_center_loss_gradients() -> None:
    built = build(CENTER, [(N, K), (N,)], blobs=[W])
    x = torch.tensor(X, requires_grad=True)
    (loss,) = built(x, torch.tensor(LABEL))
    (0.25 * loss).backward()
    label = LABEL.astype(int)
    np.testing.assert_allclose(x.grad.numpy(), 0.25 * (X - W[label]) / N, rtol=1e-12)
    step = np.zeros_like(W)
    for c in range(C):
        step[c] = (W[c] - X[label == c]).sum(0) / (1 + (label == c).sum())
    np.testing.assert_allclose(built.blobs[0].grad.numpy(), step, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("text", [margin(2), 'type: "LabelSpecificAdd" label_specific_add_param { bias: -1 }', CENTER])
def test_a_wrong_label_is_found(text: str) -> None:
    built = build(text, [(1, C), (1,)])
    with pytest.raises(DataError, match="label 4, but there are 4 classes"):
        built(torch.ones(1, C, dtype=torch.float64), torch.tensor([4.0]))


@pytest.mark.parametrize(
    ("text", "ins", "field", "words"),
    [
        ('type: "MarginInnerProduct"', [(2, 3), (2,)], "num_output", "must be given"),
        (margin(2, "axis: 2"), [(2, 3, 4), (2,)], "axis", "only axis 1"),
        (margin(2), [(2, 3), (3,)], 1, "one label for each of the 2"),
        ('type: "LabelSpecificAdd"', [(2, 3, 4), (2,)], 0, "one score per class"),
        (
            'type: "LabelSpecificAdd" label_specific_add_param { bias_base: 1 bias_min: 1 }',
            [(2, 3), (2,)], "bias_min", "above bias_max",
        ),
        ('type: "CenterLoss"', [(2, 3), (2,)], "num_output", "must be given"),
        (
            'type: "CenterLoss" center_loss_param { num_output: 2 distance_type: "L1" }',
            [(2, 3), (2,)], "distance_type", "only L2",
        ),
        (CENTER, [(2, 3), (2, 2)], 1, "one label"),
    ],
)  # fmt: skip
def test_refusals(text: str, ins: list, field: str | int, words: str) -> None:
    with pytest.raises(LayerError) as e:
        layer_of(text, bottoms=2).shapes(ins)
    assert e.value.field[-1] == field
    assert words in e.value.text
