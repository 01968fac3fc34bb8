"""Integer programs against the simulation: each op, random nets, bit for bit where all scales are powers of two."""

from __future__ import annotations

import ast
import inspect
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from caffejacinto_py.compress import integer_run
from caffejacinto_py.compress.integer_check import OpCheck, verify
from caffejacinto_py.compress.integer_file import write_program
from caffejacinto_py.passes.quantize import Settings
from tests.compress.integer_nets import net_text, program_of, quantized, simulation

POW2 = Settings(bits_weights=8, power2_weights=True, power2_activations=True, offset_weights=False)
PLAIN = Settings(bits_weights=8, offset_weights=False)
KINDS = {
    "pow2": POW2,
    "pow2, offsets": replace(POW2, offset_weights=True, offset_activations=True),
    "pow2, per channel": replace(POW2, per_channel=True),
    "plain": PLAIN,
    "offsets": replace(PLAIN, offset_weights=True, offset_activations=True),
    "per channel": replace(PLAIN, per_channel=True, offset_activations=True),
}
SHAPE = (2, 4, 7, 9)
OPS = {
    "conv": "x Convolution data x convolution_param { num_output: 6 kernel_size: 3 }",
    "conv, all options": "x Convolution data x convolution_param { num_output: 6 kernel_h: 3 kernel_w: 2 pad_h: 2 "
    "pad_w: 1 stride_h: 1 stride_w: 2 dilation: 2 group: 2 }",
    "conv, depthwise": "x Convolution data x convolution_param { num_output: 4 kernel_size: 3 pad: 1 stride: 2 "
    "group: 4 bias_term: false }",
    "conv, depthwise with multiplier": "x DepthwiseConvolution data x convolution_param { num_output: 8 "
    "kernel_size: 3 }",
    "deconv": "x Deconvolution data x convolution_param { num_output: 6 kernel_size: 4 stride: 2 pad: 1 group: 2 }",
    "deconv, dilated": "x Deconvolution data x convolution_param { num_output: 3 kernel_size: 2 dilation: 3 "
    "bias_term: false }",
    "dense": "x InnerProduct data x inner_product_param { num_output: 7 }",
    "dense, transposed": "x InnerProduct data x inner_product_param { num_output: 7 transpose: true }",
    "dense, axis": "x InnerProduct data x inner_product_param { num_output: 7 axis: 2 bias_term: false }",
    "max pool": "x Pooling data x pooling_param { kernel_size: 3 stride: 2 pad: 1 }",
    "average pool": "x Pooling data x pooling_param { pool: AVE kernel_size: 3 stride: 2 pad: 1 }",
    "average pool, hanging over": "x Pooling data x pooling_param { pool: AVE kernel_h: 3 kernel_w: 4 stride: 3 }",
    "average pool, global": "x Pooling data x pooling_param { pool: AVE global_pooling: true }",
    "relu": "x ReLU data x",
    "relu with slope": "x ReLU data x relu_param { negative_slope: 0.1 }",
    "relu with negative slope": "x ReLU data x relu_param { negative_slope: -0.3 }",
    "prelu": "x PReLU data x",
    "prelu, one slope": "x PReLU data x prelu_param { channel_shared: true }",
    "conv, relu with slope": "c Convolution data c convolution_param { num_output: 6 kernel_size: 3 }\n"
    "x ReLU c x relu_param { negative_slope: 0.1 }",
    "dense, relu with slope": "c InnerProduct data c inner_product_param { num_output: 6 axis: 2 }\n"
    "x ReLU c x relu_param { negative_slope: -0.25 }",
    "product": "x Eltwise data,data x eltwise_param { operation: PROD }",
    "product of three": "x Eltwise data,data,data x eltwise_param { operation: PROD }",
    "sum": "x Eltwise data,data x",
    "sum, coefficients": "x Eltwise data,data,data x eltwise_param { coeff: 0.75 coeff: -3 coeff: 0 }",
    "max": "x Eltwise data,data x eltwise_param { operation: MAX }",
    "concat": "x Concat data,data x concat_param { axis: 2 }",
    "bias": "x Bias data x bias_param { filler { type: 'constant' value: 0 } }",
    "bias of several axes": "x Bias data x bias_param { num_axes: 2 }",
    "bias, one number": "x Bias data x bias_param { num_axes: 0 }",
}


