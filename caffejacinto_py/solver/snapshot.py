"""Snapshots: the weights and the solver state as C++ Caffe reads them, and beside them what a bit-exact resume needs.

Three files of one iteration: `<prefix>_iter_N.caffemodel`, `.solverstate` (both with `.h5` in HDF5 format) and
`.solverstate.extra`. Each appears whole or not at all, in this order; the last one holds the checksums of the other
two, so that a mixture of two runs, a damaged file or an interrupted snapshot is recognised.
"""

from __future__ import annotations

import contextlib
import glob
import json
import logging
import os
import re
import zipfile
import zlib
from dataclasses import dataclass, field
from tokenize import TokenError
from typing import Any

import numpy as np

from caffejacinto_py.errors import CaffeError, Loc, WeightsError
from caffejacinto_py.schema.files import atomic_write, open_bytes
from caffejacinto_py.schema.state import SolverStateFile, read_state, write_state
from caffejacinto_py.schema.weights import ModelFile, read_model, write_model

log = logging.getLogger(__name__)
VERSION = 1


@dataclass(frozen=True)
class Paths:
    """The files of one snapshot."""

    model: str
    state: str

    @property
    def extra(self) -> str:
        return self.state + ".extra"


@dataclass
class Extra:
    """What C++ Caffe's files have no room for. meta: numbers and names, as JSON; arrays: by name."""

    meta: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)


def paths(prefix: str, iteration: int, *, hdf5: bool = False) -> Paths:
    end = ".h5" if hdf5 else ""
    stem = f"{prefix}_iter_{iteration}"
    return Paths(f"{stem}.caffemodel{end}", f"{stem}.solverstate{end}")


def save(
    files: Paths, model: ModelFile, state: SolverStateFile, extra: Extra, *, hdf5: bool = False, diffs: bool = False
) -> None:
    """Write the three files, weights first. CaffeError when the disk refuses; nothing is left half-written."""
    form = "hdf5" if hdf5 else "binaryproto"
    write_model(files.model, model, format=form, diffs=diffs)
    write_state(files.state, state, format=form)
    sums = {os.path.basename(p): checksum(p) for p in (files.model, files.state)}
    meta = {**extra.meta, "version": VERSION, "files": sums}
    arrays = {**extra.arrays, "meta": np.frombuffer(json.dumps(meta).encode(), np.uint8)}
    with atomic_write(files.extra) as f:
        np.savez(f, **arrays)  # type: ignore[arg-type]


def checksum(path: str, *, what: str = "snapshot file") -> list[int]:
    """[size, CRC-32] of a file: against accidents, not against malice. what: it is, for an error."""
    data = open_bytes(path, what=what)
    return [len(data), zlib.crc32(data)]


def load_extra(state: str) -> Extra:
    """The side file of a solverstate, with the files it belongs to verified. Raises WeightsError."""
    path = state + ".extra"
    loc = Loc(path)
    extra = _read_extra(path, loc)
    files = extra.meta.get("files", {})
    folder = os.path.dirname(state)
    if extra.meta.get("version") != VERSION or os.path.basename(state) not in files:
        raise WeightsError("this side file is not one of this solver state", loc=loc)
    for name, want in files.items():
        beside = os.path.join(folder, name)
        if not os.path.isfile(beside):
            raise WeightsError(f"its '{name}' is missing", loc=loc)
        if checksum(beside) != want:
            raise WeightsError(f"'{name}' is damaged or belongs to another run", loc=loc)
    return extra


def _read_extra(path: str, loc: Loc) -> Extra:
    try:
        with np.load(path, allow_pickle=False) as loaded:
            arrays = {k: loaded[k] for k in loaded.files}
        meta = json.loads(bytes(arrays.pop("meta")).decode())
    except FileNotFoundError:
        raise WeightsError("no such side file", loc=loc) from None
    except (OSError, ValueError, KeyError, EOFError, SyntaxError, zipfile.BadZipFile, zlib.error, TokenError) as e:
        raise WeightsError(f"this side file is damaged: {e}", loc=loc) from e
    if not isinstance(meta, dict):
        raise WeightsError("this side file is damaged: its description is no table", loc=loc)
    return Extra(meta, arrays)


def find_model(state: str, learned_net: str) -> str:
    """The weights that a state names: as written, else beside the state file. WeightsError when they are nowhere."""
    folder = os.path.dirname(state)
    places = [learned_net, os.path.join(folder, learned_net), os.path.join(folder, os.path.basename(learned_net))]
    for place in places:
        if os.path.isfile(place):
            return place
    hint = "put the .caffemodel beside the .solverstate"
    raise WeightsError(f"its weights '{learned_net}' are not found", loc=Loc(state), hint=hint)


def find_latest(prefix: str) -> str | None:
    """The solverstate of the newest whole snapshot with this prefix; None when there is none.

    Whole: weights, state and side file are there and agree. What is damaged is skipped with a warning. Where none
    is left (C++ Caffe writes no side file): the newest pair of weights and state that can be read.
    """
    pattern = re.compile(re.escape(os.path.basename(prefix)) + r"_iter_(\d+)\.solverstate(\.h5)?$")
    found = []
    for path in glob.glob(glob.escape(prefix) + "_iter_*.solverstate*"):
        match = pattern.match(os.path.basename(path))
        if match:
            found.append((int(match[1]), path))
    found.sort(reverse=True)
    own = [path for _, path in found if os.path.exists(path + ".extra")]
    for path in own:
        try:
            load_extra(path)
        except CaffeError as e:
            log.warning("skipping snapshot '%s': %s", path, e)
            continue
        return path
    for _, path in found:
        if path in own:
            continue
        try:
            read_model(find_model(path, read_state(path).learned_net))
        except CaffeError as e:
            log.warning("skipping snapshot '%s': %s", path, e)
            continue
        if own:
            log.warning("'%s' has no side file: the data start at the first record again", path)
        return path
    return None


def remove_leftovers(prefix: str) -> None:
    """Delete the temporary files that killed snapshots of this prefix left behind."""
    folder, base = os.path.split(prefix)
    for path in glob.glob(os.path.join(glob.escape(folder), f".{glob.escape(base)}_iter_*.tmp")):
        if re.search(r"_iter_\d+\.(caffemodel|solverstate)[.\w]*\.[0-9a-f]{12}\.tmp$", path):
            with contextlib.suppress(OSError):
                os.unlink(path)
                log.info("Removed '%s', left by an interrupted snapshot", path)
