"""Which blobs quantization touches, and what is refused in its settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from caffejacinto_py.checking import check
from caffejacinto_py.errors import ManyErrors, PrototxtError
from caffejacinto_py.ir.graph import Graph
from caffejacinto_py.passes import prepare, quantize, splits
from caffejacinto_py.schema.compat import Compat
from caffejacinto_py.schema.dialect import resolve_dialect
from caffejacinto_py.schema.text import parse
from caffejacinto_py.schema.upgrade import load_net
from tests.conftest import shared

DATA = 'layer { name: "in" type: "Input" top: "data" input_param { shape { dim: 2 dim: 3 dim: 8 dim: 8 } } }\n'
CONV = "convolution_param { num_output: 4 kernel_size: 3 pad: 1 }"


def layer(name: str, kind: str, *bottoms: str, top: str | None = None, more: str = "") -> str:
    ins = " ".join(f'bottom: "{b}"' for b in bottoms)
    return f'layer {{ name: "{name}" type: "{kind}" {ins} top: "{top or name}" {more} }}\n'


def graph(text: str, phase: str = "TEST", compat: str = "sound") -> Graph:
    doc = parse(DATA + text, "NetParameter", file="net.prototxt")
    return prepare(doc, phase=phase, dialect=resolve_dialect(doc.message, compat=Compat(quantization=compat)))


def scheme(text: str, **options: str) -> quantize.Scheme:
    found = quantize.plan(graph("quantize: true\n" + text, **options))
    assert found is not None
    return found


def reasons(text: str, **options: str) -> dict[str, str]:
    return {name: part.reason for name, part in scheme(text, **options).parts.items()}


@pytest.mark.parametrize("case", ["plain_default", "plain_ignored", "plain_noact", "plain_noweights",
                                  "residual_default", "residual_ignored", "dyadic_default"])  # fmt: skip
@pytest.mark.parametrize("with_splits", [False, True])
def test_the_binary_quantizes_the_same_blobs(case: str, with_splits: bool) -> None:
    folder = shared("golden/jacinto/quantization")
    doc = load_net(folder / f"{case}.prototxt")
    g = prepare(doc, phase="TEST", dialect=resolve_dialect(doc.message, compat=Compat(quantization="cpu")))
    found = quantize.plan(splits.insert(g) if with_splits else g)
    assert found is not None
    arrays = np.load(folder / f"{case}.npz")
    for row, values in zip(arrays["qparam_rows"], arrays["qparams"][-1], strict=True):
        name, kind, index = str(row).split("|")
        part = found.parts.get(name)
        if part is None:
            assert not with_splits
            continue
        flags: Any = {"w": part.weights, "out": part.tops}.get(kind, ())
        assert bool(values[0]) == (int(index) < len(flags) and flags[int(index)]), row


def test_merged_layers_say_into_what() -> None:
    found = reasons(
        layer("conv", "Convolution", "data", more=CONV)
        + layer("bn", "BatchNorm", "conv", top="conv")
        + layer("scale", "Scale", "conv", top="conv")
        + layer("relu", "ReLU", "conv", top="conv")
        + layer("next", "Convolution", "conv", more=CONV)
        + layer("prelu", "PReLU", "next")
        + layer("soft", "Softmax", "prelu")
    )
    assert found == {
        "in": "",
        "conv": "merged into 'bn'",
        "bn": "merged into 'scale'",
        "scale": "merged into 'relu'",
        "relu": "",
        "next": "",
        "prelu": "",
        "soft": "its type is not quantized",
    }


def test_a_blob_with_two_readers_is_quantized() -> None:
    text = layer("conv", "Convolution", "data", more=CONV) + layer("relu", "ReLU", "conv")
    assert reasons(text)["conv"] == "merged into 'relu'"
    assert reasons(text + layer("sum", "Eltwise", "conv", "relu"))["conv"] == ""


def test_norm_and_scale_before_a_convolution() -> None:
    """Merged into the convolution behind, unless a convolution before takes them."""
    front = layer("bn", "BatchNorm", "data") + layer("conv", "Convolution", "bn", more=CONV)
    assert reasons(front)["bn"] == "merged into 'conv'"
    first = layer("c", "Convolution", "data", more=CONV) + layer("bn", "BatchNorm", "c")
    assert reasons(first + layer("conv", "Convolution", "bn", more=CONV))["bn"] == ""
    behind = layer("scale", "Scale", "bn") + layer("conv", "Convolution", "scale", more=CONV)
    assert reasons(first + behind)["scale"] == ""
    assert reasons(layer("bn", "BatchNorm", "data") + behind)["scale"] == "merged into 'conv'"
    up = layer("bn", "BatchNorm", "data") + layer("up", "Deconvolution", "bn", more=CONV)
    assert reasons(up)["bn"] == ""  # a plain convolution only


def test_inputs_and_labels() -> None:
    label = 'layer { name: "lab" type: "Input" top: "label" input_param { shape { dim: 2 } } }\n'
    text = (
        label
        + layer("ip", "InnerProduct", "data", more="inner_product_param { num_output: 3 }")
        + layer("loss", "SoftmaxWithLoss", "ip", "label")
    )
    sound = scheme(text, phase="TRAIN").parts
    assert sound["in"].tops == (True,)
    assert sound["lab"].tops == (False,)
    binary = scheme(text, phase="TRAIN", compat="cpu").parts
    assert binary["in"].tops == (False,)
    assert "leaves Input alone" in binary["in"].reason


def test_old_spelling_means_the_same() -> None:
    text = "quantize: true net_quantization_param { insert_quantization_param: false power2_range: true }"
    conv = layer("conv", "Convolution", "data", more=CONV)
    stored = conv.replace("convolution_param", STORED + "convolution_param")
    g = graph(text + stored)
    found = quantize.plan(g)
    assert found is not None
    assert found.fixed
    assert found.settings.power2_weights
    assert found.settings.power2_activations
    texts = [n for n in g.notices if "0.16's name" in n]
    assert len(texts) == 2
    assert "update_quantization_param" in texts[0]


STORED = """quantization_param { qparam_in { } qparam_w { quantize: true bitwidth: 8 scale_target: 9 }
  qparam_w { quantize: true bitwidth: 16 scale_target: 99 } qparam_out { quantize: true scale_target: 3 } } """


def refused(text: str) -> str:
    with pytest.raises((PrototxtError, ManyErrors)) as caught:
        graph(text)
    assert caught.value.exit_code == 3
    assert "net.prototxt:" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("bitwidth_weights: 1", "bitwidth_weights is 2 to 16 bits, not 1"),
        ("bitwidth_weights: 17", "bitwidth_weights is 2 to 16 bits, not 17"),
        ("bitwidth_activations: 0", "bitwidth_activations is 2 to 16 bits, not 0"),
        ("bitwidth_bias: 33", "bitwidth_bias is 2 to 32 bits, not 33"),
        ("range_update_factor: 0", "range_update_factor lies in (0, 1], not 0"),
        ("range_update_factor: 1.5", "range_update_factor lies in (0, 1]"),
        ("range_update_factor: nan", "range_update_factor lies in (0, 1]"),
        ("range_expansion_factor: 0.5", "range_expansion_factor is at least 1, not 0.5"),
        ("quantization_start: -1", "quantization_start is not negative"),
        ("ignored_layer_names: 'cnov'", "there is no layer 'cnov' (hint: did you mean 'conv'?)"),
        ("update_quantization_param: false", "layer 'conv': update_quantization_param is false, but it has 0 qparam_w"),
    ],
)
def test_settings_are_refused_with_their_place(field: str, text: str) -> None:
    conv = layer("conv", "Convolution", "data", more=CONV)
    said = refused(conv + "quantize: true\nnet_quantization_param {\n  " + field + "\n}\n")
    assert text in said
    if "update_" not in field:
        assert "net.prototxt:5:3" in said


def test_settings_of_a_float_net_do_not_matter() -> None:
    g = graph(layer("conv", "Convolution", "data", more=CONV) + "net_quantization_param { bitwidth_weights: 99 }")
    assert quantize.plan(g) is None


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("bitwidth: 8", "bitwidth: 20", "qparam_w 0: bitwidth is 2 to 16, not 20"),
        ("scale_target: 9 ", "scale_target: 0 ", "qparam_w 0: scale_target 0 with offset 0 describes no numbers"),
        ("scale_target: 99", "scale_target: inf", "qparam_w 1: scale_target inf"),
        (
            "scale_target: 9 ",
            "scale_target: 9 channel_scale: 1 ",
            "qparam_w 0: 1 channel_scale values for 4 output channels",
        ),
    ],
)
def test_stored_numbers_are_checked(old: str, new: str, text: str) -> None:
    conv = layer("conv", "Convolution", "data", more=STORED.replace(old, new) + CONV)
    assert f"layer 'conv': {text}" in refused(conv)


def test_a_start_of_zero_is_said() -> None:
    g = graph("quantize: true net_quantization_param { quantization_start: 0 }" + layer("r", "ReLU", "data"))
    assert quantize.plan(g) is None
    assert any("'quantization_start' is 0: nothing is quantized" in n for n in g.notices)


def test_check_says_it_too(tmp_path: Path) -> None:
    path = tmp_path / "net.prototxt"
    path.write_text(DATA + "quantize: true net_quantization_param { bitwidth_weights: 40 }")
    report = check(path, phase="TEST")
    assert report.status == "error"
    assert "bitwidth_weights is 2 to 16 bits, not 40" in report.errors[0].text
    assert report.errors[0].loc is not None
    assert report.errors[0].loc.line == 2
