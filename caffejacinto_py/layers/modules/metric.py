"""Torch side of the metrics."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from caffejacinto_py.layers.modules.loss import check_labels


class Accuracy(nn.Module):
    """See the layer. The scores are seen as (outer, classes, inner)."""

    def __init__(
        self,
        *,
        top_k: int = 1,
        axis: int = 1,
        ignore: int | None = None,
        ties_lose: bool = True,
        empty_nan: bool = False,
        per_class: bool = False,
        where: str = "",
    ) -> None:
        super().__init__()
        self.top_k = top_k
        self.axis = axis
        self.ignore = ignore
        self.ties_lose = ties_lose
        self.empty_nan = empty_nan
        self.per_class = per_class
        self.where = where

    @torch.no_grad()
    def forward(self, x: Tensor, label: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        classes = x.shape[self.axis]
        check_labels(label, classes, self.ignore, self.where)
        x = x.reshape(math.prod(x.shape[: self.axis]), classes, -1)
        index = label.reshape(x.shape[0], 1, x.shape[2]).long()
        valid = None if self.ignore is None else index != self.ignore
        if valid is not None:
            index = index.where(valid, 0)
        hit = self._hit(x, index)
        if valid is None:
            accuracy = hit.to(x.dtype).mean()
        else:
            hit &= valid
            count = valid.sum() if self.empty_nan else valid.sum().clamp_(min=1)
            accuracy = hit.sum().to(x.dtype) / count
        return (accuracy, self._classes(index, hit, valid, x)) if self.per_class else accuracy

    def _hit(self, x: Tensor, index: Tensor) -> Tensor:
        """Whether fewer than top_k other classes rank before the label's; a NaN score of the label is a miss."""
        own = x.gather(1, index)
        if self.ties_lose:
            before = (x >= own).sum(1, keepdim=True) - 1
        else:
            higher = torch.arange(x.shape[1], device=x.device).view(1, -1, 1) > index
            before = ((x > own) | ((x == own) & higher)).sum(1, keepdim=True)
        return (before < self.top_k) & (own == own)  # NaN differs from itself

    @staticmethod
    def _classes(index: Tensor, hit: Tensor, valid: Tensor | None, x: Tensor) -> Tensor:
        """Hits of each class / labels of each class."""
        zero = x.new_zeros(x.shape[1])
        flat = index.flatten()
        hits = zero.scatter_add(0, flat, hit.flatten().to(x.dtype))
        ones = torch.ones_like(flat, dtype=x.dtype) if valid is None else valid.flatten().to(x.dtype)
        return hits / zero.scatter_add(0, flat, ones).clamp_(min=1)