def compared(source: str, setting: Settings, seed: int = 0, batches: int = 2, **options: Any) -> list[OpCheck]:
    message, weights = quantized(source, setting, seed=seed)
    built = program_of(message, weights, **options)
    net = simulation(message, weights)
    rng = torch.Generator().manual_seed(seed + 1)
    feeds = [{s.tops[0]: torch.randn(s.shapes[0], generator=rng) * 3 for s in net.sources} for _ in range(batches)]
    return list(verify(built, net, feeds).checks)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OPS)
def test_each_op(name: str, kind: str) -> None:
    checks = compared(net_text(SHAPE, *OPS[name].split("\n")), KINDS[kind])
    assert len(checks) == 1
    assert checks[0].numbers > 0
    assert checks[0].exact == kind.startswith("pow2")
    assert checks[0].good
    assert checks[0].alone.most <= 1


@pytest.mark.parametrize("kind", ["pow2", "offsets"])
def test_a_net_of_every_kind_of_layer(kind: str) -> None:
    source = net_text(
        (2, 3, 12, 12),
        "c1 Convolution data c1 convolution_param { num_output: 8 kernel_size: 3 pad: 1 }",
        "r1 ReLU c1 c1",
        "p1 Pooling c1 p1 pooling_param { kernel_size: 3 stride: 2 }",
        "c2 Convolution p1 c2 convolution_param { num_output: 8 kernel_size: 3 pad: 2 dilation: 2 group: 2 }",
        "e1 Eltwise c2,p1 e1 eltwise_param { coeff: 1 coeff: -0.5 }",
        "re ReLU e1 e1",
        "split Split e1 s1",
        "cat Concat s1,p1 cat",
        "d Deconvolution cat d convolution_param { num_output: 16 kernel_size: 4 stride: 2 pad: 1 group: 16 }",
        "f Flatten d f",
        "drop Dropout f f",
        "fc InnerProduct f fc inner_product_param { num_output: 10 }",
        "fr ReLU fc fc",
        "res Reshape fc res reshape_param { shape { dim: 0 dim: 5 dim: 2 } }",
        "fc2 InnerProduct res fc2 inner_product_param { num_output: 5 }",
        "prob Softmax fc2 prob",
    )
    message, weights = quantized(source, KINDS[kind])
    built = program_of(message, weights)
    info = built.program.info
    assert info["left_out"] == [{"layer": "prob", "type": "Softmax"}]
    assert (info["inputs"], info["outputs"]) == (["data"], ["fc2"])
    assert [op["layers"] for op in info["ops"] if op["relu" if "relu" in op else "op"] is True] == [
        ["c1", "r1"], ["re"], ["fc", "fr"]]  # fmt: skip
    checks = compared(source, KINDS[kind])
    assert all(c.good for c in checks)
    assert all(c.whole.count == 0 for c in checks) or kind != "pow2"


@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_move_numbers(kind: str) -> None:
    source = net_text(
        SHAPE,
        "p Permute data p permute_param { order: 0 order: 2 order: 3 order: 1 }",
        "c Convolution p c convolution_param { num_output: 5 kernel_size: 3 pad: 1 }",
        "f Flatten c f flatten_param { axis: 2 }",
        "q Permute f q permute_param { order: 0 order: 2 order: 1 }",
        "fc InnerProduct q fc inner_product_param { num_output: 3 }",
    )
    cut = ' layer { name: "s" type: "Slice" bottom: "data" top: "a" top: "b" top: "d" ' + (
        "slice_param { axis: -1 slice_point: 2 slice_point: 5 } }\n"
        'layer { name: "e" type: "Eltwise" bottom: "b" bottom: "b" top: "e" eltwise_param { operation: PROD } }\n'
        'layer { name: "j" type: "Concat" bottom: "e" bottom: "a" bottom: "d" top: "j" concat_param { axis: 3 } }\n'
    )
    checks = compared(source + cut, KINDS[kind])
    assert [c.op["op"] for c in checks] == [
        "permute", "conv", "reshape", "permute", "dense", "slice", "slice", "slice", "product", "concat"
    ]  # fmt: skip
    assert [(c.op["start"], c.op["end"]) for c in checks if c.op["op"] == "slice"] == [(0, 2), (2, 5), (5, 9)]
    assert all(c.good for c in checks)
    assert all(c.exact for c in checks) == kind.startswith("pow2")


