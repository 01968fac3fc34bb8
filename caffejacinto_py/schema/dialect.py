"""The one value that decides where the forks disagree on a number.

Resolved once per net by `resolve_dialect`; layers, data and solver ask it and never look at a global.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from caffejacinto_py.errors import UsageError, near
from caffejacinto_py.schema.compat import Compat
from caffejacinto_py.schema.fork_fields import FORK_FIELDS, find_fork


@dataclass(frozen=True)
class Dialect:
    """Choices in which the forks differ (spec: BVLC Caffe, NVCaffe, caffe-jacinto, SSD, ADaPTION, Ristretto).

    name: the fork. The other fields are the choices; ask those, not the name.
    """

    name: str
    batch_norm_ema: bool = False  # NV: plain moving average, the phase decides; BVLC: sums with a factor blob
    accuracy_ties_lose: bool = True  # BVLC: a tie counts as a miss; the others: higher index first
    accuracy_empty_nan: bool = False  # the others: 0/0 when every label is ignored
    sigmoid_ce_normalized: bool = True  # BVLC: loss_param normalization; NV: always / num
    infogain_softmax: bool = True  # BVLC: applies softmax itself
    bilinear_modern: bool = True  # BVLC: c = (k-1)/(2f); older forks: (2f-1-f%2)/(2f)
    elu_lambda_both: bool = True  # NVCaffe: lambda scales both branches of ELU; jacinto: only the positive one
    mean_file_centered: bool = False  # NV: mean file is center-cropped; BVLC: aligned with the crop
    global_batch: bool = False  # NV: the prototxt batch is divided among the GPUs
    test_initialization: bool = True  # False: one test iteration before training, not a whole pass
    rampup_quadratic: bool = True  # 0.17: quadratic; 0.16: linear
    lr_floor: bool = True  # 0.17: max(., min_lr) for every policy
    weight_decay_power: float = 1.0  # default of the "poly" weight decay policy (jacinto: 0.5)
    delta_floor: bool = False  # NV: Adam, AdaGrad, ... never use a delta below 1e-4 or 1e-3
    sparsity_counts_first: bool = False  # 0.16: thresholding at N follows N updates; 0.17: N + 1
    ignore_shape_mismatch: bool = False  # jacinto: blobs of other shapes are copied flat or skipped when weights load
    compat: Compat = field(default_factory=Compat)  # deviations from the binaries that the user switched off
    reason: str = field(default="", compare=False)  # why this dialect, for the log


_NV = Dialect(
    "nvcaffe",
    batch_norm_ema=True,
    accuracy_ties_lose=False,
    accuracy_empty_nan=True,
    sigmoid_ce_normalized=False,
    infogain_softmax=False,
    bilinear_modern=False,
    mean_file_centered=True,
    global_batch=True,
    test_initialization=False,
    delta_floor=True,
)
_OLD = dict(accuracy_ties_lose=False, accuracy_empty_nan=True, infogain_softmax=False, bilinear_modern=False)

DIALECTS: dict[str, Dialect] = {
    d.name: d
    for d in (
        Dialect("bvlc"),
        _NV,
        Dialect(**{**_NV.__dict__, "name": "jacinto", "weight_decay_power": 0.5, "elu_lambda_both": False,
                   "ignore_shape_mismatch": True}),
        Dialect(**{**_NV.__dict__, "name": "jacinto-0.16", "rampup_quadratic": False, "lr_floor": False,
                   "test_initialization": True, "elu_lambda_both": False, "ignore_shape_mismatch": True,
                   "sparsity_counts_first": True}),
        Dialect("ssd", **_OLD),  # type: ignore[arg-type]
        Dialect("adaption", **_OLD),  # type: ignore[arg-type]
        Dialect("ristretto"),
    )
}  # fmt: skip
BVLC = DIALECTS["bvlc"]
_PRIORITY = list(FORK_FIELDS)  # the first fork that shows wins


def resolve_dialect(
    net_message: Any = None, solver_message: Any = None, option: str | None = None, *, compat: Compat | None = None
) -> Dialect:
    """The dialect of a net and its solver; `reason` says what decided.

    `option` (the user's choice) wins, else what the net says itself (`schema.mark`), else fields that only one fork
    has, else bvlc. compat: the user's switches. UsageError: no such dialect.
    """
    found = _resolve(net_message, solver_message, option)
    return replace(found, compat=compat) if compat is not None else found


def _resolve(net_message: Any, solver_message: Any, option: str | None) -> Dialect:
    marked = net_message.dialect if net_message is not None else ""
    for name, reason in ((option, "chosen by the user"), (marked or None, "the file says so")):
        if name is not None:
            return replace(_named(name), reason=reason)
    best: tuple[int, str, str] | None = None
    for what, message in (("the net", net_message), ("the solver", solver_message)):
        found = find_fork(message) if message is not None else None
        if found is not None and (best is None or _PRIORITY.index(found[0]) < best[0]):
            best = (_PRIORITY.index(found[0]), found[0], f"{what} has '{found[1]}'")
    if best is None:
        return replace(BVLC, reason="no field that only one fork has")
    return replace(DIALECTS[best[1]], reason=best[2])


def _named(name: str) -> Dialect:
    chosen = DIALECTS.get(name)
    if chosen is None:
        known = f"one of: {', '.join(DIALECTS)}"
        guess = near(name, DIALECTS)
        raise UsageError(f"unknown dialect '{name}'", hint=f"{guess} {known}" if guess else known)
    return chosen
