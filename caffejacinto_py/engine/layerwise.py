"""Run a net one layer at a time, the way Caffe does: every blob and every gradient between two layers can be seen and
changed.

For pycaffe, which promises exactly that, and for `time`. Training uses `Net.forward`, where autograd sees the whole
net.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from caffejacinto_py.ir.graph import Node

Module = Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]


class Tape:
    """What the last forward of each layer left behind: its inputs and outputs, joined by autograd."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[list[torch.Tensor], tuple[torch.Tensor, ...]]] = {}

    def __contains__(self, key: int) -> bool:
        return key in self._kept

    def clear(self) -> None:
        self._kept.clear()

    def forward(
        self, key: int, node: Node, module: Module, bottoms: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        """The tops of one layer, detached. Bottoms are not modified, provided the module is not in place.

        key: the position of the layer in its net, for `backward`.
        """
        ins = [b.detach().requires_grad_(need) for b, need in zip(bottoms, node.needs, strict=True)]
        with torch.set_grad_enabled(node.backward):
            out = module(*ins)
        outs = out if isinstance(out, tuple) else (out,)
        if node.backward:
            self._kept[key] = (ins, outs)
        return tuple(o.detach() for o in outs)

    def backward(
        self, key: int, params: Sequence[torch.nn.Parameter], top_diffs: Sequence[torch.Tensor]
    ) -> list[torch.Tensor | None]:
        """Gradients of the bottoms (None where not needed) for these gradients of the tops.

        Gradients of the learnable blobs are added to `.grad`, as in Caffe. May be called again after one forward.
        """
        ins, outs = self._kept[key]
        wanted = [x for x in ins if x.requires_grad]
        learn = list(dict.fromkeys(p for p in params if p.requires_grad))
        reached = [(o, d) for o, d in zip(outs, top_diffs, strict=True) if o.requires_grad]
        found: Sequence[torch.Tensor | None] = [None] * (len(wanted) + len(learn))
        if reached and found:
            found = torch.autograd.grad(
                [o for o, _ in reached],
                [*wanted, *learn],
                [d.to(o.dtype) for o, d in reached],
                allow_unused=True,
                retain_graph=True,
            )
        for p, g in zip(learn, found[len(wanted) :], strict=True):
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            if g is not None:
                p.grad += g
        diffs = iter([g if g is not None else torch.zeros_like(x) for x, g in zip(wanted, found, strict=False)])
        return [next(diffs) if x.requires_grad else None for x in ins]
