"""Convolution and Deconvolution against naive loops, and every refusal."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from caffejacinto_py.errors import LayerError
from tests.layers.harness import Arrays, Case, build, check_layer, layer_of

Ints = tuple[int, ...]
Index = tuple[Any, ...]


def conv(x: np.ndarray, w: np.ndarray, b: np.ndarray | None, s: Ints, p: Ints, d: Ints, group: int) -> np.ndarray:
    """x (N, C, spatial..): the definition, one output pixel at a time."""
    n = x.ndim - 2
    x = np.pad(x, [(0, 0), (0, 0), *((q, q) for q in p)])
    reach = [d[i] * (w.shape[2 + i] - 1) + 1 for i in range(n)]
    out = [(x.shape[2 + i] - reach[i]) // s[i] + 1 for i in range(n)]
    y = np.zeros((x.shape[0], w.shape[0], *out))
    per_in, per_out = x.shape[1] // group, w.shape[0] // group
    for place in itertools.product(*map(range, out)):
        window = tuple(slice(place[i] * s[i], place[i] * s[i] + reach[i], d[i]) for i in range(n))
        for o in range(w.shape[0]):
            g = o // per_out
            source: Index = (slice(None), slice(g * per_in, (g + 1) * per_in), *window)
            part = x[source]
            target: Index = (slice(None), o, *place)
            y[target] = (part * w[o]).reshape(x.shape[0], -1).sum(1)
    return y if b is None else y + b.reshape(-1, *(1,) * n)


def deconv(x: np.ndarray, w: np.ndarray, b: np.ndarray | None, s: Ints, p: Ints, d: Ints, group: int) -> np.ndarray:
    n = x.ndim - 2
    full = [s[i] * (x.shape[2 + i] - 1) + d[i] * (w.shape[2 + i] - 1) + 1 for i in range(n)]
    per_in, per_out = x.shape[1] // group, w.shape[1]
    y = np.zeros((x.shape[0], group * per_out, *full))
    for place in itertools.product(*map(range, x.shape[2:])):
        window = tuple(
            slice(place[i] * s[i], place[i] * s[i] + d[i] * (w.shape[2 + i] - 1) + 1, d[i]) for i in range(n)
        )
        for c in range(x.shape[1]):
            g = c // per_in
            source: Index = (slice(None), c, *place)
            value = x[source].reshape(-1, *(1,) * (n + 1))
            target: Index = (slice(None), slice(g * per_out, (g + 1) * per_out), *window)
            y[target] += value * w[c]
    inner: Index = (slice(None), slice(None), *(slice(q, f - q) for q, f in zip(p, full, strict=True)))
    y = y[inner]
    return y if b is None else y + b.reshape(-1, *(1,) * n)


def case(
    kind: str, text: str, shape: Ints, s: Ints, p: Ints, d: Ints, group: int = 1, lead: int = 1, bottoms: int = 1, **kw
) -> Case:
    run = {"Convolution": conv, "Deconvolution": deconv}[kind]

    def oracle(ins: Arrays, blobs: Arrays) -> Arrays:
        out = []
        for x in ins:
            y = run(x.reshape(-1, *x.shape[lead:]), blobs[0], blobs[1] if len(blobs) > 1 else None, s, p, d, group)
            out.append(y.reshape(*x.shape[:lead], *y.shape[1:]))
        return out

    full = f'type: "{kind}" convolution_param {{ {text} }}'
    return Case(full, [shape] * bottoms, oracle, tops=bottoms, **kw)


C, D, X = "Convolution", "Deconvolution", (2, 4, 5, 6)
CASES = {
    "plain": case(C, "num_output: 3 kernel_size: 3", X, (1, 1), (0, 0), (1, 1), compiled=True),
    "stride_pad": case(C, "num_output: 3 kernel_size: 3 stride: 2 pad: 1", X, (2, 2), (1, 1), (1, 1)),
    "no_bias": case(C, "num_output: 2 kernel_size: 1 bias_term: false", X, (1, 1), (0, 0), (1, 1)),
    "group": case(C, "num_output: 6 kernel_size: 3 group: 2 pad: 1", X, (1, 1), (1, 1), (1, 1), 2),
    "depthwise": case(C, "num_output: 4 kernel_size: 3 group: 4", X, (1, 1), (0, 0), (1, 1), 4),
    "dilation": case(C, "num_output: 2 kernel_size: 2 dilation: 3 pad: 1", X, (1, 1), (1, 1), (3, 3)),
    "per_axis": case(
        C,
        "num_output: 2 kernel_size: 3 kernel_size: 2 stride: 1 stride: 2 pad: 0 pad: 1 dilation: 1 dilation: 2",
        X, (1, 2), (0, 1), (1, 2),
    ),
    "h_w": case(
        C, "num_output: 2 kernel_h: 1 kernel_w: 3 stride_h: 2 stride_w: 1 pad_h: 0 pad_w: 2", X, (2, 1), (0, 2), (1, 1)
    ),
    "pad_h_only": case(C, "num_output: 2 kernel_size: 3 pad_h: 1", X, (1, 1), (1, 0), (1, 1)),
    "hole": case(C, "num_output: 2 kernel_size: 2 hole: 3 pad: 1", X, (1, 1), (1, 1), (3, 3)),
    "hole_h_w": case(C, "num_output: 2 kernel_size: 2 hole_h: 1 hole_w: 2", X, (1, 1), (0, 0), (1, 2)),
    "one_axis": case(C, "num_output: 3 kernel_size: 3 stride: 2 pad: 1", (2, 3, 7), (2,), (1,), (1,), compiled=True),
    "three_axes": case(C, "num_output: 2 kernel_size: 2 pad: 1", (1, 2, 3, 3, 2), (1,) * 3, (1,) * 3, (1,) * 3),
    "axis_2": case(C, "num_output: 3 kernel_size: 2 axis: 2", (2, 2, 3, 4, 4), (1, 1), (0, 0), (1, 1), lead=2),
    "axis_negative": case(C, "num_output: 3 kernel_size: 2 axis: -3", X, (1, 1), (0, 0), (1, 1)),
    "axis_0": case(
        C, "num_output: 3 kernel_size: 2 axis: 0", (4, 5, 6), (1, 1), (0, 0), (1, 1), lead=0, rebatch=False
    ),
    "no_spatial_axes": case(C, "num_output: 3 kernel_size: 1", (2, 4), (), (), ()),
    "three_bottoms": case(C, "num_output: 3 kernel_size: 3", X, (1, 1), (0, 0), (1, 1), bottoms=3, compiled=True),
    "deconv": case(D, "num_output: 3 kernel_size: 3", X, (1, 1), (0, 0), (1, 1), compiled=True),
    "deconv_stride_pad": case(D, "num_output: 3 kernel_size: 4 stride: 2 pad: 1", X, (2, 2), (1, 1), (1, 1)),
    "deconv_group": case(D, "num_output: 6 kernel_size: 3 stride: 2 group: 2", X, (2, 2), (0, 0), (1, 1), 2),
    "deconv_dilation": case(D, "num_output: 2 kernel_size: 2 dilation: 2 bias_term: false", X, (1, 1), (0, 0), (2, 2)),
    "deconv_pad_beyond_kernel": case(D, "num_output: 2 kernel_size: 1 pad: 1", X, (1, 1), (1, 1), (1, 1)),
    "deconv_h_w": case(D, "num_output: 2 kernel_h: 1 kernel_w: 3 stride_h: 1 stride_w: 2", X, (1, 2), (0, 0), (1, 1)),
    "deconv_one_axis": case(D, "num_output: 2 kernel_size: 3 stride: 2", (2, 3, 5), (2,), (0,), (1,)),
    "deconv_three_axes": case(
        D, "num_output: 2 kernel_size: 2 stride: 2", (1, 2, 2, 3, 2), (2,) * 3, (0,) * 3, (1,) * 3
    ),
    "deconv_axis_2": case(D, "num_output: 2 kernel_size: 2 axis: 2", (2, 2, 3, 3, 3), (1, 1), (0, 0), (1, 1), lead=2),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_contract(name: str) -> None:
    check_layer(CASES[name])


@pytest.mark.parametrize("text", ['type: "DepthwiseConvolution"', 'type: "ConvolutionDepthwise"'])
@pytest.mark.parametrize(("num", "group"), [(4, ""), (8, ""), (4, "group: 4"), (4, "group: 2")])
def test_depthwise(text: str, num: int, group: str) -> None:
    groups = int(group[-1]) if group else 4
    full = f"{text} convolution_param {{ num_output: {num} kernel_size: 3 stride: 2 pad: 1 {group} }}"

    def oracle(ins: Arrays, blobs: Arrays) -> Arrays:
        return [conv(ins[0], blobs[0], blobs[1], (2, 2), (1, 1), (1, 1), groups)]

    check_layer(Case(full, [X], oracle, compiled=True))
    layer = layer_of(full)
    assert [b.shape for b in layer.blobs([X])] == [(num, 4 // groups, 3, 3), (num,)]
    assert layer.macs([X], layer.shapes([X])) == 2 * num * 3 * 3 * 4 // groups * 9


def test_blob_shapes_and_macs() -> None:
    layer = layer_of('type: "Convolution" convolution_param { num_output: 96 kernel_size: 11 stride: 4 }')
    ins = [(2, 3, 227, 227)]
    assert layer.shapes(ins) == [(2, 96, 55, 55)]
    assert [b.shape for b in layer.blobs(ins)] == [(96, 3, 11, 11), (96,)]
    assert layer.macs(ins, layer.shapes(ins)) == 2 * 105_415_200
    layer = layer_of(
        'type: "Deconvolution" convolution_param { num_output: 8 kernel_size: 4 stride: 2 pad: 1 group: 4 }'
    )
    ins = [(3, 12, 5, 6)]
    assert layer.shapes(ins) == [(3, 8, 10, 12)]
    assert [b.shape for b in layer.blobs(ins)] == [(12, 2, 4, 4), (8,)]
    assert layer.macs(ins, layer.shapes(ins)) == 3 * 12 * 30 * 2 * 16


def test_fillers_come_from_their_fields() -> None:
    text = 'num_output: 2 kernel_size: 1 weight_filler { type: "xavier" } bias_filler { value: 0.2 }'
    layer = layer_of(f'type: "Convolution" convolution_param {{ {text} }}')
    weight, bias = layer.blobs([(1, 3, 4, 4)])
    assert weight.filler.type == "xavier"
    assert bias.filler.value == pytest.approx(0.2)
    assert weight.lr_mult is None


def test_inputs_need_no_gradient() -> None:
    import torch

    built = build('type: "Convolution" convolution_param { num_output: 2 kernel_size: 3 }', [X])
    built(torch.ones(X, dtype=torch.float64))[0].sum().backward()
    assert built.blobs[0].grad is not None


@pytest.mark.parametrize(
    ("text", "field", "words"),
    [
        ("kernel_size: 3", "num_output", "num_output must be given"),
        ("num_output: 4", "kernel_size", "kernel_size, or kernel_h"),
        ("num_output: 4 kernel_size: 0", "kernel_size", "at least 1"),
        ("num_output: 4 kernel_h: 3", "kernel_h", "kernel_w must be at least 1"),
        ("num_output: 4 kernel_size: 3 kernel_h: 3 kernel_w: 3", "kernel_h", "not both"),
        ("num_output: 4 kernel_size: 3 stride: 0", "stride", "at least 1"),
        ("num_output: 4 kernel_size: 3 stride_h: 2", "stride_h", "stride_w must be at least 1"),
        ("num_output: 4 kernel_size: 3 stride: 1 stride_h: 2 stride_w: 2", "stride_h", "not both"),
        ("num_output: 4 kernel_size: 3 pad: 1 pad_w: 2", "pad_w", "not both"),
        ("num_output: 4 kernel_size: 3 pad: 1 pad: 1 pad: 1", "pad", "3 values for 2"),
        ("num_output: 4 kernel_size: 3 kernel_size: 3 kernel_size: 3", "kernel_size", "3 values for 2"),
        ("num_output: 4 kernel_size: 3 dilation: 0", "dilation", "at least 1"),
        ("num_output: 4 kernel_size: 3 hole: 2 dilation: 2", "hole", "not both"),
        ("num_output: 4 kernel_size: 3 hole: 2 hole_w: 2", "hole", "give hole, or hole_h"),
        ("num_output: 4 kernel_size: 3 hole: 0", "hole", "at least 1"),
        ("num_output: 4 kernel_size: 3 kernel_depth: 3", "kernel_depth", "NdConvolution"),
        ("num_output: 4 kernel_size: 3 group: 0", "group", "positive"),
        ("num_output: 4 kernel_size: 3 group: 4", "group", "6 input channels"),
        ("num_output: 4 kernel_size: 3 group: 3", "num_output", "not divisible by group 3"),
        ("num_output: 4 kernel_size: 9", "kernel_size", "covers 9 pixels"),
        ("num_output: 4 kernel_size: 3 dilation: 4 stride: 5", "kernel_size", "covers 9 pixels"),
        ("num_output: 4 kernel_h: 1 kernel_w: 9", "kernel_h", "covers 9 pixels"),
        ("num_output: 4 kernel_size: 3 axis: 4", "axis", "out of range"),
        ('num_output: 4 kernel_size: 3 weight_filler { type: "gausian" }', "weight_filler", "gaussian"),
    ],
)  # fmt: skip
def test_refusals(text: str, field: str, words: str) -> None:
    layer = layer_of(f'type: "Convolution" convolution_param {{ {text} }}')
    with pytest.raises(LayerError) as e:
        [layer.shapes([(2, 6, 8, 8)]), layer.blobs([(2, 6, 8, 8)])]
    assert e.value.field[:2] == ("convolution_param", field)
    assert words in f"{e.value.text} {e.value.hint}"
    assert "layer 'layer' (Convolution)" in e.value.text


def test_refusals_that_depend_on_the_bottoms() -> None:
    text = "convolution_param { num_output: 4 kernel_size: 3"
    with pytest.raises(LayerError, match="shape of the first") as e:
        layer_of(f'type: "Convolution" {text} }}', bottoms=2, tops=2).shapes([(2, 6, 8, 8), (2, 6, 8, 9)])
    assert e.value.field == ("bottom", 1)
    with pytest.raises(LayerError, match="at most 3"):
        layer_of(f'type: "Convolution" {text} }}').shapes([(2, 6, 8, 8, 8, 8)])
    with pytest.raises(LayerError, match="needs 2 spatial axes") as e:
        layer_of('type: "Convolution" convolution_param { num_output: 4 kernel_h: 3 kernel_w: 3 }').shapes([(2, 6, 8)])
    assert e.value.field == ("convolution_param", "kernel_h")
    with pytest.raises(LayerError, match="nothing is left") as e:
        layer_of(f'type: "Deconvolution" {text} pad: 2 }}').shapes([(1, 2, 2, 2)])
    assert e.value.field == ("convolution_param", "pad")