# --- random nets ------------------------------------------------------------------------------------------------------
@st.composite
def random_nets(draw: Any) -> str:
    """Three to six layers, each reading any earlier blob of four axes."""
    shape = (draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4, 6])), draw(st.integers(5, 9)), 7)
    blobs = {"data": shape[1]}
    layers, small = [], set()
    for i in range(draw(st.integers(2, 5))):
        bottom, top = draw(st.sampled_from(sorted(blobs))), f"x{i}"
        kind = draw(
            st.sampled_from(
                ["conv", "conv", "pool", "relu", "leaky", "prelu", "sum", "product", "concat", "deconv", "bias"]
            )
        )
        channels = blobs[bottom]
        if kind in ("conv", "deconv"):
            group = draw(st.sampled_from([g for g in (1, 2, channels) if channels % g == 0]))
            out = group * draw(st.integers(1, 3))
            name = "Convolution" if kind == "conv" else "Deconvolution"
            layers.append(f"{top} {name} {bottom} {top} convolution_param {{ num_output: {out} kernel_size: 3 pad: 1 "
                          f"group: {group} bias_term: {str(draw(st.booleans())).lower()} }}")  # fmt: skip
            channels = out
        elif kind == "pool":
            pool = draw(st.sampled_from(["MAX", "AVE"]))
            layers.append(f"{top} Pooling {bottom} {top} pooling_param {{ pool: {pool} kernel_size: 3 pad: 1 }}")
        elif kind == "relu":
            layers.append(f"{top} ReLU {bottom} {top}")
        elif kind == "leaky":
            layers.append(f"{top} ReLU {bottom} {top} relu_param {{ negative_slope: {draw(st.floats(-1, 1)):.3f} }}")
        elif kind in ("bias", "prelu"):
            layers.append(f"{top} {'Bias' if kind == 'bias' else 'PReLU'} {bottom} {top}")
        else:
            other = draw(st.sampled_from(sorted(b for b in blobs if blobs[b] == channels)))
            name = "Concat" if kind == "concat" else "Eltwise"
            fields = {"sum": " eltwise_param { coeff: 0.5 coeff: -2 }", "concat": "",
                      "product": " eltwise_param { operation: PROD }"}[kind]  # fmt: skip
            layers.append(f"{top} {name} {bottom},{other} {top}{fields}")
            channels *= 2 if kind == "concat" else 1
        blobs[top] = channels
        small.add(top)
    return net_text(shape, *layers)


WIDTHS = {"bits_weights": st.integers(2, 12), "bits_activations": st.integers(2, 12), "bits_bias": st.integers(4, 20)}
FLAGS = {"offset_weights": st.booleans(), "offset_activations": st.booleans(), "per_channel": st.booleans()}
quick = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@quick
@given(random_nets(), st.fixed_dictionaries({**WIDTHS, **FLAGS}), st.integers(0, 1000))
def test_powers_of_two_are_equal_bit_for_bit(source: str, given_: Any, seed: int) -> None:
    setting = Settings(power2_weights=True, power2_activations=True, **given_)
    for check in compared(source, setting, seed, batches=1):
        assert check.exact
        assert check.whole.count == 0, check


@quick
@given(random_nets(), st.fixed_dictionaries({**WIDTHS, **FLAGS}), st.integers(0, 1000))
def test_other_scales_are_within_one_step(source: str, given_: Any, seed: int) -> None:
    for check in compared(source, Settings(**given_), seed, batches=1):
        assert check.good, check


