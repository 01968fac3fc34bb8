"""The feeders of one net together: one batch of tensors for all its sources."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from caffejacinto_py.data import make_feeder
from caffejacinto_py.data.feeders import Feeder, UserFeeder
from caffejacinto_py.engine.net import Net
from caffejacinto_py.layers.fillers import fill


class Feed:
    """Batches for a net, opened at the first `next`.

    seed decides shuffles, mirrors and crops: batch k is the same in every run with it, whatever `workers` is. For a GPU
    net batches are copied through pinned memory without waiting for the device.
    """

    def __init__(self, net: Net, *, seed: int, workers: int = 1) -> None:
        self.net = net
        self.sources = [s for s in net.sources if s.layer.source != "teacher"]
        # what teachers make of a batch, see solver/teacher.py
        self.derive: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None = None
        self.device = net.device
        self.seed = seed
        self.workers = workers
        self.last: dict[str, Tensor] = {}  # the batch of the last `next`
        self._feeders: dict[str, Feeder] = {}
        self._start: dict[str, int] = {}

    @property
    def feeders(self) -> dict[str, Feeder]:
        """Feeder of each source layer, by layer name."""
        if len(self._feeders) < len(self.sources):
            for source in self.sources:
                name = source.node.name
                if name not in self._feeders:
                    self._feeders[name] = make_feeder(
                        source.layer,
                        shapes=source.shapes,
                        seed=self.seed,
                        workers=self.workers,
                        start=self._start.get(name, 0),
                        fill=fill,
                    )
        return self._feeders

    def next(self) -> dict[str, Tensor]:
        """The next batch: a tensor for every source top."""
        feeders, batch = self.feeders, {}
        for source in self.sources:
            for top, array in zip(source.tops, feeders[source.node.name].next()):
                tensor = torch.from_numpy(array)
                if self.device.type == "cuda":
                    tensor = tensor.pin_memory().to(self.device, non_blocking=True)
                batch[top] = tensor
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
        """Batches delivered by each source layer."""
        return {s.node.name: self._position(s.node.name) for s in self.sources}

    def _position(self, name: str) -> int:
        return self._feeders[name].position if name in self._feeders else self._start.get(name, 0)

    def rewind(self, positions: Mapping[str, int] | None = None) -> None:
        """Go to these positions; sources that are not named start again. Arrays given to user-fed sources stay."""
        self._start = dict(positions or {})
        for name in list(self._feeders):
            feeder = self._feeders[name]
            if isinstance(feeder, UserFeeder):
                feeder.position = self._start.get(name, 0)
            else:
                self._feeders.pop(name).close()

    def close(self) -> None:
        """Stop the workers; a later `next` goes on at the same position."""
        self._start = self.positions()
        for name in [n for n, f in self._feeders.items() if not isinstance(f, UserFeeder)]:
            self._feeders.pop(name).close()
        self.last = {}
