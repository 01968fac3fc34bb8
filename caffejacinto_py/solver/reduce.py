"""Gradients of several ranks become their mean, while backward still computes those of earlier layers.

Buckets as NVCaffe's `reduce_buckets`: the learnable blobs, last layer first, cut into that many runs of about the same
size; 0: each blob by itself. A bucket is sent when the last of its gradients is complete, and always after the buckets
before it, so that all ranks send in one order.

Not torch's DistributedDataParallel: that one follows the `forward` of a module. Here gradients also come from Python
layers and from passes layer by layer; whatever was not sent during backward is sent by `finish`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from caffejacinto_py.engine.net import Net
from caffejacinto_py.engine.ranks import Ranks


@dataclass
class Bucket:
    """params: of one type. ready: gradients that are complete. buffer, wait: once it is on its way."""

    params: list[nn.Parameter] = field(default_factory=list)
    ready: int = 0
    buffer: Tensor | None = None
    wait: Callable[[], None] | None = None


class Reducer:
    """The gradients of a net's learnable blobs, averaged over the ranks. Does nothing when there is one rank."""

    def __init__(self, net: Net, ranks: Ranks) -> None:
        self.ranks = ranks
        self.buckets: list[Bucket] = []
        self._armed = False
        if ranks.alone:
            return
        message = net.graph.proto
        self.buckets = cut(
            [b.param for b in net.learnable if b.param.requires_grad], message.reduce_buckets if message else 0
        )
        for bucket in self.buckets:
            for param in bucket.params:
                param.register_post_accumulate_grad_hook(self._complete(bucket))
        self._sent = 0

    @contextmanager
    def sending(self, last: bool) -> Iterator[None]:
        """Around a backward pass. last: of the iteration, so that its gradients are final."""
        self._armed = last and not self.ranks.alone
        try:
            yield
        finally:
            self._armed = False

    def finish(self, loss: Tensor) -> Tensor:
        """Behind the last pass of an iteration: all gradients are means, and so is the loss that is returned."""
        if self.ranks.alone:
            return loss
        for bucket in self.buckets[self._sent :]:
            self._send(bucket)
        # behind the buckets: all ranks send in one order, however many of these went during backward
        mean = loss.detach().double().clone()
        arrived = self.ranks.start_sum(mean)
        for bucket in self.buckets:
            self._receive(bucket)
        self._sent = 0
        arrived()
        return (mean / self.ranks.world).to(loss.dtype)

    # --- buckets -----------------------------------------------------------------------------------------------------
    def _complete(self, bucket: Bucket) -> Callable[[Tensor], None]:
        def hook(param: Tensor) -> None:
            if self._armed:
                bucket.ready += 1
                while self._sent < len(self.buckets) and self._whole(self.buckets[self._sent]):
                    self._send(self.buckets[self._sent])
                    self._sent += 1

        return hook

    @staticmethod
    def _whole(bucket: Bucket) -> bool:
        return bucket.ready == len(bucket.params)

    @torch.no_grad()
    def _send(self, bucket: Bucket) -> None:
        """Gradients move into one buffer, each in its weight's memory order, and stay there as views."""
        first = bucket.params[0]
        bucket.buffer = torch.empty(sum(p.numel() for p in bucket.params), dtype=first.dtype, device=first.device)
        for param, place in zip(bucket.params, _places(bucket)):
            if param.grad is None:
                place.zero_()
            else:
                place.copy_(param.grad)
                param.grad = place
        bucket.wait = self.ranks.start_sum(bucket.buffer)

    @torch.no_grad()
    def _receive(self, bucket: Bucket) -> None:
        assert bucket.wait is not None
        assert bucket.buffer is not None
        bucket.wait()
        bucket.buffer /= self.ranks.world
        bucket.ready, bucket.buffer, bucket.wait = 0, None, None


def cut(params: list[nn.Parameter], buckets: int) -> list[Bucket]:
    """Buckets over the blobs from the last to the first. buckets: about so many; 0: one for each blob. Blobs of
    different types never share one."""
    whole = sum(p.numel() for p in params)
    least = whole / buckets if buckets > 0 else 0
    found: list[Bucket] = []
    size = 0
    for param in reversed(params):
        if not found or size >= least or found[-1].params[0].dtype != param.dtype:
            found.append(Bucket())
            size = 0
        found[-1].params.append(param)
        size += param.numel()
    return found


def _places(bucket: Bucket) -> Iterator[Tensor]:
    """The part of the buffer that is each blob's, with its strides."""
    assert bucket.buffer is not None
    start = 0
    for param in bucket.params:
        yield bucket.buffer.as_strided(param.shape, param.stride(), start)
        start += param.numel()
