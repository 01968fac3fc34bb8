"""User code in a net: the base class of Python layers, and the bridge between its blobs and autograd."""

from __future__ import annotations

import importlib
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from caffejacinto_py.errors import DataError, LayerError
from caffejacinto_py.layers.modules.blob import Blob, ParamBlob, Top

PHASES = ("TRAIN", "TEST")  # numbers of enum Phase


class UserCodeError(LayerError, RuntimeError):
    """The code of a Python layer cannot be loaded, or failed in setup or reshape. `__cause__` is its exception."""


class BlobVector(list[Blob]):
    """`layer.blobs`."""

    def add_blob(self, *shape: int) -> None:
        """One more learnable blob, of zeros; fill it in `setup` through `self.blobs[i].data[...]`."""
        self.append(Top([int(d) for d in shape]))


class PythonLayer:
    """Base of Python layers: `class MyLayer(caffe.Layer)`.

    Defines setup(bottom, top), reshape(bottom, top), forward(bottom, top) and backward(top, propagate_down, bottom);
    bottom and top are lists of Blobs. Attributes, set before setup: param_str, phase (caffe.TRAIN or TEST), blobs.
    """

    param_str: str = ""
    phase: int = 0
    type: str = "Python"

    def __init__(self, layer_param: Any = None) -> None:
        self.blobs = BlobVector()

    def setup(self, bottom: Sequence[Blob], top: Sequence[Blob]) -> None:
        """Read param_str, check the number of blobs, add learnable blobs. Once."""

    def reshape(self, bottom: Sequence[Blob], top: Sequence[Blob]) -> None:
        """Give the tops their shapes. Before every forward."""

    def forward(self, bottom: Sequence[Blob], top: Sequence[Blob]) -> None:
        """Write `top[i].data[...]`."""
        raise NotImplementedError(f"{type(self).__name__} has no forward(self, bottom, top)")

    def backward(self, top: Sequence[Blob], propagate_down: Sequence[bool], bottom: Sequence[Blob]) -> None:
        """Write `bottom[i].diff[...]` where propagate_down[i], and add to the diffs of learnable blobs."""
        raise NotImplementedError(f"{type(self).__name__} has no backward(self, top, propagate_down, bottom)")


def load(layer: Any) -> PythonLayer:
    """A new object of the class that a layer's python_param names. Raises UserCodeError."""
    module, name = layer.param.module, layer.param.layer
    with _user_code(layer, f"importing module '{module}'"):
        found = importlib.import_module(module)
    cls = getattr(found, name, None)
    if not (isinstance(cls, type) and issubclass(cls, PythonLayer)):
        text = f"module '{module}' has no class '{name}' derived from caffe.Layer"
        raise UserCodeError(f"layer '{layer.name}': {text}", field=("python_param", "layer"))
    with _user_code(layer, f"{name}()"):
        user = cls(layer.proto)
    if not isinstance(getattr(user, "blobs", None), BlobVector):
        user.blobs = BlobVector()  # its __init__ does not call ours
    user.param_str = user.param_str_ = layer.param.param_str  # type: ignore[attr-defined]  # the old spelling too
    user.phase = PHASES.index(layer.context.phase)
    return user


@contextmanager
def _user_code(layer: Any, what: str) -> Iterator[None]:
    """User code while the net is made: what it raises becomes a UserCodeError with a place."""
    try:
        yield
    except Exception as e:
        last = traceback.extract_tb(e.__traceback__)[-1]
        missing = isinstance(e, ModuleNotFoundError) and e.name == layer.param.module.split(".")[0]
        hint = "is the folder of that file on PYTHONPATH?" if missing else None
        text = f"layer '{layer.name}' ({layer.type}): {what}: {type(e).__name__}: {e}"
        if not missing:
            text += f" ({last.filename}:{last.lineno})"
        raise UserCodeError(text, field=("python_param",), hint=hint) from e


def place(error: BaseException) -> str | None:
    """The layer in whose forward or backward user code raised `error`, and the line; None: it came from elsewhere."""
    frames = list(traceback.walk_tb(error.__traceback__))
    for i, (frame, _) in enumerate(frames):
        code = frame.f_locals.get("self")
        if isinstance(code, UserCode) and frame.f_code.co_name == UserCode._call.__name__ and i + 1 < len(frames):
            last, line = frames[-1]
            layer = code.layer
            return f"layer '{layer.name}' ({layer.type}): {code.name} failed ({last.f_code.co_filename}:{line})"
    return None


class Kind(NamedTuple):
    """Where and of which type a net's tensors are."""

    device: torch.device
    dtype: torch.dtype


