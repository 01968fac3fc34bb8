"""Every clash of field numbers between forks: read into our schema by name, and written back as the fork had it."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

from caffejacinto_py.schema import pb, wire
from caffejacinto_py.schema.retag import from_schema, head_from_schema, head_to_schema, to_schema
from caffejacinto_py.schema.weights import read_model, write_model
from tests.schema.weights_helpers import saved


def fixed(number: int, value: float) -> bytes:
    return wire.tag(number, wire.I32) + struct.pack("<f", value)


def layer(kind: str, *fields: bytes) -> bytes:
    return wire.string(1, "l") + wire.string(2, kind) + b"".join(fields)


def get(message: Any, path: str) -> Any:
    for name in path.split("."):
        message = message[int(name)] if name.isdecimal() else getattr(message, name)
    return message


RESIZE = wire.uint(3, 300)  # ResizeParameter.height
SSD = wire.block(8, RESIZE) + wire.uint(11, 20) + wire.uint(12, 30)
J_QPARAMS = wire.uint(2, 8) + wire.uint(3, 5) + wire.uint(8, 4) + fixed(9, 0.5) + fixed(10, -1) + fixed(11, 2)
J_QUANT = wire.uint(1, 1) + wire.uint(3, 1) + b"".join(wire.block(n, J_QPARAMS) for n in (5, 6, 7)) + wire.uint(8, 9)
OLD_QPARAMS = wire.uint(2, 8) + wire.uint(4, 5) + fixed(7, 3.0) + fixed(8, 0.5) + fixed(9, -1) + fixed(10, 2)
OLD_QUANT = wire.uint(1, 1) + wire.uint(3, 1) + wire.uint(4, 9) + b"".join(
    wire.block(n, OLD_QPARAMS) for n in (5, 6, 7)
)  # fmt: skip
R_QUANT = wire.uint(1, 2) + wire.uint(2, 1) + wire.uint(3, 6) + wire.uint(8, 7) + wire.uint(11, -9)

CASES: list[tuple[str | None, bytes, dict[str, Any]]] = [
    (None, layer("Parameter", wire.block(145, wire.block(1, wire.block(1, b"\x07")))),
     {"parameter_param.shape.dim.0": 7}),
    ("nvcaffe", layer("ReLU", *(wire.uint(n, 2) for n in (145, 146, 147, 148))),
     {"forward_type": 2, "backward_type": 2, "forward_math": 2, "backward_math": 2}),
    (None, layer("LSTM", wire.block(146, wire.uint(1, 5))), {"recurrent_param.num_output": 5}),
    ("nvcaffe", layer("LSTM", wire.block(151, wire.uint(1, 5))), {"recurrent_param.num_output": 5}),
    (None, layer("Swish", wire.block(147, fixed(1, 2.0))), {"swish_param.beta": 2.0}),
    ("adaption", layer("LPConvolution", wire.block(147, wire.uint(1, 3) + wire.uint(2, 4))),
     {"lpfp_param.bd": 3, "lpfp_param.ad": 4}),
    (None, layer("Clip", wire.block(148, fixed(1, -1.0))), {"clip_param.min": -1.0}),
    ("adaption", layer("ROIPooling", wire.block(148, wire.uint(1, 6))), {"roi_pooling_param.pooled_h": 6}),
    ("nvcaffe", layer("ReLU", wire.uint(149, 1)), {"debug": True}),
    ("adaption", layer("SmoothL1Loss", wire.block(149, fixed(1, 3.0))), {"smooth_l1_loss_param.sigma": 3.0}),
    ("ristretto", layer("ConvolutionRistretto", wire.block(149, R_QUANT)), {
        "quantization_param.precision": pb.QuantizationParameter.Precision.Value("INTEGER_POWER_OF_2_WEIGHTS"),
        "quantization_param.rounding_scheme": pb.QuantizationParameter.Rounding.Value("STOCHASTIC"),
        "quantization_param.bw_layer_in": 6, "quantization_param.fl_params": 7, "quantization_param.exp_min": -9}),
    ("nvcaffe", layer("Convolution", wire.uint(150, 1)), {"cudnn_math_override": 1}),
    ("adaption", layer("LPConvolution", wire.block(150, wire.uint(19, 5))), {"lp_convolution_param.bd": 5}),
    ("adaption", layer("LPAct", wire.block(151, wire.uint(1, 5))), {"lp_act_param.bd": 5}),
    ("nvcaffe", layer("TRT", wire.block(152, wire.string(3, "d"))), {"trt_param.deploy": "d"}),
    ("adaption", layer("LPInnerProduct", wire.block(152, wire.uint(7, 5))), {"lp_inner_product_param.bd": 5}),
    ("jacinto", layer("Convolution", wire.block(8404, J_QUANT)), {
        "quantization_param.power2_scale_weights": True, "quantization_param.quantized_infer_count": 9,
        "quantization_param.qparam_w.0.fracbits": 5, "quantization_param.qparam_w.0.shiftbits": 4,
        "quantization_param.qparam_out.0.max": 2.0}),
    ("jacinto-0.16", layer("Convolution", wire.block(8404, OLD_QUANT)), {
        "quantization_param.power2_range": True, "quantization_param.quantized_infer_count": 9,
        "quantization_param.qparam_w.0.fracbits": 5, "quantization_param.qparam_w.0.scale": 3.0,
        "quantization_param.qparam_out.0.offset": 0.5, "quantization_param.qparam_in.0.max": 2.0}),
    ("ssd", layer("AnnotatedData", wire.block(100, SSD)), {
        "transform_param.resize_param.height": 300, "transform_param.crop_h": 20, "transform_param.crop_w": 30}),
    ("ssd", layer("Data", wire.block(100, wire.uint(11, 20))), {"transform_param.crop_h": 20}),
    ("nvcaffe", layer("Data", wire.block(100, wire.uint(8, 1) + wire.uint(11, 256) + fixed(12, 1.5))), {
        "transform_param.use_gpu_transform": True, "transform_param.img_rand_resize_upper": 256,
        "transform_param.rand_resize_ratio_lower": 1.5}),
    ("jacinto-0.16", layer("Data", wire.block(100, wire.uint(12, 1) + wire.uint(21, 4))), {
        "transform_param.var_sz_img_enabled": True, "transform_param.num_labels": 4}),
    ("nvcaffe", layer("SoftmaxWithLoss", wire.block(101, fixed(4, 0.5))), {"loss_param.label_smoothing": 0.5}),
    ("jacinto", layer("SoftmaxWithLoss", wire.block(101, fixed(4, 0.5))), {"loss_param.label_weights.0": 0.5}),
    (None, layer("SoftmaxWithLoss", wire.block(101, fixed(4, 0.5) + fixed(4, 2))), {"loss_param.label_weights.1": 2}),
]  # fmt: skip


@pytest.mark.parametrize(("dialect", "data", "want"), CASES)
def test_clash(dialect: str | None, data: bytes, want: dict[str, Any]) -> None:
    kind = _kind(data)
    message = pb.LayerParameter.FromString(to_schema(data, kind, dialect))
    assert {path: get(message, path) for path in want} == want
    assert not _unknown(message)
    assert from_schema(message.SerializeToString(deterministic=True), kind, dialect) == data


def _kind(data: bytes) -> str:
    return next(wire.text(data, v, e) for n, _, _, v, e in wire.fields(data, 0, len(data)) if n == 2)


def _unknown(message: Any) -> int:
    """Bytes that no field of our schema took."""
    clean = type(message).FromString(message.SerializeToString())
    clean.DiscardUnknownFields()
    return len(message.SerializeToString()) - len(clean.SerializeToString())


@pytest.mark.parametrize(
    ("want", "data"),
    [
        ("nvcaffe", layer("ReLU", wire.uint(145, 1))),
        ("ristretto", layer("FcRistretto", wire.block(149, R_QUANT))),
        ("adaption", layer("LPInnerProduct", wire.block(147, wire.uint(1, 3)))),
        ("ssd", layer("Permute", wire.block(202, wire.uint(1, 0)))),
        ("nvcaffe", layer("Permute", wire.uint(145, 1), wire.block(202, wire.uint(1, 0)))),
        ("jacinto", layer("Convolution", wire.uint(145, 1), wire.block(8404, J_QUANT))),
        ("jacinto-0.16", layer("Convolution", wire.uint(145, 1), wire.block(8404, OLD_QUANT))),
        (None, layer("Swish", wire.block(147, fixed(1, 2.0)))),
    ],
)
def test_the_bytes_show_the_fork_and_survive_a_rewrite(want: str | None, data: bytes, tmp_path: Path) -> None:
    data = wire.string(1, "n") + wire.block(100, data)
    model = read_model(saved(tmp_path / "a", data))
    assert model.dialect == want
    _ = model.layers[0].proto
    write_model(tmp_path / "b", model)
    assert (tmp_path / "b").read_bytes() == data


def test_another_fork_gets_its_numbers(tmp_path: Path) -> None:
    data = wire.block(100, layer("LSTM", wire.block(146, wire.uint(1, 5))))
    model = read_model(saved(tmp_path / "a", data))
    write_model(tmp_path / "b", model, dialect="nvcaffe")
    assert (tmp_path / "b").read_bytes() == wire.block(100, layer("LSTM", wire.block(151, wire.uint(1, 5))))


# --- the net's own quantization fields --------------------------------------------------------------------------------
def test_the_net_s_quantization_fields_of_both_jacintos() -> None:
    """0.16 has other numbers for the same names; both are read as today's and written back as they were."""
    old = wire.uint(200, 1) + wire.block(201, wire.uint(1, 3) + wire.uint(5, 6) + wire.uint(12, 1))
    head = pb.NetParameter.FromString(head_to_schema(old, "jacinto-0.16"))
    param = head.net_quantization_param
    assert (head.quantize, param.quantization_start, param.bitwidth_weights, param.power2_range) == (True, 3, 6, True)
    assert head_from_schema(head.SerializeToString(deterministic=True), "jacinto-0.16") == old
    new = pb.NetParameter(quantize=True)
    new.net_quantization_param.bitwidth_weights = 6
    data = new.SerializeToString(deterministic=True)
    assert head_to_schema(data, "jacinto") == head_from_schema(data, "jacinto") == data
