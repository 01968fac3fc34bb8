"""BN in its three forms: formulas, statistics, which form the fields mean, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from caffejacinto_py.errors import LayerError
from tests.layers.harness import Arrays, Case, build, check_layer, layer_of

S = (3, 2, 2, 3)
B = (1, 2, 1, 1)


def batch(eps: float):
    def oracle(ins: Arrays, blobs: Arrays) -> Arrays:
        x = ins[0]
        mean, var = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
        return [blobs[0] * (x - mean) / np.sqrt(var + eps) + blobs[1]]

    return oracle


def running(eps: float):
    return lambda ins, b: [b[0] * (ins[0] - b[2]) / np.sqrt(b[3] + eps) + b[1]]


E = float(np.float32(1e-5))
CASES = {
    "pspnet_train": Case('type: "BN"', [S], batch(E), phases_agree=False, compiled=True),
    "pspnet_test": Case('type: "BN" bn_param { eps: 0.5 }', [S], running(0.5), phase="TEST", phases_agree=False),
    "frozen": Case('type: "BN" bn_param { frozen: true eps: 0.5 }', [S], running(0.5), compiled=True),
    "inverse_std": Case(
        'type: "BN" bn_param { inverse_std: true frozen: true }',
        [S],
        lambda ins, b: [b[0] * (ins[0] - b[2]) * b[3] + b[1]],
    ),
    "segnet_learn": Case('type: "BN" bn_param { bn_mode: LEARN }', [S], batch(1e-9), compiled=True),
    "segnet_learn_by_filler": Case('type: "BN" bn_param { scale_filler { value: 1 } }', [S], batch(1e-9), phase="TEST"),
    "segnet_inference": Case(
        'type: "BN" bn_param { bn_mode: INFERENCE }', [S], lambda ins, b: [b[0] * ins[0] + b[1]]
    ),
    "first_batch_in_test": Case('type: "BN" bn_param { decay: 0.1 var_eps: 0.25 }', [S], batch(0.25), phase="TEST"),
    "first_running_in_test": Case(
        'type: "BN" bn_param { moving_average: true var_eps: 0.25 }', [S], running(0.25), phase="TEST",
        phases_agree=False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_contract(name: str) -> None:
    check_layer(CASES[name])


def test_two_axes_and_one_value() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    one = [np.ones(B), np.zeros(B), np.zeros(B), np.ones(B)]
    built = build('type: "BN" bn_param { eps: 0 }', [(2, 2)], blobs=one, dtype=torch.float32)
    assert built(x)[0].tolist() == [[-1, -1], [1, 1]]
    single = build('type: "BN"', [(1, 2)], blobs=[np.full(B, 3), np.full(B, 0.5), *one[2:]], dtype=torch.float32)
    assert single(x[:1])[0].tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize(
    ("fields", "keep"), [("momentum: 0.75", 0.75), ("decay: 0.25", 0.75), ("", float(np.float32(0.9)))]
)
def test_running_statistics(fields: str, keep: float) -> None:
    blobs = [np.full(B, v) for v in (1.0, 0.0, 0.5, 2.0)]
    built = build(f'type: "BN" bn_param {{ {fields} }}', [S], blobs=blobs)
    x = np.random.default_rng(0).normal(size=S)
    built(torch.from_numpy(x))
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
    np.testing.assert_allclose(built.blobs[2].detach().numpy().ravel(), keep * 0.5 + (1 - keep) * mean, rtol=1e-6)
    np.testing.assert_allclose(built.blobs[3].detach().numpy().ravel(), keep * 2.0 + (1 - keep) * var, rtol=1e-6)
    built.module.update = False  # type: ignore[assignment]
    before = built.blobs[3].clone()
    built(torch.from_numpy(x))
    assert torch.equal(before, built.blobs[3])


def test_nothing_moves_when_frozen_or_in_test() -> None:
    for text, phase in (('type: "BN" bn_param { frozen: true }', "TRAIN"), ('type: "BN"', "TEST")):
        built = build(text, [S], phase=phase)
        before = [b.clone() for b in built.blobs]
        built(torch.randn(S, dtype=torch.float64))
        assert all(torch.equal(a, b) for a, b in zip(before, built.blobs))


def test_blobs() -> None:
    text = 'type: "BN" bn_param { slope_filler { value: 1 } bias_filler { value: 0.5 } %s }'
    blobs = layer_of(text % "").blobs([S])
    assert [b.shape for b in blobs] == [B] * 4
    assert [b.filler.value for b in blobs[:2]] == [1, 0.5]
    assert [(b.lr_mult, b.decay_mult) for b in blobs] == [(None, None)] * 2 + [(0, 0)] * 2
    frozen = layer_of(text % "frozen: true").blobs([S])
    assert [(b.lr_mult, b.decay_mult) for b in frozen] == [(0, 0)] * 4
    assert frozen[3].filler.value == 1
    assert [b.shape for b in layer_of('type: "BN" bn_param { bn_mode: INFERENCE }').blobs([S])] == [B, B]


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ("scale_filler { } momentum: 0.9", "momentum", "different BN layers"),
        ("decay: 0.1 bn_mode: LEARN", "bn_mode", "different BN layers"),
        ("eps: -1", "eps", "negative"),
        ("momentum: 2", "momentum", "in [0, 1]"),
        ("axis: 2", "axis", "only axis 1"),
        ("inverse_std: true", "inverse_std", "TEST or frozen"),
    ],
)
def test_refusals(fields: str, field: str, words: str) -> None:
    with pytest.raises(LayerError) as e:
        layer_of(f'type: "BN" bn_param {{ {fields} }}').shapes([S])
    assert e.value.field == ("bn_param", field)
    assert words in e.value.text


def test_needs_channels() -> None:
    with pytest.raises(LayerError, match="2 axes"):
        layer_of('type: "BN"').shapes([(3,)])
