"""Torch side of the losses of distances and of probabilities: scalars of shape (), unweighted."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from caffejacinto_py.layers.modules.loss import check_labels

LEAST = 1e-20  # Caffe's kLOG_THRESHOLD


class L1Loss(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return F.l1_loss(a, b.reshape(a.shape), reduction="sum") / a.shape[0]


class SmoothL1Loss(nn.Module):
    """weights: inner, or inner and outer."""

    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.beta = 1 / sigma**2

    def forward(self, x: Tensor, target: Tensor, *weights: Tensor) -> Tensor:
        target = target.reshape(x.shape)
        if not weights:
            return F.smooth_l1_loss(x, target, reduction="sum", beta=self.beta) / x.shape[0]
        inner = weights[0].detach().reshape(x.shape)
        each = F.smooth_l1_loss(x * inner, target * inner, reduction="none", beta=self.beta)
        if len(weights) > 1:
            each = each * weights[1].detach().reshape(x.shape)
        return each.sum() / x.shape[0]


class _Distance(torch.autograd.Function):
    """sqrt(squared) with the gradient 1 / (2 (sqrt(squared) + 1e-4)): Caffe's, finite for equal pairs."""

    @staticmethod
    def forward(ctx: Any, squared: Tensor) -> Tensor:
        d = squared.sqrt()
        ctx.save_for_backward(d)
        return d

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (d,) = ctx.saved_tensors
        return grad / (2 * (d + 1e-4))


class ContrastiveLoss(nn.Module):
    def __init__(self, margin: float, *, legacy: bool) -> None:
        super().__init__()
        self.margin, self.legacy = margin, legacy

    def forward(self, a: Tensor, b: Tensor, similar: Tensor) -> Tensor:
        squared = (a.flatten(1) - b.flatten(1)).square().sum(1)
        if self.legacy:
            apart = F.relu(self.margin - squared)
        else:
            apart = F.relu(self.margin - _Distance.apply(squared)).square()
        same = similar.detach().reshape(-1).long() != 0
        return torch.where(same, squared, apart).sum() / (2 * len(squared))


def log_cut(p: Tensor) -> Tensor:
    """log(max(p, 1e-20)), with the gradient 1 / max(p, 1e-20) everywhere."""
    return torch.log(p + (p.clamp(min=LEAST) - p).detach())


class MultinomialLogisticLoss(nn.Module):
    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def forward(self, p: Tensor, label: Tensor) -> Tensor:
        p, label = p.flatten(1), label.detach().reshape(-1)
        check_labels(label, p.shape[1], None, self.where)
        return -log_cut(p.gather(1, label.long().unsqueeze(1))).sum() / p.shape[0]


class _Infogain(nn.Module):
    """matrix: H as a numpy array, or None where it comes as a bottom."""

    matrix: Tensor | None

    def __init__(self, matrix: Any, where: str) -> None:
        super().__init__()
        held = None if matrix is None else torch.tensor(matrix)
        self.register_buffer("matrix", held, persistent=False)
        self.where = where

    def rows(self, target: Tensor, classes: int, given: tuple[Tensor, ...], like: Tensor) -> Tensor:
        """H[label] for every label: (.., classes)."""
        h = given[0].detach() if self.matrix is None else self.matrix
        return h.reshape(classes, classes).to(like.dtype)[target]


class InfogainOfProbabilities(_Infogain):
    def forward(self, p: Tensor, label: Tensor, *matrix: Tensor) -> Tensor:
        p, label = p.flatten(1), label.detach().reshape(-1)
        check_labels(label, p.shape[1], None, self.where)
        return -(self.rows(label.long(), p.shape[1], matrix, p) * log_cut(p)).sum() / p.shape[0]


class InfogainOfScores(_Infogain):
    """The scores are seen as (outer, classes, inner)."""

    def __init__(
        self, matrix: Any, where: str, *, axis: int, normalization: str, ignore: int | None, with_prob: bool
    ) -> None:
        super().__init__(matrix, where)
        self.axis, self.normalization, self.ignore, self.with_prob = axis, normalization, ignore, with_prob

    def forward(self, x: Tensor, label: Tensor, *matrix: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        outer, classes = math.prod(x.shape[: self.axis]), x.shape[self.axis]
        scores = x.reshape(outer, classes, -1).movedim(1, -1)
        target = label.detach().reshape(scores.shape[:-1])
        check_labels(target, classes, self.ignore, self.where)
        target = target.long()
        logp = F.log_softmax(scores, -1)
        cut = logp + (logp.clamp(min=math.log(LEAST)) - logp).detach()
        keep = torch.ones_like(target, dtype=torch.bool) if self.ignore is None else target != self.ignore
        rows = self.rows(torch.where(keep, target, 0), classes, matrix, x)
        total = -torch.where(keep.unsqueeze(-1), rows * cut, 0.0).sum()
        loss = total / self._count(keep, outer)
        if not self.with_prob:
            return loss
        return loss, logp.detach().exp().movedim(-1, 1).reshape(x.shape)

    def _count(self, keep: Tensor, outer: int) -> int | Tensor:
        if self.normalization == "VALID" and self.ignore is not None:
            return keep.sum().clamp_(min=1)
        return {"NONE": 1, "BATCH_SIZE": outer}.get(self.normalization, keep.numel())
