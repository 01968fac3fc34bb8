"""Fillers: ranges, moments, fans, exact patterns, refusals."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from google.protobuf import text_format

from caffejacinto_py.errors import LayerError
from caffejacinto_py.layers.fillers import check, fan, fill
from caffejacinto_py.schema import pb
from caffejacinto_py.schema.dialect import DIALECTS, Dialect

BVLC, OLD = DIALECTS["bvlc"], DIALECTS["ssd"]
SHAPE = (40, 30, 5, 5)


def draw(text: str, shape: tuple[int, ...] = SHAPE, dialect: Dialect = BVLC, seed: int = 0) -> np.ndarray:
    filler: Any = text_format.Parse(text, pb.FillerParameter())
    out = fill(filler, shape, np.random.default_rng(seed), dialect)
    assert out.dtype == np.float32
    assert out.shape == shape
    assert out.flags.c_contiguous
    assert out.flags.writeable
    return out


def test_constant_and_none() -> None:
    assert (draw("value: 1.5") == 1.5).all()
    assert (draw("", (3,)) == 0).all()
    assert draw("value: 2", ()).item() == 2
    assert (fill(None, (2, 3), np.random.default_rng(0)) == np.zeros((2, 3), np.float32)).all()


def test_uniform() -> None:
    x = draw('type: "uniform" min: -2 max: 3')
    assert -2 <= x.min() < -1.99
    assert 2.99 < x.max() <= 3
    assert abs(x.mean() - 0.5) < 0.05
    assert 0 <= draw('type: "uniform"').min() <= draw('type: "uniform"').max() <= 1


def test_gaussian() -> None:
    x = draw('type: "gaussian" mean: 2 std: 0.5')
    assert abs(x.mean() - 2) < 0.02
    assert abs(x.std() - 0.5) < 0.01
    assert abs(((x - 2) ** 4).mean() / 0.5**4 - 3) < 0.2  # kurtosis


def test_sparse_gaussian_keeps_a_share_of_s_over_the_first_axis() -> None:
    x = draw('type: "gaussian" std: 1 sparse: 10')
    assert abs((x != 0).mean() - 10 / 40) < 0.01
    assert abs(x[x != 0].std() - 1) < 0.03
    assert not draw('type: "gaussian" std: 1 sparse: 0').any()


def test_positive_unitball_rows_sum_to_one() -> None:
    x = draw('type: "positive_unitball"')
    assert x.min() >= 0
    np.testing.assert_allclose(x.reshape(40, -1).sum(1), 1, rtol=1e-5)


FAN_IN, FAN_OUT = 30 * 25, 40 * 25


@pytest.mark.parametrize(
    ("norm", "n"), [("", FAN_IN), ("FAN_IN", FAN_IN), ("FAN_OUT", FAN_OUT), ("AVERAGE", (FAN_IN + FAN_OUT) / 2)]
)
def test_xavier_and_msra_scale_with_the_fan(norm: str, n: float) -> None:
    setting = f"variance_norm: {norm}" if norm else ""
    x = draw(f'type: "xavier" {setting}')
    bound = math.sqrt(3 / n)
    assert 0.999 * bound < abs(x).max() <= bound * (1 + 1e-6)
    assert abs(x.std() / math.sqrt(1 / n) - 1) < 0.02
    y = draw(f'type: "msra" {setting}')
    assert abs(y.std() / math.sqrt(2 / n) - 1) < 0.02


def test_fan_of_small_blobs() -> None:
    assert [fan((6,), v) for v in (0, 1, 2)] == [1, 6, 3.5]  # a bias: fan_out is its count
    assert [fan((), v) for v in (0, 1, 2)] == [1, 1, 1]
    assert [fan((4, 6), v) for v in (0, 1)] == [6, 4]
    assert fan((2, 3, 4, 5, 6)) == 360  # 3-D convolution


@pytest.mark.parametrize("k", range(1, 9))
def test_bilinear_in_both_dialects(k: int) -> None:
    f = math.ceil(k / 2)
    for dialect, c in ((BVLC, (k - 1) / (2 * f)), (OLD, (2 * f - 1 - f % 2) / (2 * f))):
        want = [[(1 - abs(x / f - c)) * (1 - abs(y / f - c)) for x in range(k)] for y in range(k)]
        x = draw('type: "bilinear"', (3, 2, k, k), dialect)
        np.testing.assert_allclose(x, np.broadcast_to(np.array(want), x.shape), rtol=1e-6, atol=1e-7)
    same = np.allclose(draw('type: "bilinear"', (1, 1, k, k)), draw('type: "bilinear"', (1, 1, k, k), OLD))
    assert same == (k % 4 not in (2, 3))


@pytest.mark.parametrize("kind", ["gaussian", "uniform", "positive_unitball", "xavier", "msra", "bilinear"])
def test_static_variants_are_the_same_distribution(kind: str) -> None:
    np.testing.assert_array_equal(draw(f'type: "{kind}static"'), draw(f'type: "{kind}"'))


def test_the_generator_decides() -> None:
    same = draw('type: "xavier"', seed=1), draw('type: "xavier"', seed=1)
    np.testing.assert_array_equal(*same)
    assert (same[0] != draw('type: "xavier"', seed=2)).any()


@pytest.mark.parametrize(
    ("text", "shape", "field", "words"),
    [
        ('type: "xaviar"', SHAPE, "type", "xavier"),
        ('type: "nothing like it"', SHAPE, "type", "known fillers"),
        ('type: "constantstatic"', SHAPE, "type", "constant"),
        ('type: "xavier" sparse: 3', SHAPE, "sparse", "only gaussian"),
        ('type: "gaussian" sparse: 3', (), "sparse", "at least 1 axis"),
        ('type: "gaussian" sparse: -2', SHAPE, "sparse", ">= 0"),
        ('type: "gaussian" std: 0', SHAPE, "std", "std > 0"),
        ('type: "gaussian" std: -1', SHAPE, "std", "std > 0"),
        ('type: "uniform" min: 2', SHAPE, "min", "min <= max"),
        ('type: "positive_unitball"', (), "type", "at least 1 axis"),
        ('type: "bilinear"', (4, 3, 3), "type", "4-axis"),
        ('type: "bilinear"', (4, 3, 3, 5), "type", "square"),
    ],
)
def test_refusals(text: str, shape: tuple[int, ...], field: str, words: str) -> None:
    filler: Any = text_format.Parse(text, pb.FillerParameter())
    with pytest.raises(LayerError) as e:
        check(filler, shape, field=("convolution_param", "weight_filler"))
    assert e.value.field == ("convolution_param", "weight_filler", field)
    assert words in f"{e.value.text} {e.value.hint}"
    with pytest.raises(LayerError):
        fill(filler, shape, np.random.default_rng(0))
