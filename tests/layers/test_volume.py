"""Convolution3D, NdConvolution, Pooling3D, NdPooling: numbers against loops; spellings; refusals."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from caffejacinto_py.errors import LayerError
from caffejacinto_py.schema.text import parse
from caffejacinto_py.schema.upgrade import upgrade_net
from tests.layers.harness import Arrays, Case, check_layer, layer_of
from tests.layers.test_conv import conv

V = (2, 2, 3, 4, 4)
Ints = tuple[int, ...]


def conv_case(text: str, shape: Ints, s: Ints, p: Ints, group: int = 1, **kw) -> Case:
    def oracle(ins: Arrays, blobs: Arrays) -> Arrays:
        return [conv(ins[0], blobs[0], blobs[1] if len(blobs) > 1 else None, s, p, (1,) * len(s), group)]

    return Case(text, [shape], oracle, **kw)


C3 = 'type: "Convolution3D" convolution3d_param { num_output: 2 %s }'
ND = 'type: "NdConvolution" convolution_param { num_output: 2 %s }'
CONV = {
    "c3d": conv_case(
        C3 % "kernel_size: 3 kernel_depth: 2 pad: 1 temporal_pad: 1 stride: 2 temporal_stride: 2",
        V,
        (2, 2, 2),
        (1, 1, 1),
        compiled=True,
    ),
    "zhaofan": conv_case(
        C3 % "kernel_size: 2 kernel_l: 3 pad_l: 1 stride_l: 2 bias_term: false", V, (2, 1, 1), (1, 0, 0)
    ),
    "c3d_first": conv_case(
        'type: "Convolution3D" convolution_param { num_output: 2 kernel_size: 2 kernel_depth: 3 filter_group: 2 }',
        V,
        (1, 1, 1),
        (0, 0, 0),
    ),
    "group": conv_case(C3 % "kernel_size: 2 kernel_depth: 2 group: 2", V, (1, 1, 1), (0, 0, 0), 2),
    "nd_3": conv_case(
        ND % "kernel_shape { dim: [1, 2, 3] } stride_shape { dim: [2, 1, 1] } pad_shape { dim: [0, 1, 1] }",
        V,
        (2, 1, 1),
        (0, 1, 1),
    ),
    "nd_2": conv_case(ND % "kernel_shape { dim: 2 dim: 3 }", (2, 2, 4, 4), (1, 1), (0, 0)),
}


@pytest.mark.parametrize("name", CONV)
def test_convolution(name: str) -> None:
    check_layer(CONV[name])


def pool(x: np.ndarray, k: Ints, s: Ints, p: Ints, average: bool) -> np.ndarray:
    size = x.shape[2:]
    out = [math.ceil((n + 2 * q - a) / b) + 1 for n, q, a, b in zip(size, p, k, s)]
    if any(p):
        out = [o - 1 if (o - 1) * b >= n + q else o for o, b, n, q in zip(out, s, size, p)]
    y = np.zeros((*x.shape[:2], *out))
    for place in itertools.product(*map(range, out)):
        begin = [i * b - q for i, b, q in zip(place, s, p)]
        end = [min(a + c, n + q) for a, c, n, q in zip(begin, k, size, p)]
        count = math.prod(b - a for a, b in zip(begin, end))
        part = x[(slice(None), slice(None), *(slice(max(a, 0), b) for a, b in zip(begin, end)))]
        flat = part.reshape(*x.shape[:2], -1)
        y[(slice(None), slice(None), *place)] = flat.sum(2) / count if average else flat.max(2)
    return y


def pool_case(text: str, k: Ints, s: Ints, p: Ints, average: bool = False, shape: Ints = V, **kw) -> Case:
    return Case(text, [shape], lambda ins, _: [pool(ins[0], k, s, p, average)], **kw)


P3 = 'type: "Pooling3D" pooling3d_param { %s }'
NP = 'type: "NdPooling" pooling_param { %s }'
POOL = {
    "max": pool_case(
        P3 % "kernel_size: 2 kernel_depth: 2 stride: 2 temporal_stride: 2", (2,) * 3, (2,) * 3, (0,) * 3, compiled=True
    ),
    "max_l": pool_case(P3 % "kernel_size: 3 kernel_l: 1 stride: 2 pad: 1", (1, 3, 3), (1, 2, 2), (0, 1, 1)),
    "ave_pad": pool_case(
        P3 % "pool: AVE kernel_h: 2 kernel_w: 3 kernel_l: 2 pad_h: 1 pad_w: 1 pad_l: 1 stride: 2 stride_l: 2",
        (2, 2, 3),
        (2, 2, 2),
        (1, 1, 1),
        True,
        compiled=True,
    ),
    "ave_over_the_edge": pool_case(
        P3 % "pool: AVE kernel_size: 3 kernel_depth: 2 stride: 2", (2, 3, 3), (1, 2, 2), (0,) * 3, True
    ),
    "c3d_first": pool_case(
        'type: "Pooling3D" pooling_param { kernel_size: 2 kernel_depth: 1 stride: 2 }', (1, 2, 2), (1, 2, 2), (0,) * 3
    ),
    "rest": pool_case(
        P3 % "kernel_size: 1 kernel_depth: 1 stride: 3 temporal_stride: 2", (1,) * 3, (2, 3, 3), (0,) * 3
    ),
    "global": pool_case(P3 % "pool: AVE global_pooling: true", (3, 4, 4), (1,) * 3, (0,) * 3, True),
    "nd_3": pool_case(
        NP % "kernel_shape { dim: 1 dim: 2 dim: 2 } stride_shape { dim: 1 dim: 2 dim: 2 }",
        (1, 2, 2),
        (1, 2, 2),
        (0,) * 3,
    ),
    "nd_2": pool_case(
        NP % "pool: AVE kernel_shape { dim: 2 dim: 3 } pad_shape { dim: 1 dim: 1 }",
        (2, 3),
        (1, 1),
        (1, 1),
        True,
        (2, 2, 4, 4),
    ),
    "nd_global": pool_case(NP % "global_pooling: true", (5,), (1,), (0,), False, (2, 2, 5)),
}


@pytest.mark.parametrize("name", POOL)
def test_pooling(name: str) -> None:
    check_layer(POOL[name])


def test_blobs_macs_and_c3d_bias() -> None:
    layer = layer_of(C3 % "kernel_size: 3 kernel_depth: 2 weight_filler { type: 'xavier' }")
    blobs = layer.blobs([V])
    assert [b.shape for b in blobs] == [(2, 2, 2, 3, 3), (2,)]
    assert blobs[0].filler.type == "xavier"
    assert layer.macs([V], layer.shapes([V])) == 2 * 2 * 2 * 2 * 2 * 2 * 18
    weight, bias = np.zeros((2, 2, 2, 3, 3)), np.arange(2.0).reshape(1, 1, 1, 1, 2)
    found = layer.adapt([weight, bias], [b.shape for b in blobs])
    assert [a.shape for a in found] == [(2, 2, 2, 3, 3), (2,)]
    assert layer.adapt([weight, bias, bias], [b.shape for b in blobs])[2] is bias


def test_old_nets() -> None:
    """C3D and DeepLab wrote `layers` with types of their own."""
    doc = parse(
        """layers { name: "a" type: CONVOLUTION3D bottom: "x" top: "a" blobs_lr: 1 blobs_lr: 2
             convolution_param { num_output: 4 kernel_size: 3 kernel_depth: 3 pad: 1 temporal_pad: 1 } }
           layers { name: "b" type: POOLING3D bottom: "a" top: "b" pooling_param { kernel_size: 2 kernel_depth: 1 } }
           layers { name: "c" type: INTERP interp_param { zoom_factor: 8 } }
           layers { name: "d" type: BN bn_param { scale_filler { value: 1 } } }
           layers { name: "e" type: UPSAMPLE upsample_param { scale: 2 } }""",
        "NetParameter",
    )
    upgrade_net(doc.message)
    found = doc.message.layer
    assert [n.type for n in found] == ["Convolution3D", "Pooling3D", "Interp", "BN", "Upsample"]
    assert layer_of(str(found[0])).shapes([(1, 3, 4, 8, 8)]) == [(1, 4, 4, 8, 8)]
    assert layer_of(str(found[1])).shapes([(1, 4, 4, 8, 8)]) == [(1, 4, 4, 7, 7)]
    assert found[2].interp_param.zoom_factor == 8


def test_inputs_of_c3d_have_five_dims() -> None:
    head = 'input: "data" input_dim: [30, 3, 16, 112, 112] '
    doc = parse(head + 'layers { name: "a" type: CONVOLUTION3D bottom: "data" top: "a" }', "NetParameter")
    upgrade_net(doc.message, doc.locs)
    assert list(doc.message.layer[0].input_param.shape[0].dim) == [30, 3, 16, 112, 112]
    assert doc.locs.find(("layer", 0, "input_param", "shape", 0, "dim", 4)) is not None


@pytest.mark.parametrize(
    ("text", "ins", "field", "words"),
    [
        (C3 % "kernel_size: 3", V, ("convolution3d_param", "kernel_depth"), "length is missing"),
        (C3 % "kernel_depth: 3", V, ("convolution3d_param", "kernel_size"), "missing"),
        (C3 % "kernel_size: 9 kernel_depth: 1", V, ("convolution3d_param", "kernel_size"), "covers 9"),
        (C3 % "kernel_size: 0 kernel_depth: 1", V, ("convolution3d_param",), "must be positive"),
        (C3 % "kernel_size: 1 kernel_depth: 1 group: 4", V, ("convolution3d_param", "group"), "not divisible"),
        (C3 % "kernel_size: 3 kernel_depth: 1", V[:4], ("bottom", 0), "5 axes"),
        (ND % "kernel_size: 3", V, ("convolution_param", "kernel_size"), "kernel_shape"),
        (ND % "", V, ("convolution_param", "kernel_shape"), "missing"),
        (ND % "kernel_shape { dim: 3 }", V, ("convolution_param", "kernel_shape"), "1 numbers for 3"),
        (ND % "kernel_shape { dim: 3 }", (2, 3), ("bottom", 0), "1 to 3 spatial"),
        (P3 % "kernel_size: 2", V, ("pooling3d_param", "kernel_depth"), "missing"),
        (P3 % "kernel_depth: 2 kernel_h: 2", V, ("pooling3d_param", "kernel_h"), "belong together"),
        (P3 % "kernel_depth: 2 kernel_size: 2 kernel_h: 2 kernel_w: 2", V, ("pooling3d_param", "kernel_h"), "not both"),
        (P3 % "kernel_depth: 1 kernel_size: 2 pad: 2", V, ("pooling3d_param",), "smaller than the kernel"),
        (P3 % "kernel_depth: 1 kernel_size: 9", V, ("pooling3d_param",), "no output"),
        (P3 % "pool: STOCHASTIC kernel_depth: 1 kernel_size: 2", V, ("pooling3d_param", "pool"), "STOCHASTIC"),
        (P3 % "global_pooling: true kernel_size: 2", V, ("pooling3d_param", "kernel_size"), "leave out"),
        (P3 % "kernel_depth: 1 kernel_size: 2", V[:4], ("bottom", 0), "5 axes"),
        (NP % "kernel_shape { dim: 2 dim: 2 }", V, ("pooling_param", "kernel_shape"), "2 numbers for 3"),
    ],
)
def test_refusals(text: str, ins: Ints, field: tuple, words: str) -> None:
    with pytest.raises(LayerError) as e:
        layer_of(text).shapes([ins])
    assert e.value.field == field
    assert words in e.value.text
