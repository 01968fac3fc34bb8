"""A GPU that is not there: torch on the CPU keeps books about which tensors would lie on "cuda:0".

`with fake_cuda() as seen:` tensors made without a device, and those from numpy, are the host's; all others are the
device's, say so (`x.device`), and hold true numbers, so that a run can be compared with one on the CPU. What CUDA
refuses raises here too: host and device tensors in one call, numpy() of a device tensor, a generator of the CPU.
What makes the host wait for the device (item(), nonzero(), copies without pinned memory, ...) is noted in `seen.waits`
with the line of ours that asked. What it cannot show: kernels that CUDA lacks, their layouts, numbers and speed.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
OURS = f"{os.sep}caffejacinto_py{os.sep}"
WAITS = {
    "item", "tolist", "__bool__", "__float__", "__int__", "__index__", "__complex__", "__contains__", "nonzero",
    "equal", "allclose", "argwhere", "is_nonzero", "masked_select", "unique", "unique_consecutive", "bincount",
    "repeat_interleave", "one_hot", "new_tensor", "inverse", "linalg_inv", "linalg_solve", "linalg_svd", "linalg_eigh",
}  # fmt: skip
MAY_MIX = {"copy_", "_foreach_copy_", "__getitem__", "__setitem__", "index_put_", "index_put", "index", "set_"}
STRICT = {"stack", "cat", "_fused_sgd_", "_fused_adam_", "_fused_adagrad_"}  # scalars of the host will not do either
PASS = {"_parse_to", "_has_compatible_shallow_copy_type"}  # what nn.Module.to asks
FROM_NUMPY, RNG_STATE = torch.from_numpy, torch.get_rng_state


@dataclass
class Seen:
    """waits: what the host had to wait for: (what, place in our code or ""). uploads: copies that did not wait."""

    waits: list[tuple[str, str]] = field(default_factory=list)
    uploads: list[str] = field(default_factory=list)
    synchronized: int = 0

    def forget(self) -> None:
        self.waits.clear()
        self.uploads.clear()


class FakeCuda(TorchFunctionMode):
    """The books. host: storages of tensors on the host, kept alive so that no address comes twice."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = Seen()
        self.hosts: dict[int, Any] = {}
        self.pinned: set[int] = set()

    # --- where a tensor is -------------------------------------------------------------------------------------------
    def on_host(self, x: Tensor) -> bool:
        with torch._C.DisableTorchFunction():
            return x.untyped_storage().data_ptr() in self.hosts

    def to_host(self, x: Any, *, pinned: bool = False) -> Any:
        with torch._C.DisableTorchFunction():
            storage = x.untyped_storage()
            if storage.data_ptr():
                self.hosts[storage.data_ptr()] = storage
                if pinned:
                    self.pinned.add(storage.data_ptr())
        return x

    def place(self, x: Tensor) -> torch.device:
        return CPU if self.on_host(x) else CUDA

    # --- every call of torch -----------------------------------------------------------------------------------------
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", str(func))
        if name in ("__get__", "__set__", "__delete__"):
            return self._attribute(func, name, args)
        if func is torch.device or name in PASS:
            return func(*args, **kwargs)
        if name == "pin_memory":
            return self.to_host(args[0].clone(), pinned=True)
        if name in ("cpu", "cuda", "to") and isinstance(args[0], Tensor):
            return self._to(name, args, kwargs)
        if name == "numpy" and args[0].numel() and not self.on_host(args[0]) and not kwargs.get("force"):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        self._check(name, tensors, kwargs)
        self._look(name, args)
        return self._call(func, name, tensors, args, kwargs)

    def _call(self, func: Any, name: str, tensors: list[Tensor], args: Any, kwargs: Any) -> Any:
        asked = [d for d in tree_leaves((args, kwargs)) if isinstance(d, torch.device)]
        asked += [torch.device(kwargs["device"])] if isinstance(kwargs.get("device"), (str, int)) else []
        wants = asked[0].type if asked else None
        if wants is not None:
            args, kwargs = tree_map(lambda a: CPU if isinstance(a, torch.device) else a, (args, kwargs))
            if isinstance(kwargs.get("device"), (str, int)):
                kwargs["device"] = CPU
        if name in ("tensor", "as_tensor", "asarray") and wants == "cuda":
            self.wait(f"{name}(..., device=cuda)")
        known = {t.untyped_storage().data_ptr() for t in tensors}
        out = func(*args, **kwargs)
        host = wants == "cpu" if wants is not None else all(map(self.on_host, tensors))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and host and t.untyped_storage().data_ptr() not in known:
                self.to_host(t)
        return out

    def _attribute(self, func: Any, name: str, args: Any) -> Any:
        which = getattr(func, "__self__", None)
        if name == "__get__" and which is Tensor.device:
            return self.place(args[0])
        if name == "__get__" and which in (Tensor.is_cuda, Tensor.is_cpu):
            return self.on_host(args[0]) == (which is Tensor.is_cpu)
        return func(*args)

    def _to(self, name: str, args: Any, kwargs: Any) -> Tensor:
        x, *rest = args
        device: Any = {"cpu": CPU, "cuda": CUDA}.get(name, kwargs.pop("device", None))
        other = next((a for a in (*rest, kwargs.pop("other", None)) if isinstance(a, Tensor)), None)
        if other is not None:
            device, kwargs["dtype"] = self.place(other), other.dtype
        for a in rest if name == "to" else ():
            if isinstance(a, (torch.device, str)):
                device = torch.device(a)
            elif isinstance(a, torch.dtype):
                kwargs["dtype"] = a
        flags = dict(zip(("non_blocking", "copy"), (a for a in rest if isinstance(a, bool)), strict=False))
        kwargs = {k: v for k, v in {**flags, **kwargs}.items() if v is not None}
        blocking = not kwargs.pop("non_blocking", False)
        if device is None or torch.device(device).type == self.place(x).type:
            y = x.to(**kwargs) if kwargs else x
            return self.to_host(y) if self.on_host(x) else y
        device = torch.device(device)
        self._moved(x, f"to({device.type})", blocking)
        y = x.to(**{**kwargs, "copy": True}) if kwargs else x.clone()
        return self.to_host(y) if device.type == "cpu" else y

    def _moved(self, source: Tensor, what: str, blocking: bool) -> None:
        with torch._C.DisableTorchFunction():
            pinned = source.untyped_storage().data_ptr() in self.pinned
        if not source.numel():
            return
        if self.on_host(source) and pinned and not blocking:
            self.seen.uploads.append(what)
        else:
            self.wait(what)

    # --- rules -------------------------------------------------------------------------------------------------------
    def _check(self, name: str, tensors: list[Tensor], kwargs: Any) -> None:
        full = [t for t in tensors if t.numel()]
        on_device = any(not self.on_host(t) for t in full)
        mixed = on_device and any(self.on_host(t) and (t.dim() or name in STRICT) for t in full)
        if name in ("copy_", "_foreach_copy_"):
            if len({self.on_host(t) for t in full}) > 1:
                self._moved(full[-1], name, not kwargs.get("non_blocking", False))
        elif mixed and name in MAY_MIX:
            self.wait(f"{name} with tensors of the host")
        elif mixed:
            raise RuntimeError(f"{name}: Expected all tensors to be on the same device, but found cpu and cuda:0")
        generator = kwargs.get("generator")
        if generator is not None and on_device:
            raise RuntimeError(f"{name}: Expected a 'cuda' device type for generator but found 'cpu'")
        if on_device and name in WAITS:
            self.wait(name)
        if on_device and name in ("__getitem__", "__setitem__"):
            masks = [t for t in tensors[1:] if t.dtype in (torch.bool, torch.uint8)]
            value_is_tensor = name == "__setitem__" and len(tensors) > 2
            if masks and (name == "__getitem__" or value_is_tensor):
                self.wait(f"{name} with a mask")

    def _look(self, name: str, args: Any) -> None:
        """Calls that wait because of what is no tensor in them."""
        if not args or not isinstance(args[0], Tensor) or self.on_host(args[0]):
            return
        if name in ("__getitem__", "__setitem__"):
            parts = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(p, (list, np.ndarray)) for p in parts):
                self.wait(f"{name} with a list")
        elif name == "where" and len(args) == 1:
            self.wait("where of one tensor")

    def wait(self, what: str) -> None:
        """Somebody waits for the device."""
        self.seen.waits.append((what, _place()))


