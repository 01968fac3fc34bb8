"""Layers in float16, bfloat16 and float64: masters, gradients, statistics, hooks, devices that lack a type."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from caffejacinto_py.engine import precision
from caffejacinto_py.engine.hooks import Hook
from caffejacinto_py.engine.memory.execute import Recompute
from caffejacinto_py.engine.memory.stages import chain_of
from caffejacinto_py.engine.memory.strategies import sequential
from caffejacinto_py.engine.net import Net
from caffejacinto_py.engine.precision import DTYPES, Cast, choose
from caffejacinto_py.passes import prepare
from caffejacinto_py.passes.precision import resolve
from caffejacinto_py.schema.dialect import resolve_dialect
from caffejacinto_py.schema.text import parse

CPU = torch.device("cpu")
TEXT = """
layer { name: 'in' type: 'Input' top: 'data' top: 'label'
  input_param { shape { dim: 8 dim: 3 dim: 12 dim: 12 } shape { dim: 8 } } }
layer { name: 'c1' type: 'Convolution' bottom: 'data' top: 'c1'
  convolution_param { num_output: 8 kernel_size: 3 weight_filler { type: 'xavier' } } }
layer { name: 'bn' type: 'BatchNorm' bottom: 'c1' top: 'c1' batch_norm_param { scale_bias: true } }
layer { name: 'r' type: 'ReLU' bottom: 'c1' top: 'c1' }
layer { name: 'c2' type: 'Convolution' bottom: 'c1' top: 'c2'
  convolution_param { num_output: 8 kernel_size: 3 pad: 1 group: 2 weight_filler { type: 'xavier' } } }
layer { name: 'bn2' type: 'BatchNorm' bottom: 'c2' top: 'c2' }
layer { name: 's2' type: 'Scale' bottom: 'c2' top: 'c2' scale_param { bias_term: true } }
layer { name: 'e' type: 'Eltwise' bottom: 'c1' bottom: 'c2' top: 'e' }
layer { name: 're' type: 'ReLU' bottom: 'e' top: 'e' }
layer { name: 'p' type: 'Pooling' bottom: 'e' top: 'p' pooling_param { kernel_size: 2 stride: 2 } }
layer { name: 'norm' type: 'LRN' bottom: 'p' top: 'norm' }
layer { name: 'cc' type: 'Concat' bottom: 'p' bottom: 'norm' top: 'cc' }
layer { name: 'p2' type: 'Pooling' bottom: 'cc' top: 'p2' pooling_param { pool: AVE kernel_size: 2 stride: 2 } }
layer { name: 'ip' type: 'InnerProduct' bottom: 'p2' top: 'ip'
  inner_product_param { num_output: 5 weight_filler { type: 'xavier' } } }
