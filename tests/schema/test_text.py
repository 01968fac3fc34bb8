"""Parsing: places of fields, and errors a user can act on."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caffejacinto_py.errors import CaffeError, ManyErrors, PrototxtError, render
from caffejacinto_py.schema import pb
from caffejacinto_py.schema.scan import scan
from caffejacinto_py.schema.text import dumps, parse


def failure(text: str, message: str = "NetParameter") -> list[CaffeError]:
    with pytest.raises((PrototxtError, ManyErrors)) as caught:
        parse(text, message, file="f")
    error = caught.value
    return list(error.errors) if isinstance(error, ManyErrors) else [error]


def test_places_of_fields() -> None:
    text = """# a comment { "with: quotes
name: "n" ;
layer < name: 'a' # } not closing
  'b' type: "T", loss_weight: -1.5
  pooling_param: { pool : MAX pad: 1 }
>
layer { name: "c" convolution_param { pad: [ 1, # one
  2 ] kernel_size: 3 kernel_size: 5
  weight_filler { std: 1e-3f } } include [ { phase: TEST }, <phase: TRAIN> ] }
"""
    doc = parse(text, "NetParameter", file="f")
    assert doc.message.layer[0].name == "ab"

    def at(*path: str | int) -> tuple[int, int] | None:
        loc = doc.locs.find(path)
        return (loc.line, loc.col) if loc else None

    assert at("name") == (2, 1)
    assert at("layer", 0) == (3, 1)
    assert at("layer", 0, "type") == (4, 7)
    assert at("layer", 0, "pooling_param", "pool") == (5, 20)
    assert at("layer", 1, "convolution_param", "pad", 0) == (7, 46)
    assert at("layer", 1, "convolution_param", "pad", 1) == (8, 3)
    assert at("layer", 1, "convolution_param", "kernel_size", 1) == (8, 22)
    assert at("layer", 1, "convolution_param", "weight_filler", "std") == (9, 19)
    assert at("layer", 1, "include", 1, "phase") == (9, 62)
    # nearest enclosing field that is there
    assert at("layer", 1, "convolution_param", "stride", 0) == (7, 19)
    assert at("layer", 1, "convolution_param", "pad", 7) == (7, 19)
    assert at("layer", 0, "pooling_param", "no", "such") == (5, 3)
    assert at("layer", 9) is None
    assert at("force_backward") is None


# text -> line, words of the error, words of the hint
ERRORS = {
    'layers {\n type: "Input" }': (2, 'no value "Input"', "string types belong to 'layer {', not 'layers {'"),
    "layer {\n type: DATA }": (2, "is a string but DATA has no quotes", 'type: "Data"'),
    'layer {\n name: "p" pooling_param { rounding: "floor" } }': (2, "has no field 'rounding'", "round_mode"),
    "layer { pooling_param {\n kernal_size: 2 } }": (2, "'pooling_param' has no field", "'kernel_size'"),
    "layer {\n kernel_size: 2 }": (
        2,
        "has no field 'kernel_size'",
        "belongs inside 'convolution_param', 'pooling_param'",
    ),
    'name: "x"\nbase_lr: 1\nmax_iter: 3': (2, "a net has no field 'base_lr'", "use --solver"),
    "layer { pooling_param {\n pool: max } }": (2, "no value max", "did you mean 'MAX'"),
    'layer {\n phase: "TEST" }': (2, 'no value "TEST"', "remove the quotes: phase: TEST"),
    "layer { top: 'x'\n top: y }": (2, "y has no quotes", '"y"'),
    'name: "x"\nname: "y"': (2, "given 2 times, first in line 1", "keep one"),
    "layer { pooling_param {\n pad: -1 } }": (2, "out of range", ""),
    "layer { pooling_param {\n pad: 1.5 } }": (2, "a whole number >= 0, not 1.5", ""),
    "layer { pooling_param {\n pad: 99999999999999999999999999999999999999 } }": (2, "out of range", ""),
    "force_backward:\n yes": (1, "true or false, not yes", ""),
    "layer {\n loss_weight: x }": (2, "is a number, not x", ""),
    'layer {\n loss_weight: "1" }': (2, "is a number, not a string", "remove the quotes"),
    "\nlayer: 3": (2, "is a message, not a value", "layer { ... }"),
    "\nname { }": (2, "is a value, not a message", "name:"),
    'layer { name: "a" }\n}': (2, "'}' closes nothing", "too many"),
    'layer {\n name: "a" }\nlayer {\n name: "b"\n': (5, "'}' is missing at the end", "opened at line 3"),
    'layer {\n name: "a\n }': (2, "string of 'name' is not closed", ""),
    "layer {\n name }": (2, "expected ':' or '{' after 'name'", ""),
    "layer {\n name: }": (2, "'name:' has no value", ""),
    "layer {\n [x.y]: 3 }": (2, "unexpected '['", ""),
    "layer { x { y {\n z: 3 > } } }": (2, "'>'; '}' was expected", "'y' is opened at line 1"),
    'layer { name: "a\0" }\n\0': (2, "unexpected '\\x00'", ""),
    "item {\n}": (1, "no field 'item'", "label map"),
    "a{" * 150: (1, "nested deeper than 100", ""),
}


@pytest.mark.parametrize("text", ERRORS)
def test_error_says_what_where_and_what_to_do(text: str) -> None:
    line, words, hint = ERRORS[text]
    errors = [e for e in failure(text) if words in e.text]
    assert errors, failure(text)
    assert errors[0].loc is not None
    assert errors[0].loc.line == line
    assert hint in (errors[0].hint or "")


def test_solver_errors() -> None:
    (error,) = failure('\nlayer { name: "x" }\nlayer { name: "y" }', "SolverParameter")
    assert error.loc is not None
    assert error.loc.line == 2
    assert "looks like a net" in (error.hint or "")
    (error,) = failure("base_lr: 1 gama: 3", "SolverParameter")
    assert "a solver has no field 'gama'" in error.text
    assert error.hint == "did you mean 'gamma'?"


MISSING = """layer {
  name: "c1"
  convolution_param {
    num_output: 3
  }

layer { name: "c2" }
layer { nme: "c3" }
"""


@pytest.mark.parametrize("text", [MISSING, MISSING.replace("  }\n", "")])
def test_missing_brace_names_the_layer_that_is_open(text: str) -> None:
    errors = failure(text)
    assert "inside layer 'c1'" in errors[0].text
    assert errors[0].hint == "a '}' is missing in the layer opened at line 1"
    # and the layers behind are still checked
    assert len(errors) == 2
    assert "'nme'" in errors[1].text


def test_all_errors_of_a_file_at_once() -> None:
    text = "\n".join(f'layer {{ name: "l{i}" typ: "x" pooling_param {{ pool: WRONG }} }}' for i in range(15))
    errors = failure(text)
    assert len(errors) == 30
    assert [e.loc.line for e in errors if e.loc] == sorted([*range(1, 16), *range(1, 16)])
    assert errors[2].text.startswith("layer 'l1': ")
    with pytest.raises(ManyErrors) as caught:
        parse(text, "NetParameter")
    assert "and 10 more errors" in render(caught.value)


def test_enum_values_by_number() -> None:
    layer = parse("layer { pooling_param { pool: 1 } phase: 1 }", "NetParameter").message.layer[0]
    assert layer.pooling_param.pool == pb.PoolingParameter.AVE
    assert layer.phase == pb.TEST
    assert "one of: DEFAULT, CAFFE, CUDNN" in (failure("layer { pooling_param { engine: 7 } }")[0].hint or "")


def test_collect_drops_unknown_fields_and_lists_them() -> None:
    text = """layer { name: "a" foo { bar: "}" baz: 3 } type: "X"
  pooling_param { rounding: 1 pool: AVE rounding: 2 } }
x: [1, 2] y: 3
layer { name: "b" }"""
    doc = parse(text, "NetParameter", file="f", unknown="collect")
    assert [path for path, _ in doc.unknown] == [
        "layer[0].foo",
        "layer[0].pooling_param.rounding[0]",
        "layer[0].pooling_param.rounding[1]",
        "x",
        "y",
    ]
    assert [(loc.line, loc.col) for _, loc in doc.unknown][:2] == [(1, 19), (2, 19)]
    assert [(p.name, p.type) for p in doc.message.layer] == [("a", "X"), ("b", "")]
    assert doc.message.layer[0].pooling_param.pool == pb.PoolingParameter.AVE
    loc = doc.locs.find(("layer", 1, "name"))
    assert loc is not None
    assert (loc.line, loc.col) == (4, 9)
    with pytest.raises(CaffeError, match="no value MAXX"):
        parse("z: 1 layer { pooling_param { pool: MAXX } }", "NetParameter", unknown="collect")


def test_dumps_floats_are_short_and_exact() -> None:
    message = pb.SolverParameter(base_lr=0.1, gamma=1e-7, weight_decay=5e-4, delta=1 / 3)
    text = dumps(message)
    assert "base_lr: 0.1\n" in text
    assert "weight_decay: 0.0005\n" in text
    assert parse(text, "SolverParameter").message == message
    assert (
        dumps(pb.NetParameter(name="é", layer=[pb.LayerParameter(name="x")])) == 'name: "é"\nlayer {\n  name: "x"\n}\n'
    )


def thousand_layers() -> str:
    layer = """layer {{ name: "conv{0}" type: "Convolution" bottom: "c{0}" top: "c{0}"
  param {{ lr_mult: 1 decay_mult: 1 }} param {{ lr_mult: 2 }}
  convolution_param {{ num_output: 64 kernel_size: 3 pad: 1 weight_filler {{ type: "xavier" }} }} }}
"""
    return "".join(layer.format(i) for i in range(1000))


def test_a_thousand_layers() -> None:  # bench/build.py times it
    doc = parse(thousand_layers(), "NetParameter", file="f")
    loc = doc.locs.find(("layer", 999, "convolution_param", "pad", 0))
    assert loc is not None
    assert loc.line == 3000


@pytest.mark.parametrize(
    "text", ["a: " + "#" * 99999 + "\n@", "a:" + " " * 99999 + "@", "a" * 99999, 'a:"' + "\\" * 99999]
)
def test_scanner_is_linear(text: str) -> None:
    begin = time.process_time()
    scan(text)
    assert time.process_time() - begin < 20  # milliseconds; a quadratic scanner takes minutes


PIECES = st.sampled_from(
    [
        "layer",
        "layers",
        "name",
        "type",
        "x",
        "pad",
        "pooling_param",
        "include",
        "{",
        "}",
        "<",
        ">",
        "[",
        "]",
        ":",
        ",",
        ";",
    ]
    + [
        '"a"',
        "'b'",
        '"',
        "MAX",
        "TEST",
        "1",
        "-1",
        "1.5",
        "1e999",
        "-",
        "inf",
        "nan",
        "\n",
        " ",
        "# c\n",
        "#",
        "\0",
        "\\",
    ]
    + ["0x1F", "099", "é", "\ud800", "\udcff", "99999999999999999999", "true", "state"]
)


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(st.lists(PIECES, max_size=40).map(" ".join), st.text(max_size=60)), st.sampled_from(["error", "collect"])
)
def test_any_text_gives_a_document_or_a_clear_error(text: str, unknown: str) -> None:
    for kind in ("NetParameter", "SolverParameter"):
        error: CaffeError | None
        try:
            doc = parse(text, kind, file="f", unknown=unknown)
        except CaffeError as caught:
            error = caught
        else:
            error = None
        if error:
            assert error.loc is not None
            assert render(error)
        else:
            for path in (("layer", 0), ("layer", 0, "name")):
                doc.locs.find(path)
            assert parse(dumps(doc.message), kind).message.SerializeToString() == doc.message.SerializeToString()