def _place() -> str:
    """The innermost line of ours."""
    frame = sys._getframe(1)
    while frame is not None:
        if OURS in frame.f_code.co_filename:
            return f"{frame.f_code.co_filename.rpartition(OURS)[2]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


@contextlib.contextmanager
def fake_cuda() -> Iterator[Seen]:
    """torch believes that there is one GPU, "cuda:0"."""
    mode = FakeCuda()

    def from_numpy(array: Any) -> Tensor:
        return mode.to_host(FROM_NUMPY(array))

    def synchronize(device: Any = None) -> None:
        mode.seen.synchronized += 1

    def rng_state() -> Tensor:
        return mode.to_host(RNG_STATE())

    device = SimpleNamespace(name="fake", total_memory=1 << 34, major=9, minor=0, multi_processor_count=132)
    stream = SimpleNamespace(wait_stream=lambda other: None)
    here: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "synchronize": synchronize,
        "get_device_properties": lambda i=0: device,
        "get_device_capability": lambda i=0: (device.major, device.minor),
        "get_device_name": lambda i=0: device.name,
        "get_arch_list": lambda: ["sm_90"],
        "is_bf16_supported": lambda including_emulation=True: True,
        "get_rng_state": lambda device=None: rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "manual_seed_all": lambda seed: None,
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "set_device": lambda device: None,
        "set_sync_debug_mode": lambda mode: None,
        "device": lambda device: contextlib.nullcontext(),
        "Stream": lambda device=None: stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": lambda device=None: stream,
    }
    with contextlib.ExitStack() as stack:
        for name, value in here.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(torch.cuda, "_initialized", True))
        stack.enter_context(mock.patch.object(Tensor, "record_stream"))
        stack.enter_context(mock.patch.object(torch, "from_numpy", from_numpy))
        stack.enter_context(mock.patch.object(torch, "get_rng_state", rng_state))
        stack.enter_context(mode)
        yield mode.seen
