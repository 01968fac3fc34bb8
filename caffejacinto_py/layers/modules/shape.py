"""Torch side of the routing layers. Views where torch can make one."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Concat(nn.Module):
    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, *xs: Tensor) -> Tensor:
        return torch.cat(xs, self.axis)


class Slice(nn.Module):
    """`sizes` None: equal parts, so that another size of that axis works too."""

    def __init__(self, axis: int, tops: int, sizes: list[int] | None) -> None:
        super().__init__()
        self.axis = axis
        self.tops = tops
        self.sizes = sizes

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        if self.tops == 1:
            return x
        if self.sizes is None:
            return x.split(x.shape[self.axis] // self.tops, self.axis)
        # the last size is what remains: the sliced axis may be the batch
        last = x.shape[self.axis] - sum(self.sizes[:-1])
        return torch.split(x, [*self.sizes[:-1], last], self.axis)


class Split(nn.Module):
    def __init__(self, tops: int) -> None:
        super().__init__()
        self.tops = tops

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        return x if self.tops == 1 else (x,) * self.tops


class Flatten(nn.Module):
    def __init__(self, start: int, end: int) -> None:
        super().__init__()
        self.start = start
        self.end = end

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(self.start, self.end)


class Reshape(nn.Module):
    """Replace axes start..end-1 by dims: a size, 0 = copy of axis start + i, -1 = what remains."""

    def __init__(self, start: int, end: int, dims: list[int]) -> None:
        super().__init__()
        self.start = start
        self.end = end
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        dims = [shape[self.start + i] if d == 0 else d for i, d in enumerate(self.dims)]
        return x.reshape([*shape[: self.start], *dims, *shape[self.end :]])


class Softmax(nn.Module):
    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x, self.axis)


class ArgMax(nn.Module):
    """Ties go to the larger index: torch prefers the smaller one, so the axis is searched backwards."""

    def __init__(self, k: int, axis: int | None, values: bool, ndim: int) -> None:
        super().__init__()
        self.k = k
        self.axis = axis
        self.values = values
        self.ndim = ndim

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach()
        axis = 1 if self.axis is None else self.axis
        if self.axis is None:
            x = x.reshape(x.shape[0], -1)
        index, value = self._top(x, axis)
        if self.axis is not None:
            return value if self.values else index
        parts = [index, value] if self.values else [index]
        return torch.stack(parts, 1).reshape(x.shape[0], len(parts), self.k, *[1] * (self.ndim - 3))

    def _top(self, x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        back = x.flip(axis)
        if self.k == 1:
            place = back.argmax(axis, keepdim=True)
        else:
            place = back.argsort(dim=axis, descending=True, stable=True).narrow(axis, 0, self.k)
        value = back.gather(axis, place)
        return (x.shape[axis] - 1 - place).to(x.dtype), value


class Reduction(nn.Module):
    def __init__(self, operation: str, axis: int, coeff: float) -> None:
        super().__init__()
        self.operation = operation
        self.axis = axis
        self.coeff = coeff

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(*x.shape[: self.axis], -1)
        if self.operation == "ASUM":
            x = x.abs()
        elif self.operation == "SUMSQ":
            x = x.square()
        y = x.mean(-1) if self.operation == "MEAN" else x.sum(-1)
        return y if self.coeff == 1 else y * self.coeff


class Silence(nn.Module):
    def forward(self, *xs: Tensor) -> tuple[()]:
        return ()
