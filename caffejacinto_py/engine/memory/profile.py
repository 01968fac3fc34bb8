"""Times and bytes of a chain's stages as they are on this machine, in place of estimates."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from statistics import median

import torch
from torch import Tensor

from caffejacinto_py.engine.memory.execute import Recompute, Slots
from caffejacinto_py.engine.memory.measure import watch_saved
from caffejacinto_py.engine.memory.schedule import keep_all
from caffejacinto_py.engine.memory.stages import Chain, Stage
from caffejacinto_py.engine.net import Net


def profile(net: Net, chain: Chain, inputs: Mapping[str, Tensor], *, rounds: int = 3) -> Chain:
    """The chain with the medians of measured times, and at least the bytes that autograd was seen to keep.

    net: of the chain's graph, with no hook; its blobs, gradients and random state stay as they are. inputs: one batch.
    """
    runner = Recompute(net, chain, keep_all(chain))
    found: list[list[tuple[float, float, int]]] = []
    devices = [net.device] if net.device.type == "cuda" else []
    with torch.random.fork_rng(devices), runner.repeating():
        for _ in range(rounds + 1):
            slots: Slots = [None] * net.plan.slots
            for name, slot in net.plan.feeds:
                slots[slot] = net.feed(name, inputs)
            found.append([_stage(net, stage, slots) for stage in chain.stages])
    warm = found[1:]
    stages = []
    for k, stage in enumerate(chain.stages):
        forward, backward = (median(row[k][i] for row in warm) for i in (0, 1))
        expected = chain.bytes(stage.keeps - chain.frontiers[k]) + stage.extra
        more = max(0, max(row[k][2] for row in warm) - expected)
        stages.append(replace(stage, forward=forward, backward=backward, extra=stage.extra + more))
    return replace(chain, stages=tuple(stages))


def _stage(net: Net, stage: Stage, slots: Slots) -> tuple[float, float, int]:
    """(seconds forward, seconds backward, bytes kept beyond what was there before); the slots move on behind it."""
    for i, tensor in enumerate(slots):
        if tensor is not None:
            slots[i] = tensor.detach().requires_grad_(tensor.requires_grad)
    before = [t for t in slots if t is not None]
    leaves = [t for t in before if t.requires_grad]
    weights: list[Tensor] = [p for p in net.parameters() if p.requires_grad]
    with watch_saved(net, *before) as seen:
        started = _now(net)
        loss = net.steps(slots, stage.first, stage.last)
        forward = _now(net) - started
        kept = seen.total
    made = [t for t in (*slots, loss) if t is not None and t.requires_grad and t.grad_fn is not None]
    if not made:
        return forward, 0.0, kept
    gradients = [torch.ones_like(t) for t in made]
    started = _now(net)
    torch.autograd.grad(made, leaves + weights, gradients, allow_unused=True)
    return forward, _now(net) - started, kept


def _now(net: Net) -> float:
    if net.device.type == "cuda":
        torch.cuda.synchronize(net.device)
    return time.perf_counter()
