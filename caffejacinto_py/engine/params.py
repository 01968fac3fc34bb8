"""The learnable blobs of a net as torch parameters: made, filled, shared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from caffejacinto_py.errors import LayerError
from caffejacinto_py.ir.graph import Graph, Node, Param, Shape
from caffejacinto_py.layers.fillers import fill
from caffejacinto_py.schema.blobs import blob_to_array

if TYPE_CHECKING:
    from caffejacinto_py.engine.net import Net

Owned = dict[tuple[str, int], nn.Parameter]


@dataclass(frozen=True)
class Learnable:
    """A blob that the solver may update: an owner, in Caffe's order."""

    param: nn.Parameter
    lr_mult: float
    decay_mult: float
    node: str
    index: int
    name: str


def make_params(
    graph: Graph, *, dtype: torch.dtype, seed: int | None, share: Mapping[str, list[nn.Parameter]] | None
) -> Owned:
    """A parameter for every (layer, blob index): taken from `share` by layer name, else from the prototxt's blobs,
    else filled.

    Fillers draw from one generator seeded by `seed`, in Caffe's order of blobs.
    """
    rng = np.random.default_rng(seed)
    nodes = {n.name: n for n in graph.nodes}
    made: Owned = {}
    for p in graph.params:
        param = _shared(p, share) if share else None
        if param is None:
            array = _initial(graph, nodes[p.node], p, rng)
            param = nn.Parameter(
                torch.from_numpy(array).to(dtype), requires_grad=bool(p.lr_mult) or graph.force_backward
            )
        for user in p.users:
            made[user] = param
    return made


class Reshaped(nn.Module):
    """A module some of whose blobs are another layer's memory in another shape (share_mode: PERMISSIVE).

    borrowed: per parameter name of `inner`, the owner's parameter and the shape in which `inner` wants it.
    """

    def __init__(self, inner: nn.Module, borrowed: dict[str, tuple[nn.Parameter, Shape]]) -> None:
        super().__init__()
        self.inner = inner
        self.names = {name: shape for name, (_, shape) in borrowed.items()}
        self.owners = nn.ParameterList([p for p, _ in borrowed.values()])

    def forward(self, *args: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        now = {name: p.reshape(shape) for (name, shape), p in zip(self.names.items(), self.owners, strict=True)}
        return torch.func.functional_call(self.inner, now, args)


def make_module(node: Node, ins: list[Shape], blobs: list[nn.Parameter], declared: list[Shape]) -> nn.Module:
    """The torch module of a node. `declared`: the shapes the layer wants; a shared blob may have another one."""
    odd = {i for i, (p, s) in enumerate(zip(blobs, declared, strict=True)) if tuple(p.shape) != s}
    if not odd:
        return node.layer.module(ins, blobs)
    # the module is built around stand-ins that take no memory; each forward puts the owners' values in their place
    stand_ins = {i: nn.Parameter(blobs[i].detach().new_zeros(()).expand(declared[i]), requires_grad=False) for i in odd}
    inner = node.layer.module(ins, [stand_ins.get(i, p) for i, p in enumerate(blobs)])
    index = {id(p): i for i, p in stand_ins.items()}
    found = {name: index[id(p)] for name, p in inner.named_parameters() if id(p) in index}
    return Reshaped(inner, {name: (blobs[i], declared[i]) for name, i in found.items()})


def _shared(p: Param, share: Mapping[str, list[nn.Parameter]]) -> nn.Parameter | None:
    for name, index in p.users:
        if name in share and index < len(share[name]):
            param = share[name][index]
            if tuple(param.shape) != p.shape:
                raise LayerError(
                    f"layer '{name}': blob {index} has shape {p.shape} here and {tuple(param.shape)} in the net "
                    "it shares weights with"
                )
            return param
    return None


def _initial(graph: Graph, node: Node, p: Param, rng: np.random.Generator) -> np.ndarray:
    blob = node.layer.blobs([graph.shapes[v] for v in node.inputs])[p.index]
    if len(node.proto.blobs) > p.index:
        return _given(node, p.index, tuple(blob.shape))
    if blob.value is not None:
        return np.asarray(blob.value)
    if blob.filler is None:
        return np.zeros(blob.shape, np.float32)
    try:
        return fill(blob.filler, tuple(blob.shape), rng, graph.dialect)
    except LayerError as e:
        e.loc = e.loc or graph.where(node, *e.field)
        e.text = f"layer '{node.name}': {e.text}"
        raise


def _given(node: Node, index: int, shape: Shape) -> np.ndarray:
    """Blobs written inside a prototxt's layer replace its fillers."""
    array = blob_to_array(node.proto.blobs[index])
    if array.size != int(np.prod(shape)):
        raise LayerError(
            f"layer '{node.name}': blob {index} in the prototxt has shape {array.shape}, the layer needs {shape}",
            loc=node.loc,
        )
    return np.array(array, np.float32).reshape(shape)


def share_buffers(owner: Net, view: Net) -> None:
    """Let layers of two nets with the same parameters have one state: BatchNorm's count of passes, an LSTM's memory."""
    kept = {n.name: m for n, m in zip((n for n in owner.graph.nodes if not n.layer.source), owner.layers, strict=True)}
    for node, module in zip((n for n in view.graph.nodes if not n.layer.source), view.layers, strict=True):
        for name, buffer in getattr(kept.get(node.name), "_buffers", {}).items():
            own = module._buffers.get(name)
            if buffer is not None and own is not None and own.shape == buffer.shape:
                module._buffers[name] = buffer
