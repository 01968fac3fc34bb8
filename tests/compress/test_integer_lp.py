"""ADaPTION's layers as integer programs: fixed point as they are, equal to the net in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from caffejacinto_py.cli import main
from caffejacinto_py.compress import integer_run
from caffejacinto_py.compress.integer import Built, build
from caffejacinto_py.compress.integer_check import OpCheck, random_batch, verify
from caffejacinto_py.engine.net import Net
from caffejacinto_py.errors import CaffeError, LayerError, PrototxtError
from caffejacinto_py.passes import prepare
from caffejacinto_py.schema import text
from caffejacinto_py.schema.compat import Compat
from caffejacinto_py.schema.dialect import resolve_dialect
from caffejacinto_py.schema.weights import write_model
from tests.compress.integer_nets import blobs_of, net_text

SHAPE = (2, 3, 9, 9)
CONV = "c LPConvolution data c lpfp_param { bd: 2 ad: 6 } convolution_param { num_output: 4 kernel_size: 3 }"
RANDOM = "rounding_scheme: STOCHASTIC"
ACT = "a LPAct c c lpfp_param { bd: 10 ad: 2 }"


def made(source: str, seed: int = 0, **options: Any) -> tuple[Built, Net]:
    """The program of a net with random weights, some beyond what its words hold, and the net in float64."""
    dialect = resolve_dialect(option="adaption", compat=options.pop("compat", None))
    graph = prepare(text.parse(source, "NetParameter"), phase="TEST", dialect=dialect)
    net = Net(graph, dtype=torch.float64, seed=0)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for blob in (b for blobs in net.params.values() for b in blobs):
            blob.copy_((torch.randn(blob.shape, generator=rng, dtype=torch.float64) * 1.5).float())
    return build(graph, blobs_of(net), pixels=True, **options), net


def compared(source: str, seed: int = 0) -> list[OpCheck]:
    built, net = made(source, seed)
    return list(verify(built, net, [random_batch(built, net, seed + k) for k in range(2)]).checks)


def test_a_net_of_every_kind_of_layer() -> None:
    source = net_text(
        SHAPE,
        CONV,
        ACT,
        "r ReLU c c",
        "p Pooling c p pooling_param { kernel_size: 3 stride: 2 }",
        "c2 LPConvolution p c2 lpfp_param { bd: 1 ad: 11 round_bias: true } "
        "convolution_param { num_output: 4 kernel_size: 3 pad: 1 group: 2 }",
        "r2 ReLU c2 c2",
        "d Dropout c2 c2",
        "a2 LPAct c2 c2 lpfp_param { bd: 8 ad: 4 }",
        "e Eltwise c2,p e eltwise_param { coeff: 1 coeff: -0.5 }",
        "ea LPAct e e lpfp_param { bd: 9 ad: 3 }",
        "m Pooling e m pooling_param { pool: AVE global_pooling: true }",
        "ma LPAct m ma lpfp_param { bd: 9 ad: 8 }",
        "f Flatten ma f",
        "fc LPInnerProduct f fc lpfp_param { bd: 3 ad: 9 } inner_product_param { num_output: 5 }",
        "prob Softmax fc prob",
    )
    built, _ = made(source)
    checks = compared(source)
    assert [op["layers"] for op in built.program.info["ops"]] == [
        ["c", "a"], ["r"], ["p"], ["c2", "r2", "d", "a2"], ["e", "ea"], ["m", "ma"], ["f"], ["fc"]
    ]  # fmt: skip
    assert built.program.info["left_out"] == [{"layer": "prob", "type": "Softmax"}]
    assert all(c.good for c in checks)
    assert all(c.exact and c.whole.count == 0 for c in checks if c.op["op"] not in ("average_pool",))
    tensors = built.program.tensors
    assert tensors["c"] == {"shape": [2, 4, 7, 7], "bits": 12, "signed": True, "scale": 4.0, "zero": 0,
                            "symmetric": True}  # fmt: skip
    assert tensors["fc"]["scale"] == 2.0 ** (9 + 8)
    weight = built.program.arrays[next(op for op in built.program.info["ops"] if op["layer"] == "c")["weight"]]
    assert (weight.min(), weight.max()) == (-127, 127)  # clipped, without -128


def test_the_most_negative_number_is_not_used() -> None:
    act = "a LPAct c c lpfp_param { bd: 2 ad: 2 }"
    built, net = made(net_text(SHAPE, CONV, act))
    values = integer_run.run(built.program, {"data": np.full(SHAPE, 255, np.uint8)})["c"]
    assert (values.min(), values.max()) == (-7, 7)
    assert verify(built, net, [random_batch(built, net, 0)]).checks[0].good


words = st.tuples(st.integers(1, 8), st.integers(0, 12), st.booleans())


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(words, min_size=6, max_size=6), st.booleans(), st.integers(0, 1000))
def test_random_formats(formats: list[tuple[int, int, bool]], before: bool, seed: int) -> None:
    def word(i: int, *, product: bool = False) -> str:
        bd, ad, rounded = formats[i]
        return f"lpfp_param {{ bd: {bd} ad: {ad}{f' round_bias: {str(rounded).lower()}' if product else ''} }}"

    rounded = [f"a LPAct c c {word(1)}", "r ReLU c c"]
    source = net_text(
        SHAPE,
        f"c LPConvolution data c {word(0, product=True)} convolution_param {{ num_output: 3 kernel_size: 3 }}",
        *(rounded if before else rounded[::-1]),
        f"c2 LPConvolution c c2 {word(2, product=True)} convolution_param {{ num_output: 3 kernel_size: 2 }}",
        f"a2 LPAct c2 a2 {word(3)}",
        "k Concat a2,a2 k",
        f"fc LPInnerProduct k fc {word(4, product=True)} inner_product_param {{ num_output: 4 }}",
    )
    for check in compared(source, seed):
        assert check.good, check
        assert check.exact or check.op["sum_bits"] > 53 or check.op["op"] != "rescale"


def test_inputs_with_a_scale() -> None:
    data = """layer { name: "in" type: "MemoryData" top: "data" top: "label" transform_param { scale: 0.00390625 }
    memory_data_param { batch_size: 2 channels: 3 height: 9 width: 9 } }\n"""
    built, net = made(data + net_text(SHAPE, CONV, ACT).split("\n", 1)[1])
    assert built.program.tensors["data"]["scale"] == 256
    whole = torch.arange(2 * 3 * 81).reshape(SHAPE) % 256
    batch = {"data": whole.double() / 256, "label": torch.zeros(2, dtype=torch.float64)}
    (check,) = verify(built, net, [batch]).checks
    assert check.exact
    assert check.good


@pytest.mark.parametrize(
    ("layers", "part", "hint"),
    [
        ((CONV.replace("ad: 6", f"ad: 6 {RANDOM}"),), "'c' (LPConvolution): integer programs round to", None),
        ((CONV, ACT.replace("ad: 2", f"ad: 2 {RANDOM}")), "'a' (LPAct): integer programs round to", None),
        ((CONV, ACT, "p Pooling c p pooling_param { pool: AVE kernel_size: 2 }"), "'p' (Pooling): its top", "LPAct"),
        ((CONV, ACT, "e Eltwise c,c e"), "'e' (Eltwise): its top", "LPAct"),
        ((CONV, ACT, "b BatchNorm c b", "d LPAct b b lpfp_param { bd: 2 }"), "'b' (BatchNorm): this layer", "optimize"),
    ],
)  # fmt: skip
def test_refusals(layers: tuple[str, ...], part: str, hint: str | None) -> None:
    with pytest.raises(CaffeError) as caught:
        made(net_text(SHAPE, *layers))
    assert part in str(caught.value)
    assert (hint or "") in (caught.value.hint or "")


def test_the_gpus_rounding_is_refused() -> None:
    with pytest.raises(LayerError, match="round to the nearest"):
        made(net_text(SHAPE, CONV, ACT), compat=Compat(adaption="gpu"))
    with pytest.raises(PrototxtError, match="no quantization parameters"):
        made(net_text(SHAPE, "c Convolution data c convolution_param { num_output: 4 kernel_size: 3 }"))


def test_the_verb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    fc = "fc LPInnerProduct c fc lpfp_param { bd: 3 ad: 9 round_bias: true } inner_product_param { num_output: 5 }"
    source = net_text(SHAPE, CONV, ACT, "r ReLU c c", fc, "prob Softmax fc prob")
    Path("low.prototxt").write_text(source)
    write_model("low.caffemodel", made(source)[1].model())
    args = ["export_int", "--model=low.prototxt", "--weights=low.caffemodel", "--output=p", "--log-level=error"]
    assert main(args) == 3
    assert "--pixels" in capsys.readouterr().err
    assert main([*args, "--pixels", "--verify=2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(r["exact"], r["differing"]) for r in found["layers"]] == [(True, 0)] * 3
    program = integer_run.load("p.json")
    values = integer_run.run(program, {"data": np.full(SHAPE, 9, np.uint8)})
    assert values["fc"].shape == (2, 5)
