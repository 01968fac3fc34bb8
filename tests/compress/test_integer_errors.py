"""What no integer program can be made of: each with its layer, its place and what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from caffejacinto_py.compress.integer import build
from caffejacinto_py.compress.integer_check import verify
from caffejacinto_py.compress.integer_run import ProgramError, load, run
from caffejacinto_py.errors import CaffeError, InputError, LayerError, ManyErrors, PrototxtError, UsageError
from caffejacinto_py.passes import prepare
from caffejacinto_py.passes.quantize import Settings
from caffejacinto_py.schema import text
from caffejacinto_py.schema.compat import Compat
from caffejacinto_py.schema.dialect import resolve_dialect
from tests.compress.integer_nets import blobs_of, net_text, program_of, quantized, simulation

PLAIN = Settings(bits_weights=8, offset_weights=False)
SHAPE = (1, 3, 6, 6)
CONV = "conv Convolution data conv convolution_param { num_output: 4 kernel_size: 3 }"
FC = "fc InnerProduct conv fc inner_product_param { num_output: 2 }"


def refused(*layers: str, change: Any = None, pixels: bool = False) -> CaffeError:
    """The error of a net of these layers; `change` gets its message first."""
    message, weights = quantized(net_text(SHAPE, *layers), PLAIN)
    if change is not None:
        change({layer.name: layer for layer in message.layer}, message)
    with pytest.raises(CaffeError) as caught:
        program_of(message, weights, pixels=pixels)
    return caught.value


@pytest.mark.parametrize(
    ("layers", "name", "part", "hint"),
    [
        ((CONV, "bn BatchNorm conv bn", FC), "bn", "no integer form", "caffejacinto optimize"),
        ((CONV, "sc Scale conv sc", FC), "sc", "no integer form", "caffejacinto optimize"),
        (("bn BatchNorm data bn",), "bn", "no integer form", "caffejacinto optimize"),
        ((CONV, "p Permute conv p permute_param { order: 1 }"), "p", "the batch axis moves", None),
        ((CONV, "s Slice conv s slice_param { axis: 0 }", "r ReLU s s"), "s", "keep", None),
        (("p Pooling data p pooling_param { pool: STOCHASTIC kernel_size: 2 }",), "p", "STOCHASTIC", "AVE or MAX"),
        (("p Pooling data p pooling_param { kernel_size: 1 stride: 4 }",), "p", "window is empty", None),
        ((CONV, "n LRN conv n", FC.replace(" conv ", " n ")), "fc", "'n' (LRN) has no integer form", "calibrate"),
        ((CONV, "s Sigmoid conv s", "c Concat s,conv c"), "c", "'s' (Sigmoid) has no integer form", "calibrate"),
        (("b Bias data,data b bias_param { axis: 0 }",), "b", "constants only", None),
        ((CONV, "r Reshape conv r reshape_param { shape { dim: 2 dim: -1 } }"), "r", "keep the batch axis", None),
    ],
)  # fmt: skip
def test_layers_without_integers(layers: tuple[str, ...], name: str, part: str, hint: str | None) -> None:
    error = refused(*layers)
    assert isinstance(error, LayerError), error
    assert f"layer '{name}'" in error.text
    assert part in error.text
    assert (hint or "") in (error.hint or "")


def test_all_of_them_at_once() -> None:
    bn = "bn BatchNorm conv bn"
    pool = "p Pooling bn p pooling_param { pool: STOCHASTIC kernel_size: 2 }"
    error = refused(CONV, bn, "r ReLU bn bn", pool, FC.replace(" conv ", " p "))
    assert isinstance(error, ManyErrors)
    assert [e.text.split("'")[1] for e in error.errors] == ["bn", "p"]


def test_places(tmp_path: Any) -> None:
    message, weights = quantized(net_text(SHAPE, CONV, "p Permute conv p permute_param { order: 1 }"), PLAIN)
    graph = prepare(text.parse(text.dumps(message), "NetParameter", file="net.prototxt"), phase="TEST")
    with pytest.raises(LayerError) as caught:
        build(graph, blobs_of(weights))
    assert caught.value.loc is not None
    assert caught.value.loc.file == "net.prototxt"
    line = text.dumps(message).splitlines()[caught.value.loc.line - 1]
    assert "order" in line


def _drop(name: str) -> Any:
    return lambda layers, net: layers[name].ClearField("quantization_param")


def _set(name: str, field: str, **values: Any) -> Any:
    def change(layers: Any, net: Any) -> None:
        net.quantize = False  # else the net itself says that qparams are missing
        for key, value in values.items():
            setattr(getattr(layers[name].quantization_param, field)[0], key, value)

    return change


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (_drop("fc"), "layer 'fc': update_quantization_param is false, but it has 0 qparam_w of 2"),
        (_set("fc", "qparam_w", quantize=False), "layer 'fc' (InnerProduct): its weights have no quantization"),
        (_set("fc", "qparam_out", quantize=False), "layer 'fc' (InnerProduct): its top 'fc' has no quantization"),
        (_set("in", "qparam_out", quantize=False), "layer 'conv' (Convolution): it reads 'data', which is not"),
        (_set("fc", "qparam_w", bitwidth=1), "layer 'fc': qparam_w 0: bitwidth is 2 to 16, not 1"),
        (_set("fc", "qparam_out", bitwidth=17), "layer 'fc': qparam_out 0: bitwidth is 2 to 16, not 17"),
        (_set("fc", "qparam_out", scale_target=0), "layer 'fc': qparam_out 0: scale_target 0"),
        (_set("fc", "qparam_out", offset=0.5), "layer 'fc' (InnerProduct): offset 0.5 is not a whole number"),
        (_set("fc", "qparam_w", offset=0.25), "layer 'fc' (InnerProduct): offset 0.25 is not a whole number"),
        (_set("fc", "qparam_out", scale_target=1e30), "the sums need more than 64 bits"),
    ],
)  # fmt: skip
def test_qparams(change: Any, part: str) -> None:
    assert part in str(refused(CONV, FC, change=change))


def test_a_layer_without_qparams_in_a_net_that_does_not_say_quantize() -> None:
    def change(layers: Any, net: Any) -> None:
        net.quantize = False
        layers["fc"].ClearField("quantization_param")

    assert "layer 'fc' (InnerProduct): its top 'fc' has no quantization parameters" in str(
        refused(CONV, FC, change=change)
    )


def test_ignored_layers_are_named() -> None:
    ignoring = Settings(bits_weights=8, offset_weights=False, ignored=("conv",))
    message, weights = quantized(net_text(SHAPE, CONV, "e Eltwise conv,conv e", FC.replace(" conv ", " e ")), ignoring)
    with pytest.raises(LayerError, match=r"layer 'conv'.*top 'conv' has no quantization parameters"):
        program_of(message, weights)


def test_weights_that_are_not_finite() -> None:
    message, weights = quantized(net_text(SHAPE, CONV, FC), PLAIN)
    with torch.no_grad():
        weights.params["fc"][0][0, 0] = float("nan")
    with pytest.raises(LayerError, match=r"layer 'fc'.*blob 0 holds 1 numbers that are NaN"):
        program_of(message, weights)


def test_nets_that_are_not_ready() -> None:
    plain = text.parse(net_text(SHAPE, CONV), "NetParameter")
    with pytest.raises(PrototxtError, match="no quantization parameters"):
        build(prepare(plain, phase="TEST"), {})
    message, weights = quantized(net_text(SHAPE, CONV), PLAIN)
    message.net_quantization_param.update_quantization_param = True
    with pytest.raises(PrototxtError, match="while it runs"):
        program_of(message, weights)
    message.net_quantization_param.update_quantization_param = False
    message.net_quantization_param.rounding_scheme = 1
    with pytest.raises(PrototxtError, match="STOCHASTIC"):
        program_of(message, weights)
    message.net_quantization_param.rounding_scheme = 0
    dialect = resolve_dialect(message, compat=Compat(quantization="cpu"))
    with pytest.raises(UsageError, match="quantization=cpu"):
        build(prepare(message, phase="TEST", dialect=dialect), blobs_of(weights))


# --- pixels -----------------------------------------------------------------------------------------------------------
def _pixel_net() -> Any:
    power2 = Settings(bits_weights=8, offset_weights=False, power2_weights=True, power2_activations=True)
    bias = "bias Bias data b bias_param { num_axes: 0 }"
    conv = CONV.replace(" data ", " b ")
    message, weights = quantized(net_text(SHAPE, bias, conv), power2, batch={"data": torch.full(SHAPE, 255.0)})
    message.layer[0].quantization_param.qparam_out[0].quantize = False  # as caffe-jacinto leaves Input layers
    with torch.no_grad():
        weights.params["bias"][0].fill_(-128)
    return message, weights


def test_pixels_are_integers_already() -> None:
    message, weights = _pixel_net()
    built = program_of(message, weights, pixels=True)
    assert built.program.tensors["data"] == {"shape": list(SHAPE), "bits": 8, "signed": False, "scale": 1.0, "zero": 0}
    batch = {"data": torch.randint(0, 256, SHAPE, generator=torch.Generator().manual_seed(0)).float()}
    checks = verify(built, simulation(message, weights), [batch]).checks
    assert [c.whole.count for c in checks] == [0, 0]
    assert all(c.exact for c in checks)


def test_data_that_are_no_pixels() -> None:
    message, weights = _pixel_net()
    built = program_of(message, weights, pixels=True)
    with pytest.raises(InputError, match=r"not whole numbers 0 \.\. 255"):
        verify(built, simulation(message, weights), [{"data": torch.full(SHAPE, 0.5)}])


# --- running ----------------------------------------------------------------------------------------------------------
def test_inputs_that_do_not_fit() -> None:
    import numpy as np

    message, weights = quantized(net_text(SHAPE, CONV), PLAIN)
    program = program_of(message, weights).program
    good = np.zeros(SHAPE, np.int64)
    for inputs, part in [
        ({}, "'data' is missing"),
        ({"data": good[0]}, "shape"),
        ({"data": good.astype(np.float32)}, "not integers"),
        ({"data": good + 300}, "outside -128 .. 127"),
    ]:
        with pytest.raises(ProgramError, match=part):
            run(program, inputs)


def test_files_that_are_no_programs(tmp_path: Any) -> None:
    from caffejacinto_py.compress.integer_file import write_program

    message, weights = quantized(net_text(SHAPE, CONV), PLAIN)
    document, arrays = write_program(program_of(message, weights).program, tmp_path / "p")
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "b.json").write_text("not json")
    (tmp_path / "v.json").write_text(document.read_text().replace('"version": 2', '"version": 7'))
    arrays.write_bytes(arrays.read_bytes() + b"x")
    for name, part in [("a", "not an integer program"), ("b", "cannot read"), ("c", "cannot read"),
                       ("v", "version 7"), ("p", "not the file")]:  # fmt: skip
        with pytest.raises(ProgramError, match=part):
            load(tmp_path / f"{name}.json")


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ('"op": "conv"', '"op": "fft"', "layer 'conv': unknown op 'fft'"),
        ('"conv/shift"', '"conv/none"', "array 'conv/none' is missing"),
        ('"output": "conv"', '"output": "x"', "a tensor that is not there"),
        ('"outputs": [', '"outputs": ["x", ', "output of the program is not there"),
        ('"inputs": [', '"was": [', "cannot read this program"),
    ],
)
def test_documents_that_name_what_is_not_there(tmp_path: Any, old: str, new: str, part: str) -> None:
    from caffejacinto_py.compress.integer_file import write_program

    message, weights = quantized(net_text(SHAPE, CONV), PLAIN)
    document, _ = write_program(program_of(message, weights).program, tmp_path / "p")
    words = document.read_text()
    assert old in words
    document.write_text(words.replace(old, new, 1))
    with pytest.raises(ProgramError, match=part):
        load(document)
