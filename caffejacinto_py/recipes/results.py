"""result.json of a stage: what it was made from and what came out, so that a run goes on where it was."""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from caffejacinto_py.errors import WeightsError
from caffejacinto_py.recipes import fingerprint
from caffejacinto_py.recipes.recipe import TRAIN
from caffejacinto_py.recipes.resolve import Job
from caffejacinto_py.schema.files import atomic_write, open_bytes
from caffejacinto_py.solver import build
from caffejacinto_py.solver.snapshot import paths

VERSION = 1
DONE, BEGUN = "done", "begun"
# fields of a solver that say where files are, not what is computed
_PLACES = ("train_net", "test_net", "snapshot_prefix")


@dataclass
class Result:
    """status: "begun" or "done". inputs: digest of all that decides the outcome. weights: file name in the stage's
    folder -> SHA-256, of what a later stage starts from; empty where a stage makes no weights. iterations: trained, or
    test batches. scores: as in measure.Scores. seconds: spent, interrupted parts included."""

    stage: str
    kind: str
    status: str
    inputs: str
    weights: dict[str, str] = field(default_factory=dict)
    iterations: int = 0
    scores: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def done(self) -> bool:
        return self.status == DONE


def load(folder: str) -> Result | None:
    """The result in a stage's folder; None where there is none that this version wrote."""
    try:
        with open(os.path.join(folder, "result.json"), encoding="utf-8") as f:
            found = json.load(f)
        if found.pop("version", None) != VERSION:
            return None
        return Result(**{f.name: found[f.name] for f in fields(Result)})
    except (OSError, ValueError, KeyError, AttributeError):
        return None


def save(folder: str, result: Result) -> None:
    with atomic_write(os.path.join(folder, "result.json"), "w") as f:
        json.dump({"version": VERSION, **asdict(result)}, f, indent=2)
        f.write("\n")


def sha256(path: str) -> str:
    """Checksum of a file's content. WeightsError where it cannot be read."""
    return hashlib.sha256(open_bytes(path, what="weights file", error=WeightsError)).hexdigest()


def digest(job: Job, weights: Sequence[str]) -> str:
    """Of all that decides what a stage computes. weights: checksums of the files it starts from.

    Data, mean files and code that its nets name are known as far as `fingerprint` says.
    """
    solver = None
    if job.solver is not None and job.stage.kind == TRAIN:
        solver = type(job.solver)()
        solver.CopyFrom(job.solver)
        for name in _PLACES:
            solver.ClearField(name)
    parts = {
        "kind": job.stage.kind,
        "iterations": job.iterations,
        "optimized": job.optimized,
        "solver": solver.SerializeToString(deterministic=True).hex() if solver is not None else None,
        "nets": {n: s.doc.message.SerializeToString(deterministic=True).hex() for n, s in job.nets.items()},
        "weights": list(weights),
        "dialect": job.dialect.name,
        "compat": job.dialect.compat.changed(),
        "files": _files(job),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _files(job: Job) -> dict[str, str]:
    teachers = job.solver.teacher if job.solver is not None and job.stage.kind == TRAIN else ()
    named = [name for t in teachers for name in (t.net, *build.split_names(list(t.weights)))]
    found = {name: fingerprint.of_file(name) for name in named}
    return found | fingerprint.of_nets([source.doc.message for source in job.nets.values()])


def intact(folder: str, result: Result) -> bool:
    """Whether the weights that the result names are still what they were."""
    for name, known in result.weights.items():
        path = os.path.join(folder, name)
        if not os.path.isfile(path) or sha256(path) != known:
            return False
    return True


def final_weights(job: Job) -> str:
    """The file that training leaves."""
    hdf5 = job.solver.snapshot_format == job.solver.HDF5
    return paths(job.solver.snapshot_prefix, job.solver.max_iter, hdf5=hdf5).model


def forget(job: Job) -> None:
    """Remove the snapshots and the result of an earlier run of this stage."""
    if job.solver is not None:
        stem = glob.escape(job.solver.snapshot_prefix)
        for ending in ("caffemodel", "caffemodel.h5", "solverstate", "solverstate.h5", "solverstate*.extra"):
            for path in glob.glob(f"{stem}_iter_*.{ending}"):
                os.unlink(path)
    if os.path.exists(job.path("result.json")):
        os.unlink(job.path("result.json"))
