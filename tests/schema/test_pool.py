"""The schema: the committed descriptor is the compiled proto, conflicts are resolved, the pool is private."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool

from caffejacinto_py.schema import pb
from caffejacinto_py.schema.pool import descriptor, pool
from caffejacinto_py.schema.text import dumps, parse

ROOT = Path(__file__).resolve().parents[2]


def test_descriptor_is_the_compiled_proto() -> None:
    pytest.importorskip("grpc_tools")
    spec = importlib.util.spec_from_file_location("proto_build", ROOT / "proto" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    compiled = descriptor_pb2.FileDescriptorProto.FromString(build.compile_proto())
    shipped = descriptor_pb2.FileDescriptorProto.FromString(build.TARGET.read_bytes())
    assert compiled == shipped, "run `make proto`"


def test_the_pool_is_private() -> None:
    assert pb.NetParameter().DESCRIPTOR.file.pool is pool()
    with pytest.raises(KeyError):
        descriptor_pool.Default().FindMessageTypeByName("caffejacinto.NetParameter")


def test_access_by_attribute() -> None:
    assert pb.NetParameter is pb.NetParameter
    assert pb.Phase.Value("TEST") == pb.TEST == 1
    assert pb.DetectNetGroundTruthParameter.ClassMapping(src=1, dst=2).dst == 2
    assert pb.PoolingParameter.AVE == 1
    assert "LayerParameter" in dir(pb)
    with pytest.raises(AttributeError, match="NetParam"):
        pb.NetParam  # noqa: B018


def test_nothing_is_required_and_no_number_is_used_twice() -> None:
    file = descriptor_pb2.FileDescriptorProto()
    descriptor("NetParameter").file.CopyToProto(file)
    todo = list(file.message_type)
    while todo:
        message = todo.pop()
        todo += message.nested_type
        assert all(f.label != f.LABEL_REQUIRED for f in message.field), message.name
        assert len({f.number for f in message.field}) == len(message.field), message.name


@pytest.mark.parametrize(
    ("field", "number"),
    [
        ("parameter_param", 145),
        ("recurrent_param", 146),
        ("swish_param", 147),
        ("clip_param", 148),
        ("debug", 149),
        ("cudnn_math_override", 150),
        ("trt_param", 152),
        ("quantization_param", 8404),
    ],
)
def test_public_numbers(field: str, number: int) -> None:
    assert descriptor("LayerParameter").fields_by_name[field].number == number


@pytest.mark.parametrize("field", ["forward_type", "forward_math", "lpfp_param", "roi_pooling_param", "lp_act_param"])
def test_losers_have_private_numbers(field: str) -> None:
    assert descriptor("LayerParameter").fields_by_name[field].number >= 20000


def test_defaults_where_forks_disagree() -> None:
    solver = pb.SolverParameter()
    assert solver.test_initialization is True
    assert solver.rms_decay == pytest.approx(0.99)
    assert not descriptor("BatchNormParameter").fields_by_name["use_global_stats"].has_default_value
    assert pb.ConvolutionParameter().conv_algos_override == "-1,-1,-1"
    assert pb.MultiBoxLossParameter().mining_type == pb.MultiBoxLossParameter.MAX_NEGATIVE


def test_both_quantization_dialects_parse() -> None:
    text = """layer { quantization_param { precision: DYNAMIC_FIXED_POINT rounding_scheme: STOCHASTIC bw_params: 8 } }
    layer { quantization_param { precision: QuantizationParameter_Precision_DYNAMIC_FIXED_POINT
                                 rounding_scheme: QuantizationParameter_Rounding_NEAREST
                                 qparam_w { bitwidth: 8 fracbits: 3 } qparam_out { min: -1 max: 2 scale: 3 } } }"""
    message = parse(text, "NetParameter").message
    assert message.layer[0].quantization_param.precision != message.layer[1].quantization_param.precision
    assert message.layer[1].quantization_param.qparam_out[0].max == 2
    assert parse(dumps(message), "NetParameter").message == message
