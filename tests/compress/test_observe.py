"""Statistics of blobs: exact counts, a histogram that grows, NaN with the name of its layer."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from caffejacinto_py.compress.observe import Collector, Observer, channel_ranges, measure, observe
from caffejacinto_py.engine.hooks import Hook
from caffejacinto_py.engine.net import Net
from caffejacinto_py.errors import CaffeError, UsageError
from caffejacinto_py.passes import prepare
from caffejacinto_py.schema import text

NET = """
layer { name: "in" type: "Input" top: "data" input_param { shape { dim: 2 dim: 3 dim: 6 dim: 6 } } }
layer { name: "conv" type: "Convolution" bottom: "data" top: "conv"
        convolution_param { num_output: 4 kernel_size: 3 weight_filler { type: "xavier" } } }
layer { name: "relu" type: "ReLU" bottom: "conv" top: "conv" }
layer { name: "pool" type: "Pooling" bottom: "conv" top: "pool" pooling_param { kernel_size: 2 stride: 2 } }
"""


class _Feed:
    """Batches that get larger values from one to the next."""

    def __init__(self, *, bad: float = 0.0) -> None:
        self.generator = torch.Generator().manual_seed(3)
        self.seen: list[Tensor] = []
        self.bad = bad

    def next(self) -> Mapping[str, Tensor]:
        x = torch.randn(2, 3, 6, 6, generator=self.generator) * 3 ** len(self.seen)
        if self.bad:
            x[0, 0, 0, 0] = self.bad
        self.seen.append(x)
        return {"data": x}


def _net() -> Net:
    return Net(prepare(text.parse(NET, "NetParameter"), phase="TEST"), seed=1)


def test_every_top_is_counted_at_its_version() -> None:
    net, feed = _net(), _Feed()
    observer = observe(net, feed, 3)
    assert list(observer.stats) == ["in", "conv", "relu", "pool"]
    assert net.hook is None
    data = torch.cat(feed.seen)
    with torch.no_grad():
        conv = torch.nn.functional.conv2d(data, net.params["conv"][0], net.params["conv"][1])
    for name, value in {"in": data, "conv": conv, "relu": conv.relu()}.items():
        (s,) = observer.stats[name]
        assert (s.layer, s.count, s.bad, s.passes) == (name, value.numel(), 0, 3)
        assert s.zeros == int((value == 0).sum())
        assert s.min == pytest.approx(float(value.min()))
        assert s.max == pytest.approx(float(value.max()))
        assert s.mean == pytest.approx(float(value.double().mean()), abs=1e-5)
        assert s.power == pytest.approx(float(value.double().square().mean()), rel=1e-5)
        assert s.hist.sum() + s.zeros == s.finite
        assert s.sparsity == pytest.approx(float((value == 0).double().mean()))
    pool = net.graph.node("pool")
    read = observer.bottom(pool)
    assert read is not None
    assert read.layer == "relu"
    assert observer.stats["pool"][0].blob == "pool"


def test_only_wanted_layers() -> None:
    net = _net()
    observer = observe(net, _Feed(), 1, wanted=lambda node: node.name == "conv", bins=0)
    assert list(observer.stats) == ["conv"]
    assert observer.stats["conv"][0].count > 0
    assert not len(observer.stats["conv"][0].hist)
    assert observer.bottom(net.graph.node("conv")) is None


def test_a_hook_that_is_there_stays() -> None:
    class Double(Hook):
        def tops(self, node: object, outs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(2 * o for o in outs)

    net, feed, double = _net(), _Feed(), Double()
    net.hook = double
    observer = observe(net, feed, 1)
    assert net.hook is double
    assert observer.stats["in"][0].max == pytest.approx(2 * float(feed.seen[0].max()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_names_the_first_layer_that_made_it(bad: float) -> None:
    with pytest.raises(CaffeError, match=r"layer 'in': 2 of 432 values of blob 'data' are NaN or infinite"):
        observe(_net(), _Feed(bad=bad), 2)
    net = _net()
    with torch.no_grad():
        net.params["conv"][0][0] = bad
    with pytest.raises(CaffeError, match="layer 'conv'"):
        observe(net, _Feed(), 1)
    assert net.hook is None


def test_no_batches_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="at least 1"):
        observe(_net(), _Feed(), 0)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(st.floats(-1e6, 1e6, width=32), max_size=30),
        min_size=1,
        max_size=4,
    )
)
def test_histogram_equals_one_made_at_the_end(batches: list[list[float]]) -> None:
    collector = Collector(bins=64)
    for batch in batches:
        collector.add(torch.tensor(batch, dtype=torch.float64))
    s = collector.stats
    values = np.array([v for b in batches for v in b])
    assert s.count == len(values)
    assert s.zeros == np.count_nonzero(values == 0)
    if s.limit:
        assert abs(values).max() < s.limit <= 2 * abs(values).max()
        wanted = np.histogram(values[values != 0], 64, (-s.limit, s.limit))[0]
        # subtracting the lower border may round tiny negative values up to zero
        tiny = np.count_nonzero((values < 0) & (values > -1e-9 * s.limit))
        assert np.abs(wanted - s.hist).sum() <= 2 * tiny
    else:
        assert not s.hist.any()


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1.0, 3e38])
def test_extreme_magnitudes(scale: float) -> None:
    s = measure(torch.tensor([-1.0, -0.5, 0.0, 0.25, 1.0]) * scale)
    assert s.zeros == 1
    assert s.hist.sum() == 4
    assert s.quantile(1.0) == s.max
    assert s.quantile(0.0) == pytest.approx(s.min, rel=1e-3)


def test_quantiles_are_exact_to_a_bin() -> None:
    x = torch.randn(20000, generator=torch.Generator().manual_seed(5)).relu()
    s = measure(x)
    for q in (0.1, 0.5, 0.6, 0.9, 0.999):
        assert s.quantile(q) == pytest.approx(float(np.quantile(x.numpy(), q)), abs=2 * s.limit / len(s.hist) + 1e-3)
    assert s.quantile(0.3) == 0.0


def test_nothing_or_zeros_only() -> None:
    assert (measure(torch.zeros(0)).count, measure(torch.zeros(0)).max) == (0, 0.0)
    s = measure(torch.zeros(7))
    assert (s.zeros, s.limit, s.quantile(0.5), s.sparsity) == (7, 0.0, 0.0, 1.0)


def test_layout_and_type_do_not_matter() -> None:
    x = torch.randn(2, 8, 5, 4)
    a, b = measure(x), measure(x.to(memory_format=torch.channels_last))
    assert (a.hist == b.hist).all()
    assert a.total == pytest.approx(b.total)
    assert measure(x.half()).count == x.numel()
    assert measure((x > 0).to(torch.int64)).max == 1.0


def test_an_observer_without_a_run_has_nothing() -> None:
    assert Observer().stats == {}


def test_channel_ranges() -> None:
    w = torch.arange(24.0).reshape(2, 3, 2, 2)
    low, high = channel_ranges(w)
    assert low.shape == (2, 1, 1, 1)
    assert low.flatten().tolist() == [0, 12]
    assert high.flatten().tolist() == [11, 23]
    low, high = channel_ranges(w, 1)
    assert low.shape == (1, 3, 1, 1)
    assert high.flatten().tolist() == [15, 19, 23]
    low, high = channel_ranges(torch.tensor([1.0, -2.0]))
    assert low.tolist() == high.tolist() == [1.0, -2.0]
