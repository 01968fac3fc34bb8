"""Ristretto's precision in every spelling, from text and from binary files, and back to what the fork reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from caffejacinto_py.errors import PrototxtError
from caffejacinto_py.schema import pb, wire
from caffejacinto_py.schema.text import dumps
from caffejacinto_py.schema.upgrade import load_net
from caffejacinto_py.schema.weights import LayerBlobs, ModelFile, read_model, write_model

NET = 'layer { name: "a" type: "%s" bottom: "x" top: "y"\n  quantization_param {\n    %s } }\n'


def read(folder: Path, kind: str, fields: str):
    (folder / "n.prototxt").write_text(NET % (kind, fields))
    return load_net(folder / "n.prototxt")


@pytest.mark.parametrize(
    ("spellings", "name"),
    [
        (("0", "FIXED_POINT", "DYNAMIC_FIXED_POINT"), "DYNAMIC_FIXED_POINT"),
        (("1", "MINI_FLOATING_POINT", "MINIFLOAT"), "MINIFLOAT"),
        (("2", "POWER_2_WEIGHTS", "INTEGER_POWER_OF_2_WEIGHTS"), "INTEGER_POWER_OF_2_WEIGHTS"),
    ],
)
@pytest.mark.parametrize("kind", ["ConvolutionRistretto", "FcRistretto", "DeconvolutionRistretto", "LRNRistretto"])
def test_every_spelling_of_precision(tmp_path: Path, kind: str, spellings: tuple[str, ...], name: str) -> None:
    for spelling in spellings:
        doc = read(tmp_path, kind, f"precision: {spelling} rounding_scheme: 1")
        assert f"precision: {name}" in dumps(doc.message)
        assert "rounding_scheme: STOCHASTIC" in dumps(doc.message)


def test_other_layers_keep_the_numbers_of_caffe_jacinto(tmp_path: Path) -> None:
    doc = read(tmp_path, "Convolution", "precision: 1 rounding_scheme: 0")
    assert "precision: QuantizationParameter_Precision_DYNAMIC_FIXED_POINT" in dumps(doc.message)
    assert doc.notices == []


@pytest.mark.parametrize(
    ("kind", "fields", "text"),
    [
        ("FcRistretto", "precision: QuantizationParameter_Precision_FLOAT", "is a value of caffe-jacinto"),
        ("FcRistretto", "rounding_scheme: QuantizationParameter_Rounding_NEAREST", "is a value of caffe-jacinto"),
        ("Convolution", "precision: 2", "precision 2 is Ristretto's"),
        ("FcRistretto", "precision: FLOAT", "'precision' has no value FLOAT"),
    ],
)
def test_values_of_the_other_fork_are_refused_with_their_place(
    tmp_path: Path, kind: str, fields: str, text: str
) -> None:
    with pytest.raises(PrototxtError, match=text) as e:
        read(tmp_path, kind, fields)
    assert e.value.loc is not None
    assert (e.value.loc.line, e.value.loc.col) == (3, 5)
    assert e.value.hint


@pytest.mark.parametrize("number", [0, 1, 2])
def test_files_have_the_numbers_of_the_fork(tmp_path: Path, number: int) -> None:
    doc = read(tmp_path, "FcRistretto", f"precision: {number} rounding_scheme: 1 bw_params: 4 fl_params: -2")
    model = ModelFile("n", [LayerBlobs("a", "FcRistretto", proto=doc.message.layer[0])], dialect="ristretto")
    write_model(tmp_path / "m.caffemodel", model)
    data = (tmp_path / "m.caffemodel").read_bytes()
    layer = next(data[v:e] for n, _, _, v, e in wire.fields(data, 0, len(data)) if n == 100)
    param = next(layer[v:e] for n, _, _, v, e in wire.fields(layer, 0, len(layer)) if n == 149)
    found = {n: v for n, _, _, v, _ in wire.fields(param, 0, len(param))}
    assert found == {1: number, 2: 1, 5: 4, 8: 2**64 - 2}
    back = read_model(tmp_path / "m.caffemodel")
    assert back.dialect == "ristretto"
    assert back.net().layer[0].quantization_param == doc.message.layer[0].quantization_param
    assert pb.QuantizationParameter.Precision.Name(back.layers[0].proto.quantization_param.precision) in dumps(
        doc.message
    )
