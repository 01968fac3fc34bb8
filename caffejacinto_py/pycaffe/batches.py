"""`forward_all` and `forward_backward_all`: any number of items through a net of a fixed batch size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import zip_longest
from typing import Any

import numpy as np

from caffejacinto_py.errors import UsageError

Arrays = dict[str, np.ndarray]


class InBatches:
    """What a Net does with arrays that are longer (or shorter) than its batch. The last batch is padded with zeros, and
    results are cut to the number of items.
    """

    def forward_all(self: Any, blobs: Iterable[str] | None = None, **kwargs: Any) -> Arrays:
        """Forward all items of the input arrays. Returns outputs and the blobs named, as copies, in items' order."""
        found: dict[str, list[np.ndarray]] = {}
        for batch in self._batches(kwargs):
            _add(found, self.forward(blobs=blobs, **batch))
        return self._joined(found, kwargs)

    def forward_backward_all(
        self: Any, blobs: Iterable[str] | None = None, diffs: Iterable[str] | None = None, **kwargs: Any
    ) -> tuple[Arrays, Arrays]:
        """The same, and backward. kwargs: input arrays, and gradients of outputs under the outputs' names. Returns
        (values of outputs and `blobs`, gradients of inputs and `diffs`).
        """
        ins = {name: a for name, a in kwargs.items() if name not in self.outputs}
        outs = {name: a for name, a in kwargs.items() if name in self.outputs}
        values: dict[str, list[np.ndarray]] = {}
        gradients: dict[str, list[np.ndarray]] = {}
        nothing: Arrays = {}
        for batch, top in zip_longest(self._batches(ins), self._batches(outs), fillvalue=nothing):
            _add(values, self.forward(blobs=blobs, **batch))
            _add(gradients, self.backward(diffs=diffs, **top))
        return self._joined(values, kwargs), self._joined(gradients, kwargs)

    def _batches(self: Any, arrays: Mapping[str, Any]) -> Iterator[Arrays]:
        if not arrays:
            return
        count = _count(arrays)
        size = self._blob(next(iter(arrays))).num
        for start in range(0, count, size):
            part = {name: np.asarray(a[start : start + size], np.float32) for name, a in arrays.items()}
            short = size - len(next(iter(part.values())))
            if short:
                part = {n: np.concatenate([a, np.zeros((short, *a.shape[1:]), a.dtype)]) for n, a in part.items()}
            yield part

    def _joined(self: Any, found: dict[str, list[np.ndarray]], arrays: Mapping[str, Any]) -> Arrays:
        if not arrays:
            raise UsageError("forward_all needs input arrays", hint=f"inputs of this net: {', '.join(self.inputs)}")
        size, count = self._blob(next(iter(arrays))).num, _count(arrays)
        padded = -(-count // size) * size
        joined = {name: np.concatenate([np.atleast_1d(a) for a in parts]) for name, parts in found.items()}
        return {name: a[:count] if len(a) == padded else a for name, a in joined.items()}


def _count(arrays: Mapping[str, Any]) -> int:
    counts = {name: len(a) for name, a in arrays.items()}
    if len(set(counts.values())) > 1:
        raise UsageError(f"the arrays have different numbers of items: {counts}")
    count = next(iter(counts.values()))
    if not count:
        raise UsageError("the arrays have no items")
    return count


def _add(found: dict[str, list[np.ndarray]], arrays: Arrays) -> None:
    for name, array in arrays.items():
        found.setdefault(name, []).append(array.copy())
