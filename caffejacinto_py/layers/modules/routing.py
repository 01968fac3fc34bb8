"""Torch side of Tile, BatchReindex, Filter, Permute, Parameter and Embed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from caffejacinto_py.errors import DataError


def check_index(index: Tensor, size: int, where: str) -> None:
    """Raise DataError for a number outside 0..size-1. On the CPU only: elsewhere it would stall the device."""
    if torch.compiler.is_compiling() or index.device.type != "cpu":
        return
    bad = (index < 0) | (index >= size)
    if bool(bad.any()):
        raise DataError(f"{where} holds {int(index[bad][0])}, but only 0..{size - 1} exist")


class Tile(nn.Module):
    def __init__(self, axis: int, tiles: int) -> None:
        super().__init__()
        self.axis, self.tiles = axis, tiles

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x] * self.tiles, self.axis)


class BatchReindex(nn.Module):
    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        index = index.detach().long()
        check_index(index, x.shape[0], self.where)
        return x.index_select(0, index)


class Filter(nn.Module):
    """The number of items depends on the data, so the host waits for them."""

    def forward(self, *bottoms: Tensor) -> Tensor | tuple[Tensor, ...]:
        *data, selector = bottoms
        kept = selector.detach().reshape(-1).nonzero().flatten()
        tops = tuple(x.index_select(0, kept) for x in data)
        return tops if len(tops) > 1 else tops[0]


class Permute(nn.Module):
    def __init__(self, order: Sequence[int]) -> None:
        super().__init__()
        self.order = tuple(order)

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.order)


class Parameter(nn.Module):
    def __init__(self, blob: nn.Parameter) -> None:
        super().__init__()
        self.blob = blob

    def forward(self) -> Tensor:
        return self.blob.view_as(self.blob)


class Embed(nn.Module):
    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, where: str) -> None:
        super().__init__()
        self.weight, self.bias, self.where = weight, bias, where

    def forward(self, x: Tensor) -> Tensor:
        index = x.detach().long()
        check_index(index, self.weight.shape[0], self.where)
        y = F.embedding(index, self.weight)
        return y if self.bias is None else y + self.bias