# --- the run ----------------------------------------------------------------------------------------------------------
def test_the_run_has_no_floats() -> None:
    """Only `quantize` and `dequantize`, which stand outside of the program, divide or name floats."""
    tree = ast.parse(inspect.getsource(integer_run))
    inside = [
        f for f in tree.body if isinstance(f, ast.FunctionDef) and f.name not in ("quantize", "dequantize", "main")
    ]
    for node in (n for f in inside for n in ast.walk(f)):
        assert not isinstance(node, ast.Div), ast.unparse(node)
        assert not (isinstance(node, ast.Constant) and isinstance(node.value, float)), ast.unparse(node)
        assert not (isinstance(node, ast.Attribute) and node.attr.startswith("float")), ast.unparse(node)
    imports = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    assert imports <= {"argparse", "hashlib", "json", "sys", "zipfile", "numpy"}


def test_every_number_of_a_run_is_an_integer() -> None:
    pool = "p Pooling x p pooling_param { pool: AVE kernel_size: 2 }"
    message, weights = quantized(net_text(SHAPE, OPS["conv"], pool), KINDS["offsets"])
    built = program_of(message, weights)
    values = integer_run.run(built.program, {"data": np.full(SHAPE, 7, np.uint8)})
    assert {v.dtype for v in values.values()} == {np.dtype(np.uint8)}
    assert all(a.dtype.kind in "iu" for a in built.program.arrays.values())


def test_wide_accumulators_do_not_overflow_and_are_reported() -> None:
    wide = replace(POW2, bits_weights=16, bits_activations=16)
    source = net_text((1, 8, 16, 16), "x InnerProduct data x inner_product_param { num_output: 4 bias_term: false }")
    message, weights = quantized(source, wide)
    built = program_of(message, weights)
    assert built.program.info["ops"][0]["accumulator_bits"] > 32
    assert "more than 32" in built.notes[0]
    with torch.no_grad():
        for p in weights.params["x"]:
            p.copy_(p.sign() * p.abs().max())
    built = program_of(message, weights)
    extremes = {"data": torch.where(weights.params["x"][0][0].reshape(1, 8, 16, 16) > 0, 1e6, -1e6)}
    check = verify(built, simulation(message, weights), [extremes]).checks[0]
    assert check.accumulator >= 1 << 31
    assert check.accumulator < 1 << (check.op["accumulator_bits"] - 1)
    assert check.good


def test_another_batch_size() -> None:
    dense = "y InnerProduct f y inner_product_param { num_output: 3 }"
    message, weights = quantized(net_text(SHAPE, OPS["conv"], "f Flatten x f", dense), POW2)
    program = program_of(message, weights).program
    x = np.random.default_rng(0).integers(-128, 128, (5, *SHAPE[1:]), np.int8)
    whole = integer_run.run(program, {"data": x})["y"]
    assert whole.shape == (5, 3)
    assert np.array_equal(whole[2:3], integer_run.run(program, {"data": x[2:3]})["y"])


def test_files_are_read_back_and_equal_each_time(tmp_path: Any) -> None:
    message, weights = quantized(net_text(SHAPE, OPS["conv, all options"]), KINDS["per channel"])
    built = program_of(message, weights)
    first, arrays = write_program(built.program, tmp_path / "a.b")
    assert (first.name, arrays.name) == ("a.b.json", "a.b.npz")
    again, _ = write_program(built.program, tmp_path / "c.json")
    assert first.read_bytes().replace(b"a.b.npz", b"c.npz") == again.read_bytes()
    program = integer_run.load(first)
    x = {"data": np.random.default_rng(0).integers(0, 256, SHAPE, np.uint8)}
    assert np.array_equal(integer_run.run(program, x)["x"], integer_run.run(built.program, x)["x"])


def test_quantize_and_dequantize_at_the_border() -> None:
    message, weights = quantized(net_text(SHAPE, OPS["relu"]), POW2)
    program = program_of(message, weights).program
    scale = program.tensors["data"]["scale"]
    n = integer_run.quantize(program, "data", np.array([0.5, -0.5, 2.5, 1e9, -1e9]) / scale)
    assert n.tolist() == [1, -1, 3, 127, -128]
    assert integer_run.dequantize(program, "data", n).tolist()[:3] == [1 / scale, -1 / scale, 3 / scale]
