"""Accuracy: both rules for ties, top_k, ignored labels, classes, empty batches."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from caffejacinto_py.errors import LayerError
from tests.layers.harness import Arrays, Case, build, check_layer, layer_of

TEXT = 'type: "Accuracy" accuracy_param {{ {} }}'


def _oracle(*, axis: int = 1, top_k: int = 1, ignore: int | None = None, lose: bool = True, per_class: bool = False):
    """Caffe's loops, label by label."""

    def oracle(bottoms: Arrays, _: Arrays) -> Arrays:
        x = np.moveaxis(bottoms[0], axis, -1)
        classes = x.shape[-1]
        hits, count = np.zeros(classes), np.zeros(classes)
        for row, label in zip(x.reshape(-1, classes), bottoms[1].astype(int).flatten(), strict=True):
            if label == ignore:
                continue
            count[label] += 1
            if lose:
                before = sum(row[k] >= row[label] for k in range(classes) if k != label)
                hits[label] += before < top_k
            else:
                order = sorted(range(classes), key=lambda k: (row[k], k), reverse=True)
                hits[label] += label in order[:top_k]
        return [np.array(hits.sum() / count.sum()), hits / np.maximum(count, 1)][: 2 if per_class else 1]

    return oracle


def _ties() -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [rng.integers(0, 3, (4, 5, 3)) * 1.0, rng.integers(0, 5, (4, 1, 3)) * 1.0]


CASES = {
    "flat": Case(TEXT.format(""), [(8, 5), (8,)], _oracle(), labels={1: 5}, gradient=False, compiled=True),
    "top3": Case(
        TEXT.format("top_k: 3"), [(2, 5, 3, 4), (2, 1, 3, 4)], _oracle(top_k=3), labels={1: 5}, gradient=False
    ),
    "axis_last": Case(
        TEXT.format("axis: -1 ignore_label: 0"),
        [(3, 4, 5), (3, 4)],
        _oracle(axis=2, ignore=0, per_class=True),
        tops=2,
        labels={1: 5},
        gradient=False,
    ),
}
for k in (1, 2, 5):
    for dialect, lose in (("bvlc", True), ("nvcaffe", False), ("ssd", False), ("ristretto", True)):
        CASES[f"ties_{k}_{dialect}"] = Case(
            TEXT.format(f"top_k: {k} ignore_label: 2"),
            [(4, 5, 3), (4, 1, 3)],
            _oracle(top_k=k, ignore=2, lose=lose, per_class=True),
            tops=2,
            dialect=dialect,
            bottoms=_ties(),
            labels={1: 5},
            gradient=False,
            compiled=k == 2 and dialect == "nvcaffe",
        )


@pytest.mark.parametrize("name", CASES)
def test_contract(name: str) -> None:
    check_layer(CASES[name])


@pytest.mark.parametrize(("dialect", "equal"), [("bvlc", 0.0), ("jacinto", 0.5)])
def test_equal_scores(dialect: str, equal: float) -> None:
    built = build(TEXT.format(""), [(2, 2), (2,)], dialect=dialect)
    assert built(torch.zeros(2, 2), torch.tensor([0.0, 1.0]))[0].item() == equal


def test_every_label_ignored() -> None:
    args = torch.zeros(2, 3), torch.ones(2)
    (bvlc,) = build(TEXT.format("ignore_label: 1"), [(2, 3), (2,)])(*args)
    (nv,) = build(TEXT.format("ignore_label: 1"), [(2, 3), (2,)], dialect="nvcaffe")(*args)
    assert bvlc.item() == 0
    assert math.isnan(nv.item())


@pytest.mark.parametrize("dialect", ["bvlc", "nvcaffe"])
def test_nan_scores_are_misses(dialect: str) -> None:
    built = build(TEXT.format("top_k: 2"), [(1, 3), (1,)], dialect=dialect)
    assert built(torch.full((1, 3), math.nan), torch.zeros(1))[0].item() == 0


def test_no_gradient() -> None:
    layer = layer_of(TEXT.format(""), bottoms=2)
    assert not any(layer.differentiable(i) or layer.force_backward(i) for i in (0, 1))
    x = torch.zeros(2, 3, requires_grad=True)
    assert not build(TEXT.format(""), [(2, 3), (2,)])(x, torch.zeros(2))[0].requires_grad
    assert layer.expects(1, [(2, 3, 4, 5), None]) == (2, 1, 4, 5)


@pytest.mark.parametrize(
    ("param", "ins", "field", "says"),
    [
        ("top_k: 6", [(4, 5), (4,)], ("accuracy_param", "top_k"), "between 1 and the number of classes, 5"),
        ("top_k: 0", [(4, 5), (4,)], ("accuracy_param", "top_k"), "top_k 0"),
        ("", [(4, 5), (5,)], ("bottom", 1), "needs 4 labels"),
        ("axis: 2", [(4, 5), (4,)], ("accuracy_param", "axis"), "axis 2"),
    ],
)
def test_refusals(param: str, ins: list, field: tuple, says: str) -> None:
    with pytest.raises(LayerError, match=says) as e:
        layer_of(TEXT.format(param), bottoms=2).shapes(ins)
    assert e.value.field == field
