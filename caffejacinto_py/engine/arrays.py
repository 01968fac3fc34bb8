"""Tensors as numpy arrays on their way into files."""

from __future__ import annotations

import numpy as np
import torch

from caffejacinto_py.schema.lazy import LazyArray


def lazy_array(tensor: torch.Tensor, *, zero: bool = False) -> LazyArray:
    """What a tensor holds when it is written. zero: zeros of its kind."""
    shape, kind = tuple(tensor.shape), torch.empty(0, dtype=tensor.dtype).numpy().dtype
    if zero:
        return LazyArray(shape, kind, lambda: np.zeros(shape, kind))
    return LazyArray(shape, kind, lambda: host_array(tensor))


def host_array(tensor: torch.Tensor) -> np.ndarray:
    """C-contiguous, on the host: the tensor's own memory where that is so."""
    return tensor.detach().cpu().contiguous().numpy()
