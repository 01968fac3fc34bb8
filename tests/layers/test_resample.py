"""Interp and Upsample against loops over pixels; sizes; refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from caffejacinto_py.errors import DataError, LayerError
from tests.layers.harness import Arrays, Case, build, check_layer, layer_of

S = (2, 2, 4, 5)


def interp(size: tuple[int, int], begin: int = 0, end: int = 0, nearest: bool = False):
    """One top pixel at a time, as DeepLab's loop."""

    def oracle(ins: Arrays, _: Arrays) -> Arrays:
        x = ins[0][:, :, begin : ins[0].shape[2] - end, begin : ins[0].shape[3] - end]
        h, w = x.shape[2:]
        y = np.zeros((*x.shape[:2], *size))
        for i, j in np.ndindex(*size):
            a = i * (h - 1) / (size[0] - 1) if size[0] > 1 else 0
            b = j * (w - 1) / (size[1] - 1) if size[1] > 1 else 0
            if nearest:
                y[:, :, i, j] = x[:, :, int(a + 0.5), int(b + 0.5)]
                continue
            p, q = int(a), int(b)
            for r, v in ((p, 1 - a + p), (min(p + 1, h - 1), a - p)):
                for c, u in ((q, 1 - b + q), (min(q + 1, w - 1), b - q)):
                    y[:, :, i, j] += v * u * x[:, :, r, c]
        return [y]

    return oracle


def case(fields: str, oracle, bottoms: int = 1, **kw) -> Case:
    ins = [S, (2, 1, 6, 3)][:bottoms]
    return Case(f'type: "Interp" interp_param {{ {fields} }}', ins, oracle, **kw)


INTERP = {
    "bigger": case("height: 7 width: 11", interp((7, 11)), compiled=True),
    "smaller": case("height: 2 width: 3", interp((2, 3))),
    "one_pixel": case("height: 1 width: 1", interp((1, 1))),
    "zoom": case("zoom_factor: 3", interp((10, 13))),
    "shrink": case("shrink_factor: 2", interp((2, 3))),
    "both": case("shrink_factor: 2 zoom_factor: 2", interp((3, 5))),
    "cut": case("zoom_factor: 2 pad_beg: -1 pad_end: -1", interp((3, 5), 1, 1)),
    "cut_one_side": case("height: 4 width: 4 pad_end: -2", interp((4, 4), 0, 2)),
    "second_bottom": case("", interp((6, 3)), 2),
    "nearest": case('height: 7 width: 3 interp_type: "nearest_neighbor"', interp((7, 3), nearest=True), compiled=True),
    "nearest_same": case('height: 4 width: 5 interp_type: "nearest_neighbor"', interp((4, 5), nearest=True)),
}  # fmt: skip


@pytest.mark.parametrize("name", INTERP)
def test_interp(name: str) -> None:
    check_layer(INTERP[name])


def test_interp_by_hand() -> None:
    x = torch.tensor([[[[0.0, 4.0], [8.0, 12.0]]]])
    (y,) = build('type: "Interp" interp_param { zoom_factor: 3 }', [(1, 1, 2, 2)])(x)
    assert y.shape == (1, 1, 4, 4)
    assert torch.allclose(y[0, 0, :, 0], torch.tensor([0, 8 / 3, 16 / 3, 8]))
    assert torch.allclose(y[0, 0, 0], torch.tensor([0, 4 / 3, 8 / 3, 4]))


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ("", "interp_param", "give the size once"),
        ("height: 3", "height", "belong together"),
        ("height: 3 width: 3 zoom_factor: 2", "zoom_factor", "give the size once"),
        ("zoom_factor: 0", "zoom_factor", "at least 1"),
        ("height: 0 width: 3", "height", "must be positive"),
        ("zoom_factor: 2 pad_beg: 1", "pad_beg", "never positive"),
        ("zoom_factor: 2 pad_beg: -2 pad_end: -2", "pad_beg", "leave nothing"),
        ('zoom_factor: 2 interp_type: "cubic"', "interp_type", "nearest_neighbor"),
    ],
)
def test_interp_refusals(fields: str, field: str, words: str) -> None:
    with pytest.raises(LayerError) as e:
        layer_of(f'type: "Interp" interp_param {{ {fields} }}').shapes([S])
    assert e.value.field[-1] == field
    assert words in e.value.text


