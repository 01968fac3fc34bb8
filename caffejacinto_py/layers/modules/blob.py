"""Blob: what users of pycaffe and Python layers read and write as numpy arrays, kept in step with torch tensors on any
device.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import torch

from caffejacinto_py.errors import UsageError

Shape = tuple[int, ...]


class Memory:
    """One float32 array of a blob. Until somebody looks, only the net's tensor is kept; afterwards one numpy array
    stays live.
    """

    def __init__(self, shape: Sequence[int], fill: float = 0.0) -> None:
        self.shape: Shape = tuple(shape)
        self._fill = fill
        self._tensor: torch.Tensor | None = None  # the net's last result, not yet looked at
        self._host: np.ndarray | None = None

    def view(self) -> np.ndarray:
        """The live array: writable, and refreshed by every later result of the same shape."""
        if self._host is None:
            if self._tensor is None:
                self._host = np.full(self.shape, self._fill, np.float32)
            else:
                self._host = self._tensor.to(device="cpu", dtype=torch.float32, copy=True).contiguous().numpy()
                self._tensor = None
        return self._host

    def put(self, result: torch.Tensor) -> None:
        """Take a result of the net. It must not be modified afterwards."""
        if self._host is not None and self._host.shape == tuple(result.shape):
            np.copyto(self._host, result.numpy(force=True))
            return
        self.shape, self._tensor, self._host = tuple(result.shape), result, None

    def take(self, device: torch.device) -> torch.Tensor:
        """The value for the net; a copy wherever the user may still write."""
        if self._tensor is not None:
            return self._tensor.to(device)
        return torch.from_numpy(self.view().copy()).to(device)

    def reshape(self, shape: Shape) -> None:
        """New shape; as many values as fit keep their flat place."""
        old = self.view().ravel()
        new = np.full(prod(shape), self._fill, np.float32)
        n = min(old.size, new.size)
        new[:n] = old[:n]
        self.shape, self._host = shape, new.reshape(shape)


class ParamMemory:
    """The same for a learnable blob or its gradient, which the net owns. On a CPU the array *is* the parameter."""

    def __init__(self, param: torch.nn.Parameter, *, grad: bool) -> None:
        self.param = param
        self.grad = grad
        self._host: np.ndarray | None = None  # mirror of a parameter on a GPU
        self._shown: torch.Tensor | None = None  # the gradient on a CPU that somebody has an array of

    @property
    def shape(self) -> Shape:
        return tuple(self.param.shape)

    def tensor(self) -> torch.Tensor:
        if not self.grad:
            return self.param.data  # not detach(): a user's write between forward and backward is no error in Caffe
        if self.param.grad is None:
            self.param.grad = torch.zeros_like(self.param)
        return self.param.grad

    def view(self) -> np.ndarray:
        tensor = self.tensor()
        if self._visible(tensor):
            self._shown = tensor if self.grad else None
            return tensor.numpy()
        if self._host is None:
            self._host = tensor.to("cpu", copy=True).numpy()
        return self._host

    @staticmethod
    def _visible(tensor: torch.Tensor) -> bool:
        """Whether numpy can look at the memory itself; otherwise there is a mirror."""
        return tensor.device.type == "cpu"

    def push(self) -> None:
        """Bring what the user wrote into the mirror to the device. Call before the net runs."""
        if self._host is not None:
            self.tensor().copy_(torch.from_numpy(self._host))

    def pull(self) -> None:
        """Refresh the mirror. Call after the net or the solver ran."""
        if self._host is not None:
            np.copyto(self._host, self.tensor().numpy(force=True))
        shown = self._shown
        if shown is not None and self.param.grad is not shown:
            # training drops gradients and makes new ones: the array that was handed out goes on as the gradient
            self.param.grad = shown.copy_(self.tensor())

    def zero(self) -> None:
        self.tensor().zero_()
        self.pull()

    def reshape(self, shape: Shape) -> None:
        if not self.grad:
            self.param.data = self.param.data.new_zeros(shape)
            self.param.grad = None
        self._host = self._shown = None


class Blob:
    """`data` and `diff`: writable float32 arrays that stay live across forward and backward."""

    def __init__(self, data: Memory | ParamMemory, diff: Memory | ParamMemory) -> None:
        self._data = data
        self._diff = diff

    def __repr__(self) -> str:
        return f"Blob{self.shape}"

    @property
    def data(self) -> np.ndarray:
        return self._data.view()

    @property
    def diff(self) -> np.ndarray:
        return self._diff.view()

    @property
    def shape(self) -> Shape:
        return self._data.shape

    @property
    def count(self) -> int:
        return prod(self.shape)

    num = property(lambda self: self._legacy(0))
    channels = property(lambda self: self._legacy(1))
    height = property(lambda self: self._legacy(2))
    width = property(lambda self: self._legacy(3))

    def _legacy(self, axis: int) -> int:
        if len(self.shape) > 4:
            raise UsageError(f"a blob of {len(self.shape)} axes has no num, channels, height, width: use shape")
        return self.shape[axis] if axis < len(self.shape) else 1

    def reshape(self, *dims: int) -> None:
        """New shape. For an input: the net adapts on the next `forward` or `reshape`."""
        shape = tuple(int(d) for d in dims)
        if any(d < 0 for d in shape):
            raise UsageError(f"a blob cannot have the shape {shape}")
        if shape != self.shape:
            self._diff.reshape(shape)
            self._data.reshape(shape)


class Top(Blob):
    """A blob that a layer makes. data, diff: what it and its gradient (a loss weight) are before the first pass."""

    _data: Memory
    _diff: Memory

    def __init__(self, shape: Sequence[int], diff: float = 0.0, data: float = 0.0) -> None:
        super().__init__(Memory(shape, data), Memory(shape, diff))


class ParamBlob(Blob):
    """A learnable blob."""

    _data: ParamMemory
    _diff: ParamMemory

    def __init__(self, param: torch.nn.Parameter) -> None:
        super().__init__(ParamMemory(param, grad=False), ParamMemory(param, grad=True))

    @classmethod
    def of(cls, param: torch.nn.Parameter) -> ParamBlob:
        """The one blob of a parameter, so that everybody's arrays are the same."""
        if not hasattr(param, "_caffe_blob"):
            param._caffe_blob = cls(param)  # type: ignore[attr-defined]
        return param._caffe_blob  # type: ignore[attr-defined, no-any-return]
