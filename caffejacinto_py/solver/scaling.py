"""Loss scaling for layers in float16: the sum of all losses is multiplied, gradients are divided again at the masters.

float16 ends at 6e-8; smaller gradients would be zero. NVCaffe multiplies inside two loss layers only and divides every
gradient, so that other losses train with gradients that are too small; here the scale is in all of them or in none.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor

from caffejacinto_py.engine.net import Net
from caffejacinto_py.errors import CaffeError, PrototxtError

log = logging.getLogger(__name__)
START = 2.0**16  # of the dynamic scale; it halves at each overflow, so that the right one is found in a few steps
LARGEST = 2.0**24
PATIENCE = 2000  # finite steps before the dynamic scale doubles; as torch.amp.GradScaler
ENOUGH = 50  # skipped steps in a row that end the training


class Scaling:
    """The scale of one training.

    global_grad_scale of the net: a fixed scale; with global_grad_scale_adaptive a dynamic one, which halves at a
    gradient that is not finite and doubles after 2000 steps without. In both, such a step changes no weight. Nets
    without a layer in float16 are not scaled. chosen: float16 came from the command line; a net that names no scale
    then gets a dynamic one. Raises PrototxtError for a scale that is not positive.

    scale: of the next pass. good: whether the gradients of the last one may be used. skipped: steps so far that could
    not be used.
    """

    def __init__(self, net: Net, *, chosen: bool = False) -> None:
        message, locate = net.graph.proto, net.graph.locate
        given = message is not None and (message.HasField("global_grad_scale") or message.global_grad_scale_adaptive)
        fixed = float(message.global_grad_scale) if message is not None else 1.0
        if not (fixed > 0 and math.isfinite(fixed)):
            loc = locate(("global_grad_scale",)) if locate else None
            raise PrototxtError(f"global_grad_scale must be positive, not {fixed:g}", loc=loc, hint="1000, say")
        half = net.types is not None and "FLOAT16" in net.types.types
        self.dynamic = half and (bool(message.global_grad_scale_adaptive) if given else chosen)
        self.active = half and (self.dynamic or fixed != 1.0)
        self.scale = START if self.dynamic else fixed if self.active else 1.0
        self.good, self.skipped = True, 0
        self._finite = self._bad = 0  # steps in a row
        self._scaled, self._used = False, self.scale
        self._params = [b.param for b in net.learnable]
        if given and not half:
            log.info("global_grad_scale has no effect: no layer runs in FLOAT16")
        elif self.active:
            log.info("Gradient scale: %g%s", self.scale, ", dynamic" if self.dynamic else "")

    def backward(self, loss: Tensor) -> None:
        """Gradients of a pass, scaled; they add up in the parameters until `finish`."""
        self._scaled, self._used = self.active, self.scale
        (loss * self.scale if self.active else loss).backward()

    def finish(self, iteration: int) -> None:
        """Behind the last pass of an iteration: divide the gradients by the scale, judge them, choose the next scale.

        CaffeError when no step could be used for long.
        """
        self.good = True
        if not self._scaled:
            return
        self._scaled = False
        grads = [p.grad for p in self._params if p.grad is not None]
        if not grads:
            return
        self.good = bool(torch.stack(torch._foreach_norm(grads, math.inf)).isfinite().all())
        if self.good:
            torch._foreach_mul_(grads, 1.0 / self.scale)
            self._calm()
        else:
            self._skip(iteration)

    def _calm(self) -> None:
        self._finite, self._bad = self._finite + 1, 0
        if self.dynamic and self._finite >= PATIENCE:
            self.scale, self._finite = min(2 * self.scale, LARGEST), 0

    def _skip(self, iteration: int) -> None:
        self.skipped, self._bad, self._finite = self.skipped + 1, self._bad + 1, 0
        before = self.scale
        if self.dynamic:
            self.scale /= 2
        then = f"; scale {self.scale:g} from here on" if self.dynamic else ""
        text = "Iteration %d: gradients are not finite at scale %g: no update (%d so far)%s"
        log.warning(text, iteration, before, self.skipped, then)
        if self._bad >= ENOUGH:
            hint = "lower base_lr" + ("" if self.dynamic else ", or set global_grad_scale_adaptive: true")
            text = f"iteration {iteration}: gradients were not finite in {self._bad} iterations in a row"
            raise CaffeError(text, hint=hint)

    @property
    def shown(self) -> str:
        """The scale of the last pass, for the log line of the rates, as NVCaffe."""
        return f", gs = {self._used:g}" if self.active else ""

    # --- resume ------------------------------------------------------------------------------------------------------
    def state(self) -> dict[str, Any]:
        """What a resumed training needs."""
        return {"scale": self.scale, "skipped": self.skipped, "finite": self._finite, "bad": self._bad}

    def restore(self, state: dict[str, Any] | None) -> None:
        """Go on from a `state`; None (a side file from before there was a scale): as at the beginning. Raises KeyError,
        TypeError or ValueError for what is none. A fixed scale stays what the net says."""
        if state is None:
            return
        if self.dynamic:
            self.scale = float(state["scale"])
        self.skipped, self._finite, self._bad = int(state["skipped"]), int(state["finite"]), int(state["bad"])
