"""Numbers that a module knows from the prototxt, where its inputs are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Constant:
    """values: a (nested) list of numbers. They are brought to a device once: a copy in each pass would make the host
    wait for the device. No buffer, as it is no state."""

    def __init__(self, values: Sequence[Any]) -> None:
        self.values = values
        self._made: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def like(self, x: Tensor) -> Tensor:
        """The numbers on the device and in the type of x. Not to be changed."""
        key = (x.device, x.dtype)
        if key not in self._made:
            made = torch.tensor(self.values, dtype=x.dtype)
            self._made[key] = made.pin_memory().to(x.device, non_blocking=True) if x.is_cuda else made.to(x.device)
        return self._made[key]
