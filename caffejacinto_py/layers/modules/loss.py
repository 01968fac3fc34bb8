"""Torch side of the losses: scalars of shape (), unweighted. Labels arrive as floats, as in Caffe."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from caffejacinto_py.errors import DataError

FLT_MIN = torch.finfo(torch.float32).tiny
LARGEST = -math.log(FLT_MIN)  # of one label: 87.3365
NOTHING = -(1 << 62)  # an ignore_index that no label has


def wrong_label(label: Tensor, classes: int, ignore: int | None, where: str) -> DataError | None:
    """The error for the first label outside 0..classes-1 (the ignored one apart); None: all are fine."""
    index = label.long()
    bad = (index < 0) | (index >= classes)
    if ignore is not None:
        bad &= index != ignore
    if not bool(bad.any()):
        return None
    value = label[bad].flatten()[0].item()
    text = f"{where} has label {value:g}, but there are {classes} classes: labels must be 0..{classes - 1}"
    hint = "check num_output of the last layer and the labels of the dataset"
    if ignore is None:
        hint += ", or set ignore_label for labels that mean nothing"
    return DataError(text, hint=hint)


def check_labels(label: Tensor, classes: int, ignore: int | None, where: str) -> None:
    """Raise DataError for a label out of range. On the CPU only: elsewhere it would stall the device."""
    if torch.compiler.is_compiling() or label.device.type != "cpu":
        return
    error = wrong_label(label, classes, ignore, where)
    if error:
        raise error


class SoftmaxWithLoss(nn.Module):
    """See the layer. The scores are seen as (outer, classes) or (outer, classes, inner)."""

    def __init__(
        self,
        *,
        axis: int = 1,
        normalization: str = "VALID",
        ignore: int | None = None,
        smoothing: float = 0.0,
        weights: list[float] | None = None,
        with_prob: bool = False,
        where: str = "",
    ) -> None:
        super().__init__()
        self.axis = axis
        self.normalization = normalization
        self.ignore = ignore
        self.smoothing = smoothing
        self.with_prob = with_prob
        self.where = where
        self.weights: Tensor | None
        # a buffer follows the module to its device; it is not part of any saved state
        self.register_buffer("weights", torch.tensor(weights) if weights else None, persistent=False)
        bare = not smoothing and not weights and ignore is None and not with_prob
        self.plain = bare and axis == 1 and normalization != "NONE"

    def forward(self, x: Tensor, label: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if self.plain and x.dim() == 2:  # the usual case, with as few calls as possible
            target = label.long() if label.dim() == 1 else label.reshape(-1).long()
            return self._nll(torch.log_softmax(x, 1), target, label).mean()
        shape = x.shape
        outer, classes = math.prod(shape[: self.axis]), shape[self.axis]
        inner = math.prod(shape[self.axis + 1 :])
        flat = (outer, classes) if inner == 1 else (outer, classes, inner)
        logp = torch.log_softmax(x.reshape(flat), 1)
        target = label.detach().reshape(outer if inner == 1 else (outer, inner)).long()
        each = self._each(logp, target, label)
        if self.normalization == "VALID" and self.ignore is not None:
            loss = each.sum() / (target != self.ignore).sum().clamp_(min=1)
        elif self.normalization == "NONE":
            loss = each.sum()
        else:
            count = outer if self.normalization == "BATCH_SIZE" else outer * inner
            loss = each.mean() if count == each.numel() else each.sum() / count
        return (loss, logp.detach().exp().reshape(shape)) if self.with_prob else loss

    def _each(self, logp: Tensor, target: Tensor, label: Tensor) -> Tensor:
        """Loss of every label; 0 for ignored ones."""
        each = self._nll(logp, target, label)
        if self.smoothing and self.training:
            rest = self.smoothing / (logp.shape[1] - 1)
            spread = logp.sum(1)
            if self.ignore is not None:
                spread = spread.masked_fill(target == self.ignore, 0)
            each = each * (1 - self.smoothing - rest) - spread * rest
        if self.weights is not None:
            each = each * self.weights.to(each.dtype)[target.clamp(0, logp.shape[1] - 1)]
        return each

    def _nll(self, logp: Tensor, target: Tensor, label: Tensor) -> Tensor:
        """-log(max(p, FLT_MIN)) of every label."""
        ignore = NOTHING if self.ignore is None else self.ignore
        if torch.compiler.is_compiling():
            each = F.nll_loss(logp, target, ignore_index=ignore, reduction="none")
        else:
            try:  # on the CPU torch looks at every label anyway
                each = F.nll_loss(logp, target, ignore_index=ignore, reduction="none")
            except IndexError:
                error = wrong_label(label, logp.shape[1], self.ignore, self.where)
                if error is None:
                    raise
                raise error from None
        each.detach().clamp_(max=LARGEST)  # the value is cut, the gradient goes on, as in Caffe
        return each


class EuclideanLoss(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return F.mse_loss(a, b.reshape(a.shape), reduction="sum") * (0.5 / a.shape[0])


class SigmoidCrossEntropyLoss(nn.Module):
    def __init__(self, normalization: str, ignore: int | None) -> None:
        super().__init__()
        self.normalization = normalization
        self.ignore = ignore

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        target = target.detach().reshape(x.shape)
        if self.ignore is None:
            loss = F.binary_cross_entropy_with_logits(x, target, reduction="sum")
            return loss / self._count(x, None)
        keep = target.trunc() != self.ignore
        each = F.binary_cross_entropy_with_logits(x, target, reduction="none")
        return torch.where(keep, each, 0.0).sum() / self._count(x, keep)

    def _count(self, x: Tensor, keep: Tensor | None) -> int | Tensor:
        if self.normalization == "BATCH_SIZE":
            return x.shape[0]
        if self.normalization == "NONE":
            return 1
        if self.normalization == "VALID" and keep is not None:
            return keep.sum().clamp_(min=1)
        return max(1, x.numel())


class HingeLoss(nn.Module):
    def __init__(self, *, squared: bool = False, where: str = "") -> None:
        super().__init__()
        self.squared = squared
        self.where = where

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        x = x.reshape(x.shape[0], -1)
        label = label.detach().reshape(-1, 1)
        check_labels(label, x.shape[1], None, self.where)
        sign = torch.ones_like(x).scatter_(1, label.long(), -1.0)
        margin = F.relu(1 + sign * x)
        return (margin.square() if self.squared else margin).sum() / x.shape[0]
