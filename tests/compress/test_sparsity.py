"""Which weights take part, thresholds, tables: against caffe-jacinto's own results, and where it has no say."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from caffejacinto_py.compress import sparsity, threshold
from caffejacinto_py.compress.sparsity import Fractions, Limits, Pruned
from caffejacinto_py.engine.net import Net
from caffejacinto_py.layers.base import Prunable
from caffejacinto_py.passes import prepare
from caffejacinto_py.schema.text import parse
from caffejacinto_py.schema.upgrade import load_net
from tests.conftest import shared

CASES = ("channel_cap_ratio", "channel_cap_value", "channel_coarse_step", "channel_no_cap", "channel_solver_like",
         "channel_zero_fraction", "net_coarse", "net_documented", "net_no_cap", "net_tool_defaults")  # fmt: skip
FROZEN = "All zero weights of convolution layers are frozen"


def make(text: str, phase: str = "TEST") -> Net:
    return Net(prepare(parse(text, "NetParameter"), phase=phase), seed=3)


@pytest.fixture(scope="module")
def before() -> Any:
    return np.load(shared("golden/jacinto/sparsity/threshold_before.npz"))


@pytest.fixture(scope="module")
def net() -> Net:
    path = shared("golden/jacinto/sparsity/threshold_net.prototxt")
    return Net(prepare(load_net(path), phase="TEST"), seed=0)


@pytest.mark.parametrize("case", CASES)
def test_golden(case: str, net: Net, before: Any) -> None:
    """The very weights that the binary sets to zero, and its log."""
    folder = shared("golden/jacinto/sparsity")
    table = np.load(folder / f"threshold_{case}.npz")
    names = [k[7:] for k in before.files if k.startswith("weight/")]
    with torch.no_grad():
        for name in names:
            net.params[name][0].copy_(torch.from_numpy(before[f"weight/{name}"]))
    per_channel = str(table["kind"]) == "channel"
    *fractions, maxratio, value_max, step = table["settings"].tolist()
    found = sparsity.weights(net)
    limits = Limits(maxratio, value_max, step)
    done = sparsity.prune(found, Fractions(*fractions), limits, per_channel=per_channel)
    for name in names:
        want = before[f"weight/{name}"]
        if f"zeroed/{name}" in table.files:
            bits = np.unpackbits(table[f"zeroed/{name}"])[: want.size].reshape(want.shape)
            want = np.where(bits, np.float32(0), want)
        np.testing.assert_array_equal(net.params[name][0].detach().numpy(), want, err_msg=name)
    counted = [w for w in found if w.counted]
    rows = sparsity.measure(net)
    connected = sparsity.count(counted, sparsity.masks(counted))
    mine = [*sparsity.prune_lines(done, per_channel=per_channel), *sparsity.lines(rows), FROZEN,
            *sparsity.lines(connected, what="ConnectivitySparsity")]  # fmt: skip
    log = (folder / f"threshold_{case}.log").read_text().splitlines()
    # the binary adds up its steps in float32: the threshold of a whole layer differs in the sixth digit
    assert [_without_threshold(line) for line in mine] == [_without_threshold(line) for line in log]
    np.testing.assert_allclose([_threshold(x) for x in mine], [_threshold(x) for x in log], rtol=2e-5)
    assert np.float32(sparsity.total(rows).fraction) == pytest.approx(float(table["sparsity"]), rel=1e-6)


def _without_threshold(line: str) -> str:
    return re.sub(r"SelectedThreshold=\S+", "", line)


def _threshold(line: str) -> float:
    found = re.search(r"SelectedThreshold=(\S+)", line)
    return float(found[1]) if found else 0.0


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.3, 0.305, 0.5, 0.7, 0.99, 1.0])
@pytest.mark.parametrize("n", [27, 75, 144, 1152])
def test_zeros_per_row(fraction: float, n: int) -> None:
    """min(floor(fraction n), how many are below the cap)."""
    weight = torch.randn(64, n, generator=torch.Generator().manual_seed(n))
    magnitudes = weight.abs()
    cap = torch.minimum(magnitudes.amax(1) * 0.4, torch.tensor(0.9))
    below = (magnitudes < cap[:, None]).sum(1)
    threshold.apply(weight, threshold.per_row(weight, fraction, Limits(0.4, 0.9, 1e-9)))
    want = below.clamp_max(int(np.floor(np.float32(fraction) * n + 1e-6)))
    assert torch.equal((weight == 0).sum(1), want)


def test_memory_layout_does_not_matter() -> None:
    a = torch.randn(8, 40, 3, 3, generator=torch.Generator().manual_seed(1))
    b = a.to(memory_format=torch.channels_last)
    assert b.stride() != a.stride()
    for weight in (a, b):
        threshold.apply(weight, threshold.per_row(weight, 0.5, Limits(1, 10)))
    assert torch.equal(a, b)
    assert (a == 0).flatten(1).sum(1).tolist() == [180] * 8


def test_zero_and_constant_rows() -> None:
    weight = torch.tensor([[0.0] * 4, [2.0] * 4, [0.0, 0.0, 0.0, 1.0], [float("nan"), 1.0, 2.0, 3.0]])
    found = threshold.per_row(weight, 0.5, Limits(1.0, 10.0))
    threshold.apply(weight, found)
    assert torch.equal(weight[:3], torch.tensor([[0.0] * 4, [2.0] * 4, [0.0, 0.0, 0.0, 1.0]]))
    assert torch.equal(weight[3, 1:], torch.tensor([1.0, 2.0, 3.0])), "a row with NaN is left alone"


@pytest.mark.parametrize(
    ("sizes", "kind"),
    [
        (Prunable(True, (3, 3), 1, 32, 32), "mid"),
        (Prunable(True, (5, 3), 4, 32, 31), "low"),
        (Prunable(True, (3, 3), 1, 3, 32), "low"),
        (Prunable(True, (3, 3), 1, 256, 512), "high"),
        (Prunable(True, (3, 3), 1, 255, 512), "mid"),
        (Prunable(True, (3, 3), 1, 31, 31), None),
        (Prunable(True, (1, 1), 1, 512, 512), None),
        (Prunable(True, (2, 3), 1, 64, 64), None),
        (Prunable(True, (3, 3), 64, 64, 64), None),
        (Prunable(True, (), 1, 64, 64), None),
        (Prunable(False, (), 1, 800, 512), "high"),
        (Prunable(False, (4, 4), 1, 64, 64), "mid"),
        (Prunable(False, (4, 4), 64, 64, 64), None),
    ],
)
def test_kinds(sizes: Prunable, kind: str | None) -> None:
    assert sparsity.kind_of(sizes) == kind


SMALL = """
name: "small"
layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 2 dim: 32 dim: 6 dim: 6 } } }
layer { name: "conv" type: "Convolution" bottom: "data" top: "conv" param { name: "shared" }
  convolution_param { num_output: 32 kernel_size: 3 pad: 1 weight_filler { type: "xavier" } } }
