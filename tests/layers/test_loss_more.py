"""L1, SmoothL1 (three forms), contrastive, multinomial and infogain losses: values, gradients, dialects, bad input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from caffejacinto_py.errors import DataError, LayerError, WeightsError
from caffejacinto_py.schema.blobs import write_blob
from tests.layers.harness import Arrays, Case, build, check_layer, layer_of

S = (4, 3)
Oracle = Callable[[Arrays, Arrays], Arrays]
H = np.array([[1, 0.2, 0], [0.5, 2, 0.1], [0, 0.3, 1.5]])


def _smooth(sigma: float = 1.0) -> Oracle:
    def oracle(b: Arrays, _: Arrays) -> Arrays:
        d = (b[0] - b[1]) * (b[2] if len(b) > 2 else 1)
        each = np.where(np.abs(d) < 1 / sigma**2, 0.5 * (sigma * d) ** 2, np.abs(d) - 0.5 / sigma**2)
        return [np.array((each * (b[3] if len(b) > 3 else 1)).sum() / len(d))]

    return oracle


def _contrastive(margin: float, legacy: bool) -> Oracle:
    def oracle(b: Arrays, _: Arrays) -> Arrays:
        square = ((b[0] - b[1]) ** 2).reshape(len(b[0]), -1).sum(1)
        apart = np.maximum(margin - square, 0) if legacy else np.maximum(margin - np.sqrt(square), 0) ** 2
        return [np.array(np.where(b[2].flatten() != 0, square, apart).sum() / 2 / len(square))]

    return oracle


def _infogain(norm: str = "VALID", ignore: int | None = None, axis: int = 1, softmax: bool = True) -> Oracle:
    def oracle(b: Arrays, _: Arrays) -> Arrays:
        x = np.moveaxis(b[0], axis, -1)
        p = np.exp(x) / np.exp(x).sum(-1, keepdims=True) if softmax else x
        labels = b[1].astype(int).flatten()
        rows = p.reshape(-1, p.shape[-1])
        h = b[2].reshape(3, 3)
        total = -sum((h[k] * np.log(row)).sum() for row, k in zip(rows, labels) if k != ignore)
        outer = int(np.prod(b[0].shape[:axis]))
        n = {"VALID": (labels != ignore).sum(), "FULL": labels.size, "BATCH_SIZE": outer, "NONE": 1}[norm]
        loss = np.array(total / max(n, 1))
        return [loss, np.moveaxis(p, -1, axis)] if softmax else [loss]

    return oracle


def _weights(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 2, shape).astype(float)


X, T = (np.random.default_rng(k).normal(size=S) * 2 for k in (5, 6))
PAIRS = [np.random.default_rng(k).normal(size=(6, 4)) for k in (7, 8)]
PAIRS[1][3:] = PAIRS[0][3:] + 0.4  # some nearer than the margin
SIMILAR = np.array([1, 0, 0, 1, 0, 0], float)
PROBS = np.random.default_rng(9).dirichlet(np.ones(3), 4)
LABELS = np.array([0, 2, 1, 2], float)
SPATIAL = (2, 3, 2, 2)

CASES = {
    "l1": Case('type: "L1Loss"', [S, S], lambda b, _: [np.array(np.abs(b[0] - b[1]).sum() / len(b[0]))], compiled=True),
    "smooth": Case('type: "SmoothL1Loss"', [S, S], _smooth(), bottoms=[X, T], compiled=True),
    "smooth_ssd": Case('type: "SmoothL1Loss"', [S] * 3, _smooth(), bottoms=[X, T, X - 2 * T]),
    "smooth_rcnn": Case(
        'type: "SmoothL1Loss" smooth_l1_loss_param { sigma: 2 }',
        [S] * 4,
        _smooth(2),
        bottoms=[X, T, _weights(*S), _weights(*S) / 3],
    ),
    "contrastive": Case(  # the gradient is Caffe's, no derivative: see below
        'type: "ContrastiveLoss" contrastive_loss_param { margin: 2 }',
        [(6, 4), (6, 4), (6,)],
        _contrastive(2, False),
        bottoms=[*PAIRS, SIMILAR],
        gradient=False,
    ),
    "contrastive_legacy": Case(
        'type: "ContrastiveLoss" contrastive_loss_param { margin: 2 legacy_version: true }',
        [(6, 4, 1, 1), (6, 4, 1, 1), (6, 1)],
        _contrastive(2, True),
        bottoms=[p.reshape(6, 4, 1, 1) for p in PAIRS] + [SIMILAR.reshape(6, 1)],
        compiled=True,
    ),
    "multinomial": Case(
        'type: "MultinomialLogisticLoss"',
        [S, (4,)],
        lambda b, _: [np.array(-np.log(b[0][range(4), b[1].astype(int)]).mean())],
        bottoms=[PROBS, LABELS],
        rebatch=False,
        compiled=True,
    ),
    "infogain": Case('type: "InfogainLoss"', [S, (4,), (1, 1, 3, 3)], _infogain(), tops=2, bottoms=[X, LABELS, H],
                     rebatch=False, compiled=True),
    "infogain_ignore": Case(
        'type: "InfogainLoss" loss_param { ignore_label: 2 }',
        [SPATIAL, (2, 1, 2, 2), (3, 3)],
        _infogain(ignore=2),
        tops=2,
        labels={1: 3},
        rebatch=False,
    ),
    "infogain_full": Case(
        'type: "InfogainLoss" infogain_loss_param { axis: -1 } loss_param { ignore_label: 2 normalization: FULL }',
        [(2, 4, 3), (2, 4), (3, 3)],
        _infogain("FULL", ignore=2, axis=2),
        tops=2,
        labels={1: 3},
        rebatch=False,
    ),
    "infogain_batch": Case(
        'type: "InfogainLoss" loss_param { normalization: BATCH_SIZE }',
        [SPATIAL, (2, 2, 2), (3, 3)],
        _infogain("BATCH_SIZE"),
        tops=2,
        labels={1: 3},
        rebatch=False,
    ),
    "infogain_probabilities": Case(
        'type: "InfogainLoss" loss_param { normalization: NONE ignore_label: 1 }',
        [S, (4,), (1, 1, 3, 3)],
        _infogain("FULL", softmax=False),
        dialect="ssd",
        bottoms=[PROBS, LABELS, H],
        rebatch=False,
        compiled=True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_layer(name: str) -> None:
    check_layer(CASES[name])


def test_contrastive_gradient_is_caffes() -> None:
    """Dissimilar and near: -(margin - d) / (d + 1e-4) (a - b) / N; equal pairs stay finite."""
    built = build('type: "ContrastiveLoss" contrastive_loss_param { margin: 2 }', [(6, 4), (6, 4), (6,)])
    a, b, s = (torch.tensor(v) for v in (*PAIRS, SIMILAR))
    b[5] = a[5]
    a.requires_grad_()
    b.requires_grad_()
    built(a, b, s)[0].backward()
    diff = (a - b).detach()
    d = diff.norm(dim=1, keepdim=True)
    want = torch.where(s[:, None] != 0, diff, -(2 - d).clamp(min=0) / (d + 1e-4) * diff) / 6
    torch.testing.assert_close(a.grad, want)
    torch.testing.assert_close(b.grad, -want)


def test_logs_are_cut_but_their_gradient_goes_on() -> None:
    p = torch.tensor([[0.0, 1.0]], dtype=torch.float64, requires_grad=True)
    label = torch.zeros(1, dtype=torch.float64)
    (loss,) = build('type: "MultinomialLogisticLoss"', [(1, 2), (1,)])(p, label)
    loss.backward()
    assert loss.item() == pytest.approx(46.0517, abs=1e-4)
    assert p.grad is not None
    assert p.grad.tolist() == [[-1e20, 0]]
    x = torch.tensor([[-60.0, 0.0]], dtype=torch.float64, requires_grad=True)
    loss, _ = build('type: "InfogainLoss"', [(1, 2), (1,), (2, 2)], tops=2)(x, label, torch.eye(2, dtype=torch.float64))
    loss.backward()
    assert loss.item() == pytest.approx(46.0517, abs=1e-4)
    assert x.grad is not None
    np.testing.assert_allclose(x.grad, [[-1, 1]], atol=1e-9)


def test_infogain_matrix_from_a_file(tmp_path: Path) -> None:
    """The same numbers as with H as a bottom; a file of another size, or none, is refused by name."""
    path = tmp_path / "h.binaryproto"
    write_blob(path, H.astype(np.float32).reshape(1, 1, 3, 3))
    x, label = torch.tensor(X), torch.tensor(LABELS)
    from_file = build(f'type: "InfogainLoss" infogain_loss_param {{ source: "{path}" }}', [S, (4,)])
    from_bottom = build('type: "InfogainLoss"', [S, (4,), (3, 3)])
    h32 = torch.tensor(H.astype(np.float32)).double()
    torch.testing.assert_close(from_file(x, label)[0], from_bottom(x, label, h32)[0])
    with pytest.raises(WeightsError, match="layer 'layer' must hold 4 x 4 numbers"):
        build(f'type: "InfogainLoss" infogain_loss_param {{ source: "{path}" }}', [(4, 4), (4,)])
    with pytest.raises(WeightsError, match="missing"):
        build(f'type: "InfogainLoss" infogain_loss_param {{ source: "{tmp_path}/missing" }}', [S, (4,)])


@pytest.mark.parametrize(
    ("text", "dialect", "ins"),
    [
        ('type: "MultinomialLogisticLoss"', "bvlc", [S, (4,)]),
        ('type: "InfogainLoss"', "bvlc", [S, (4,), (3, 3)]),
        ('type: "InfogainLoss"', "nvcaffe", [S, (4,), (3, 3)]),
    ],
)
def test_labels_out_of_range(text: str, dialect: str, ins: list[tuple[int, ...]]) -> None:
    built = build(text, ins, dialect=dialect)
    bottoms = [torch.tensor(v) for v in (PROBS, LABELS, H)][: len(ins)]
    bottoms[1][2] = 3
    with pytest.raises(DataError, match="blob 'b1' has label 3, but there are 3 classes"):
        built(*bottoms)


@pytest.mark.parametrize(
    ("text", "ins", "tops", "dialect", "match"),
    [
        ('type: "L1Loss"', [S, (3, 4)], 1, "bvlc", "as many numbers"),
        ('type: "SmoothL1Loss" smooth_l1_loss_param { sigma: 0 }', [S, S], 1, "bvlc", "sigma must be positive"),
        ('type: "SmoothL1Loss"', [S, S, (4,)], 1, "bvlc", "bottom 2, the weights"),
        ('type: "ContrastiveLoss"', [(4, 3, 2), (4, 3, 2), (4,)], 1, "bvlc", "bottom 0 must be"),
        ('type: "ContrastiveLoss"', [S, (4, 2), (4,)], 1, "bvlc", "pairs of one size"),
        ('type: "ContrastiveLoss"', [S, S, S], 1, "bvlc", "4 marks of similarity"),
        ('type: "MultinomialLogisticLoss"', [(4,), (4,)], 1, "bvlc", "items and classes"),
        ('type: "MultinomialLogisticLoss"', [S, S], 1, "bvlc", "need 4 labels"),
        ('type: "InfogainLoss"', [S, (4,)], 1, "bvlc", "no infogain matrix"),
        ('type: "InfogainLoss"', [S, (4,), (3,)], 1, "bvlc", "H must hold 3 x 3"),
        ('type: "InfogainLoss"', [S, (3,), (3, 3)], 1, "bvlc", "needs 4 labels"),
        (
            'type: "InfogainLoss" loss_param { normalize: true }',
            [S, (4,), (3, 3)],
            1,
            "bvlc",
            "does not take normalize",
        ),
        ('type: "InfogainLoss"', [S, (4,), (3, 3)], 2, "ssd", "no second top"),
        ('type: "InfogainLoss"', [S, (5,), (3, 3)], 1, "ssd", "need 4 labels"),
    ],
)
def test_refusals(text: str, ins: list[tuple[int, ...]], tops: int, dialect: str, match: str) -> None:
    with pytest.raises(LayerError, match=match):
        layer_of(text, bottoms=len(ins), tops=tops, dialect=dialect).shapes(ins)


def test_expected_shapes() -> None:
    assert layer_of('type: "SmoothL1Loss"', bottoms=4).expects(3, [S, S, None, None]) == S
    assert layer_of('type: "L1Loss"', bottoms=2).expects(0, [None, S]) == S
    assert layer_of('type: "ContrastiveLoss"', bottoms=3).expects(2, [S, S, None]) == (4,)
    infogain = layer_of('type: "InfogainLoss"', bottoms=3)
    assert [infogain.expects(i, [SPATIAL, None, None]) for i in (1, 2)] == [(2, 1, 2, 2), (1, 1, 3, 3)]
    assert layer_of('type: "InfogainLoss"', bottoms=3, dialect="ssd").expects(1, [S, None, None]) == (4,)
    smooth = layer_of('type: "SmoothL1Loss"', bottoms=4)
    assert [smooth.differentiable(i) for i in range(4)] == [True, True, False, False]
