"""The sparse step of the training loop: thresholding on a schedule, zeros kept at zero by masks. Caffe-jacinto's
ThresholdNet, with its log lines.

After each update: every `sparsity_step_iter` iterations from `sparsity_start_iter` on, while the target is not reached
and the factor is not above min(target + 0.15, 0.95), weights are thresholded (the fraction of zeros per row is the
factor, half of it in layers with few channels), masks are made anew and the factor grows. Then all weights are
multiplied by their masks. Gradients and momentum are not masked, as in C++.

Deviations from caffe-jacinto 0.17: factor and masks are saved with a snapshot and restored; at one iteration at most
one event happens, so that a finished run that is started again is not pruned further.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from caffejacinto_py.compress import sparsity
from caffejacinto_py.compress.sparsity import Fractions, Limits, Weight
from caffejacinto_py.engine.net import Net
from caffejacinto_py.errors import CaffeError, PrototxtError, near, raise_all
from caffejacinto_py.ir.graph import Graph
from caffejacinto_py.schema.dialect import Dialect
from caffejacinto_py.solver.logs import number
from caffejacinto_py.solver.lr import Where

log = logging.getLogger(__name__)
FROZEN = "All zero weights of convolution layers are frozen"
F = np.float32  # the schedule is in float32, as in C++: limits are met or missed by the last bit


class Sparse:
    """Sparsity of a solver's net; does nothing where `sparse_mode` and `display_sparsity` are not set.

    factor: fraction of zeros that the next event aims at. masks: one for each of `weights`, None before training.
    Raises PrototxtError for a `sparsity_layer_type` that the net has no weights of.
    """

    def __init__(self, net: Net, param: Any, where: Where, dialect: Dialect) -> None:
        self.param = param
        self.on = param.sparse_mode != param.DESCRIPTOR.fields_by_name["sparse_mode"].default_value
        self.counts_first = _counts_first(param, dialect)
        self.also = tuple(param.sparsity_layer_type)
        self.weights: list[Weight] = []
        if self.on or param.display_sparsity:
            check_types(net.graph, self.also, where)
            self.weights = sparsity.weights(net, also=self.also)
        self.target = F(param.sparsity_target)
        self.limit = F(min(float(self.target) + 0.15, 0.95))  # added in double, then rounded: so in C++
        self.factor = F(param.sparsity_start_factor)
        self.last_event = -1
        self.masks: list[Tensor] | None = None
        self._masked: tuple[list[Tensor], list[Tensor]] = ([], [])
        if self.on and self.target > 0:
            self._warn(where)

    # --- the three places where the loop calls -----------------------------------------------------------------------
    def begin(self) -> None:
        """Before the first update: freeze what is zero in the weights, unless a snapshot brought its masks."""
        if self.on and self.masks is None:
            self._freeze()

    def after_update(self, iteration: int) -> None:
        """After each update, before the counter moves. iteration: updates done before this one."""
        if self.counts_first:
            iteration += 1
        if self.on:
            self._threshold(iteration)
        if self.param.display_sparsity and iteration % self.param.display_sparsity == 0:
            self._display("Sparsity after update:")

    def after_training(self, iteration: int) -> None:
        """After the last iteration: one more chance for an event, and the table."""
        if self.on:
            self._threshold(iteration)
        if self.param.display_sparsity:
            self._display("Sparsity after training:")

    # --- what they do ------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def _threshold(self, iteration: int) -> None:
        self.begin()
        if self._due(iteration):
            self._event(iteration)
        if self._masked[0]:
            torch._foreach_mul_(*self._masked)

    def _due(self, iteration: int) -> bool:
        """Whether the schedule has an event here and the factor allows it."""
        p = self.param
        on_schedule = iteration >= p.sparsity_start_iter and iteration % p.sparsity_step_iter == 0
        return bool(self.target > 0 and on_schedule and self.factor <= self.limit and iteration != self.last_event)

    def _event(self, iteration: int) -> None:
        achieved = self._achieved()
        if achieved >= self.target:
            return
        values = {"target": self.target, "factor": self.factor, "achieved": achieved}
        text = " ".join(f"sparsity_{name}={number(float(value))}" for name, value in values.items())
        log.info("Finding and applying sparsity: %s iter=%d", text, iteration)
        high = float(self.factor)
        limits = Limits(self.param.sparsity_threshold_maxratio, self.param.sparsity_threshold_value_max)
        done = sparsity.prune(self.weights, Fractions(float(self.factor / F(2)), high, high), limits)
        for line in sparsity.prune_lines(done):
            log.info("%s", line)
        self._freeze()
        self.factor = self.factor + F(self.param.sparsity_step_factor)
        self.last_event = iteration

    def _achieved(self) -> np.float32:
        """Share of zeros in the masks of the counted weights."""
        assert self.masks is not None
        counted = [(w, m) for w, m in zip(self.weights, self.masks) if w.counted]
        return F(sparsity.total(sparsity.count([w for w, _ in counted], [m for _, m in counted])).fraction)

    def _freeze(self) -> None:
        self._set(sparsity.masks(self.weights))
        log.info(FROZEN)

    def _set(self, masks: list[Tensor]) -> None:
        """Take masks; those without a zero need not be multiplied, nor those of a shared weight twice."""
        self.masks = masks
        used = {id(w.param): (w.param.detach(), m) for w, m in zip(self.weights, masks) if not m.all()}
        self._masked = ([w for w, _ in used.values()], [m for _, m in used.values()])

    def _display(self, title: str) -> None:
        rows = sparsity.count([w for w in self.weights if w.counted])
        for line in (title, *sparsity.lines(rows)):
            log.info("%s", line)

    def _warn(self, where: Where) -> None:
        """Say it before the training when the target cannot be reached."""
        counted = [w for w in self.weights if w.counted]
        whole = sum(w.param.numel() for w in counted)
        share = {"low": 0.5, "mid": 1.0, "high": 1.0}
        most = sum(share[w.kind] * float(self.limit) * w.param.numel() for w in counted if w.kind)
        if whole == 0 or most < float(self.target) * whole:
            place = where("sparsity_target")
            text = "%ssparsity_target %g will not be reached: of the counted weights at most %.3g can become zero"
            log.warning(text, f"{place}: " if place else "", self.target, most / whole if whole else 0.0)

    # --- saving and restoring ----------------------------------------------------------------------------------------
    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """(numbers, arrays by name) for the side file of a snapshot."""
        if self.masks is None:
            return {}, {}
        arrays = {f"mask/{w.name}": np.packbits(m.cpu().numpy() != 0) for w, m in zip(self.weights, self.masks)}
        return {"sparse": {"factor": float(self.factor), "last_event": self.last_event}}, arrays

    def restore(self, meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        """The reverse of `state`, after the weights. A state of a run that was not sparse: begin anew.

        KeyError, TypeError, ValueError or RuntimeError for what does not fit; nothing is changed then.
        """
        if not self.on:
            return
        saved = meta.get("sparse")
        if saved is None:
            self.masks, self.factor, self.last_event = None, F(self.param.sparsity_start_factor), -1
            return
        factor, last_event = F(saved["factor"]), int(saved["last_event"])
        masks = []
        for w in self.weights:
            packed, n = arrays.get(f"mask/{w.name}"), w.param.numel()
            if packed is None:  # a layer that the solver did not prune when this was saved
                masks += sparsity.masks([w])
                continue
            if packed.size != (n + 7) // 8:
                raise ValueError(f"the mask of layer '{w.name}' has another size")
            bits = np.unpackbits(packed, count=n)
            mask = torch.from_numpy(bits.astype(np.float32)).reshape(w.param.shape)
            masks.append(torch.empty_like(w.param.detach()).copy_(mask))
        self.factor, self.last_event = factor, last_event
        self._set(masks)

    def replay(self, iteration: int) -> None:
        """Where there is no side file: zeros of the weights are frozen, the factor is what it would be by now.

        C++ goes back to the start factor; its next event then revives most of the zeros.
        """
        self.masks, self.factor, self.last_event = None, F(self.param.sparsity_start_factor), -1
        if not self.on or not self.target > 0:
            return
        for i in range(0, iteration + self.counts_first, self.param.sparsity_step_iter):
            if i >= max(self.param.sparsity_start_iter, self.counts_first) and self.factor <= self.limit:
                self.factor, self.last_event = self.factor + F(self.param.sparsity_step_factor), i
        if self.last_event >= 0:
            log.warning("the sparsity factor is not in this state: going on with %s", number(float(self.factor)))


def _counts_first(param: Any, dialect: Dialect) -> bool:
    """Whether an event at iteration N is the one after N updates (caffe-jacinto 0.16), not after N + 1."""
    if dialect.compat.sparsity == "0.17":
        return False
    if param.HasField("sparsity_itr_increment_bfr_applying"):
        return bool(param.sparsity_itr_increment_bfr_applying)
    return dialect.sparsity_counts_first


def check_types(graph: Graph, also: tuple[str, ...], where: Where) -> None:
    """Every type asked for must be one of the net's with a weight that can be masked."""
    known = {n.type for n in graph.nodes if sparsity.prunable(graph, n) is not None}
    errors: list[CaffeError] = []
    for i, kind in enumerate(also):
        if kind not in known:
            text = f"sparsity_layer_type: this net has no layer of type '{kind}' with weights that can be made sparse"
            hint = near(kind, known) or (f"it has: {', '.join(sorted(known))}" if known else None)
            errors.append(PrototxtError(text, loc=where("sparsity_layer_type", i), hint=hint))
    raise_all(errors)