layer { name: "up" type: "Deconvolution" bottom: "conv" top: "up"
  convolution_param { num_output: 32 kernel_size: 3 weight_filler { type: "xavier" } } }
layer { name: "ip" type: "InnerProduct" bottom: "up" top: "ip"
  inner_product_param { num_output: 32 weight_filler { type: "xavier" } } }
layer { name: "last" type: "Convolution" bottom: "up" top: "last"
  convolution_param { num_output: 4 kernel_size: 8 weight_filler { type: "xavier" } } }
layer { name: "prob" type: "Softmax" bottom: "last" top: "prob" }
"""


def test_also() -> None:
    """Other layer types take part where they are asked for."""
    net = make(SMALL)
    assert [r.name for r in sparsity.measure(net)] == ["conv"], "the one before the softmax is not counted"
    also = ("InnerProduct", "Deconvolution")
    found = sparsity.weights(net, also=also)
    assert [(w.name, w.kind, w.counted) for w in found] == [
        ("conv", "mid", True), ("up", "mid", True), ("ip", "mid", True), ("last", "low", False)
    ]  # fmt: skip
    done = sparsity.prune(found, Fractions(0.2, 0.6, 0.6), Limits(1, 10))
    assert all(isinstance(d, Pruned) for d in done)
    shares = [r.fraction for r in sparsity.measure(net, also=also)]
    assert shares == pytest.approx([172 / 288, 172 / 288, 1228 / 2048], abs=1e-3)
    assert sparsity.lines(sparsity.measure(net))[:2] == [
        "Num Params(1), Sparsity (zero_weights/count): ",
        "conv_param_shared(0.597) ",
    ]


OTHERS = """
layer { name: "in" type: "Input" top: "x" input_param { shape { dim: 1 dim: 32 dim: 8 dim: 8 } } }
layer { name: "plain" type: "Convolution" bottom: "x" top: "plain" convolution_param { num_output: 32 kernel_size: 3 } }
layer { name: "deep" type: "DepthwiseConvolution" bottom: "plain" top: "deep"
  convolution_param { num_output: 32 kernel_size: 3 } }
layer { name: "nd" type: "NdConvolution" bottom: "deep" top: "nd"
  convolution_param { num_output: 32 kernel_shape { dim: 3 dim: 3 } } }
layer { name: "lp" type: "LPConvolution" bottom: "nd" top: "lp" convolution_param { num_output: 32 kernel_size: 1 }
  lpfp_param { bd: 2 ad: 6 } }
"""


def test_only_the_type_convolution_counts_unless_asked_for() -> None:
    """As in C++, which compares the type; depthwise weights are counted where they are asked for, but never pruned."""
    made = Net(prepare(parse(OTHERS, "NetParameter"), phase="TEST"), seed=0)
    assert [w.name for w in sparsity.weights(made)] == ["plain"]
    found = sparsity.weights(made, also=("DepthwiseConvolution", "NdConvolution"))
    assert [(w.name, w.kind) for w in found] == [("plain", "mid"), ("deep", None), ("nd", "mid")]


def test_a_split_before_the_softmax_counts() -> None:
    """As in C++, where the layer next to the convolution then is a Split."""
    more = 'layer { name: "look" type: "Silence" bottom: "last" }'
    assert [r.name for r in sparsity.measure(make(SMALL + more))] == ["conv", "last"]


def test_net_without_convolutions() -> None:
    net = make('layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 1 } } }')
    assert sparsity.measure(net) == []
    assert sparsity.lines([])[-1] == "Total Sparsity (zero_weights/count) =  (0/0) 0"


def test_masks_follow_the_weights() -> None:
    net = make(SMALL)
    found = sparsity.weights(net)
    sparsity.prune(found, Fractions(0.5, 0.5, 0.5), Limits(1, 10))
    for w, mask in zip(found, sparsity.masks(found)):
        assert mask.stride() == w.param.stride()
        assert torch.equal(mask, (w.param != 0).float())
