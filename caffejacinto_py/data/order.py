"""Which records make up batch k, and the random numbers of batch k. Pure functions of (seed, k): no hidden cursor."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

_MASK = (1 << 64) - 1
_EPOCH, _BATCH, _SKIP = 1, 2, 3  # separate random streams of one seed


def generator(seed: int, name: str, stream: int, number: int) -> np.random.Generator:
    """The random generator of one purpose: a layer (by name), a stream, and an epoch or batch number."""
    return np.random.default_rng([seed & _MASK, zlib.crc32(name.encode()), stream, number])


class Share(NamedTuple):
    """Which batches are this rank's: `first + rank`, `first + rank + world`, ... parts: so many batches in a row are
    parts of one batch, for which the random numbers are drawn: data then do not depend on how many ranks share them."""

    rank: int = 0
    world: int = 1
    parts: int = 1
    first: int = 0


class Order:
    """The endless sequence of record ordinals that a source layer reads, cut into batches.

    Without `shuffle`: file order, wrapping around inside a batch like Caffe's cursor. With it: one permutation per
    epoch, drawn from (seed, name, epoch). `groups` are the record counts of the files behind the source: a shuffle
    permutes the files and the records inside each file, never across (HDF5Data of BVLC Caffe); one group is a plain
    permutation.

    rank, world, parts, first: see `Share`; every record of an epoch goes to one rank. rand_skip: start up to that many
    records later, drawn from the seed.
    """

    def __init__(
        self,
        groups: Sequence[int],
        *,
        batch: int,
        seed: int = 0,
        name: str = "",
        shuffle: bool = False,
        rand_skip: int = 0,
        rank: int = 0,
        world: int = 1,
        parts: int = 1,
        first: int = 0,
    ) -> None:
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} of {world}")
        self.groups = tuple(groups)
        self.count = sum(self.groups)
        if self.count <= 0 or batch <= 0:
            raise ValueError(f"{self.count} records in batches of {batch}")
        self.batch, self.seed, self.name, self.shuffle = batch, seed, name, shuffle
        self.rank, self.world, self.parts, self.first = rank, world, parts, first
        self.skip = int(generator(seed, name, _SKIP, 0).integers(rand_skip)) if rand_skip else 0
        self._permutations: dict[int, np.ndarray] = {}

    def number(self, k: int) -> int:
        """The number of this rank's batch k among the batches of all ranks."""
        return self.first + k * self.world + self.rank

    def records(self, k: int) -> np.ndarray:
        """Record ordinals of batch k: int64 of length `batch`."""
        first = self.skip + self.number(k) * self.batch
        positions = np.arange(first, first + self.batch, dtype=np.int64)
        index = positions % self.count
        if not self.shuffle:
            return index
        epochs = positions // self.count
        for epoch in np.unique(epochs):
            here = epochs == epoch
            index[here] = self._permutation(int(epoch))[index[here]]
        return index

    def draws(self, k: int, draw: Callable[[int, np.random.Generator], np.ndarray]) -> np.ndarray:
        """The random numbers of batch k, a row for each record. draw: makes that many rows."""
        whole, part = divmod(self.number(k), self.parts)
        rows = draw((part + 1) * self.batch, generator(self.seed, self.name, _BATCH, whole))
        return rows[part * self.batch :]

    def _permutation(self, epoch: int) -> np.ndarray:
        found = self._permutations.get(epoch)
        if found is None:
            rng = generator(self.seed, self.name, _EPOCH, epoch)
            starts = np.concatenate(([0], np.cumsum(self.groups)))
            files = rng.permutation(len(self.groups))
            found = np.concatenate([starts[g] + rng.permutation(self.groups[g]) for g in files])
            # An epoch is left behind within a few batches; worker threads may race here, both then compute the same.
            self._permutations = {e: p for e, p in [*self._permutations.items(), (epoch, found)] if abs(e - epoch) <= 1}
        return found
