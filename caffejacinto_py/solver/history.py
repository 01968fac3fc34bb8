"""History of the update rules in 16 or 8 bits between steps; each step works on float32, a piece of it at a time.

bfloat16: stochastic rounding. To nearest, h = 0.999 h + 0.001 g^2 stands still: bfloat16 has 8 bits, and the change is
less than half of the last one.

int8: blocks of 256 numbers, each a code times the largest magnitude of its block; codes lie densest near 0 (dynamic
quantization of Dettmers 2022, "8-bit Optimizers via Block-wise Quantization"), signed or, for second moments, unsigned.
Different from there: rounding is stochastic; the largest code is 1 with either sign, so that a block that is read and
stored again stays as it is; and a second moment above 0 never becomes 0, or a first moment beside it would be divided
by delta alone. Blobs of fewer than HISTORY_SMALL numbers stay float32.

Numbers are taken in the order of the parameter's memory.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from caffejacinto_py.passes.memory import HISTORY_BLOCK, HISTORY_PIECES, HISTORY_SMALL

PIECES = {"cpu": HISTORY_PIECES[0]}  # numbers that are float32 at one time: what a cache holds
PIECE = HISTORY_PIECES[1]  # of a GPU: few calls, little memory
_STEPS = 1 << 16  # of rounding noise
_LEAST = 2.0**-100  # a block below this becomes 0: products of its scale and its codes would lose bits


class Store(Protocol):
    """One history blob, flat. read: float32, which may be the stored memory itself; write: rounds, with noise (integers
    in 0 .. 65535) or, where it is None, to nearest."""

    def read(self, at: int, count: int) -> Tensor: ...

    def write(self, at: int, values: Tensor, noise: Tensor | None) -> None: ...

    @property
    def nbytes(self) -> int: ...


class Full:
    """float32."""

    def __init__(self, count: int, device: torch.device) -> None:
        self.values = torch.zeros(count, device=device)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    def read(self, at: int, count: int) -> Tensor:
        return self.values[at : at + count]

    def write(self, at: int, values: Tensor, noise: Tensor | None) -> None:
        kept = self.values[at : at + values.numel()]
        if kept.data_ptr() != values.data_ptr():
            kept.copy_(values)


class Half:
    """bfloat16: the upper half of a float32; stochastic rounding adds noise to the lower half."""

    def __init__(self, count: int, device: torch.device) -> None:
        self.values = torch.zeros(count, dtype=torch.bfloat16, device=device)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    def read(self, at: int, count: int) -> Tensor:
        return self.values[at : at + count].float()

    def write(self, at: int, values: Tensor, noise: Tensor | None) -> None:
        kept = self.values[at : at + values.numel()]
        if noise is None:
            kept.copy_(values)
            return
        sizes = values.abs().view(torch.int32).clamp_max_(0x7FFF0000)  # a NaN with all bits set would wrap round to 0
        sizes = sizes.add_(noise).bitwise_right_shift_(16)
        signs = values.view(torch.int32).bitwise_right_shift(16).bitwise_and_(-0x8000)
        kept.view(torch.int16).copy_(sizes.bitwise_or_(signs))


class Codes:
    """The code values of 8 bits, and the way to them.

    Magnitudes: in each decade below 1, twice as many as in the one before, evenly: 2^i of them in decade i. So the code
    as a function of the magnitude is a polygon with falling slopes, and the least of its lines everywhere.
    """

    def __init__(self, *, signed: bool, device: torch.device) -> None:
        decades = 7 if signed else 8
        ends = [10.0 ** (i - decades + 1) for i in range(decades)]
        sizes = [0.0] + [e * (0.1 + 0.9 * j / 2**i) for i, e in enumerate(ends) for j in range(1, 2**i + 1)]
        slopes = [1 / ends[0]] + [2**i / 0.9 / e for i, e in enumerate(ends) if i]
        offsets = [0.0] + [2**i - 1 - 2**i / 9 for i in range(1, decades)]
        self.slopes = [float(np.float32(s)) for s in slopes]
        offsets[-1] = len(sizes) - 1 - self.slopes[-1]  # no rounding: 1 is the last code exactly, whatever the noise
        self.offsets = [torch.tensor(o, dtype=torch.float32, device=device) for o in offsets]
        self.signed = signed
        table = [*sizes, -1.0, *(-s for s in reversed(sizes[1:]))] if signed else sizes  # two's complement
        self.table = torch.tensor(table, dtype=torch.float32, device=device)

    def encode(self, values: Tensor, noise: Tensor | None) -> Tensor:
        """Codes, uint8, of values in -1 .. 1 (signed) or 0 .. 1."""
        sizes = values.abs() if self.signed else values
        found = sizes * self.slopes[0]
        for slope, offset in zip(self.slopes[1:], self.offsets[1:], strict=True):
            torch.minimum(found, torch.add(offset, sizes, alpha=slope), out=found)
        found += 0.5 if noise is None else noise / _STEPS
        found.floor_()
        if self.signed:
            return found.copysign_(values).to(torch.int8).view(torch.uint8)
        return torch.maximum(found, sizes.ceil(), out=found).to(torch.uint8)  # 0 only where the value is

    def decode(self, codes: Tensor) -> Tensor:
        return self.table.index_select(0, codes.int())


class Blocks:
    """8-bit codes and a float32 scale for each block."""

    def __init__(self, count: int, codes: Codes, device: torch.device) -> None:
        blocks = -(-count // HISTORY_BLOCK)
        self.codes = codes
        self.values = torch.zeros(blocks * HISTORY_BLOCK, dtype=torch.uint8, device=device)
        self.scales = torch.zeros(blocks, 1, device=device)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes

    def read(self, at: int, count: int) -> Tensor:
        """at: a multiple of the block."""
        first, last = at // HISTORY_BLOCK, -(-(at + count) // HISTORY_BLOCK)
        found = self.codes.decode(self.values[first * HISTORY_BLOCK : last * HISTORY_BLOCK])
        found.view(-1, HISTORY_BLOCK).mul_(self.scales[first:last])
        return found[:count]

    def write(self, at: int, values: Tensor, noise: Tensor | None) -> None:
        count, rest = values.numel(), -values.numel() % HISTORY_BLOCK
        if rest:
            values = torch.nn.functional.pad(values, (0, rest))
            noise = None if noise is None else torch.nn.functional.pad(noise, (0, rest))
        rows = values.view(-1, HISTORY_BLOCK)
        most = rows.abs().amax(1, keepdim=True)
        most.masked_fill_(most < _LEAST, 0.0)
        shares = rows / most.masked_fill(most == 0, math.inf)  # a division: the largest becomes exactly 1
        first = at // HISTORY_BLOCK
        self.scales[first : first + len(rows)] = most
        self.values[at : at + count + rest] = self.codes.encode(shares.view(-1), noise)


class Noise:
    """What stochastic rounding adds: a fixed list of 16-bit integers, each equally often, read from places that the
    iteration decides. Over time each number sees every entry of the list."""

    def __init__(self, size: int, device: torch.device) -> None:
        numbers = np.random.default_rng(16).permutation(np.arange(size) * _STEPS // size).astype(np.int32)
        self.size = size
        self.values = torch.from_numpy(np.concatenate([numbers, numbers])).to(device)
        self._places = random.Random(0)

    def begin(self, iteration: int) -> None:
        self._places = random.Random(iteration)

    def take(self, count: int) -> Tensor:
        """count: the size at most."""
        at = self._places.randrange(self.size)
        return self.values[at : at + count]


class Packed:
    """The history of some parameters on one device. signed: for each slot of the rule, whether it can be negative."""

    def __init__(self, params: Sequence[Tensor], signed: Sequence[bool], kind: str, noise: Noise) -> None:
        self.params = list(params)
        self.noise = noise
        device = self.params[0].device
        codes = {s: Codes(signed=s, device=device) for s in set(signed)} if kind == "int8" else {}
        self.stores = [[_store(p.numel(), codes.get(s), device) for p in self.params] for s in signed]

    @property
    def nbytes(self) -> int:
        return sum(store.nbytes for stores in self.stores for store in stores)

    def parts(
        self, grads: Sequence[Tensor], *, whole: bool
    ) -> Iterator[tuple[list[Tensor], list[Tensor], list[list[Tensor]]]]:
        """(parameters, gradients, history slot by slot) of a piece at a time, flat views and float32. What stands in
        the history when the next piece is asked for is stored. whole: no parameter is cut."""
        rows: list[tuple[int, int, int]] = []  # parameter, first, count
        size = 0
        for i, p in enumerate(self.params):
            count, step = p.numel(), p.numel() if whole else self.noise.size
            for at in range(0, count, step):
                taken = min(step, count - at)
                if rows and size + taken > self.noise.size:
                    yield from self._piece(rows, grads)
                    rows, size = [], 0
                rows.append((i, at, taken))
                size += taken
        if rows:
            yield from self._piece(rows, grads)

    def _piece(
        self, rows: list[tuple[int, int, int]], grads: Sequence[Tensor]
    ) -> Iterator[tuple[list[Tensor], list[Tensor], list[list[Tensor]]]]:
        params = [flat(self.params[i])[at : at + n] for i, at, n in rows]
        slopes = [flat(grads[i])[at : at + n] for i, at, n in rows]
        history = [[stores[i].read(at, n) for i, at, n in rows] for stores in self.stores]
        yield params, slopes, history
        for stores, found in zip(self.stores, history, strict=True):
            for (i, at, _), values in zip(rows, found, strict=True):
                self._write(stores[i], at, values)

    def _write(self, store: Store, at: int, values: Tensor, *, nearest: bool = False) -> None:
        for part in values.split(self.noise.size):
            store.write(at, part, None if nearest else self.noise.take(part.numel()))
            at += part.numel()

    def get(self, slot: int, i: int) -> Tensor:
        """A history blob in float32, laid out as its parameter."""
        found = torch.empty_like(self.params[i], dtype=torch.float32)
        for part, values in zip(flat(found).split(self.noise.size), self.parts_of(slot, i), strict=True):
            part.copy_(values)
        return found

    def parts_of(self, slot: int, i: int) -> Iterator[Tensor]:
        """The same flat, in the order of memory, a piece at a time."""
        count = self.params[i].numel()
        for at in range(0, count, self.noise.size):
            yield self.stores[slot][i].read(at, min(self.noise.size, count - at))

    def put(self, slot: int, i: int, values: Tensor) -> None:
        """Store a history blob, rounded to nearest. What `get` gave comes back as it was."""
        laid = torch.empty_like(self.params[i], dtype=torch.float32).copy_(values.reshape(self.params[i].shape))
        self._write(self.stores[slot][i], 0, flat(laid), nearest=True)


def flat(tensor: Tensor) -> Tensor:
    """A tensor without gaps as one axis, in the order of its memory."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def noise_for(device: torch.device) -> Noise:
    return Noise(PIECES.get(device.type, PIECE), device)


def _store(count: int, codes: Codes | None, device: torch.device) -> Store:
    if codes is None:
        return Half(count, device)
    return Full(count, device) if count < HISTORY_SMALL else Blocks(count, codes, device)
