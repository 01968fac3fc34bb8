"""Torch side of the losses between a student and a teacher: scalars of shape (), unweighted."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DistillSoftmaxLoss(nn.Module):
    """entropy: take off the teacher's own, which makes the cross entropy a divergence. See the layer."""

    def __init__(
        self,
        *,
        axis: int,
        temperature: float,
        entropy: bool,
        probabilities: bool,
        normalization: str,
        ignore: int | None,
    ) -> None:
        super().__init__()
        self.axis, self.temperature = axis, temperature
        self.entropy, self.probabilities = entropy, probabilities
        self.normalization, self.ignore = normalization, ignore

    def forward(self, student: Tensor, teacher: Tensor, *label: Tensor) -> Tensor:
        target = teacher.detach().reshape(student.shape)
        if self.probabilities:
            target = target.clamp(min=torch.finfo(target.dtype).tiny).log()
        logq = F.log_softmax(target / self.temperature, self.axis)
        logp = F.log_softmax(student / self.temperature, self.axis)
        each = (logq.exp() * (logq - logp if self.entropy else -logp)).sum(self.axis)
        count: float | Tensor = each.numel()
        if label and self.ignore is not None:
            keep = label[0].detach().reshape(each.shape).long() != self.ignore
            each = torch.where(keep, each, 0.0)
            if self.normalization == "VALID":
                count = keep.sum().clamp(min=1)
        if self.normalization == "BATCH_SIZE":
            count = math.prod(student.shape[: self.axis])
        elif self.normalization == "NONE":
            count = 1
        return each.sum() * self.temperature**2 / count


def _divided(total: Tensor, normalization: str, items: int, numbers: int) -> Tensor:
    return total / {"BATCH_SIZE": items, "NONE": 1}.get(normalization, numbers)


class FeatureHintLoss(nn.Module):
    def __init__(self, *, norm: str, sigma: float, normalization: str) -> None:
        super().__init__()
        self.norm, self.beta, self.normalization = norm, 1 / sigma**2, normalization

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        target = teacher.detach().reshape(student.shape)
        if self.norm == "L1":
            total = F.l1_loss(student, target, reduction="sum")
        elif self.norm == "SMOOTH_L1":
            total = F.smooth_l1_loss(student, target, reduction="sum", beta=self.beta)
        else:
            total = F.mse_loss(student, target, reduction="sum") / 2
        return _divided(total, self.normalization, student.shape[0], student.numel())


class AttentionTransferLoss(nn.Module):
    def __init__(self, *, power: float, normalization: str) -> None:
        super().__init__()
        self.power, self.normalization = power, normalization

    def _map(self, x: Tensor) -> Tensor:
        """(N, places), each row of length 1; a row of zeros stays."""
        strength = x.square() if self.power == 2 else x.abs() ** self.power
        return F.normalize(strength.mean(1).flatten(1), dim=1)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        own = self._map(student)
        total = F.mse_loss(own, self._map(teacher.detach()), reduction="sum")
        return _divided(total, self.normalization, own.shape[0], own.numel())
