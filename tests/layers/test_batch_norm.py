"""BatchNorm in both dialects: formula, statistics over several passes, phases, the C++ vectors, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from google.protobuf import text_format

from caffejacinto_py.errors import LayerError
from caffejacinto_py.schema import pb
from tests.conftest import SHARED
from tests.layers.harness import Arrays, Built, Case, build, check_layer, layer_of

FOLDER = SHARED / "golden/jacinto/layers"
X = (4, 3, 2, 5)


def stats(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """(mean, biased variance, count) per channel; a vector is one channel."""
    rows = np.moveaxis(x.reshape(len(x), 1) if x.ndim == 1 else x, 1, 0)
    flat = rows.reshape(rows.shape[0], -1)
    return flat.mean(1), flat.var(1), flat.shape[1]


def apply(x: np.ndarray, mean: np.ndarray, variance: np.ndarray, eps: float, blobs: Arrays = ()) -> np.ndarray:  # type: ignore[assignment]
    shape = (-1, *(1,) * (x.ndim - 2)) if x.ndim > 1 else (-1,)
    y = (x - mean.reshape(shape)) / np.sqrt(variance.reshape(shape) + eps)
    return y * blobs[0].reshape(shape) + blobs[1].reshape(shape) if len(blobs) else y


def of_batch(eps: float):
    def oracle(ins: Arrays, blobs: Arrays) -> Arrays:
        mean, variance, _ = stats(ins[0])
        return [apply(ins[0], mean, variance, eps, blobs[3:])]

    return oracle


def of_blobs(eps: float, factor: bool):
    def oracle(ins: Arrays, blobs: Arrays) -> Arrays:
        by = blobs[2] if factor else 1.0
        return [apply(ins[0], blobs[0] / by, blobs[1] / by, eps, blobs[3:])]

    return oracle


PARAM = 'type: "BatchNorm" batch_norm_param'
CASES = {
    "train": Case('type: "BatchNorm"', [X], of_batch(1e-5), phases_agree=False, compiled=True),
    "train_eps": Case(f"{PARAM} {{ eps: 0.0078125 }}", [X], of_batch(0.0078125), phases_agree=False),
    "train_matrix": Case('type: "BatchNorm"', [(6, 3)], of_batch(1e-5), phases_agree=False),
    "train_vector": Case('type: "BatchNorm"', [(6,)], of_batch(1e-5), phases_agree=False),
    "train_five_axes": Case('type: "BatchNorm"', [(2, 3, 2, 2, 2)], of_batch(1e-5), phases_agree=False),
    "test": Case('type: "BatchNorm"', [X], of_blobs(1e-5, True), phase="TEST", phases_agree=False, compiled=True),
    "test_vector": Case('type: "BatchNorm"', [(6,)], of_blobs(1e-5, True), phase="TEST", phases_agree=False),
    "global_in_train": Case(f"{PARAM} {{ use_global_stats: true }}", [X], of_blobs(1e-5, True)),
    "batch_in_test": Case(f"{PARAM} {{ use_global_stats: false }}", [X], of_batch(1e-5), phase="TEST"),
    "nv_train": Case('type: "BatchNorm"', [X], of_batch(1e-5), dialect="nvcaffe", phases_agree=False, compiled=True),
    "nv_test": Case(
        'type: "BatchNorm"', [X], of_blobs(1e-5, False), dialect="nvcaffe", phase="TEST", phases_agree=False
    ),
    "nv_scale_train": Case(
        f"{PARAM} {{ scale_bias: true eps: 0.0078125 }}",
        [X],
        of_batch(0.0078125),
        dialect="jacinto",
        phases_agree=False,
    ),
    "nv_scale_test": Case(
        f"{PARAM} {{ scale_bias: true eps: 1e-8 }}",
        [X],
        of_blobs(1e-5, False),
        dialect="jacinto",
        phase="TEST",
        phases_agree=False,
        compiled=True,
    ),
    "nv_phase_decides": Case(
        f"{PARAM} {{ use_global_stats: true }}", [X], of_batch(1e-5), dialect="jacinto", phases_agree=False
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_contract(name: str) -> None:
    check_layer(CASES[name])


def run(built: Built, xs: list[np.ndarray]) -> list[np.ndarray]:
    for x in xs:
        built(torch.tensor(x))
    return [b.detach().numpy().copy() for b in built.blobs]


@pytest.mark.parametrize("shape", [X, (5, 3), (6,), (1, 3)])
def test_bvlc_statistics_are_fading_sums(shape: tuple[int, ...]) -> None:
    xs = list(np.random.default_rng(0).normal(2, 3, (4, *shape)))
    channels = shape[1] if len(shape) > 1 else 1
    blobs = [np.full(channels, 0.3), np.full(channels, 0.7), np.array([2.0])]
    want = [b.copy() for b in blobs]
    for x in xs:
        mean, variance, m = stats(x)
        for blob, new in zip(want, (mean, variance * (m / (m - 1) if m > 1 else 1), np.ones(1))):
            blob *= 0.875
            blob += new
    built = build(f"{PARAM} {{ moving_average_fraction: 0.875 }}", [shape], blobs=blobs)
    for got, expected in zip(run(built, xs), want, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_a_batch_of_one_value_is_normalized_to_zero() -> None:
    for dialect, text in (("bvlc", 'type: "BatchNorm"'), ("jacinto", f"{PARAM} {{ scale_bias: true }}")):
        built = build(text, [(1, 3)], dialect=dialect)
        x = torch.randn(1, 3, dtype=torch.float64, requires_grad=True)
        (y,) = built(x)
        shift = built.blobs[4] if dialect == "jacinto" else torch.zeros(3)
        assert torch.equal(y[0], shift.double())
        y.sum().backward()
        assert x.grad is not None
        assert not x.grad.any()
        assert all(b.isfinite().all() for b in built.blobs)


def test_bvlc_before_any_pass() -> None:
    """Factor 0: mean and variance count as 0, as in C++."""
    built = build('type: "BatchNorm"', [X], phase="TEST", blobs=[np.ones(3), np.ones(3), np.zeros(1)])
    x = np.random.default_rng(0).normal(size=X)
    np.testing.assert_allclose(built(torch.tensor(x))[0].numpy(), x / np.sqrt(1e-5))


def test_global_statistics_stay() -> None:
    for text, phase in (("{ use_global_stats: true }", "TRAIN"), ("{ }", "TEST")):
        built = build(f"{PARAM} {text}", [X], phase=phase)
        before = [b.detach().clone() for b in built.blobs]
        run(built, [np.ones(X)])
        assert all(torch.equal(a, b) for a, b in zip(before, built.blobs))


def test_a_recomputed_pass_counts_once() -> None:
    for dialect in ("bvlc", "jacinto"):
        once, twice = (build('type: "BatchNorm"', [X], dialect=dialect) for _ in range(2))
        x = np.random.default_rng(0).normal(size=X)
        run(once, [x])
        run(twice, [x])
        twice.module.update = False  # type: ignore[assignment]
        run(twice, [x])
        assert all(torch.equal(a, b) for a, b in zip(once.blobs, twice.blobs))


def test_passes_are_part_of_the_state() -> None:
    """A resumed NV run must not overwrite its averages again."""
    built = build('type: "BatchNorm"', [X], dialect="jacinto")
    xs = list(np.random.default_rng(0).normal(size=(4, *X)))
    run(built, xs[:3])
    other = build('type: "BatchNorm"', [X], dialect="jacinto", blobs=[b.detach().numpy() for b in built.blobs])
    other.module.load_state_dict(built.module.state_dict())
    assert other.module.passes == 3
    for a, b in zip(run(built, xs[3:]), run(other, xs[3:])):
        np.testing.assert_array_equal(a, b)


def test_declared_blobs() -> None:
    def declared(text: str, dialect: str) -> list[tuple]:
        blobs = layer_of(f"{PARAM} {{ {text} }}", dialect=dialect).blobs([X])
        return [(b.shape, b.filler.value if b.filler else 0, b.lr_mult, b.decay_mult) for b in blobs]

    fixed = [((3,), 0, 0, 0)] * 2
    assert declared("", "bvlc") == [*fixed, ((1,), 0, 0, 0)]
    assert declared("", "nvcaffe") == [*fixed, ((1,), 1, 0, 0)]
    assert declared("scale_bias: true", "nvcaffe")[3:] == [((3,), 1, 1, 1), ((3,), 0, 1, 1)]
    assert declared("scale_filler { value: 2 }", "jacinto")[3:] == [((3,), 2, 1, 1), ((3,), 0, 1, 1)]
    assert declared("bias_filler { value: 2 }", "jacinto")[3:] == [((3,), 1, 1, 1), ((3,), 2, 1, 1)]


def test_refusals() -> None:
    with pytest.raises(LayerError, match="lr_mult must be 0") as e:
        layer_of('type: "BatchNorm" param { lr_mult: 0 } param { lr_mult: 1 }').shapes([X])
    assert e.value.field == ("param", 1, "lr_mult")
    layer_of('type: "BatchNorm" param { lr_mult: 0 decay_mult: 1 } param { name: "v" }').shapes([X])
    layer_of('type: "BatchNorm" param { lr_mult: 1 }', dialect="nvcaffe").shapes([X])
    with pytest.raises(LayerError, match="NVCaffe") as e:
        layer_of(f"{PARAM} {{ scale_bias: true }}").shapes([X])
    assert e.value.field == ("batch_norm_param", "scale_bias")
    assert e.value.hint
    assert "jacinto" in e.value.hint
    with pytest.raises(LayerError, match="eps"):
        layer_of(f"{PARAM} {{ eps: -1 }}").shapes([X])
    with pytest.raises(LayerError, match="axis"):
        layer_of('type: "BatchNorm"').shapes([()])


@pytest.mark.parametrize("name", sorted(p.stem for p in FOLDER.glob("bn_*.prototxt")))
def test_agrees_with_caffe_jacinto(name: str) -> None:
    net = text_format.Parse((FOLDER / f"{name}.prototxt").read_text(), pb.NetParameter())
    with np.load(FOLDER / f"{name}.npz") as z:
        data = {k: z[k] for k in z.files}
    phase = "TEST" if net.state.phase == pb.TEST else "TRAIN"
    shape = data["bottom/x"].shape
    blobs = [data[f"param/{i}"] for i in range(5) if f"param/{i}" in data]
    built = build(str(net.layer[1]), [shape], phase=phase, dialect="jacinto", blobs=blobs, dtype=torch.float32)
    passes = [f"step{k}/" for k in range(9) if f"step{k}/bottom/x" in data]
    for prefix in [*passes, ""]:
        x = torch.tensor(data[f"{prefix}bottom/x"], requires_grad=True)
        (y,) = built(x)
        close(y, data[f"{prefix}top/y_out"])
        for i, blob in enumerate(built.blobs):
            close(blob, data.get(f"{prefix}param_after/{i}", data[f"param/{i}"]))
    if "top_diff/y_out" in data:
        y.backward(torch.tensor(data["top_diff/y_out"]))
        close(x.grad, data["bottom_diff/x"])
        for i, blob in enumerate(built.blobs):
            close(torch.zeros_like(blob) if blob.grad is None else blob.grad, data[f"param_diff/{i}"])


def close(got: torch.Tensor | None, want: np.ndarray) -> None:
    assert got is not None
    np.testing.assert_allclose(got.detach().numpy(), want, rtol=1e-4, atol=1e-5)
