"""Losses: values and gradients in every normalization, ignored and wrong labels, extremes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from caffejacinto_py.errors import DataError, LayerError
from tests.layers.harness import Arrays, Case, build, check_layer, layer_of

WEIGHTS = np.array([0.5, 1, 2, 4, 8])


def _softmax_loss(
    *, axis: int = 1, norm: str = "VALID", ignore: int | None = None, smooth: float = 0, weights: bool = False
) -> Callable[[Arrays, Arrays], Arrays]:
    def oracle(bottoms: Arrays, _: Arrays) -> Arrays:
        x = np.moveaxis(bottoms[0], axis, -1)
        outer = math.prod(bottoms[0].shape[:axis])
        rows, labels = x.reshape(-1, x.shape[-1]), bottoms[1].astype(int).flatten()
        classes, total, valid = x.shape[-1], 0.0, 0
        for row, label in zip(rows, labels, strict=True):
            if label == ignore:
                continue
            logp = row - row.max() - np.log(np.exp(row - row.max()).sum())
            target = np.full(classes, smooth / (classes - 1))
            target[label] = 1 - smooth
            total -= (target * logp).sum() * (WEIGHTS[label] if weights else 1)
            valid += 1
        n = {"VALID": valid, "FULL": len(labels), "BATCH_SIZE": outer, "NONE": 1}[norm]
        return [np.array(total / max(n, 1))]

    return oracle


def _sigmoid_ce(norm: str = "BATCH_SIZE", ignore: int | None = None) -> Callable[[Arrays, Arrays], Arrays]:
    def oracle(bottoms: Arrays, _: Arrays) -> Arrays:
        x, t = bottoms
        p = 1 / (1 + np.exp(-x))
        each = -(t * np.log(p) + (1 - t) * np.log(1 - p))
        keep = np.ones_like(t, bool) if ignore is None else np.trunc(t) != ignore
        n = {"VALID": keep.sum(), "FULL": x.size, "BATCH_SIZE": len(x), "NONE": 1}[norm]
        return [np.array(each[keep].sum() / max(n, 1))]

    return oracle


def _hinge(power: int) -> Callable[[Arrays, Arrays], Arrays]:
    def oracle(bottoms: Arrays, _: Arrays) -> Arrays:
        x = bottoms[0].reshape(len(bottoms[0]), -1)
        d = -np.ones_like(x)
        d[np.arange(len(x)), bottoms[1].astype(int).flatten()] = 1
        return [np.array((np.maximum(0, 1 - d * x) ** power).sum() / len(x))]

    return oracle


def _sce(param: str, *, axis: int | None = None) -> str:
    where = "" if axis is None else f"softmax_param {{ axis: {axis} }}"
    return f'type: "SoftmaxWithLoss" loss_param {{ {param} }} {where}'


FLAT, IMAGE, LABEL = (4, 5), (2, 5, 2, 3), (2, 1, 2, 3)
CASES = {
    "flat": Case(_sce(""), [FLAT, (4,)], _softmax_loss(), labels={1: 5}, compiled=True),
    "flat_column": Case(_sce(""), [FLAT, (4, 1)], _softmax_loss(), labels={1: 5}),
    "pooled": Case(_sce(""), [(4, 5, 1, 1), (4,)], _softmax_loss(), labels={1: 5}),
    "weights": Case(
        _sce("".join(f"label_weights: {w} " for w in WEIGHTS)),
        [IMAGE, LABEL],
        _softmax_loss(weights=True),
        labels={1: 5},
        compiled=True,
    ),
    "weights_ignore": Case(
        _sce("".join(f"label_weights: {w} " for w in WEIGHTS) + "ignore_label: 0"),
        [IMAGE, LABEL],
        _softmax_loss(weights=True, ignore=0),
        labels={1: 5},
    ),
    "smoothing": Case(
        _sce("label_smoothing: 0.25 ignore_label: 1"),
        [IMAGE, LABEL],
        _softmax_loss(smooth=0.25, ignore=1),
        labels={1: 5},
        phases_agree=False,
        compiled=True,
    ),
    "smoothing_weights": Case(
        _sce("label_smoothing: 0.25 " + "".join(f"label_weights: {w} " for w in WEIGHTS)),
        [FLAT, (4,)],
        _softmax_loss(smooth=0.25, weights=True),
        labels={1: 5},
        phases_agree=False,
    ),
    "smoothing_test_phase": Case(
        _sce("label_smoothing: 0.25"), [FLAT, (4,)], _softmax_loss(), labels={1: 5}, phase="TEST", phases_agree=False
    ),
    "axis_last": Case(
        _sce("ignore_label: 2", axis=-1), [(2, 3, 5), (2, 3)], _softmax_loss(axis=2, ignore=2), labels={1: 5}
    ),
    "axis_middle": Case(
        _sce("normalization: BATCH_SIZE", axis=2),
        [(2, 3, 5, 2), (2, 3, 1, 2)],
        _softmax_loss(axis=2, norm="BATCH_SIZE"),
        labels={1: 5},
    ),
    "old_normalize": Case(_sce("normalize: true"), [IMAGE, LABEL], _softmax_loss(), labels={1: 5}),
    "old_normalize_false": Case(
        _sce("normalize: false"), [IMAGE, LABEL], _softmax_loss(norm="BATCH_SIZE"), labels={1: 5}
    ),
    "normalization_beats_normalize": Case(
        _sce("normalize: false normalization: NONE"), [IMAGE, LABEL], _softmax_loss(norm="NONE"), labels={1: 5}
    ),
    "euclidean": Case(
        'type: "EuclideanLoss"',
        [(4, 2, 3), (4, 6)],
        lambda b, _: [np.array(((b[0].reshape(4, 6) - b[1]) ** 2).sum() / 8)],
        compiled=True,
    ),
    "hinge": Case('type: "HingeLoss"', [(4, 5), (4,)], _hinge(1), labels={1: 5}, kinks=[-1, 1], compiled=True),
    "hinge_l2": Case(
        'type: "HingeLoss" hinge_loss_param { norm: L2 }', [(4, 5, 1, 1), (4, 1)], _hinge(2), labels={1: 5}
    ),
    "sigmoid_ce": Case('type: "SigmoidCrossEntropyLoss"', [IMAGE, IMAGE], _sigmoid_ce(), low=0.1, high=0.9),
    "sigmoid_ce_normalize": Case(
        'type: "SigmoidCrossEntropyLoss" loss_param { normalize: true }', [FLAT, FLAT], _sigmoid_ce("VALID")
    ),
    "sigmoid_ce_nv": Case(
        'type: "SigmoidCrossEntropyLoss" loss_param { normalization: FULL ignore_label: 0 }',
        [FLAT, FLAT],
        _sigmoid_ce(),
        dialect="nvcaffe",
    ),
}
for norm, ignore in itertools.product(("VALID", "FULL", "BATCH_SIZE", "NONE"), (None, 3)):
    text = f"normalization: {norm} " + ("" if ignore is None else f"ignore_label: {ignore}")
    CASES[f"{norm}_{ignore}"] = Case(_sce(text), [IMAGE, LABEL], _softmax_loss(norm=norm, ignore=ignore), labels={1: 5})
for norm in ("VALID", "FULL", "BATCH_SIZE", "NONE"):
    CASES[f"sigmoid_ce_{norm}"] = Case(
        f'type: "SigmoidCrossEntropyLoss" loss_param {{ normalization: {norm} ignore_label: 1 }}',
        [FLAT, FLAT],
        _sigmoid_ce(norm, 1),
        bottoms=[np.random.default_rng(0).normal(size=FLAT), np.random.default_rng(1).integers(0, 3, FLAT) * 1.0],
        rebatch=False,
        compiled=norm == "VALID",
    )


@pytest.mark.parametrize("name", CASES)
def test_contract(name: str) -> None:
    check_layer(CASES[name])


def _loss(x: list, labels: list, param: str = "", *, tops: int = 1) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    scores = torch.tensor(x, requires_grad=True)
    built = build(_sce(param), [tuple(scores.shape), (len(labels),)], tops=tops)
    out = built(scores, torch.tensor(labels))
    out[0].backward()
    assert scores.grad is not None
    return out, scores.grad


def test_traits() -> None:
    layer = layer_of(_sce(""), bottoms=2)
    assert layer.loss_top
    assert layer.auto_tops
    assert [layer.differentiable(i) for i in (0, 1)] == [True, False]
    assert [layer_of('type: "EuclideanLoss"', bottoms=2).force_backward(i) for i in (0, 1)] == [True, True]


def test_one_label_costs_at_most_87_and_its_gradient_goes_on() -> None:
    (loss,), grad = _loss([[0.0, 200.0]], [0.0])
    assert loss.item() == pytest.approx(87.33654, abs=1e-4)
    assert grad.tolist() == [[-1, 1]]


def test_all_labels_ignored() -> None:
    (loss,), grad = _loss([[1.0, 2.0]], [255.0], "ignore_label: 255")
    assert loss.item() == 0
    assert grad.tolist() == [[0, 0]]


def test_smoothed_and_ignored() -> None:
    (loss,), grad = _loss([[1.0, 2.0], [0.0, 0.0]], [255.0, 1.0], "ignore_label: 255 label_smoothing: 0.25")
    assert loss.item() == pytest.approx(math.log(2))
    assert grad.tolist() == [[0, 0], [0.25, -0.25]]


def test_second_top_is_the_probabilities_without_gradient() -> None:
    (_, prob), _ = _loss([[0.0, math.log(3.0)]], [1.0], tops=2)
    assert prob.tolist() == [[pytest.approx(0.25), pytest.approx(0.75)]]
    assert not prob.requires_grad


def test_labels_are_truncated_like_in_c() -> None:
    assert _loss([[0.0, 1.0]], [1.9])[0][0].item() == _loss([[0.0, 1.0]], [1.0])[0][0].item()


@pytest.mark.parametrize("bad", [5.0, -1.0, -100.0, math.nan])
@pytest.mark.parametrize(
    ("kind", "inner"),
    [
        ("SoftmaxWithLoss", False),
        ("SoftmaxWithLoss", True),
        ("HingeLoss", False),
        ("Accuracy", False),
        ("Accuracy", True),
    ],
)
def test_label_out_of_range(kind: str, bad: float, inner: bool) -> None:
    ins = [(2, 5, 3), (2, 3)] if inner else [(2, 5), (2,)]
    built = build(f'name: "top" type: "{kind}" bottom: "fc" bottom: "label"', ins)
    label = torch.zeros(ins[1], dtype=torch.float64)
    label[-1] = bad
    with pytest.raises(DataError, match=r"layer 'top'.*blob 'label' has label.*but there are 5 classes") as e:
        built(torch.zeros(ins[0], dtype=torch.float64), label)
    assert f"label {bad:g}," in e.value.text
    assert e.value.hint


def test_ignored_labels_may_be_out_of_range_but_no_others() -> None:
    _loss([[0.0, 1.0]], [255.0], "ignore_label: 255")
    _loss([[0.0, 1.0]], [-1.0], "ignore_label: -1")
    with pytest.raises(DataError, match="label 254"):
        _loss([[0.0, 1.0], [0.0, 1.0]], [255.0, 254.0], "ignore_label: 255")


def test_expected_labels() -> None:
    layer = layer_of(_sce(""), bottoms=2)
    assert layer.expects(1, [(8, 10), None]) == (8,)
    assert layer.expects(1, [(8, 10, 1, 1), None]) == (8,)
    assert layer.expects(1, [(8, 21, 6, 7), None]) == (8, 1, 6, 7)
    assert layer.expects(0, [None, (8,)]) is None
    assert layer_of(_sce("", axis=-1), bottoms=2).expects(1, [(8, 6, 21), None]) == (8, 6)
    assert layer_of('type: "HingeLoss"', bottoms=2).expects(1, [(8, 10), None]) == (8,)
    for kind in ("EuclideanLoss", "SigmoidCrossEntropyLoss"):
        assert layer_of(f'type: "{kind}"', bottoms=2).expects(1, [(8, 3, 2), None]) == (8, 3, 2)


@pytest.mark.parametrize(
    ("text", "ins", "field", "says"),
    [
        (_sce(""), [(4, 5), (3,)], ("bottom", 1), "needs 4 labels, bottom 1 'b1' \\(3,\\) has 3"),
        (_sce(""), [(4, 5, 2, 2), (4,)], ("bottom", 1), "needs 16 labels"),
        (_sce(""), [(4,), (4,)], ("softmax_param", "axis"), "axis 1 is out of range"),
        (_sce("label_weights: 1"), [(4, 5), (4,)], ("loss_param", "label_weights", 0), "1 label_weights for 5 classes"),
        (_sce("label_smoothing: 1"), [(4, 5), (4,)], ("loss_param", "label_smoothing"), "label_smoothing 1"),
        (_sce("label_smoothing: 0.1"), [(4, 1), (4,)], ("loss_param", "label_smoothing"), "2 or more classes"),
        ('type: "EuclideanLoss"', [(4, 5), (4, 6)], ("bottom", 1), "as many numbers"),
        ('type: "EuclideanLoss"', [(4, 5), (5, 4)], ("bottom", 1), "as many items"),
        ('type: "SigmoidCrossEntropyLoss"', [(4, 5), ()], ("bottom", 1), "as many numbers"),
        ('type: "HingeLoss"', [(4,), (4,)], ("bottom", 0), "items and classes"),
        ('type: "HingeLoss"', [(4, 5), (4, 5)], ("bottom", 1), "need 4 labels"),
    ],
)
def test_refusals(text: str, ins: list, field: tuple, says: str) -> None:
    with pytest.raises(LayerError, match=says) as e:
        layer_of(text, bottoms=2).shapes(ins)
    assert e.value.field == field
