"""Types of layers: NVCaffe's rules, what stays in float32, bad types."""

from __future__ import annotations

import pytest

from caffejacinto_py.errors import ManyErrors, PrototxtError, UsageError
from caffejacinto_py.passes import prepare
from caffejacinto_py.passes.precision import AS_BOTTOMS, Row, Table, describe, resolve
from caffejacinto_py.schema.text import parse

DATA = "layer { name: 'in' type: 'Input' top: 'data' top: 'label' input_param { shape { dim: 2 dim: 3 dim: 8 dim: 8 } shape { dim: 2 } } }"  # noqa: E501
CONV = "layer { name: 'c' type: 'Convolution' bottom: 'data' top: 'c' %s convolution_param { num_output: 4 kernel_size: 3 %s } }"  # noqa: E501
REST = """
layer { name: 'bn' type: 'BatchNorm' bottom: 'c' top: 'bn' }
layer { name: 'norm' type: 'LRN' bottom: 'bn' top: 'norm' }
layer { name: 'cc' type: 'Concat' bottom: 'bn' bottom: 'norm' top: 'cc' }
layer { name: 'p' type: 'Pooling' bottom: 'cc' top: 'p' top: 'mask' pooling_param { kernel_size: 2 stride: 2 } }
layer { name: 'ip' type: 'InnerProduct' bottom: 'p' top: 'ip' inner_product_param { num_output: 5 } }
layer { name: 'acc' type: 'Accuracy' bottom: 'ip' bottom: 'label' top: 'acc' }
layer { name: 'loss' type: 'SoftmaxWithLoss' bottom: 'ip' bottom: 'label' top: 'loss' }
"""


def table(head: str = "", layer: str = "", conv: str = "", override: str | None = None, phase: str = "TRAIN") -> Table:
    doc = parse("\n".join([head, DATA, CONV % (layer, conv), REST]), "NetParameter", file="n.prototxt")
    return resolve(prepare(doc, phase=phase), override)


def asked(row: Row) -> str:
    return f"{row.forward_type} {row.backward_type} {row.forward_math} {row.backward_math}"


@pytest.mark.parametrize(
    ("head", "layer", "want"),
    [
        ("", "", "FLOAT FLOAT FLOAT FLOAT"),
        ("default_forward_type: FLOAT16", "", "FLOAT16 FLOAT FLOAT16 FLOAT"),  # the type is the math's default
        ("default_forward_type: FLOAT16 default_forward_math: FLOAT", "", "FLOAT16 FLOAT FLOAT FLOAT"),
        ("default_forward_math: FLOAT16", "", "FLOAT FLOAT FLOAT16 FLOAT"),
        ("default_forward_math: FLOAT16", "forward_type: DOUBLE", "DOUBLE FLOAT DOUBLE FLOAT"),  # own type first
        ("default_forward_type: FLOAT16", "forward_type: FLOAT", "FLOAT FLOAT FLOAT FLOAT"),
        ("default_backward_type: FLOAT16", "backward_math: FLOAT forward_math: DOUBLE", "FLOAT FLOAT16 DOUBLE FLOAT"),
    ],
)
def test_nvcaffes_rules(head: str, layer: str, want: str) -> None:
    assert asked(table(head, layer).rows["c"]) == want


def test_what_stays_in_float32_and_why() -> None:
    found = table("default_forward_type: FLOAT16 default_backward_type: FLOAT16")
    assert found.base == "FLOAT"
    assert found.mixed
    assert {name: row.runs for name, row in found.rows.items()} == {
        "in": "FLOAT", "c": "FLOAT16", "bn": "FLOAT16", "norm": "FLOAT", "cc": AS_BOTTOMS, "p": "FLOAT",
        "ip": "FLOAT16", "acc": "FLOAT", "loss": "FLOAT",
    }  # fmt: skip
    why = {name: row.why for name, row in found.rows.items() if row.why}
    assert set(why) == {"in", "norm", "p", "acc", "loss"}
    assert why["p"] == "its second top holds places"  # 8 x 8 = 64 places fit, larger ones would not
    assert found.rows["in"].backward_type == "FLOAT"
    text = "\n".join(describe(found))
    assert "FLOAT16: c, bn, ip (types FLOAT16/FLOAT16, math FLOAT16/FLOAT16)" in text
    assert "losses keep it" in text


def test_different_types_for_the_two_ways_run_in_the_wider_one() -> None:
    head = "default_forward_type: FLOAT16"
    row = table(head).rows["c"]
    assert (row.runs, row.why) == ("FLOAT", "the wider of forward FLOAT16, backward FLOAT")
    assert table(head, phase="TEST").rows["c"].runs == "FLOAT16"  # nothing goes backward there
    assert table("default_forward_type: FLOAT16 default_backward_type: BFLOAT16").rows["c"].runs == "FLOAT"


def test_double_is_for_the_whole_net() -> None:
    found = table("default_forward_type: DOUBLE default_backward_type: DOUBLE")
    assert found.base == "DOUBLE"
    assert not found.mixed
    assert found.types == ("DOUBLE",)
    one = table("", "forward_type: DOUBLE backward_type: DOUBLE")
    assert (one.base, one.rows["c"].runs, one.mixed) == ("FLOAT", "DOUBLE", True)


def test_overrides() -> None:
    half, layer = (
        "default_forward_type: FLOAT16 default_backward_type: FLOAT16",
        "forward_type: FLOAT backward_type: FLOAT",
    )
    assert table(override="bf16").rows["ip"].runs == "BFLOAT16"
    found = table(half, layer, override="bf16")
    assert (found.rows["c"].runs, found.rows["ip"].runs) == ("FLOAT", "BFLOAT16")  # a layer's own word stands
    assert table(half, override="fp32").types == ("FLOAT",)
    assert table("", "forward_type: FLOAT16 backward_type: FLOAT16", override="fp64").types == ("DOUBLE",)
    with pytest.raises(UsageError, match="fp8") as caught:
        table(override="fp8")
    assert "fp32, tf32, fp16" in str(caught.value.hint)


def test_switches_of_cudnn_are_noted_once() -> None:
    found = table("default_cudnn_math_override: 1", "cudnn_math_override: 0", "conv_algos_override: '1,1,1'")
    assert [note.split("'")[1] for note in found.notes] == [
        "default_cudnn_math_override", "cudnn_math_override", "conv_algos_override",
    ]  # fmt: skip
    assert found.notes[0].startswith("n.prototxt:1:")
    assert found.plain
    assert table().plain
    assert describe(found) == []
    assert table().notes == ()


def test_types_that_are_only_stored() -> None:
    with pytest.raises(ManyErrors) as many:
        table("default_forward_type: INT", "backward_math: BOOL")
    assert [e.loc.line for e in many.value.errors if e.loc] == [1, 3]
    with pytest.raises(PrototxtError, match="UINT") as one:
        table("", "forward_type: UINT")
    assert "BFLOAT16" in str(one.value.hint)


def test_a_type_that_does_not_exist() -> None:
    with pytest.raises(PrototxtError, match="FLOT16") as caught:
        table("default_forward_type: FLOT16")
    assert "FLOAT16" in f"{caught.value.text} {caught.value.hint}"