def unpool(size: tuple[int, int]):
    def oracle(ins: Arrays, _: Arrays) -> Arrays:
        y = np.zeros((*ins[0].shape[:2], size[0] * size[1]))
        for n, c, i, j in np.ndindex(*ins[0].shape):
            y[n, c, int(ins[1][n, c, i, j])] = ins[0][n, c, i, j]
        return [y.reshape(*y.shape[:2], *size)]

    return oracle


MASK = np.array([[[[0, 3], [8, 11]], [[5, 2], [9, 12]]]])  # places in a 4 x 4 (or 4 x 3: all but the 12) image
VALUES = np.arange(8.0).reshape(MASK.shape) + 1
REPEAT = lambda ins, _: [ins[0].repeat(2, 2).repeat(2, 3)]  # noqa: E731
UPSAMPLE = {
    "mask": Case(
        'type: "Upsample" upsample_param { scale: 2 }', [MASK.shape] * 2, unpool((4, 4)), bottoms=[VALUES, MASK],
        labels={1: 16}, compiled=True,
    ),
    "mask_size": Case(
        'type: "Upsample" upsample_param { upsample_h: 5 upsample_w: 3 }', [MASK.shape] * 2, unpool((5, 3)),
        bottoms=[VALUES, MASK], labels={1: 15},
    ),
    "mask_pad_out": Case(
        'type: "Upsample" upsample_param { scale: 2 pad_out_w: true }', [MASK.shape] * 2, unpool((4, 3)),
        bottoms=[VALUES, MASK % 12], labels={1: 12},
    ),
    "blocks": Case('type: "Upsample"', [S], REPEAT, compiled=True),
    "blocks_scale": Case(
        'type: "Upsample" upsample_param { scale_h: 1 scale_w: 3 }', [S], lambda ins, _: [ins[0].repeat(3, 3)]
    ),
    "blocks_size": Case('type: "Upsample" upsample_param { upsample_h: 8 upsample_w: 10 }', [S], REPEAT),
}  # fmt: skip


@pytest.mark.parametrize("name", UPSAMPLE)
def test_upsample(name: str) -> None:
    check_layer(UPSAMPLE[name])


def test_upsample_undoes_max_pooling() -> None:
    x = torch.rand(1, 2, 5, 6, dtype=torch.float64)
    pool = build('type: "Pooling" pooling_param { kernel_size: 2 stride: 2 }', [x.shape], tops=2)
    y, mask = pool(x)
    up = build('type: "Upsample" upsample_param { upsample_h: 5 upsample_w: 6 }', [y.shape] * 2)(y, mask)[0]
    assert torch.equal(up, torch.where(up != 0, x, 0))
    assert (up != 0).sum() == y.numel()


def test_a_mask_of_another_pooling_is_found() -> None:
    built = build('type: "Upsample" upsample_param { scale: 2 }', [(1, 1, 1, 1)] * 2)
    with pytest.raises(DataError, match="place 4, but the top has 4 pixels"):
        built(torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), 4.0))


@pytest.mark.parametrize(
    ("fields", "ins", "field", "words"),
    [
        ("scale: 0", [S], "scale_h", "positive"),
        ("scale: 2 scale_h: 2 scale_w: 2", [S], "scale", "not both"),
        ("scale_h: 2", [S], "scale_h", "belong together"),
        ("pad_out_h: true", [S], "pad_out_h", "with a scale of 2 and a mask"),
        ("scale: 3 pad_out_w: true", [S, S], "pad_out_w", "with a scale of 2"),
        ("upsample_h: 7 upsample_w: 10", [S], "upsample_h", "multiple"),
        ("", [S, (2, 2, 4, 4)], 1, "shape of bottom 0"),
        ("", [S[:3]], 0, "4 axes"),
    ],
)
def test_upsample_refusals(fields: str, ins: list, field: str | int, words: str) -> None:
    with pytest.raises(LayerError) as e:
        layer_of(f'type: "Upsample" upsample_param {{ {fields} }}', bottoms=len(ins)).shapes(ins)
    assert e.value.field[-1] == field
    assert words in e.value.text
