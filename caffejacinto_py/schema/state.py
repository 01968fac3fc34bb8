"""Solver states (.solverstate, .solverstate.h5): what a solver needs besides the weights to go on.

history is one array per learnable parameter, two (all first moments, then all second) for AdaDelta and Adam.
Source: bvlc sgd_solver.cpp (SnapshotSolverStateToBinaryProto, ...ToHDF5).
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from caffejacinto_py.errors import Loc, UsageError, WeightsError
from caffejacinto_py.schema import wire
from caffejacinto_py.schema.blobs import decode_blob, encode_blob
from caffejacinto_py.schema.files import atomic_write, open_bytes
from caffejacinto_py.schema.lazy import as_array
from caffejacinto_py.schema.sniff import is_hdf5, seems_by_magic, seems_other_message, seems_text
from caffejacinto_py.schema.weights import FORMATS
from caffejacinto_py.schema.wire import LEN, VARINT, Buffer, WireError


@dataclass
class SolverStateFile:
    """iter: iterations done. learned_net: path of the weights as stored, "" where there is none. current_step: steps of
    the multistep and step policies passed. history: float arrays (read-only views when read; LazyArrays may be
    written). legacy: per array, whether its shape is the old one of 4 axes (`shapes_match`)."""

    iter: int
    learned_net: str = ""
    current_step: int = 0
    history: list[Any] = field(default_factory=list)
    legacy: list[bool] = field(default_factory=list)
    path: str = ""


def read_state(path: str | os.PathLike[str]) -> SolverStateFile:
    """Read a solver state, binary or HDF5 by content. Raises WeightsError when missing, damaged or something else."""
    path = os.fspath(path)
    buf = open_bytes(path, what="solver state")
    if is_hdf5(buf):
        from caffejacinto_py.schema.hdf5 import read_hdf5_state

        done, learned, step, history = read_hdf5_state(path)
        return SolverStateFile(done, learned, step, history, [False] * len(history), path)
    seems = seems_by_magic(buf)
    if seems is None:
        try:
            return _parse(buf, path)
        except WireError as e:
            other = seems_other_message(buf)
            seems = seems_text(buf) or ((other, None) if other and "state" not in other else None)
            if seems is None:
                raise wire.damaged(e, path, "solver state", size=len(buf)) from None
    text = "the file is empty" if seems[0] == "empty" else f"not a solver state: it seems to be {seems[0]}"
    raise WeightsError(
        text, loc=Loc(path), hint="a .solverstate is wanted here; weights alone are given with --weights"
    )


def write_state(path: str | os.PathLike[str], state: SolverStateFile, *, format: str = "binaryproto") -> None:
    """Write a solver state that C++ Caffe reads, atomically. format: "binaryproto" or "hdf5".

    Raises CaffeError when the disk refuses, UsageError for an unknown format.
    """
    if format not in FORMATS:
        raise UsageError(f"no solver state format '{format}'", hint=f"one of {', '.join(FORMATS)}")
    if format == "hdf5":
        from caffejacinto_py.schema.hdf5 import write_hdf5_state

        write_hdf5_state(
            path,
            iter=state.iter,
            learned_net=state.learned_net,
            current_step=state.current_step,
            history=state.history,
        )
        return
    with atomic_write(path) as f:
        f.write(wire.uint(1, state.iter))
        if state.learned_net:
            f.write(wire.string(2, state.learned_net))
        for array in state.history:
            pieces = encode_blob(as_array(array))
            f.write(wire.header(3, sum(map(len, pieces))))
            f.writelines(wire.bytes_of(pieces))
        f.write(wire.uint(4, state.current_step))


def _parse(buf: Buffer, path: str) -> SolverStateFile:
    state = SolverStateFile(-1, path=path)
    for number, form, _, value, end in wire.fields(buf, 0, len(buf)):
        if number == 1 and form == VARINT:
            state.iter = wire.int32(value)
        elif number == 2 and form == LEN:
            state.learned_net = wire.text(buf, value, end)
        elif number == 3 and form == LEN:
            try:
                blob = decode_blob(buf, value, end)
            except WireError as e:
                raise e.within(f"history blob {len(state.history)}") from None
            state.history.append(blob.data)
            state.legacy.append(blob.legacy)
        elif number == 4 and form == VARINT:
            state.current_step = wire.int32(value)
    if state.iter < 0:
        raise WireError(0, "no iteration count in it")
    return state
