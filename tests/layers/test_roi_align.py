"""PSROIPooling and ROIAlign against loops over regions and cells; refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from caffejacinto_py.errors import LayerError
from tests.layers.harness import Case, build, check_layer, layer_of

ROIS = np.array(
    [
        [0, 0, 0, 11, 15],
        [1, 3.4, 2.5, 9.5, 12],
        [1, 7, 7, 7, 7],
        [0, -5, -6, 4, 30],
        [1, 20, 3, 40, 9],  # outside
        [0, 9, 9, 2, 2],  # inside out
    ],
    dtype=np.float64,
)
RNG = np.random.default_rng(3)


def c_round(v: float) -> float:
    return math.copysign(math.floor(abs(v) + 0.5), v)


def psroi(x: np.ndarray, rois: np.ndarray, g: int, scale: float) -> np.ndarray:
    d, (h, w) = x.shape[1] // g**2, x.shape[2:]
    y = np.zeros((len(rois), d, g, g))
    for r, c, i, j in np.ndindex(*y.shape):
        n, x1, y1, x2, y2 = rois[r]
        left, top = c_round(x1) * scale, c_round(y1) * scale
        cell_w = max((c_round(x2) + 1) * scale - left, 0.1) / g
        cell_h = max((c_round(y2) + 1) * scale - top, 0.1) / g
        a, b = math.floor(i * cell_h + top), math.ceil((i + 1) * cell_h + top)
        p, q = math.floor(j * cell_w + left), math.ceil((j + 1) * cell_w + left)
        a, b, p, q = min(max(a, 0), h), min(max(b, 0), h), min(max(p, 0), w), min(max(q, 0), w)
        part = x[int(n), (c * g + i) * g + j, a:b, p:q]
        y[r, c, i, j] = part.mean() if part.size else 0
    return y


def bilinear(image: np.ndarray, y: float, x: float) -> float:
    h, w = image.shape
    if y < -1 or y > h or x < -1 or x > w:
        return 0.0
    y, x = min(max(y, 0), h - 1), min(max(x, 0), w - 1)
    a, b = int(y), int(x)
    c, d = min(a + 1, h - 1), min(b + 1, w - 1)
    v, u = y - a, x - b
    return ((1 - v) * ((1 - u) * image[a, b] + u * image[a, d])) + v * ((1 - u) * image[c, b] + u * image[c, d])


def align(x: np.ndarray, rois: np.ndarray, grid: tuple[int, int], scale: float, samples: int) -> np.ndarray:
    out = np.zeros((len(rois), x.shape[1], *grid))
    for r, c, i, j in np.ndindex(*out.shape):
        x1, y1, x2, y2 = rois[r, 1:] * scale
        ch, cw = max(y2 - y1, 1) / grid[0], max(x2 - x1, 1) / grid[1]
        ny, nx = (samples, samples) if samples > 0 else (math.ceil(ch), math.ceil(cw))
        image = x[int(rois[r, 0]), c]
        total = 0.0
        for a in range(ny):
            for b in range(nx):
                total += bilinear(image, y1 + (i + (a + 0.5) / ny) * ch, x1 + (j + (b + 0.5) / nx) * cw)
        out[r, c, i, j] = total / (ny * nx)
    return out


def case(text: str, channels: int, oracle, **kw) -> Case:
    ins = [(2, channels, 6, 7), (len(ROIS), 5)]
    x = RNG.normal(size=ins[0])
    return Case(text, ins, lambda b, _: [oracle(b[0], b[1].reshape(-1, 5))], bottoms=[x, ROIS], rebatch=False, **kw)


PS = 'type: "PSROIPooling" psroi_pooling_param { spatial_scale: 0.5 output_dim: 2 group_size: %d }'
AL = 'type: "ROIAlign" roi_align_param { pooled_h: 3 pooled_w: 2 spatial_scale: 0.5 %s }'
CASES = {
    "psroi_3": case(PS % 3, 18, lambda x, r: psroi(x, r, 3, 0.5), compiled=True),
    "psroi_1": case(PS % 1, 2, lambda x, r: psroi(x, r, 1, 0.5)),
    "align_by_size": case(AL % "", 2, lambda x, r: align(x, r, (3, 2), 0.5, -1), waits=True),
    "align_2": case(AL % "sampling_ratio: 2", 2, lambda x, r: align(x, r, (3, 2), 0.5, 2), compiled=True),
    "align_roi_pooling_param": case(
        'type: "ROIAlign" roi_pooling_param { pooled_h: 2 pooled_w: 2 }',
        2,
        lambda x, r: align(x, r, (2, 2), 1, -1),
        waits=True,
    ),
    "align_aligned": case(
        'type: "RoIAlign" roi_align_param { aligned_h: 2 aligned_w: 1 }',
        2,
        lambda x, r: align(x, r, (2, 1), 1, -1),
        waits=True,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_contract(name: str) -> None:
    check_layer(CASES[name])


def test_by_hand() -> None:
    """One cell over a ramp: the mean of its samples is the ramp at the middle."""
    x = torch.arange(8.0).expand(1, 1, 8, 8)
    rois = torch.tensor([[0.0, 2, 1, 5, 6]])
    (y,) = build('type: "ROIAlign" roi_align_param { pooled_h: 1 pooled_w: 1 }', [x.shape, rois.shape])(x, rois)
    assert y.item() == pytest.approx(3.5)
    text = 'type: "PSROIPooling" psroi_pooling_param { spatial_scale: 1 output_dim: 1 group_size: 1 }'
    assert build(text, [x.shape, rois.shape])(x, rois)[0].item() == pytest.approx((2 + 3 + 4 + 5) / 4)


@pytest.mark.parametrize("text", [PS % 2, AL % ""])
def test_other_images_and_no_regions(text: str) -> None:
    """An image number that is not in the batch gives 0; four trailing axes are fine; none too."""
    x = torch.rand(1, 8, 4, 4, dtype=torch.float64)
    rois = torch.tensor([[1.0, 0, 0, 3, 3], [-1, 0, 0, 3, 3]], dtype=torch.float64).view(2, 5, 1, 1)
    assert (build(text, [x.shape, (2, 5, 1, 1)])(x, rois)[0] == 0).all()
    assert build(text, [x.shape, (0, 5)])(x, rois[:0])[0].numel() == 0


@pytest.mark.parametrize(
    ("text", "ins", "field", "words"),
    [
        ('type: "PSROIPooling"', [(1, 9, 4, 4), (2, 5)], "spatial_scale", "must be given"),
        (PS % 3, [(1, 9, 4, 4), (2, 5)], 0, "need 18 channels"),
        (PS % 3, [(1, 18, 4, 4), (2, 4)], 1, "5 numbers"),
        (PS % 3, [(1, 18, 4), (2, 5)], 0, "4 axes"),
        ('type: "ROIAlign"', [(1, 9, 4, 4), (2, 5)], "pooled_h", "must be given"),
        ('type: "ROIAlign" roi_pooling_param { pooled_h: 1 }', [(1, 9, 4, 4), (2, 5)], "pooled_w", "must be given"),
        (AL % "" + "", [(1, 9, 4, 4), (2, 5, 2)], 1, "5 numbers"),
        (
            'type: "ROIAlign" roi_align_param { pooled_h: 1 pooled_w: 1 spatial_scale: 0 }',
            [(1, 9, 4, 4), (2, 5)], "spatial_scale", "positive",
        ),
    ],
)  # fmt: skip
def test_refusals(text: str, ins: list, field: str | int, words: str) -> None:
    with pytest.raises(LayerError) as e:
        layer_of(text, bottoms=2).shapes(ins)
    assert e.value.field[-1] == field
    assert words in e.value.text
