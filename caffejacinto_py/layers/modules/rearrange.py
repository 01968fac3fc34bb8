"""Numbers in another order, on torch."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ShuffleChannel(nn.Module):
    def __init__(self, group: int) -> None:
        super().__init__()
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        n, c, *rest = x.shape
        return x.reshape(n, self.group, c // self.group, *rest).transpose(1, 2).reshape(x.shape)

    def extra_repr(self) -> str:
        return f"group={self.group}"


class Reorg(nn.Module):
    """See the layer."""

    def __init__(self, stride: int, *, reverse: bool) -> None:
        super().__init__()
        self.stride, self.reverse = stride, reverse

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        s = self.stride
        k = c // (s * s)
        if self.reverse:  # channels are (a, b, k)
            return x.reshape(n, s, s, k, h, w).permute(0, 3, 4, 1, 5, 2).reshape(n, k, h * s, w * s)
        blocks = x.reshape(n, k, h, s, w, s).permute(0, 3, 5, 1, 2, 4)
        return blocks.reshape(n, c * s * s, h // s, w // s)

    def extra_repr(self) -> str:
        return f"stride={self.stride}, reverse={self.reverse}"


class Transpose(nn.Module):
    def __init__(self, dims: list[int]) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.dims)

    def extra_repr(self) -> str:
        return f"dims={self.dims}"


class Flip(nn.Module):
    def __init__(self, axes: list[int]) -> None:
        super().__init__()
        self.axes = axes

    def forward(self, x: Tensor) -> Tensor:
        return torch.flip(x, self.axes) if self.axes else x

    def extra_repr(self) -> str:
        return f"axes={self.axes}"
