"""Which fork a net was written for."""

from __future__ import annotations

import pytest

from caffejacinto_py.errors import UsageError
from caffejacinto_py.schema.dialect import BVLC, DIALECTS, resolve_dialect
from caffejacinto_py.schema.fork_fields import FORK_FIELDS
from caffejacinto_py.schema.pool import descriptor
from caffejacinto_py.schema.text import parse

NETS = {
    'name: "x" layer { type: "BatchNorm" batch_norm_param { eps: 1 } }': ("bvlc", "no field"),
    "layer { batch_norm_param { scale_bias: false } }": ("nvcaffe", "layer[0].batch_norm_param.scale_bias"),
    "default_forward_type: FLOAT16": ("nvcaffe", "default_forward_type"),
    "layer { } layer { multibox_loss_param { } }": ("ssd", "layer[1].multibox_loss_param"),
    "layer { multibox_loss_param { } forward_type: FLOAT }": ("nvcaffe", "forward_type"),
    "global_grad_scale: 2 net_quantization_param { }": ("jacinto", "net_quantization_param"),
    "layer { quantization_param { qparam_in { scale: 2 } } }": ("jacinto-0.16", "qparam_in[0].scale"),
    "layer { quantization_param { qparam_in { shiftbits: 2 } } }": ("jacinto", "qparam_in"),
    "layer { quantization_param { bw_params: 4 } }": ("ristretto", "bw_params"),
    "layer { lpfp_param { bd: 4 } }": ("adaption", "lpfp_param"),
}


@pytest.mark.parametrize("text", NETS)
def test_fields_decide(text: str) -> None:
    name, reason = NETS[text]
    found = resolve_dialect(parse(text, "NetParameter").message)
    assert found == DIALECTS[name]
    assert reason in found.reason


def test_the_solver_has_a_say() -> None:
    net = parse("layer { forward_type: FLOAT }", "NetParameter").message
    solver = parse("sparse_mode: SPARSE_UPDATE", "SolverParameter").message
    assert resolve_dialect(net, solver).name == "jacinto"
    assert resolve_dialect(net, solver).reason == "the solver has 'sparse_mode'"
    assert resolve_dialect(solver_message=parse("min_lr: 0", "SolverParameter").message).name == "nvcaffe"
    inside = parse("net_param { layer { permute_param { } } }", "SolverParameter").message
    assert resolve_dialect(solver_message=inside).name == "ssd"


def test_the_option_wins() -> None:
    net = parse("layer { forward_type: FLOAT }", "NetParameter").message
    assert resolve_dialect(net, option="bvlc") == BVLC
    assert resolve_dialect().name == "bvlc"
    with pytest.raises(UsageError, match="unknown dialect 'nvcafe'") as caught:
        resolve_dialect(option="nvcafe")
    assert "did you mean 'nvcaffe'?" in (caught.value.hint or "")


def test_every_fork_field_is_in_the_schema() -> None:
    for fork, messages in FORK_FIELDS.items():
        assert fork in DIALECTS
        for name, fields in messages.items():
            schema = descriptor("QuantizationParameter.QParams" if name == "QParams" else name)
            assert set(fields.split()) <= set(schema.fields_by_name), name