layer { name: 'loss' type: 'SoftmaxWithLoss' bottom: 'ip' bottom: 'label' top: 'loss' }
"""


def net(override: str | None = None, text: str = TEXT, phase: str = "TRAIN", **options) -> Net:
    doc = parse(text, "NetParameter", file="n.prototxt")
    graph = prepare(doc, phase=phase, dialect=resolve_dialect(doc.message, None, "nvcaffe"))
    table = resolve(graph, override)
    return Net(graph, seed=1, dtype=DTYPES[table.base], types=table, **options)


def batch() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {"data": torch.randn(8, 3, 12, 12, generator=g), "label": torch.arange(8.0) % 5}


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize(("name", "most"), [("fp16", 0.08), ("bf16", 0.2), ("fp64", 1e-5)])
def test_masters_and_gradients_keep_their_type_and_agree(name: str, most: float) -> None:
    """Behind BatchNorm at batch 8 rounding grows: measured 0.05 and 0.10 at the first convolution."""
    plain, other = net(), net(name)
    base = torch.float64 if name == "fp64" else torch.float32
    for n in (plain, other):
        n(batch()).loss.backward()
    assert abs(float((other(batch()).loss - plain(batch()).loss).detach())) < 0.02
    for layer, blobs in other.params.items():
        for i, p in enumerate(blobs):
            assert p.dtype == base
            if p.grad is None or (layer in ("c1", "c2") and i == 1):  # a bias before BatchNorm: its gradient is noise
                continue
            assert p.grad.dtype == base
            want = plain.params[layer][i].grad
            assert want is not None
            assert distance(p.grad, want) < most, layer


def test_statistics_and_losses_are_float32_sums() -> None:
    plain, half = net(), net("fp16")
    result = half(batch())
    plain(batch())
    assert result.loss.dtype == torch.float32
    for a, b in zip(half.params["bn"][:2], plain.params["bn"][:2]):
        assert a.dtype == torch.float32
        assert distance(a, b) < 2e-3


def test_blobs_between_layers_are_half() -> None:
    half = net("fp16")
    blobs = {top: half.feed(top, batch()) for source in half.sources for top in source.tops}
    kinds = {node.name: outs[0].dtype for node, outs in half.run(blobs)}
    assert kinds["c1"] == kinds["r"] == kinds["ip"] == torch.float16
    assert kinds["norm"] == kinds["loss"] == torch.float32
    assert kinds["cc"] == torch.float32  # of a half and a float32 bottom


def test_channels_last_is_kept() -> None:
    half = net("bf16")
    blobs = {top: half.feed(top, batch()) for source in half.sources for top in source.tops}
    for node, outs in half.run(blobs):
        if node.name in ("c1", "c2", "p"):
            assert outs[0].is_contiguous(memory_format=torch.channels_last)


def test_outputs_leave_in_the_base_type_and_both_roads_agree() -> None:
    text = TEXT[: TEXT.index("layer { name: 'loss'")]
    half = net("bf16", text, phase="TEST")
    outputs = half(batch()).outputs
    assert outputs["ip"].dtype == torch.float32
    blobs = {top: half.feed(top, batch()) for source in half.sources for top in source.tops}
    outs = {node.name: outs[0] for node, outs in half.run(blobs)}
    torch.testing.assert_close(outs["ip"], outputs["ip"], rtol=2e-2, atol=2e-2)  # Scale inside BatchNorm rounds once


def test_a_hook_sees_float32() -> None:
    kinds: set[torch.dtype] = set()

    class Look(Hook):
        def tops(self, node, outs):
            kinds.update(o.dtype for o in outs)
            return outs

    half, plain = net("fp16"), net()
    half.hook, plain.hook = Look(), Look()
    torch.testing.assert_close(half(batch()).loss, plain(batch()).loss)
    assert kinds == {torch.float32}
    half.hook = None
    assert isinstance(half.layers[0], Cast)
    assert half.layers[0](torch.ones(1, 3, 12, 12)).dtype == torch.float16


def test_a_plain_net_is_not_wrapped() -> None:
    assert not any(isinstance(m, Cast) for m in net().layers)
    assert not any(isinstance(m, Cast) for m in net("fp64").layers)


def test_one_double_layer() -> None:
    text = TEXT.replace("name: 'ip' type", "forward_type: DOUBLE backward_type: DOUBLE name: 'ip' type")
    mixed, plain = net(text=text), net()
    loss = mixed(batch()).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, plain(batch()).loss)
    loss.backward()
    assert mixed.params["ip"][0].grad.dtype == torch.float32


def test_a_test_net_shares_the_type_of_its_weights() -> None:
    train = net("fp64")
    graph = prepare(parse(TEXT, "NetParameter"), phase="TEST")
    table, _ = choose(graph, CPU, shared=train.dtype)
    assert table.base == "DOUBLE"
    test = Net(graph, share=train, dtype=DTYPES[table.base], types=table)
    assert test(batch()).loss.dtype == torch.float64


def test_a_type_without_instructions_runs_in_float32_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = net().graph
    monkeypatch.setattr(precision, "missing", lambda kind, device: "no way" if kind == "FLOAT16" else None)
    table, lines = choose(graph, CPU, "fp16")
    assert not table.mixed
    assert lines == ["FLOAT16: no way; 11 layers run in FLOAT instead"]
    assert table.rows["c1"].why == "no way"
    table, lines = choose(graph, CPU, "bf16")
    assert table.mixed
    assert lines == []


def test_missing_answers_for_this_machine() -> None:
    assert precision.missing("FLOAT", CPU) is None
    assert precision.missing("DOUBLE", CPU) is None
    for kind in ("FLOAT16", "BFLOAT16"):
        answer = precision.missing(kind, CPU)
        assert answer is None or "no instructions for" in answer


def test_in_place_marks_reach_the_module_inside() -> None:
    inner = nn.ReLU(inplace=False)
    cast = Cast(inner, torch.float16, bottoms=1, weights=False)
    cast.inplace = True
    assert inner.inplace
    assert cast.inplace


def test_layers_in_16_bits_that_run_again_leave_no_trace() -> None:
    """Checkpoints of engine/memory around casts: the same bits, statistics counted once."""
    plain, again = net("bf16"), net("bf16")
    chain = chain_of(again.graph)
    again.recompute = Recompute(again, chain, sequential(chain, 2))
    for n in (plain, again):
        n(batch()).loss.backward()
    for a, b in zip(plain.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
        assert (a.grad is None and b.grad is None) or torch.equal(a.grad, b.grad)
