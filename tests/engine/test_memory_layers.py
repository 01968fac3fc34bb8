"""Layer by layer: what autograd keeps is what the layer says, and running it a second time changes nothing."""

from __future__ import annotations

import pytest
import torch

from caffejacinto_py.engine.memory import strategies
from caffejacinto_py.engine.memory.budget import make_plan, numbers_of
from caffejacinto_py.engine.memory.execute import Recompute
from caffejacinto_py.engine.memory.measure import peak_bytes, watch_saved
from caffejacinto_py.engine.memory.stages import chain_of
from caffejacinto_py.engine.net import Net
from caffejacinto_py.passes import prepare
from caffejacinto_py.passes.memory import account
from caffejacinto_py.schema.text import parse

torch.set_num_threads(1)
CONV = "convolution_param { num_output: 8 kernel_size: 3 pad: 1 weight_filler { type: 'msra' } }"
HEAD = f"""layer {{ name: "data" type: "Input" top: "data" top: "label"
  input_param {{ shape {{ dim: 4 dim: 8 dim: 12 dim: 12 }} shape {{ dim: 4 }} }} }}
layer {{ name: "a" type: "Convolution" bottom: "data" top: "a" {CONV} }}
layer {{ name: "ra" type: "ReLU" bottom: "a" top: "a" }}
layer {{ name: "c" type: "Convolution" bottom: "a" top: "c" {CONV} }}"""
TAIL = """layer { name: "ip" type: "InnerProduct" bottom: "m" top: "ip"
  inner_product_param { num_output: 5 weight_filler { type: "xavier" } } }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "ip" bottom: "label" top: "loss" }"""
SHORT = "bw_layer_in: 8 bw_layer_out: 8 bw_params: 8 fl_layer_in: 4 fl_layer_out: 4 fl_params: 6"
CASES = {
    "lp product": [
        f'type: "LPConvolution" bottom: "c" top: "m" {CONV} lpfp_param {{ bd: 2 ad: 6 rounding_scheme: STOCHASTIC }}'
    ],
    "lp act": ['type: "LPAct" bottom: "c" top: "m" lpfp_param { bd: 3 ad: 5 rounding_scheme: STOCHASTIC }'],
    "ristretto": [
        f'type: "ConvolutionRistretto" bottom: "c" top: "m" {CONV} '
        f"quantization_param {{ {SHORT} rounding_scheme: STOCHASTIC }}"
    ],
    "lrn": ['type: "LRN" bottom: "c" top: "m"'],
    "lrn within": ['type: "LRN" bottom: "c" top: "m" lrn_param { norm_region: WITHIN_CHANNEL local_size: 3 }'],
    "prelu": ['type: "PReLU" bottom: "c" top: "m"'],
    "power": ['type: "ELU" bottom: "c" top: "c"', 'type: "Power" bottom: "c" top: "m" power_param { scale: 2 }'],
    "stochastic": [
        'type: "Sigmoid" bottom: "c" top: "c"',
        'type: "Pooling" bottom: "c" top: "m" pooling_param { pool: STOCHASTIC kernel_size: 2 stride: 2 }',
    ],
    "max": ['type: "Pooling" bottom: "c" top: "m" pooling_param { kernel_size: 3 stride: 2 }'],
    "ave": ['type: "Pooling" bottom: "c" top: "m" pooling_param { pool: AVE kernel_size: 3 stride: 2 }'],
    "branches": [
        'type: "Slice" bottom: "c" top: "s1" top: "s2"',
        'type: "ReLU" bottom: "s1" top: "s1"',
        'type: "Dropout" bottom: "s2" top: "s2"',
        'type: "Concat" bottom: "s2" bottom: "s1" top: "m"',
    ],
    "product": [
        'type: "TanH" bottom: "c" top: "t"',
        'type: "Eltwise" bottom: "c" bottom: "t" top: "m" eltwise_param { operation: PROD }',
    ],
    "maximum": [
        'type: "ReLU" bottom: "c" top: "t" relu_param { negative_slope: 0.1 }',
        'type: "Eltwise" bottom: "c" bottom: "t" top: "m" eltwise_param { operation: MAX }',
    ],
    "mvn": ['type: "MVN" bottom: "c" top: "m"'],
    "normalize": ['type: "Normalize" bottom: "c" top: "m" norm_param { }'],
    "views": [
        'type: "Reshape" bottom: "c" top: "r" reshape_param { shape { dim: 0 dim: 4 dim: -1 } }',
        'type: "Flatten" bottom: "r" top: "m"',
    ],
    "deconvolution": [
        'type: "Deconvolution" bottom: "c" top: "m" convolution_param { num_output: 4 kernel_size: 2 stride: 2 '
        "weight_filler { type: 'xavier' } }"
    ],
    "scale": [
        'type: "Bias" bottom: "c" top: "c"',
        'type: "Scale" bottom: "c" top: "c" scale_param { bias_term: true }',
        'type: "AbsVal" bottom: "c" top: "m"',
    ],
    "batch norm": ['type: "BatchNorm" bottom: "c" top: "m"'],
    "bn": ['type: "BN" bottom: "c" top: "m"'],
}


@pytest.mark.parametrize("name", CASES)
def test_a_layer_keeps_what_it_says_and_may_run_again(name: str) -> None:
    layers = "".join(f'layer {{ name: "l{i}" {text} }}\n' for i, text in enumerate(CASES[name]))
    graph = prepare(parse(f"{HEAD}\n{layers}{TAIL}", "NetParameter").message, phase="TRAIN")
    torch.manual_seed(0)
    batch = {"data": torch.randn(4, 8, 12, 12), "label": torch.arange(4.0)}
    chain = chain_of(graph)
    again = strategies.find(chain, 0, strategies.parse("revolve"))
    assert again.cost.forwards > len(chain)
    found = []
    for planned in (False, True):
        net = Net(graph, seed=0)
        if planned:
            net.recompute = Recompute(net, chain, again.schedule)
        else:
            with watch_saved(net) as seen:
                net(batch)
            assert account(graph).saved == pytest.approx(seen.total, rel=0.1)
            net = Net(graph, seed=0)
        torch.manual_seed(1)
        for _ in range(2):
            net(batch).loss.backward()
        gradients = [p.grad for p in net.parameters() if p.grad is not None]
        found.append([*gradients, *net.parameters(), *net.buffers(), torch.get_rng_state()])
    assert len(found[0]) == len(found[1])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_what_a_layer_needs_while_it_runs_is_in_the_plan(name: str) -> None:
    """The peak of a pass, with nothing run again and with as much as possible; 32 KiB: scalars and vectors of a layer,
    of which each is too small to count."""
    layers = "".join(f'layer {{ name: "l{i}" {text} }}\n' for i, text in enumerate(CASES[name]))
    text = f"{HEAD}\n{layers}{TAIL}".replace("dim: 12 dim: 12", "dim: 48 dim: 48")
    graph = prepare(parse(text, "NetParameter").message, phase="TRAIN")
    batch = {"data": torch.randn(4, 8, 48, 48), "label": torch.arange(4.0)}
    net = Net(graph, seed=0)

    def run() -> None:
        net(batch).loss.backward()
        for blob in net.parameters():
            blob.grad = None

    plan = make_plan(graph, numbers=numbers_of(net))
    again = strategies.find(plan.chain, 0, strategies.parse("revolve"))
    for cost, recompute in ((plan.cost, None), (again.cost, Recompute(net, plan.chain, again.schedule))):
        net.recompute = recompute
        run()
        assert peak_bytes(run) <= cost.peak + (1 << 15)
