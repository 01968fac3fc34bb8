"""The feeders of one net together: one batch of tensors for all its sources."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from caffejacinto_py.data import make_feeder
from caffejacinto_py.data.feeders import Feeder, UserFeeder
from caffejacinto_py.data.order import Share
from caffejacinto_py.engine import gpu
from caffejacinto_py.engine.net import Net
from caffejacinto_py.layers.fillers import fill

ALONE = Share()


class Feed:
    """Batches for a net, opened at the first `next`.

    seed decides shuffles, mirrors and crops: batch k is the same in every run with it, whatever `workers` is. For a GPU
    net batches are copied through pinned memory without waiting for the device. share: which batches are this rank's.
    """

    def __init__(self, net: Net, *, seed: int, workers: int = 1, share: Share = ALONE) -> None:
        self.net = net
        self.sources = [s for s in net.sources if s.layer.source != "teacher"]
        # what teachers make of a batch, see solver/teacher.py
        self.derive: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None = None
        self.device = net.device
        self.seed = seed
        self.workers = workers
        self.share = share
        self.last: dict[str, Tensor] = {}  # the batch of the last `next`
        self._upload = gpu.Upload(net.device) if net.device.type == "cuda" else None
        self._feeders: dict[str, Feeder] = {}
        self._start: dict[str, int] = {}

    @property
    def feeders(self) -> dict[str, Feeder]:
        """Feeder of each source layer, by layer name."""
        if len(self._feeders) < len(self.sources):
            for source in self.sources:
                name = source.node.name
                if name not in self._feeders:
                    start = self._start.get(name, 0)
                    place: dict[str, Any] = {"start": start, "share": self.share}
                    if self.dealt:
                        place = {"start": 0, "share": self.share._replace(first=start)}
                    options: dict[str, Any] = {"seed": self.seed, "workers": self.workers, "fill": fill, **place}
                    self._feeders[name] = make_feeder(source.layer, shapes=source.shapes, **options)
        return self._feeders

    def next(self) -> dict[str, Tensor]:
        """The next batch: a tensor for every source top."""
        feeders, batch = self.feeders, {}
        for source in self.sources:
            for top, array in zip(source.tops, feeders[source.node.name].next()):
                tensor = torch.from_numpy(array)
                batch[top] = self._upload(tensor) if self._upload is not None else tensor
        if self.derive is not None:
            batch |= self.derive(batch)
        self.last = batch
        return batch

    def taught(self, tops: Sequence[str], blob: Callable[[str], Tensor]) -> list[Tensor]:
        """These tops of Teacher layers for data that stand elsewhere: `blob` gives a data blob by its name."""
        assert self.derive is not None
        found = self.derive({top: blob(top) for source in self.sources for top in source.tops})
        return [found[top] for top in tops]

    @property
    def batch(self) -> int:
        """Records in one batch: the first axis of the first blob that is made from nothing; 0 without one."""
        tops = (self.net.graph.shapes[v] for n in self.net.graph.nodes if not n.inputs for v in n.outputs)
        return next((shape[0] for shape in tops if shape), 0)

    def positions(self) -> dict[str, int]:
        """Batches delivered by each source layer: to all ranks, where they are dealt out."""
        return {s.node.name: self._position(s.node.name) for s in self.sources}

    def steps(self) -> dict[str, int]:
        """Records that one of the batches that `positions` counts takes from the data of its source."""
        parts = 1 if self.dealt else self.share.world
        return {s.node.name: parts * (s.shapes[0][0] if s.shapes[0] else 1) for s in self.sources}

    @property
    def dealt(self) -> bool:
        """Whether whole batches go to the ranks in turn; else every rank has a part of each."""
        return self.share.world > self.share.parts

    def settle(self, counted: int) -> None:
        """Where batches were dealt out, `counted` in all: go on behind them, though some ranks have drawn one more."""
        if self.dealt and counted % self.share.world:
            over = self.share.world - counted % self.share.world
            self.rewind({name: position - over for name, position in self.positions().items()})

    def _position(self, name: str) -> int:
        if name not in self._feeders:
            return self._start.get(name, 0)
        position = self._feeders[name].position
        return self._start.get(name, 0) + position * self.share.world if self.dealt else position

    def rewind(self, positions: Mapping[str, int] | None = None) -> None:
        """Go to these positions; sources that are not named start again. Arrays given to user-fed sources stay."""
        self._start = dict(positions or {})
        for name in list(self._feeders):
            feeder = self._feeders[name]
            if isinstance(feeder, UserFeeder):
                feeder.position = 0 if self.dealt else self._start.get(name, 0)
            else:
                self._feeders.pop(name).close()

    def close(self) -> None:
        """Stop the workers; a later `next` goes on at the same position."""
        self._start = self.positions()
        for name in [n for n, f in self._feeders.items() if not isinstance(f, UserFeeder)]:
            self._feeders.pop(name).close()
        self.last = {}
