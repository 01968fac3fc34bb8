"""ShuffleChannel, Reorg, Transpose, Reverse, Flip against loops over indices; refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from caffejacinto_py.errors import LayerError
from tests.layers.harness import Arrays, Case, build, check_layer, layer_of

S = (2, 6, 2, 3)


def shuffle(group: int):
    def oracle(ins: Arrays, _: Arrays) -> Arrays:
        x, y = ins[0], np.zeros_like(ins[0])
        per = x.shape[1] // group
        for i in range(group):
            for j in range(per):
                y[:, j * group + i] = x[:, i * per + j]
        return [y]

    return oracle


def reorg(x: np.ndarray, s: int, reverse: bool) -> np.ndarray:
    """darknet's loop over flat indices."""
    b, c, h, w = x.shape
    out_c = c // (s * s)
    flat, out = x.reshape(-1), np.zeros(x.size)
    for n, k, j, i in np.ndindex(b, c, h, w):
        near = i + w * (j + h * (k + c * n))
        offset = k // out_c
        x2, y2 = i * s + offset % s, j * s + offset // s
        far = x2 + w * s * (y2 + h * s * (k % out_c + out_c * n))
        if reverse:
            out[far] = flat[near]
        else:
            out[near] = flat[far]
    return out.reshape((b, out_c, h * s, w * s) if reverse else (b, c * s * s, h // s, w // s))


R = (2, 8, 4, 2)
CASES = {
    "shuffle_2": Case(
        'type: "ShuffleChannel" shuffle_channel_param { group: 2 }', [S], shuffle(2), compiled=True
    ),
    "shuffle_3": Case('type: "ShuffleChannel" shuffle_channel_param { group: 3 }', [S], shuffle(3)),
    "shuffle_1": Case('type: "ShuffleChannel"', [(2, 6)], lambda ins, _: ins),
    "reorg": Case('type: "Reorg" reorg_param { stride: 2 }', [R], lambda ins, _: [reorg(ins[0], 2, False)],
                  compiled=True),
    "reorg_reverse": Case(
        'type: "Reorg" reorg_param { stride: 2 reverse: true }', [R], lambda ins, _: [reorg(ins[0], 2, True)]
    ),
    "transpose": Case(
        'type: "Transpose" transpose_param { dim: 0 dim: 3 dim: 1 dim: 2 }', [S],
        lambda ins, _: [ins[0].transpose(0, 3, 1, 2)], compiled=True,
    ),
    "transpose_batch": Case(
        'type: "Transpose" transpose_param { dim: 1 dim: 0 }', [(2, 3)], lambda ins, _: [ins[0].T]
    ),
    "reverse": Case('type: "Reverse"', [S], lambda ins, _: [ins[0][::-1]], compiled=True),
    "reverse_last": Case('type: "Reverse" reverse_param { axis: -1 }', [S], lambda ins, _: [ins[0][..., ::-1]]),
    "flip": Case('type: "Flip"', [S], lambda ins, _: [ins[0][..., ::-1]], compiled=True),
    "flip_both": Case(
        'type: "Flip" flip_param { flip_height: true }', [S], lambda ins, _: [ins[0][:, :, ::-1, ::-1]]
    ),
    "flip_none": Case('type: "Flip" flip_param { flip_width: false }', [S], lambda ins, _: ins),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_contract(name: str) -> None:
    check_layer(CASES[name])


def test_by_hand() -> None:
    x = torch.arange(4.0).view(1, 4, 1, 1)
    two = build('type: "ShuffleChannel" shuffle_channel_param { group: 2 }', [x.shape])(x)[0]
    assert two.flatten().tolist() == [0, 2, 1, 3]
    back = build('type: "Reorg" reorg_param { stride: 2 reverse: true }', [x.shape])(x)[0]
    assert back.tolist() == [[[[0, 1], [2, 3]]]]


@pytest.mark.parametrize(
    ("text", "ins", "field", "words"),
    [
        ('type: "ShuffleChannel" shuffle_channel_param { group: 4 }', S, "group", "does not divide 6"),
        ('type: "ShuffleChannel" shuffle_channel_param { group: 0 }', S, "group", "does not divide"),
        ('type: "ShuffleChannel"', (3,), 0, "2 axes"),
        ('type: "Reorg"', R, "stride", "must be given"),
        ('type: "Reorg" reorg_param { stride: 3 }', R, "stride", "no multiple of stride"),
        ('type: "Reorg" reorg_param { stride: 2 }', (2, 8, 3, 2), "stride", "no multiple of the stride"),
        ('type: "Transpose" transpose_param { dim: 0 dim: 1 }', S, "dim", "each axis"),
        ('type: "Transpose" transpose_param { dim: 0 dim: 1 dim: 1 dim: 2 }', S, "dim", "each axis"),
        ('type: "Reverse" reverse_param { axis: 4 }', S, "axis", "out of range"),
        ('type: "Reverse"', (), 0, "scalar"),
        ('type: "Flip"', (2, 3), 0, "4 axes"),
    ],
)
def test_refusals(text: str, ins: tuple, field: str | int, words: str) -> None:
    with pytest.raises(LayerError) as e:
        layer_of(text).shapes([ins])
    assert e.value.field[-1] == field
    assert words in e.value.text
