"""The plan of a net: which module reads and writes which slots, what is freed when, where gradients are cut."""

from __future__ import annotations

from dataclasses import dataclass, replace

from caffejacinto_py.ir.graph import Graph, Node, Value


@dataclass(frozen=True)
class Step:
    """One module call. module: its place in `Net.layers`. cut: positions of inputs whose gradient is not wanted (they
    are detached). affine: the place of a module whose scale and shift this one applies, or None.
    """

    node: Node
    module: int
    ins: tuple[int, ...] = ()
    outs: tuple[int, ...] = ()
    free: tuple[int, ...] = ()
    cut: tuple[int, ...] = ()
    backward: bool = False
    losses: tuple[tuple[int, float], ...] = ()  # (position among the outputs, weight)
    affine: int | None = None


@dataclass(frozen=True)
class Plan:
    """steps: every layer, for `run`. fast: what `forward` executes, on slots that are reused once a value is dead.

    feeds: source tops in order (name, slot). outputs: net outputs (name, slot), alphabetical.
    """

    slots: int
    feeds: tuple[tuple[str, int], ...]
    steps: tuple[Step, ...]
    fast: tuple[Step, ...]
    outputs: tuple[tuple[str, int], ...]


def plan(graph: Graph, *, fused: bool = True) -> Plan:
    """Assign slots in execution order. fused: layers marked `absorbed` join the step before them."""
    nodes = [n for n in graph.nodes if not n.layer.source]
    steps = tuple(
        Step(
            node=node,
            module=i,
            cut=tuple(k for k, need in enumerate(node.needs) if not need),
            backward=node.backward,
            losses=tuple((k, w) for k, w in enumerate(node.loss_weights) if w),
        )
        for i, node in enumerate(nodes)
    )
    merged = _merge(steps) if fused else [(step, step.node.outputs) for step in steps]
    fed = [v for n in graph.nodes if n.layer.source for v in n.outputs]
    slot = {v: i for i, v in enumerate(fed)}
    feeds = tuple((v.name, s) for v, s in slot.items())
    fast, count = _assign(graph, merged, slot)
    return Plan(count, feeds, steps, fast, tuple((v.name, slot[v]) for v in graph.outputs))


def _merge(steps: tuple[Step, ...]) -> list[tuple[Step, tuple[Value, ...]]]:
    """(step, its outputs): an absorbed layer goes into the step that makes its input."""
    merged: list[tuple[Step, tuple[Value, ...]]] = []
    place: dict[Value, int] = {}
    for step in steps:
        node = step.node
        if node.absorbed:
            k = place[node.inputs[0]]
            before = merged[k][0]
            joined = replace(before, affine=step.module, backward=before.backward or step.backward, losses=step.losses)
            merged[k] = (joined, node.outputs)
        else:
            k = len(merged)
            merged.append((step, node.outputs))
        place.update((v, k) for v in node.outputs)
    return merged


def _assign(
    graph: Graph, merged: list[tuple[Step, tuple[Value, ...]]], slot: dict[Value, int]
) -> tuple[tuple[Step, ...], int]:
    """Steps with slots; `slot` is extended by every value. Returns them and the number of slots."""
    last: dict[Value, int] = dict.fromkeys(slot, -1)
    for k, (step, outputs) in enumerate(merged):
        last.update((v, k) for v in (*step.node.inputs, *outputs))
    kept = set(graph.outputs)
    spare: list[int] = []
    count = len(slot)
    fast = []
    for k, (step, outputs) in enumerate(merged):
        ins = tuple(slot[v] for v in step.node.inputs)
        for v in outputs:
            slot[v] = spare.pop() if spare else count
            count += slot[v] == count
        dead = [v for v in dict.fromkeys((*step.node.inputs, *outputs)) if last[v] == k and v not in kept]
        free = tuple(slot[v] for v in dead)
        spare += free
        fast.append(replace(step, ins=ins, outs=tuple(slot[v] for v in outputs), free=free))
    return tuple(fast), count
