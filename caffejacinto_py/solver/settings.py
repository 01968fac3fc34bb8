"""Checks of a solver message before anything is built, and warnings about settings that do nothing here."""

from __future__ import annotations

import logging
from typing import Any

from caffejacinto_py.errors import CaffeError, PrototxtError, near, raise_all
from caffejacinto_py.passes.memory import HISTORY_TYPES
from caffejacinto_py.schema.dialect import Dialect
from caffejacinto_py.solver import lr, memory
from caffejacinto_py.solver.lr import Where
from caffejacinto_py.solver.rules import RULES

log = logging.getLogger(__name__)

# fields that are read, and why they change nothing
WITHOUT_EFFECT = {
    "plateau_winsize": "lr_policy 'plateau' is not supported",
    "snapshot_log": "caffe-jacinto stopped reading it in 0.16; metrics.jsonl has the log",
    "test_and_snapshot_last_epochs": "this version tests and snapshots by iterations only",
    "larc_turbo": "it chooses between CUDA kernels of NVCaffe",
    "max_weight_decay": "the formula of NVCaffe's weight decay here has no upper bound",
    "layer_wise_reduce": "gradients are reduced while backward runs, whatever it says",
    "store_blobs_in_old_format": "weights are written in the form that every Caffe reads",
    "eval_type": "the outputs of the test net decide",
    "solver_data_type": "weights and history have the net's type, FLOAT or DOUBLE (docs/precision.md)",
    "engine": "it chooses between Intel Caffe's kernels",
    "estimate": "the Iteration line shows the speed",
}
NOT_NEGATIVE = ("display_sparsity", "sparsity_start_iter", "sparsity_start_factor", "sparsity_step_factor",
                "sparsity_threshold_maxratio", "sparsity_threshold_value_max")  # fmt: skip


def check(param: Any, where: Where, dialect: Dialect) -> None:
    """All that is wrong with a solver message in itself, at once; then warn about what has no effect."""
    errors: list[CaffeError] = []
    try:
        lr.check(param, where)
    except CaffeError as e:
        errors += getattr(e, "errors", (e,))
    if param.type not in RULES:
        known = {r.lower(): r for r in RULES}
        hint = (
            f"did you mean '{known[param.type.lower()]}'?" if param.type.lower() in known else near(param.type, RULES)
        )
        errors.append(
            _wrong(where, "type", f"unknown solver type '{param.type}'", hint or f"known: {', '.join(RULES)}")
        )
    if param.history_type not in HISTORY_TYPES:
        text = f"unknown history_type '{param.history_type}'"
        errors.append(_wrong(where, "history_type", text, f"one of {', '.join(HISTORY_TYPES)}"))
    if param.regularization_type not in ("L1", "L2"):
        text = f"unknown regularization_type '{param.regularization_type}'"
        errors.append(_wrong(where, "regularization_type", text, "L1 or L2"))
    if param.larc and param.larc_policy not in ("scale", "clip"):
        errors.append(_wrong(where, "larc_policy", f"unknown larc_policy '{param.larc_policy}'", "scale or clip"))
    if param.disabled_update:
        text = "disabled_update (Intel Caffe) trains without changing the weights; this version always updates"
        errors.append(_wrong(where, "disabled_update", text, "remove it, or use the time command to measure speed"))
    for field in ("iter_size", "average_loss", "sparsity_step_iter"):
        if getattr(param, field) < 1:
            errors.append(_wrong(where, field, f"{field} must be at least 1, not {getattr(param, field)}"))
    for field in ("display", "test_interval", "snapshot", "max_iter", *NOT_NEGATIVE):
        if not getattr(param, field) >= 0:
            errors.append(_wrong(where, field, f"{field} cannot be negative: {getattr(param, field):g}"))
    if not 0 <= param.sparsity_target < 1:
        text = f"sparsity_target must be in [0, 1), not {param.sparsity_target:g}"
        errors.append(_wrong(where, "sparsity_target", text, "the fraction of all weights that shall be zero: 0.8"))
    if param.type in ("AdaGrad", "RMSProp") and param.momentum:
        errors.append(_wrong(where, "momentum", f"{param.type} has no momentum: remove it or choose another type"))
    if param.type == "RMSProp" and not 0 <= param.rms_decay < 1:
        errors.append(_wrong(where, "rms_decay", f"rms_decay must be in [0, 1), not {param.rms_decay:g}"))
    if param.type == "Adam" and not 0 <= param.momentum2 < 1:
        errors.append(_wrong(where, "momentum2", f"momentum2 must be in [0, 1), not {param.momentum2:g}"))
    try:
        memory.limits(param, where)
    except CaffeError as e:
        errors.append(e)
    raise_all(errors)
    _warn(param, where, dialect)


def _wrong(where: Where, field: str, text: str, hint: str | None = None) -> PrototxtError:
    return PrototxtError(text, loc=where(field), hint=hint)


def _warn(param: Any, where: Where, dialect: Dialect) -> None:
    found = {f: why for f, why in WITHOUT_EFFECT.items() if _set(param, f)}
    if param.type != "SGD":
        for field in ("larc", "momentum_policy"):
            if _set(param, field):
                found[field] = f"only SGD has it, this solver is {param.type}"
    if _set(param, "test_initialization") and not dialect.test_initialization:
        found["test_initialization"] = f"{dialect.name} tests one batch before iteration 0, whatever it says"
    if _set(param, "min_lr") and param.lr_policy != "poly" and not dialect.lr_floor:
        found["min_lr"] = f"in {dialect.name} only lr_policy 'poly' looks at it"
    if not param.sparse_mode and _set(param, "sparsity_target"):
        found["sparsity_target"] = "sparse_mode is not set; add: sparse_mode: SPARSE_UPDATE"
    if _set(param, "sparsity_itr_increment_bfr_applying") and dialect.compat.sparsity == "0.17":
        found["sparsity_itr_increment_bfr_applying"] = "caffe-jacinto 0.17, which compat asks for, does not read it"
    highest = min(param.sparsity_target + 0.15, 0.95)
    if param.sparsity_target > 0 and param.sparsity_start_factor > highest:
        found["sparsity_target"] = f"sparsity_start_factor starts above {highest:g}, where thresholding ends"
    for field, why in found.items():
        place = where(field)
        log.warning("%s'%s' has no effect: %s", f"{place}: " if place else "", field, why)


def _set(param: Any, field: str) -> bool:
    """Whether a field is in the file and differs from its default."""
    spec = param.DESCRIPTOR.fields_by_name.get(field)
    if spec is None:
        return False
    value = getattr(param, field)
    return len(value) > 0 if hasattr(value, "extend") else param.HasField(field) and value != spec.default_value
