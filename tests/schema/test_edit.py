"""`--set path=value`."""

from __future__ import annotations

from typing import Any

import pytest

from caffejacinto_py.errors import UsageError
from caffejacinto_py.schema import pb
from caffejacinto_py.schema.edit import set_field
from caffejacinto_py.schema.text import parse


@pytest.fixture
def net() -> Any:
    text = """name: "n" layer { name: "conv1" convolution_param { kernel_size: 3 } param { } param { } }
              layer { name: "a.b/c" } layer { name: "a" } layer { name: "a" }"""
    return parse(text, "NetParameter").message


def test_values_are_typed_by_the_schema(net: Any) -> None:
    set_field(net, "name=a b # c", "force_backward=true", "layer[0].phase=TEST", "layer[-1].type=ReLU")
    set_field(net, "layer.conv1.convolution_param.kernel_size=[1, 5]", "layer.conv1.convolution_param.kernel_size[1]=7")
    set_field(
        net, "layer.conv1.param[1].lr_mult=2e-1", "layer.conv1.bottom=data", "state={ level: 3 }", "state.stage=s"
    )
    set_field(net, "layer.conv1.convolution_param.weight_filler.type=xavier", "layer.a.b/c.type=X", "layer.a.top=t")
    assert (net.name, net.force_backward) == ("a b # c", True)
    conv = net.layer[0]
    assert conv.phase == pb.TEST
    assert list(conv.convolution_param.kernel_size) == [1, 7]
    assert conv.convolution_param.weight_filler.type == "xavier"
    assert conv.param[1].lr_mult == pytest.approx(0.2)
    assert (net.state.level, list(net.state.stage), list(conv.bottom)) == (3, ["s"], ["data"])
    assert [p.type for p in net.layer] == ["", "X", "", "ReLU"]
    assert [list(p.top) for p in net.layer] == [[], [], ["t"], ["t"]]


def test_solver_values() -> None:
    solver = pb.SolverParameter(stepvalue=[1, 2])
    set_field(solver, "base_lr=0.5", "stepvalue=[10, 20, 30]", "solver_mode=CPU", "net=a=b.prototxt", 'type="Adam"')
    assert list(solver.stepvalue) == [10, 20, 30]
    assert (solver.base_lr, solver.solver_mode, solver.net, solver.type) == (0.5, 0, "a=b.prototxt", "Adam")


ERRORS = {
    "layer.conv2.phase=TEST": ("no 'layer' is named 'conv2'", "'conv1'"),
    "lauer[0].name=x": ("NetParameter has no field 'lauer'", "'layer'"),
    "layer[9].name=x": ("there is no 'layer[9]', there are 4", ""),
    "layer.conv1.convolution_param.num_outpt=1": ("has no field 'num_outpt'", "'num_output'"),
    "layer.conv1.convolution_param.num_output=-1": ("a whole number in range", ""),
    "layer.conv1.convolution_param.engine=CUDNNN": ("no such value", "'CUDNN'"),
    "layer.conv1.param.lr_mult=1": ("there are 2 'param'", "param[0]"),
    "layer.conv1=3": ("'layer' is a message", "layer.conv1.field=value"),
    "force_backward=maybe": ("true or false", ""),
    "state=3": ("is a message", ""),
    "name.x=3": ("is a value and has no field 'x'", ""),
    "name[0]=x": ("is not repeated", "without [0]"),
    "input_dim=1 name: 3": ("a whole number", ""),
    "name": ("is no assignment", "path.to.field=value"),
    "=3": ("is no assignment", ""),
    "a..b=3": ("no field 'a'", ""),
    "[0]=3": ("cannot read '[0]'", ""),
}


@pytest.mark.parametrize("text", ERRORS)
def test_errors(net: Any, text: str) -> None:
    words, hint = ERRORS[text]
    before = net.SerializeToString()
    with pytest.raises(UsageError) as caught:
        set_field(net, "name=changed", text)
    assert words in caught.value.text
    assert hint in (caught.value.hint or "")
    assert net.SerializeToString() == before
