"""Filtering, name resolution and their errors."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from google.protobuf import text_format

from caffejacinto_py.errors import LayerError, ManyErrors, PrototxtError
from caffejacinto_py.ir.build import build, kept, met
from caffejacinto_py.ir.emit import emit
from caffejacinto_py.ir.graph import Value
from caffejacinto_py.ir.verify import verify
from caffejacinto_py.schema import pb

PLAIN = SimpleNamespace(
    bottoms=(0, None), tops=(0, None), equal_counts=False, auto_tops=False, loss_top=False, forbids_inplace=False
)
LOSS = SimpleNamespace(**{**PLAIN.__dict__, "bottoms": (2, 2), "tops": (1, 2), "auto_tops": True, "loss_top": True})
UNARY = SimpleNamespace(**{**PLAIN.__dict__, "bottoms": (1, 1), "tops": (1, 1), "forbids_inplace": True})


def lookup(type, **_):
    return {"Loss": LOSS, "Unary": UNARY}.get(type, PLAIN)


def net(text: str):
    return text_format.Parse(text, pb.NetParameter())


def graph(text: str, **options):
    g = build(net(text), lookup, **options)
    verify(g)
    return g


@pytest.mark.parametrize(
    ("rule", "state", "expected"),
    [
        ("", {}, True),
        ("phase: TRAIN", {}, True),
        ("phase: TEST", {}, False),
        ("min_level: 1", {}, False),
        ("min_level: 1", {"level": 1}, True),
        ("max_level: 1", {"level": 2}, False),
        ("stage: 'a' stage: 'b'", {"stages": ["a"]}, False),
        ("stage: 'a' stage: 'b'", {"stages": ["b", "a", "c"]}, True),
        ("not_stage: 'a'", {"stages": ["b", "a"]}, False),
        ("stage: 'b' not_stage: 'a'", {"stages": ["b"]}, True),
    ],
)
def test_a_rule_is_met(rule, state, expected):
    state = {"phase": "TRAIN", "level": 0, "stages": [], **state}
    assert met(text_format.Parse(rule, pb.NetStateRule()), **state) is expected


def test_include_needs_any_rule_and_exclude_any():
    layer = net("layer { include { phase: TEST } include { stage: 'x' } }").layer[0]
    assert kept(layer, phase="TEST", level=0, stages=[])
    assert kept(layer, phase="TRAIN", level=0, stages=["x"])
    assert not kept(layer, phase="TRAIN", level=0, stages=[])
    layer = net("layer { exclude { phase: TEST } exclude { stage: 'x' } }").layer[0]
    assert not kept(layer, phase="TRAIN", level=0, stages=["x"])
    assert kept(layer, phase="TRAIN", level=0, stages=[])


def test_include_and_exclude_together_are_refused():
    with pytest.raises(LayerError, match="both include and exclude"):
        graph("layer { name: 'a' include { phase: TEST } exclude { phase: TRAIN } }")


def test_in_place_layers_make_versions_and_outputs_are_alphabetical():
    g = graph("""
        layer { name: 'in' type: 'In' top: 'z' top: 'a' top: 'x' }
        layer { name: 'r' type: 'ReLU' bottom: 'x' top: 'x' }
        layer { name: 'c' type: 'C' bottom: 'x' top: 'y' }""")
    assert g.nodes[1].inputs == (Value("x", 0),)
    assert g.nodes[1].outputs == (Value("x", 1),)
    assert g.nodes[2].inputs == (Value("x", 1),)
    assert [v.name for v in g.outputs] == ["a", "y", "z"]


def test_loss_tops_are_made_up_and_weighted():
    g = graph("""
        layer { name: 'in' type: 'In' top: 'a' top: 'b' }
        layer { name: 'l' type: 'Loss' bottom: 'a' bottom: 'b' }
        layer { name: 'm' type: 'Loss' bottom: 'a' bottom: 'b' top: 'm' loss_weight: 0.5 }
        layer { name: 'n' type: 'Loss' bottom: 'a' bottom: 'b' top: 'n' top: 'p' }""")
    assert [n.loss_weights for n in g.nodes] == [(0, 0), (1,), (0.5,), (1, 0)]
    assert len(g.nodes[1].outputs) == 1
    assert emit(g).layer[1].top == []


def test_every_error_is_collected_with_a_hint():
    with pytest.raises(ManyErrors) as caught:
        graph("""
            layer { name: 'in' type: 'In' top: 'data' }
            layer { name: 'c1' type: 'Unary' bottom: 'dtaa' top: 'c1' }
            layer { name: 'c2' type: 'C' bottom: 'c1' top: 'data' }
            layer { name: 'c3' type: 'Unary' bottom: 'c1' top: 'c1' }
            layer { name: 'c4' type: 'Loss' bottom: 'c1' top: 'c4' loss_weight: 1 loss_weight: 2 }
            layer { name: 'test' type: 'In' top: 't' include { phase: TEST } }
            layer { name: 'c5' type: 'C' bottom: 't' }""")
    texts = [str(e) for e in caught.value.errors]
    assert "bottom 'dtaa' is not produced by any earlier layer (hint: did you mean 'data'?)" in texts[0]
    assert "top 'data' is already produced by layer 'in'" in texts[1]
    assert "cannot work in place" in texts[2]
    assert "takes 2 bottom blobs, not 1" in texts[3]
    assert "loss_weight is given 2 times for 1 tops" in texts[4]
    assert "leave out" in texts[5]
    assert len(texts) == 6


def test_a_net_without_layers_says_why():
    with pytest.raises(PrototxtError, match="no layer of net 'n' is left in phase TRAIN"):
        graph("name: 'n' layer { name: 'a' include { phase: TEST } }")
    with pytest.raises(PrototxtError, match="has no layers"):
        graph("name: 'n'")


def test_emit_keeps_what_filtering_left():
    g = graph(
        "layer { name: 'a' type: 'In' top: 'x' include { phase: TRAIN } } layer { name: 'b' include { phase: TEST } }"
    )
    assert [(m.name, list(m.top), list(m.include)) for m in emit(g).layer] == [("a", ["x"], [])]


def test_layers_may_share_a_name(caplog: pytest.LogCaptureFixture) -> None:
    text = """
        layer { type: "Input" name: "in" top: "a" input_param { shape { dim: 1 } } }
        layer { type: "ReLU" name: "act" bottom: "a" top: "b" }
        layer { type: "ReLU" name: "act" bottom: "a" top: "c" }
        layer { type: "ReLU" bottom: "b" top: "d" }
        layer { type: "ReLU" bottom: "c" top: "e" }
    """
    assert [n.name for n in graph(text).nodes] == ["in", "act", "act_2", "", "ReLU_2"]
    assert caplog.text.count("a second layer is named 'act'") == 1
