"""Memory format of 4-D blobs. The graph is ours, so the layout is the engine's choice, not a user's chore."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from caffejacinto_py.errors import UsageError
from caffejacinto_py.ir.graph import Graph
from caffejacinto_py.passes.precision import Table

if TYPE_CHECKING:
    from caffejacinto_py.engine.net import Net


@dataclass(frozen=True)
class Layout:
    """channels_last: 4-D inputs and 4-D weights are stored N,H,W,C (their shapes stay N,C,H,W).

    `to` and not `contiguous`: with one channel both formats fit the same strides, and only `to` makes them say
    channels_last, which is what the next convolution looks at.
    """

    channels_last: bool = False

    def feed(self, tensor: Tensor) -> Tensor:
        if self.channels_last and tensor.dim() == 4:
            return tensor.to(memory_format=torch.channels_last)
        return tensor

    def weights(self, net: Net) -> None:
        """Store the 4-D parameters of a net in this layout, in place."""
        if self.channels_last:
            for blobs in net.params.values():
                for p in blobs:
                    if p.dim() == 4:
                        p.data = p.data.to(memory_format=torch.channels_last)


def choose(graph: Graph, layout: str, device: torch.device, dtype: torch.dtype, types: Table | None = None) -> Layout:
    """The layout of a net: "nchw", "channels_last", or "auto": channels_last for float32 nets whose convolutions are
    2-D; on a GPU where they use tensor cores, which want it. types: what layers run in."""
    if layout not in ("auto", "nchw", "channels_last"):
        raise UsageError(f"layout '{layout}' is not one of auto, nchw, channels_last")
    if layout != "auto":
        return Layout(layout == "channels_last")
    blobs = [p.shape for p in graph.params if len(p.shape) == 4]
    tensor_cores = types is not None and (types.mixed or types.tf32)
    return Layout(bool(blobs) and dtype != torch.float64 and (device.type != "cuda" or tensor_cores))
