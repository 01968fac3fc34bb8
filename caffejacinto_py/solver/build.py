"""From a solver message to the nets it trains and tests, ready to run."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from caffejacinto_py.compress import quantize
from caffejacinto_py.data import probe
from caffejacinto_py.engine import precision as types
from caffejacinto_py.engine.allocator import tune
from caffejacinto_py.engine.net import Net
from caffejacinto_py.errors import CaffeError, UsageError
from caffejacinto_py.passes import prepare
from caffejacinto_py.passes.precision import describe
from caffejacinto_py.schema.dialect import Dialect
from caffejacinto_py.schema.weights import read_model
from caffejacinto_py.solver.nets import NetSource
from caffejacinto_py.solver.teacher import Teachers

log = logging.getLogger(__name__)


def choose_device(param: Any, device: str | torch.device | None) -> torch.device:
    """The device asked for; None: what solver_mode and device_id say, the CPU where there is no GPU."""
    if device is not None:
        return torch.device(device)
    if type(param).SolverMode.Name(param.solver_mode) == "CPU":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        log.info("solver_mode is GPU, but torch finds no GPU here: running on the CPU")
        return torch.device("cpu")
    if param.device_id >= torch.cuda.device_count():
        raise UsageError(f"device_id {param.device_id}: only {torch.cuda.device_count()} GPUs are here")
    return torch.device("cuda", param.device_id)


def choose_seed(param: Any) -> int:
    """random_seed, or where it is negative a fresh one, which is logged so that the run can be repeated."""
    if param.random_seed >= 0:
        return int(param.random_seed)
    seed = int.from_bytes(os.urandom(4), "little") >> 1
    log.info("random_seed: %d (drawn; put it into the solver to repeat this run)", seed)
    return seed


def seed_everything(seed: int) -> None:
    """Seed the generators that layers draw from."""
    torch.manual_seed(seed)
    np.random.seed(seed % (1 << 32))
    random.seed(seed)


def build_net(
    source: NetSource,
    phase: str,
    *,
    dialect: Dialect,
    device: torch.device,
    seed: int,
    share: Net | None = None,
    layout: str = "auto",
    python_layers: bool = False,
    precision: str | None = None,
    teachers: Teachers | None = None,
) -> Net:
    """One net of a solver, with parameters filled or shared. precision: see `passes.precision.resolve`. teachers: for
    its Teacher layers."""
    if device.type == "cpu" and share is None:
        tune()
    for notice in source.doc.notices:
        log.info("%s: %s", source.label, notice)
    state: dict[str, Any] = {"phase": phase, "level": source.level, "stages": source.stages}
    common: dict[str, Any] = {"dialect": dialect, "python_layers": python_layers}
    lesson = teachers.lesson(source, phase, device=device, **common) if teachers is not None else None
    state["teacher"] = lesson.shapes if lesson is not None else None
    graph = prepare(source.doc, probe=probe, **common, **state)
    for notice in graph.notices if share is None else ():
        log.warning("%s", notice)
    table, lines = types.choose(graph, device, precision, shared=share.dtype if share else None)
    if share is None:
        for line in describe(table):
            log.info("%s", line)
        for line in (*table.notes, *lines):
            log.warning("%s", line)
    made: dict[str, Any] = {"dtype": types.DTYPES[table.base], "types": table}
    net = Net(graph, device=device, share=share, seed=seed, layout=layout, **made)
    quantize.attach(net)
    return net


def split_names(weights: str | os.PathLike[str] | Sequence[str]) -> list[str]:
    """File names from one string or several, each with commas between names."""
    given: Iterable[str] = [os.fspath(weights)] if isinstance(weights, (str, os.PathLike)) else weights
    return [name.strip() for one in given for name in one.split(",") if name.strip()]


def load_weights(nets: Sequence[Net], names: Sequence[str], *, tolerant: bool) -> None:
    """Copy weights files into the nets by layer name, in order; the first net is the one whose report is logged.

    Raises WeightsError for a damaged file or other shapes; CaffeError when a file has no layer of the net at all.
    """
    for name in names:
        model = read_model(name)
        report = nets[0].load(model, ignore_shape_mismatch=tolerant)
        for net in nets[1:]:
            net.load(model, ignore_shape_mismatch=tolerant)
        for line in report.warnings:
            log.warning("%s", line)
        if not report.loaded:
            hint = "layers are matched by name: is this the file for this net?"
            raise CaffeError(f"'{name}' has no layer of this net", hint=hint)
        log.info("Loaded %d layers from %s", len(report.loaded), name)
        if report.ignored:
            log.info("Not in the net, ignored: %s", ", ".join(report.ignored))
        if report.untouched:
            log.info("Not in the file, left as initialised: %s", ", ".join(report.untouched))
