"""Arrays that are made when they are written, so that a file needs the memory of one of them and not of all."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np


class LazyArray:
    """An array whose shape and type are known before its values are. `np.asarray(lazy)` calls `make` anew each time and
    nothing is kept; what make returns may be live memory, as long as nobody changes it meanwhile.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype | type, make: Callable[[], np.ndarray]) -> None:
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self.make = make

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def reshape(self, shape: tuple[int, ...]) -> LazyArray:
        """The same values under another shape."""
        return LazyArray(shape, self.dtype, lambda: self.make().reshape(shape))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self.make()
        if array.shape != self.shape or array.dtype != self.dtype:
            raise ValueError(f"{array.dtype} {array.shape} was made where {self.dtype} {self.shape} was announced")
        return array.astype(self.dtype if dtype is None else dtype, copy=bool(copy))


def as_array(array: Any) -> Any:
    """An ndarray, or a LazyArray as it is."""
    return array if isinstance(array, LazyArray) else np.asarray(array)
