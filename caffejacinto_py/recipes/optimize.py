"""A stage's nets and weights with batch norm absorbed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from caffejacinto_py.data import probe
from caffejacinto_py.ir.emit import emit
from caffejacinto_py.passes import prepare
from caffejacinto_py.passes.absorb import Absorbed, absorb
from caffejacinto_py.recipes.resolve import Job
from caffejacinto_py.schema.files import atomic_write
from caffejacinto_py.schema.mark import mark
from caffejacinto_py.schema.text import dumps
from caffejacinto_py.schema.upgrade import load_net
from caffejacinto_py.schema.weights import ModelFile, read_model, write_model
from caffejacinto_py.solver.nets import NetSource

log = logging.getLogger(__name__)


def optimized(job: Job, weights: Sequence[str], name: str, *, python_layers: bool = False) -> tuple[Job, list[str]]:
    """The job with its nets absorbed, and the weights file that goes with them; all written into the stage's folder.

    Layers that stay are logged with the reason. Raises CaffeError of data, nets and weights.
    """
    found: dict[str, Any] = {}
    for entry in (e for file in weights for e in read_model(file).current_layers()):
        found[entry.name] = entry
    held = ModelFile(name, list(found.values()), ", ".join(weights))
    nets: dict[str, NetSource] = {}
    path = job.path(f"{name}.caffemodel")
    for which, source in job.nets.items():
        state: dict[str, Any] = {"level": source.level, "stages": source.stages, "dialect": job.dialect}
        graph = prepare(source.doc, phase="TEST", probe=probe, python_layers=python_layers, **state)
        done = absorb(graph, held, shared="keep")
        if not nets:
            _report(done)
            write_model(path, done.model)
        nets[which] = replace(source, doc=_written(job, which, source.doc.message, done))
    return replace(job, nets=nets), [path]


def _written(job: Job, which: str, old: Any, done: Absorbed) -> Any:
    """The absorbed net as a file, read back. Settings of the net as a whole stay."""
    message = type(old)()
    message.CopyFrom(old)
    del message.layer[:]
    message.layer.extend(emit(done.graph).layer)
    mark(message, job.dialect.name)
    with atomic_write(job.path(f"{which}.prototxt"), "w") as f:
        f.write(dumps(message))
    return load_net(job.path(f"{which}.prototxt"))


def _report(done: Absorbed) -> None:
    for merge in done.merged:
        log.info("Optimizing layer: %s %s (%s)", merge.type, merge.into, merge.node)
    for kept in done.kept:
        log.info("Kept: %s %s: %s", kept.type, kept.node, kept.reason)
