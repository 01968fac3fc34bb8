"""The plan of a net: which module reads and writes which slots, what is freed when, where gradients are cut."""

from __future__ import annotations

from dataclasses import dataclass

from caffejacinto_py.ir.graph import Graph, Node, Value


@dataclass(frozen=True)
class Step:
    """One module call. cut: positions of inputs whose gradient is not wanted (they are detached)."""

    node: Node
    module: int
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    free: tuple[int, ...]
    cut: tuple[int, ...]
    backward: bool
    losses: tuple[tuple[int, float], ...]  # (position among the outputs, weight)


@dataclass(frozen=True)
class Plan:
    """Slots are reused once a value is dead. feeds: source tops in order (name, slot)."""

    slots: int
    feeds: tuple[tuple[str, int], ...]
    steps: tuple[Step, ...]
    outputs: tuple[tuple[str, int], ...]


def plan(graph: Graph) -> Plan:
    """Assign slots in execution order; a slot is free again after the last reader of its value."""
    last: dict[Value, int] = {}
    for index, node in enumerate(graph.nodes):
        for v in (*node.inputs, *node.outputs):
            last[v] = index
    kept = set(graph.outputs)
    slot: dict[Value, int] = {}
    spare: list[int] = []
    count = 0
    feeds: list[tuple[str, int]] = []
    steps: list[Step] = []
    for node in (n for n in graph.nodes if n.layer.source):
        for v in node.outputs:
            slot[v] = count
            feeds.append((v.name, count))
            count += 1
    for index, node in enumerate(graph.nodes):
        if node.layer.source:
            continue
        ins = tuple(slot[v] for v in node.inputs)
        for v in node.outputs:
            if spare:
                slot[v] = spare.pop()
            else:
                slot[v] = count
                count += 1
        dead = [v for v in dict.fromkeys((*node.inputs, *node.outputs)) if last[v] == index and v not in kept]
        free = tuple(slot[v] for v in dead)
        spare += free
        steps.append(_step(graph, node, len(steps), ins, tuple(slot[v] for v in node.outputs), free))
    return Plan(count, tuple(feeds), tuple(steps), tuple((v.name, slot[v]) for v in graph.outputs))


def _step(
    graph: Graph, node: Node, module: int, ins: tuple[int, ...], outs: tuple[int, ...], free: tuple[int, ...]
) -> Step:
    return Step(
        node=node,
        module=module,
        ins=ins,
        outs=outs,
        free=free,
        cut=tuple(i for i, need in enumerate(node.needs) if not need),
        backward=node.backward,
        losses=tuple((i, w) for i, w in enumerate(node.loss_weights) if w),
    )
