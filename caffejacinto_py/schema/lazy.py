"""Arrays that are made when they are written, so that a file needs the memory of one of them and not of all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np


class LazyArray:
    """An array whose shape and type are known before its values are. `np.asarray(lazy)` calls `make` anew each time and
    nothing is kept; what make returns may be live memory, as long as nobody changes it meanwhile.

    parts: the values in C order, a flat piece at a time, where they can be had so.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: np.dtype | type,
        make: Callable[[], np.ndarray],
        *,
        parts: Callable[[], Iterator[np.ndarray]] | None = None,
    ) -> None:
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self.make = make
        self._parts = parts

    def parts(self) -> Iterator[np.ndarray]:
        """All values in C order, flat."""
        if self._parts is not None:
            yield from self._parts()
        else:
            yield np.asarray(self).reshape(-1)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def reshape(self, shape: tuple[int, ...]) -> LazyArray:
        """The same values under another shape."""
        return LazyArray(shape, self.dtype, lambda: self.make().reshape(shape), parts=self._parts)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self.make()
        if array.shape != self.shape or array.dtype != self.dtype:
            raise ValueError(f"{array.dtype} {array.shape} was made where {self.dtype} {self.shape} was announced")
        return array.astype(self.dtype if dtype is None else dtype, copy=bool(copy))


def as_array(array: Any) -> Any:
    """An ndarray, or a LazyArray as it is."""
    return array if isinstance(array, LazyArray) else np.asarray(array)
