"""What autograd really keeps: bytes of saved tensors, each storage once, parameters and buffers left out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class SavedBytes:
    """Storages that were saved while `watch_saved` was on: address -> bytes. A storage is known by its address, so
    what is watched must stay alive."""

    def __init__(self, own: Iterable[Tensor]) -> None:
        self.own = {t.untyped_storage().data_ptr() for t in own}
        self.found: dict[int, int] = {}

    @property
    def total(self) -> int:
        return sum(self.found.values())

    def see(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.own:
            self.found[storage.data_ptr()] = storage.nbytes()
        return tensor


@contextmanager
def watch_saved(module: torch.nn.Module, *others: Tensor) -> Iterator[SavedBytes]:
    """Count what autograd saves in this block, besides the parameters and buffers of `module` and `others`."""
    found = SavedBytes((*module.parameters(), *module.buffers(), *others))
    with torch.autograd.graph.saved_tensors_hooks(found.see, lambda tensor: tensor):
        yield found


def peak_bytes(run: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """The most bytes that torch's allocator holds at one time during `run`, beyond what it held before; workspace of
    kernels that goes past the allocator (oneDNN's scratch) is not seen."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most
