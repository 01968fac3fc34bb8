"""The net that runs: an nn.Module that executes a plan over a list of slots, under Caffe's names.

It knows nothing of data, solvers or files; weights go in and out as `ModelFile` (engine/weights.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from caffejacinto_py.engine import gpu, precision, size, weights
from caffejacinto_py.engine.hooks import Hook, Module
from caffejacinto_py.engine.layout import Layout, choose
from caffejacinto_py.engine.memory.execute import Recompute
from caffejacinto_py.engine.params import Learnable, make_module, make_params
from caffejacinto_py.engine.plan import Plan, Step, plan
from caffejacinto_py.errors import UsageError, near
from caffejacinto_py.ir.graph import Graph, Node, Shape
from caffejacinto_py.layers.base import Layer


class Result(NamedTuple):
    """loss: sum of loss_weight x loss, shape (). outputs: net outputs by name, alphabetical."""

    loss: Tensor
    outputs: dict[str, Tensor]


@dataclass(frozen=True)
class Source:
    """A layer that must be fed: its tops in order, with their shapes."""

    layer: Layer
    node: Node
    tops: tuple[str, ...]
    shapes: tuple[Shape, ...]


class Net(nn.Module):
    """A net in one phase.

    graph: from `passes.prepare`. share: another Net whose parameters are used, by layer name, where it has them (test
    nets).
    seed: for the fillers; None draws a fresh one. layout: memory format of 4-D blobs, "auto" lets the engine choose.
    inplace: False keeps every blob intact for whoever looks at them (pycaffe). types: what layers run in where that is
    not `dtype` (engine/precision.py).
    """

    def __init__(
        self,
        graph: Graph,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        share: Net | None = None,
        seed: int | None = None,
        layout: str = "auto",
        inplace: bool = True,
        types: precision.Table | None = None,
    ) -> None:
        super().__init__()
        size.check(graph, item=dtype.itemsize)
        self.graph = graph
        self.plan: Plan = plan(graph)
        self.dtype = dtype
        self.types = types
        self.device = torch.device(device)
        owned = make_params(graph, dtype=dtype, seed=seed, share=share.params if share else None)
        self.params: dict[str, list[nn.Parameter]] = {}
        self.blob_shapes: dict[str, list[Shape]] = {}  # as each layer sees its blobs; a sharer's may differ
        self.layers = nn.ModuleList()
        self.sources: list[Source] = []
        for node in graph.nodes:
            self._add(node, owned, inplace=inplace)
        self.learnable = [
            Learnable(owned[p.users[0]], p.lr_mult, p.decay_mult, p.node, p.index, p.name) for p in graph.params
        ]
        self.recompute: Recompute | None = None  # saves memory in passes that build a graph, see engine/memory
        if self.device.type == "cuda" and share is None:
            gpu.claim(self.device)
        self._ready()
        self.to(self.device)
        self.layout: Layout = share.layout if share else choose(graph, layout, self.device, dtype, types)
        self.layout.weights(self)
        self.train(graph.phase == "TRAIN")
        self._hook: Hook | None = None
        self._fast = self._road()

    def _ready(self) -> None:
        """Tell a GPU's libraries what kernels of this net may do; its backward follows its forward."""
        if self.device.type == "cuda":
            search = self.phase == "TRAIN" and self.recompute is None  # shapes stay; room for any workspace
            gpu.allow(tf32=self.types is not None and self.types.tf32, search=search)

    def _road(self) -> list[tuple[Step, nn.Module, Any]]:
        places = [(s, s.module, s.affine) for s in self.plan.fast]
        return [(s, self.layers[m], None if a is None else self.layers[a]) for s, m, a in places]

    @property
    def hook(self) -> Hook | None:
        """Who looks at every pass, see engine/hooks.py."""
        return self._hook

    @hook.setter
    def hook(self, hook: Hook | None) -> None:
        if (hook is None) != (self._hook is None):
            self.plan = plan(self.graph, fused=hook is None)
            self._fast = self._road()
        precision.pause(self.layers, hook is not None)
        self._hook = hook

    def _add(self, node: Node, owned: Any, *, inplace: bool) -> None:
        shapes = [self.graph.shapes[v] for v in node.inputs]
        declared = [tuple(b.shape) for b in node.layer.blobs(shapes)]
        blobs = [owned[node.name, i] for i in range(len(declared))]
        if blobs:
            self.params[node.name] = blobs
            self.blob_shapes[node.name] = declared
        if node.layer.source:
            tops = tuple(v.name for v in node.outputs)
            self.sources.append(Source(node.layer, node, tops, tuple(self.graph.shapes[v] for v in node.outputs)))
            return
        module: Any = make_module(node, shapes, blobs, declared)
        if inplace and node.inplace is not None:
            module.inplace, module.into = True, node.inplace
        self.layers.append(precision.wrap(module, node, self.types))

    @property
    def phase(self) -> str:
        return self.graph.phase

    # --- running -----------------------------------------------------------------------------------------------------
    def forward(self, inputs: Mapping[str, Tensor]) -> Result:
        """One pass. inputs: a tensor for every source top (`sources`), on any device. Frees blobs as soon as they are
        dead."""
        self._ready()
        slots: list[Tensor | None] = [None] * self.plan.slots
        for name, slot in self.plan.feeds:
            slots[slot] = self.feed(name, inputs)
        hook = self._hook
        if hook is not None:
            hook.begin(self)
            self._fed(hook, slots)
        if self.recompute is not None and torch.is_grad_enabled():
            loss = self.recompute(slots)
        else:
            loss = self.steps(slots, 0, len(self._fast))
        if hook is not None:
            hook.end(self)
        if loss is None:
            loss = torch.zeros((), dtype=self.dtype, device=self.device)
        return Result(loss, {name: slots[slot] for name, slot in self.plan.outputs})  # type: ignore[misc]

    def steps(self, slots: list[Tensor | None], first: int, last: int, loss: Tensor | None = None) -> Tensor | None:
        """Run the fast steps first..last-1 on the slots; their losses are added to `loss`."""
        hook = self._hook
        for step, module, affine in self._fast[first:last]:
            args = [slots[i] for i in step.ins]
            if affine is not None:
                args += affine.affine()
            outs = _call(step, module if hook is None else hook.module(step.node, module), args)
            if hook is not None:
                outs = hook.tops(step.node, outs)
            for slot, out in zip(step.outs, outs, strict=True):
                slots[slot] = out
            for i, weight in step.losses:
                loss = _add_loss(loss, outs[i], weight)
            for slot in step.free:
                slots[slot] = None
        return loss

    def _fed(self, hook: Hook, slots: list[Tensor | None]) -> None:
        """Show the inputs to the hook."""
        places = dict(self.plan.feeds)
        for source in self.sources:
            outs = hook.tops(source.node, tuple(slots[places[top]] for top in source.tops))  # type: ignore[misc]
            for top, out in zip(source.tops, outs, strict=True):
                slots[places[top]] = out

    def run(
        self, blobs: dict[str, Tensor], *, start: str | None = None, end: str | None = None
    ) -> Iterator[tuple[Node, tuple[Tensor, ...]]]:
        """Layer by layer, from layer `start` to layer `end` (both included): yields each node with its tops.

        `blobs` maps blob names to tensors; it must hold what the range reads and is updated as the layers run, as
        Caffe's blobs
        are. A pass for the hook begins with the first layer and ends with the last. For debugging; `forward` is the
        fast road.
        """
        self._ready()
        names = [s.node.name for s in self.plan.steps]
        sources = {s.node.name for s in self.sources}
        first, last = self._index(start, names, sources, 0), self._index(end, names, sources, len(names) - 1)
        hook = self._hook or Hook()
        if first == 0:
            hook.begin(self)
            for source in self.sources if self._hook is not None else ():
                outs = hook.tops(source.node, tuple(blobs[top] for top in source.tops))
                blobs.update(zip(source.tops, outs, strict=True))
        for step, module in zip(self.plan.steps[first : last + 1], self.layers[first : last + 1], strict=True):
            for v in step.node.inputs:
                if v.name not in blobs:
                    raise UsageError(f"layer '{step.node.name}' reads blob '{v.name}', which has no value yet")
            with _intact(module):
                called = hook.module(step.node, module)
                outs = _call(step, called, [blobs[v.name] for v in step.node.inputs])
            outs = hook.tops(step.node, outs)
            for v, out in zip(step.node.outputs, outs, strict=True):
                blobs[v.name] = out
            yield step.node, outs
        if last == len(names) - 1:
            hook.end(self)

    @staticmethod
    def _index(name: str | None, names: list[str], sources: set[str], default: int) -> int:
        if name is None:
            return default
        if name in names:
            return names.index(name)
        if name in sources:
            return default if default == 0 else -1
        raise UsageError(f"the net has no layer '{name}'", hint=near(name, names))

    def feed(self, name: str, inputs: Mapping[str, Tensor]) -> Tensor:
        """A source top as the net wants it: device, floating type, memory format; a leaf with gradient if
        force_backward."""
        if name not in inputs:
            raise UsageError(f"input blob '{name}' is missing", hint=near(name, inputs))
        tensor = inputs[name].to(self.device, self.dtype, non_blocking=True)
        tensor = self.layout.feed(tensor)
        if self.graph.force_backward and torch.is_grad_enabled() and not tensor.requires_grad:
            tensor = tensor.detach().requires_grad_()
        return tensor

    def load(self, model: Any, *, ignore_shape_mismatch: bool = False) -> weights.LoadReport:
        """Copy blobs from a ModelFile into layers of the same name. See engine/weights.py."""
        return weights.load(self, model, ignore_shape_mismatch=ignore_shape_mismatch)

    def model(self, *, diffs: bool = False, lazy: bool = False) -> Any:
        """The net as a ModelFile (copies; lazy: for writing, before the net changes). diffs: gradients too."""
        return weights.model(self, diffs=diffs, lazy=lazy)


@contextmanager
def _intact(module: Any) -> Iterator[None]:
    """Let a module leave its inputs as they are for a while."""
    inplace = getattr(module, "inplace", False)
    if inplace:
        module.inplace = False
    try:
        yield
    finally:
        if inplace:
            module.inplace = True


def _call(step: Step, module: Module, args: list[Any]) -> tuple[Tensor, ...]:
    if step.backward:
        for i in step.cut:
            if args[i].requires_grad:
                args[i] = args[i].detach()
        out = module(*args)
    else:
        with torch.no_grad():
            out = module(*args)
    return out if isinstance(out, tuple) else (out,)


def _add_loss(loss: Tensor | None, top: Tensor, weight: float) -> Tensor:
    term = top.sum() if top.dim() else top
    if weight != 1.0:
        term = term * weight
    return term if loss is None else loss + term
