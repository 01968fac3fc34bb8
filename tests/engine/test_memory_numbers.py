"""Bytes of nets that do not run in plain float32: number types and simulated quantization against what is measured.

Predictions are on the safe side: never below the measured peak, but for the scalars and vectors of one layer (SMALL),
of which each is too small to count. They are above it by at most 30 %: a stage counts what its layers keep and pass as
if all of that were there at once, which few of them need.
"""

from __future__ import annotations

import pytest
import torch

from caffejacinto_py.compress import quantize
from caffejacinto_py.engine.memory.budget import make_plan, numbers_of
from caffejacinto_py.engine.memory.measure import peak_bytes, watch_saved
from caffejacinto_py.engine.net import Net
from caffejacinto_py.engine.precision import DTYPES
from caffejacinto_py.passes import prepare
from caffejacinto_py.passes.memory import account
from caffejacinto_py.passes.precision import resolve
from caffejacinto_py.passes.storages import asked
from caffejacinto_py.schema.text import parse
from caffejacinto_py.solver.feed import Feed
from tests.engine.test_memory import HEAD, NET, conv, score, tight

SMALL = 1 << 15
LARGE = NET.replace("dim: 16 dim: 16", "dim: 48 dim: 48")
HALF = "default_forward_type: FLOAT16 default_backward_type: FLOAT16 "
# layers of another type between those in 16 bits: float32 products, LRN and a power; outputs that are cast back
MIXED = (
    HALF
    + HEAD.replace("dim: 16 dim: 16", "dim: 48 dim: 48")
    + conv("a", "data")
    + 'layer { name: "lrn" type: "LRN" bottom: "a" top: "lrn" }'
    + conv("b", "lrn").replace("convolution_param", "forward_type: FLOAT backward_type: FLOAT convolution_param")
    + 'layer { name: "sum" type: "Eltwise" bottom: "a" bottom: "b" top: "sum" }'
    + 'layer { name: "prelu" type: "PReLU" bottom: "sum" top: "sum" }'
    + 'layer { name: "half" type: "Split" bottom: "sum" top: "half" top: "seen" }'
    + 'layer { name: "ave" type: "Pooling" bottom: "half" top: "ave" '
    + "pooling_param { pool: AVE kernel_size: 2 stride: 2 } }"
    + 'layer { name: "sig" type: "Sigmoid" bottom: "ave" top: "sig" }'
    + 'layer { name: "cat" type: "Concat" bottom: "ave" bottom: "sig" top: "cat" }'
    + conv("c", "cat", 16)
    + score("fc", "c")
)
SIMULATED = LARGE + "quantize: true net_quantization_param { quantization_start: 1 %s }"
CASES: dict[str, tuple[str, str | None]] = {
    "float": (LARGE, None),
    "double": (LARGE, "fp64"),
    "bfloat16": (LARGE, "bf16"),
    "float16": (LARGE, "fp16"),
    "mixed": (MIXED, None),
    "simulated": (SIMULATED % "", None),
    "simulated weights": (SIMULATED % "quantize_activations: false", None),
    "simulated per channel, offset": (SIMULATED % "per_channel_weights: true apply_offset_activations: true", None),
    "simulated, drawn": (SIMULATED % "rounding_scheme: STOCHASTIC", None),
}


@pytest.mark.parametrize("name", CASES)
def test_the_measured_peak_is_within_the_plan(name: str) -> None:
    """16 bits are computed here even where the processor has no instruction for them: through torch's slow kernels,
    whose matrices are in the plan then."""
    torch.set_num_threads(1)
    text, override = CASES[name]
    g = prepare(parse(text, "NetParameter").message, phase="TRAIN")
    types = resolve(g, override)
    net = Net(g, seed=0, dtype=DTYPES[types.base], types=types)
    quantize.attach(net)
    batch = Feed(net, seed=0).next()

    def run() -> None:
        net(batch).loss.backward()
        for blob in net.learnable:
            blob.param.grad = None

    run()
    run()
    plain = make_plan(g, numbers=numbers_of(net))
    with watch_saved(net) as seen:
        net(batch)
    # in float64 blobs are not in channels_last, and products need no flattened copy
    assert account(g, numbers=numbers_of(net)).saved == pytest.approx(seen.total, rel=0.2 if name == "double" else 0.02)
    peaks = []
    for share in (None, 0.5, 0.0):
        made = plain if share is None else tight(net, share)
        run()
        peaks.append(peak_bytes(run))
        predicted = made.cost.peak
        assert peaks[-1] - SMALL <= predicted <= 1.3 * peaks[-1], share
    assert peaks[0] >= peaks[1] >= peaks[2]
    assert peaks[0] > peaks[2] or name == "mixed"  # LRN decides there, and has to run backward in any case


def test_what_a_net_asks_for() -> None:
    """Without a net: the types of the file or of the user, in 2 bytes and 8; masters and what belongs to them in 4."""
    g = prepare(parse(LARGE, "NetParameter").message, phase="TRAIN")
    single, half, double = (account(g, numbers=asked(g, kind)) for kind in (None, "bf16", "fp64"))
    assert (half.params, half.gradients, half.history) == (single.params, single.gradients, single.history)
    assert (double.params, double.history) == (2 * single.params, 2 * single.history)
    assert 0.5 < half.saved / single.saved < 0.6
    assert 1.9 < double.saved / single.saved < 2
    simulated = prepare(parse(SIMULATED % "", "NetParameter").message, phase="TRAIN")
    assert account(simulated, numbers=asked(simulated)).saved > 1.2 * single.saved
    assert (
        make_plan(simulated, numbers=asked(simulated, "bf16")).cost
        == make_plan(simulated, numbers=asked(simulated)).cost
    )
    still = LARGE + "quantize: true net_quantization_param { precision: QuantizationParameter_Precision_FLOAT }"
    still_graph = prepare(parse(still, "NetParameter").message, phase="TRAIN")
    assert account(still_graph, numbers=asked(still_graph)).saved < account(simulated, numbers=asked(simulated)).saved
