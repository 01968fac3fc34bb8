"""Run a test net over its data and average what it puts out, as the solver's test pass and `caffe test` do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from caffejacinto_py.engine.net import Net
from caffejacinto_py.engine.ranks import ALONE, Ranks


class Feeds(Protocol):
    """Where batches come from: `next()` gives a tensor for every source top of the net."""

    def next(self) -> Mapping[str, Tensor]: ...


@dataclass(frozen=True)
class TestOutput:
    """One element of one output blob. index: its number over all outputs, as logs count them.

    value: mean over the iterations. per_iteration: its value in each.
    """

    __test__ = False  # for pytest

    name: str
    index: int
    value: float
    loss_weight: float = 0.0
    per_iteration: tuple[float, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Score:
    """Outputs of a test pass. loss: mean weighted loss. iterations: done, less than asked when stopped."""

    outputs: tuple[TestOutput, ...]
    loss: float
    iterations: int


def loss_weights(net: Net) -> dict[str, float]:
    """The loss weight of every net output, 0 for those that are no loss."""
    made = {v: w for n in net.graph.nodes for v, w in zip(n.outputs, n.loss_weights or (0.0,) * len(n.outputs))}
    return {v.name: made.get(v, 0.0) for v in net.graph.outputs}


def evaluate(
    net: Net, feeds: Feeds, iterations: int, *, proceed: Callable[[], bool] | None = None, ranks: Ranks = ALONE
) -> Score:
    """Forward `iterations` batches and average each element of each output.

    proceed: asked before every batch; False ends the pass early. Nothing waits for the device until the end. ranks:
    each runs every world-th batch, and all have the result; they run equally many, those too many do not count.
    """
    rows: dict[str, list[Tensor]] = {v.name: [] for v in net.graph.outputs}
    losses: list[Tensor] = []
    for i in range(ranks.rank, -(-iterations // ranks.world) * ranks.world, ranks.world):
        if proceed is not None and not proceed():
            break
        with torch.no_grad():
            result = net(feeds.next())
        if i >= iterations:
            continue
        losses.append(result.loss)
        for name, value in result.outputs.items():
            rows[name].append(value.detach().reshape(-1))
    if not ranks.alone:
        rows, losses = _together(ranks, rows, losses)
    loss = float(torch.stack(losses).double().mean()) if losses else 0.0
    return Score(tuple(summarize(rows, loss_weights(net))), loss, len(losses))


def _together(
    ranks: Ranks, rows: dict[str, list[Tensor]], losses: list[Tensor]
) -> tuple[dict[str, list[Tensor]], list[Tensor]]:
    """Everybody's rows and losses, in the order of the batches."""
    mine = {name: [row.cpu() for row in values] for name, values in rows.items()}
    everybody = ranks.gather((mine, [loss.cpu() for loss in losses]))
    most = max(len(found) for _, found in everybody)
    order = [(k, r) for k in range(most) for r, (_, found) in enumerate(everybody) if k < len(found)]
    return {n: [everybody[r][0][n][k] for k, r in order] for n in rows}, [everybody[r][1][k] for k, r in order]


def summarize(rows: Mapping[str, Sequence[Tensor]], weights: Mapping[str, float]) -> list[TestOutput]:
    """Means over iterations, element by element. rows: per output blob, one flat tensor per iteration."""
    found: list[TestOutput] = []
    for name, values in rows.items():
        if not values:
            continue
        # outputs whose length changes from batch to batch (detections) have no mean per element
        if len({len(v) for v in values}) > 1:
            continue
        table: np.ndarray = torch.stack(list(values)).double().cpu().numpy()
        for column in table.T:
            weight = weights.get(name, 0.0)
            found.append(TestOutput(name, len(found), float(column.mean()), weight, tuple(column.tolist())))
    return found
