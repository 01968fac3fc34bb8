"""Im2col, SPP, Crop, ROIPooling: hand-written loops as oracles, gradients, refusals."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from caffejacinto_py.errors import DataError, LayerError
from tests.layers.harness import Case, build, check_layer, layer_of

S = (2, 3, 7, 6)


def _im2col(x: np.ndarray, k: tuple[int, ...], s: int, p: int, d: int) -> np.ndarray:
    """x (N, C, spatial..), one window at a time."""
    n = len(k)
    x = np.pad(x, [(0, 0), (0, 0)] + [(p, p)] * n)
    out = [(size - (d * (k_ - 1) + 1)) // s + 1 for size, k_ in zip(x.shape[2:], k)]
    y = np.zeros((x.shape[0], x.shape[1], math.prod(k), *out))
    for row, offset in enumerate(itertools.product(*(range(k_) for k_ in k))):
        for at in itertools.product(*(range(o) for o in out)):
            y[(slice(None), slice(None), row, *at)] = x[
                (slice(None), slice(None), *(a * s + o * d for a, o in zip(at, offset)))
            ]
    return y.reshape(x.shape[0], -1, *out)


def _spp(x: np.ndarray, height: int, how: str) -> np.ndarray:
    parts = []
    for level in range(height):
        bins = 2**level
        y = np.zeros((*x.shape[:2], bins, bins))
        k = [-(-size // bins) for size in x.shape[2:]]
        p = [(k_ * bins - size + 1) // 2 for k_, size in zip(k, x.shape[2:])]
        for at in itertools.product(range(bins), repeat=2):
            low = [a * k_ - p_ for a, k_, p_ in zip(at, k, p)]
            high = [min(a + k_, size + p_) for a, k_, size, p_ in zip(low, k, x.shape[2:], p)]
            window = x[:, :, max(low[0], 0) : high[0], max(low[1], 0) : high[1]]
            area = math.prod(b - a for a, b in zip(low, high))
            y[(..., *at)] = window.max((2, 3)) if how == "MAX" else window.sum((2, 3)) / area
        parts.append(y.reshape(len(x), -1))
    return np.concatenate(parts, 1)


def _roi(x: np.ndarray, rois: np.ndarray, bins: tuple[int, int], scale: float) -> np.ndarray:
    height, width = x.shape[2:]
    y = np.zeros((len(rois), x.shape[1], *bins))
    for r, roi in enumerate(rois.reshape(-1, 5)):
        x1, y1, x2, y2 = (math.floor(v * scale + 0.5) for v in roi[1:])
        high, wide = max(y2 - y1 + 1, 1), max(x2 - x1 + 1, 1)
        for i, j in itertools.product(*(range(b) for b in bins)):
            top, bottom = y1 + i * high // bins[0], y1 + -(-(i + 1) * high // bins[0])
            left, right = x1 + j * wide // bins[1], x1 + -(-(j + 1) * wide // bins[1])
            window = x[int(roi[0]), :, max(top, 0) : min(bottom, height), max(left, 0) : min(right, width)]
            if bottom > 0 and right > 0 and window.size:
                y[r, :, i, j] = window.max((1, 2))
    return y


ROIS = np.array(
    [[0, 0, 0, 10, 12], [1, 2, 4, 9, 9], [1, 3, 3, 3, 3], [0, 6, 8, 2, 1], [1, -5, -3, 4, 6], [0, 8, 10, 20, 30]]
    + [[0, 40, 40, 50, 50], [1, 1, 5, 11, 7]],
    float,
)
RANDOM = np.random.default_rng(0)
CASES = {
    "im2col": Case(
        'type: "Im2col" convolution_param { kernel_size: 3 stride: 2 pad: 1 }',
        [S],
        lambda b, _: [_im2col(b[0], (3, 3), 2, 1, 1)],
        compiled=True,
    ),
    "im2col_dilated": Case(
        'type: "Im2col" convolution_param { kernel_h: 2 kernel_w: 3 dilation: 2 }',
        [S],
        lambda b, _: [_im2col(b[0], (2, 3), 1, 0, 2)],
    ),
    "im2col_1d": Case(
        'type: "Im2col" convolution_param { kernel_size: 3 pad: 2 }',
        [(2, 3, 8)],
        lambda b, _: [_im2col(b[0], (3,), 1, 2, 1)],
    ),
    "im2col_3d": Case(
        'type: "Im2col" convolution_param { kernel_size: 2 stride: 2 pad: 1 }',
        [(1, 2, 4, 3, 5)],
        lambda b, _: [_im2col(b[0], (2, 2, 2), 2, 1, 1)],
    ),
    "im2col_axis": Case(
        'type: "Im2col" convolution_param { kernel_size: 2 axis: 2 }',
        [(2, 3, 2, 4, 4)],
        lambda b, _: [_im2col(b[0].reshape(-1, 2, 4, 4), (2, 2), 1, 0, 1).reshape(len(b[0]), 3, 8, 3, 3)],
    ),
    "spp_max": Case('type: "SPP" spp_param { pyramid_height: 3 }', [S], lambda b, _: [_spp(b[0], 3, "MAX")]),
    "spp_ave": Case('type: "SPP" spp_param { pyramid_height: 3 pool: AVE }', [S], lambda b, _: [_spp(b[0], 3, "AVE")]),
    "spp_one_level": Case(
        'type: "SPP" spp_param { pyramid_height: 1 }', [S], lambda b, _: [b[0].max((2, 3))], compiled=True
    ),
    "spp_stochastic_test": Case(
        'type: "SPP" spp_param { pyramid_height: 2 pool: STOCHASTIC }',
        [(2, 3, 4, 4)],
        phase="TEST",
        low=0.1,
        phases_agree=False,
    ),
    "crop": Case(
        'type: "Crop" crop_param { offset: 1 offset: 2 }',
        [S, (2, 5, 4, 3)],
        lambda b, _: [b[0][:, :, 1:5, 2:5]],
        compiled=True,
    ),
    "crop_channels": Case(
        'type: "Crop" crop_param { axis: 1 offset: 1 }', [S, (1, 2, 4, 3)], lambda b, _: [b[0][:, 1:3, 1:5, 1:4]]
    ),
    "crop_last": Case('type: "Crop" crop_param { axis: -1 }', [S, (1, 1, 1, 4)], lambda b, _: [b[0][..., :4]]),
    "roi": Case(
        'type: "ROIPooling" roi_pooling_param { pooled_h: 3 pooled_w: 2 spatial_scale: 0.5 }',
        [S, ROIS.shape],
        lambda b, _: [_roi(b[0], b[1], (3, 2), 0.5)],
        bottoms=[RANDOM.permutation(2 * 3 * 7 * 6).reshape(S) / 50, ROIS],
        rebatch=False,
        waits=True,
    ),
    "roi_4_axes": Case(
        'type: "ROIPooling" roi_pooling_param { pooled_h: 2 pooled_w: 4 }',
        [S, (8, 5, 1, 1)],
        lambda b, _: [_roi(b[0], b[1], (2, 4), 1)],
        bottoms=[RANDOM.permutation(2 * 3 * 7 * 6).reshape(S) / 50, ROIS.reshape(8, 5, 1, 1)],
        rebatch=False,
        waits=True,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_layer(name: str) -> None:
    check_layer(CASES[name])


def test_convolution_is_im2col_and_a_product() -> None:
    fields = "kernel_size: 3 stride: 2 pad: 1 num_output: 4 bias_term: false"
    x = torch.randn(S, dtype=torch.float64)
    conv = build(f'type: "Convolution" convolution_param {{ {fields} }}', [S])
    (columns,) = build(f'type: "Im2col" convolution_param {{ {fields} }}', [S])(x)
    product = torch.einsum("ok,nkyx->noyx", conv.blobs[0].flatten(1), columns)
    torch.testing.assert_close(conv(x)[0], product)


def test_crop_takes_the_reference_of_the_moment() -> None:
    built = build('type: "Crop"', [(1, 2, 9, 9), (1, 1, 4, 4)])
    (y,) = built(torch.zeros(1, 2, 9, 9), torch.zeros(1, 1, 6, 5))
    assert y.shape == (1, 2, 6, 5)


def test_roi_gradient_goes_to_the_first_maximum() -> None:
    built = build('type: "ROIPooling" roi_pooling_param { pooled_h: 1 pooled_w: 1 }', [(1, 1, 3, 3), (2, 5)])
    x = torch.ones(1, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    rois = torch.tensor([[0, 0, 0, 2, 2], [0, 1, 1, 5, 5]], dtype=torch.float64)
    built(x, rois)[0].sum().backward()
    assert x.grad is not None
    assert x.grad.flatten().tolist() == [1, 0, 0, 0, 1, 0, 0, 0, 0]


def test_roi_without_regions_and_with_a_wrong_image() -> None:
    built = build('name: "roi" type: "ROIPooling" roi_pooling_param { pooled_h: 2 pooled_w: 2 }', [S, (1, 5)])
    x = torch.zeros(S, dtype=torch.float64)
    assert built(x, torch.zeros(0, 5, dtype=torch.float64))[0].shape == (0, 3, 2, 2)
    with pytest.raises(DataError, match=r"layer 'roi'.*blob 'b1'.*image 2, but the batch has images 0..1"):
        built(x, torch.tensor([[2.0, 0, 0, 1, 1]], dtype=torch.float64))


Shapes = list[tuple[int, ...]]


@pytest.mark.parametrize(
    ("text", "ins", "match", "field"),
    [
        ('type: "Im2col"', [S], "no kernel size", ("convolution_param", "kernel_size")),
        ('type: "Im2col" convolution_param { kernel_size: 9 }', [S], "no output", ("convolution_param", "kernel_size")),
        ('type: "SPP"', [S], "pyramid_height", ("spp_param", "pyramid_height")),
        ('type: "SPP" spp_param { pyramid_height: 2 }', [(2, 3, 4)], "4 axes", ("bottom", 0)),
        ('type: "SPP" spp_param { pyramid_height: 4 }', [(2, 3, 5, 9)], "4 x 4 bins", ("spp_param", "pyramid_height")),
        ('type: "SPP" spp_param { pyramid_height: 2 pool: STOCHASTIC }', [S], "evenly", ("spp_param", "pool")),
        ('type: "Crop"', [S, (2, 3, 4)], "as many axes", ("bottom", 1)),
        ('type: "Crop"', [S, (2, 3, 9, 4)], "9 from offset 0", ("bottom", 1)),
        ('type: "Crop" crop_param { offset: 1 offset: 4 }', [S, (2, 3, 4, 4)], "axis 3", ("crop_param", "offset", 1)),
        ('type: "Crop" crop_param { axis: 1 offset: 1 offset: 4 }', [S, S], "give none, 1 or 3", None),
        ('type: "Crop" crop_param { axis: 4 }', [S, S], "out of range", ("crop_param", "axis")),
        ('type: "ROIPooling" roi_pooling_param { pooled_h: 2 }', [S, (4, 5)], "pooled_w", None),
        ('type: "ROIPooling" roi_pooling_param { pooled_h: 2 pooled_w: 2 }', [S, (4, 4)], "regions", ("bottom", 1)),
        ('type: "ROIPooling" roi_pooling_param { pooled_h: 2 pooled_w: 2 }', [(4, 4), (4, 5)], "N, C, H, W", None),
    ],
)
def test_refusals(text: str, ins: Shapes, match: str, field: tuple[str | int, ...] | None) -> None:
    with pytest.raises(LayerError, match=match) as e:
        layer_of(text, bottoms=len(ins)).shapes(ins)
    assert field is None or e.value.field == field


def test_expected_shapes() -> None:
    assert layer_of('type: "Crop"', bottoms=2).expects(1, [S, None]) == S
    assert layer_of('type: "ROIPooling"', bottoms=2).expects(1, [S, None]) == (2, 5)
