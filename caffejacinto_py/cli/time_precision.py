"""`caffejacinto time --precision fp32,bf16`: the same net in several number types, in turns."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from caffejacinto_py.cli import options

if TYPE_CHECKING:
    import torch

    from caffejacinto_py.engine.net import Net


def compare(nets: Mapping[str, Net], batch: Mapping[str, torch.Tensor], iterations: int) -> list[dict[str, Any]]:
    """Time whole passes of nets that take turns, in rotating order; each turn begins with a pass that is not counted.

    One row a net: median milliseconds; ratio: median over the rounds of the first net's time to this one's (more than
    1: this one is faster); kept_bytes: what a pass keeps for its gradient, weights left out.
    """
    from caffejacinto_py.engine.timing import time_net

    times: dict[str, list[tuple[float, float]]] = {name: [] for name in nets}
    order = list(nets)
    for _ in range(iterations):
        for name in order:
            times[name].append(time_net(nets[name], batch, 1))
        order.append(order.pop(0))
    first = [sum(t) for t in times[next(iter(nets))]]
    return [_row(name, net, times[name], first, batch) for name, net in nets.items()]


def _row(
    name: str, net: Net, times: Sequence[tuple[float, float]], first: Sequence[float], batch: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    forward, backward = (1e3 * statistics.median(t[k] for t in times) for k in (0, 1))
    ratio = statistics.median(a / sum(b) for a, b in zip(first, times, strict=True))
    ran = "/".join(net.types.types) if net.types is not None else "FLOAT"
    ran = "TF32" if net.types is not None and net.types.tf32 else ran
    return {
        "precision": name,
        "runs": ran,
        "forward_ms": forward,
        "backward_ms": backward,
        "total_ms": forward + backward,
        "ratio": ratio,
        "kept_bytes": _kept(net, batch),
    }


def _kept(net: Net, batch: Mapping[str, torch.Tensor]) -> int:
    from caffejacinto_py.engine.memory.measure import watch_saved

    inputs = {name: net.feed(name, batch) for source in net.sources for name in source.tops}
    with watch_saved(net) as saved:
        net(inputs)
    return saved.total


def render(found: Mapping[str, Any]) -> str:
    """The table of the comparison."""
    rows = [("precision", "layers run in", "forward ms", "backward ms", "total ms", "ratio", "kept for backward")]
    for r in found["precisions"]:
        times = (f"{r[k]:.3f}" for k in ("forward_ms", "backward_ms", "total_ms"))
        rows.append((r["precision"], r["runs"], *times, f"{r['ratio']:.2f}", options.size(r["kept_bytes"])))
    head = f"{found['name'] or 'net'} ({found['phase']}), batch {found['batch']}, {found['device']}"
    what = f"ratio: time of {found['precisions'][0]['precision']} to this one's, median of {found['iterations']} rounds"
    return "\n".join([head, options.table(rows, "llrrrrr"), what])