class UserCode:
    """One user object with the blobs it works on. Where a top is named like a bottom (in place), they are one blob."""

    def __init__(self, layer: Any, ins: Sequence[tuple[int, ...]]) -> None:
        self.layer = layer
        self.user = load(layer)
        self.name = type(self.user).__name__
        names = list(layer.proto.bottom)
        self.bottoms = [Top(s) for s in ins]
        self.tops = [self.bottoms[names.index(t)] if t in names else Top(()) for t in layer.proto.top]
        with _user_code(layer, f"{self.name}.setup"):
            self.user.setup(self.bottoms, self.tops)

    def shapes(self, ins: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """Top shapes for these bottom shapes, from the user's `reshape`."""
        for blob, shape in zip(self.bottoms, ins, strict=True):
            blob.reshape(*shape)
        with _user_code(self.layer, f"{self.name}.reshape"):
            self.user.reshape(self.bottoms, self.tops)
        return [t.shape for t in self.tops]

    def bind(self, params: Sequence[nn.Parameter]) -> None:
        """Let the user's learnable blobs be these parameters."""
        for blob, param in zip(self.user.blobs, params, strict=True):
            shared = ParamBlob.of(param)
            blob._data, blob._diff = shared._data, shared._diff

    def forward(self, bottoms: Sequence[Tensor], kind: Kind) -> tuple[Tensor, ...]:
        """The tops. What the user raises goes through as it is."""
        for blob, x in zip(self.bottoms, bottoms, strict=True):
            blob.reshape(*x.shape)
            blob._data.put(x.detach())
        self._call(self.user.reshape, self.bottoms, self.tops)
        self._call(self.user.forward, self.bottoms, self.tops)
        return tuple(t._data.take(kind.device).to(kind.dtype) for t in self.tops)

    def backward(self, grads: Sequence[Tensor], wanted: Sequence[bool], kind: Kind) -> tuple[Tensor | None, ...]:
        """Gradients of the bottoms; those of learnable blobs the user adds to theirs itself."""
        for blob, grad in zip(self.tops, grads, strict=True):
            blob._diff.put(grad.detach())
        self._call(self.user.backward, self.tops, list(wanted), self.bottoms)
        return tuple(b._diff.take(kind.device).to(kind.dtype) if w else None for b, w in zip(self.bottoms, wanted))

    def _call(self, method: Callable[..., None], *args: Any) -> None:
        memories = [m for b in self.user.blobs for m in (b._data, b._diff)]
        for m in memories:
            m.pull()  # type: ignore[union-attr]
        method(*args)
        for m in memories:
            m.push()  # type: ignore[union-attr]


class _Call(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, code: UserCode, kind: Kind, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.code, ctx.kind, ctx.count = code, kind, count
        return code.forward(tensors[:count], kind)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[3 : 3 + ctx.count]
        found = ctx.code.backward(grads, wanted, ctx.kind)
        return (None, None, None, *found, *[None] * (len(ctx.needs_input_grad) - 3 - ctx.count))


class Python(nn.Module):
    """User code as a module. Its parameters take part in the call, so that backward runs for their sake."""

    here: Tensor

    def __init__(self, code: UserCode, blobs: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.code = code
        self.learned = nn.ParameterList(blobs)
        self.register_buffer("here", torch.zeros(()), persistent=False)  # tells a data layer which device it is on
        code.bind(blobs)

    @torch.compiler.disable
    def forward(self, *bottoms: Tensor) -> Tensor | tuple[Tensor, ...]:
        like = bottoms[0] if bottoms else self.here
        kind = Kind(like.device, like.dtype)
        outs: tuple[Tensor, ...] = _Call.apply(self.code, kind, len(bottoms), *bottoms, *self.learned)
        return outs[0] if len(outs) == 1 else outs


class HDF5Output(nn.Module):
    """Appends rows to datasets "data" and "label"."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self.begun = False

    @torch.compiler.disable
    def forward(self, data: Tensor, label: Tensor) -> tuple[Tensor, ...]:
        try:
            import h5py
        except ImportError as e:
            raise DataError("HDF5Output needs h5py", hint="pip install h5py") from e
        try:
            with h5py.File(self.path, "a" if self.begun else "w") as file:
                for name, tensor in (("data", data), ("label", label)):
                    rows = tensor.detach().float().cpu().contiguous().numpy()
                    if name not in file:
                        file.create_dataset(name, data=rows, maxshape=(None, *rows.shape[1:]))
                        continue
                    file[name].resize(len(file[name]) + len(rows), axis=0)
                    file[name][-len(rows) :] = rows
        except OSError as e:
            raise DataError(f"HDF5Output cannot write '{os.fspath(self.path)}': {e}") from e
        self.begun = True
        return ()
