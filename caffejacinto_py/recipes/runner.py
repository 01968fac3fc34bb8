"""Run the stages of a recipe: each in its folder, finished ones kept, an interrupted one continued.

`<output>/<stage>/` gets train, test, deploy and solver.prototxt, run.log, the weights and result.json; `<output>/`
gets table.md.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from caffejacinto_py.data import probe
from caffejacinto_py.errors import CaffeError, UsageError, raise_all
from caffejacinto_py.passes import prepare
from caffejacinto_py.recipes import results, table
from caffejacinto_py.recipes.lock import locked
from caffejacinto_py.recipes.measure import bits, device_of, score
from caffejacinto_py.recipes.optimize import optimized
from caffejacinto_py.recipes.recipe import TRAIN, Recipe
from caffejacinto_py.recipes.resolve import Job, Origin
from caffejacinto_py.recipes.results import BEGUN, DONE, Result
from caffejacinto_py.schema.files import atomic_write
from caffejacinto_py.schema.upgrade import load_solver
from caffejacinto_py.solver import Solver, find_latest
from caffejacinto_py.solver.logs import LOGGER, GlogFormatter
from caffejacinto_py.solver.metrics import Metrics

log = logging.getLogger(__name__)
KEEP, RESUME, RUN = "keep", "resume", "run"


@dataclass
class Runner:
    """A recipe about to run.

    start: stage to begin with, run anew; the ones before it must have finished. device: of torch, None lets each solver
    decide. dialect: as given to `resolve`. elsewhere: trains a stage in other processes, from these weights or this
    solverstate; False when Ctrl-C came.
    """

    recipe: Recipe
    jobs: Sequence[Job]
    start: str | None = None
    device: str | None = None
    dialect: str | None = None
    workers: int = 1
    python_layers: bool = False
    elsewhere: Callable[[Job, Sequence[str], str | None], bool] | None = None
    stopped: bool = False
    results: list[Result] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.first = self.recipe.index(self.start) if self.start is not None else None

    def plan(self) -> list[tuple[Job, str]]:
        """Each stage with what would happen to it: keep, resume or run. Reads results and weights, changes nothing."""
        done: list[str] = []
        for index, job in enumerate(self.jobs):
            origin = job.origin.stage
            fresh = origin is not None and done[origin] != KEEP and not self._before(index)
            done.append(RUN if fresh else self._action(index))
        return list(zip(self.jobs, done))

    def run(self) -> list[Result]:
        """All stages in order; stops early at Ctrl-C (`stopped`). Raises CaffeError of every kind: what was finished
        stays, and the next run goes on from it. Another run in the same folder is an error."""
        self._preflight()
        with locked(self.recipe.output):
            for index in range(len(self.jobs)):
                result = self._stage(index)
                if result is None:
                    self.stopped = True
                    break
                self.results.append(result)
                self._write_table()
        return self.results

    def _stage(self, index: int) -> Result | None:
        """The result of a stage, kept or new; None when Ctrl-C came."""
        job, action = self.jobs[index], self._action(index)
        known = results.load(job.folder)
        if action == KEEP and known is not None:
            log.info("Stage %s: nothing has changed, its result stands", job.name)
            return known
        with _explained(job):
            return self._run(index, resume=action == RESUME)

    # --- what there is -----------------------------------------------------------------------------------------------
    def _before(self, index: int) -> bool:
        return self.first is not None and index < self.first

    def _action(self, index: int) -> str:
        job, known = self.jobs[index], results.load(self.jobs[index].folder)
        if self._before(index):
            if known is None or not known.done or not results.intact(job.folder, known):
                text = f"--from {self.start}: the stage '{job.name}' before it has not finished in '{job.folder}'"
                raise UsageError(text, hint="leave --from out: finished stages are kept anyway")
            return KEEP
        if self.first is not None or known is None or known.inputs != self._digest(index):
            return RUN
        if known.done:
            return KEEP if results.intact(job.folder, known) else RUN
        return RESUME

    def _digest(self, index: int) -> str | None:
        """None where the weights it starts from are not there yet."""
        job = self.jobs[index]
        files = self.weights(job.origin)
        if not all(os.path.isfile(f) for f in files):
            return None
        return results.digest(job, [results.sha256(f) for f in files])

    def weights(self, origin: Origin) -> list[str]:
        """The files that an origin means."""
        if origin.stage is None:
            return list(origin.files)
        job = self.jobs[origin.stage]
        return [results.final_weights(job)] if job.stage.kind == TRAIN else self.weights(job.origin)

    def _preflight(self) -> None:
        """Open the data of every stage and work out all shapes, before the first is trained."""
        errors: list[CaffeError] = []
        for job, action in self.plan():
            for name, source in job.nets.items() if action != KEEP else ():
                options: dict[str, Any] = {"level": source.level, "stages": source.stages, "dialect": job.dialect}
                phase = "TRAIN" if name == "train" else "TEST"
                try:
                    prepare(source.doc, phase=phase, probe=probe, python_layers=self.python_layers, **options)
                except CaffeError as e:
                    errors += getattr(e, "errors", (e,))
        raise_all(list({(e.loc, e.text): e for e in errors}.values()))

    # --- one stage ---------------------------------------------------------------------------------------------------
    def _run(self, index: int, *, resume: bool) -> Result | None:
        """The result, or None when Ctrl-C came."""
        job = self.jobs[index]
        began = time.perf_counter()
        inputs = self._digest(index)
        if inputs is None:
            raise CaffeError(f"weights of '{', '.join(self.weights(job.origin))}' are gone")
        known = results.load(job.folder) if resume else None
        if known is None:
            os.makedirs(job.folder, exist_ok=True)
            results.forget(job)
            for name, text in job.texts().items():
                with atomic_write(job.path(name), "w") as f:
                    f.write(self._header(job, name) + text)
            known = Result(job.name, job.stage.kind, BEGUN, inputs)
            results.save(job.folder, known)
        spent = known.seconds
        with _run_log(job.path("run.log"), append=resume):
            log.info("Stage %s (%s) of %s", job.name, job.stage.kind, self.recipe.file)
            finished = self._work(job, known, resume=resume)
        known.seconds = round(spent + time.perf_counter() - began, 3)
        known.status = DONE if finished else BEGUN
        results.save(job.folder, known)
        return known if finished else None

    def _work(self, job: Job, result: Result, *, resume: bool) -> bool:
        """Do what the kind of stage says and fill in the result; False when Ctrl-C came."""
        start = self.weights(job.origin)
        final = start
        result.iterations = job.iterations
        if job.stage.kind == TRAIN:
            final = [results.final_weights(job)]
            result.iterations = job.solver.max_iter
            if not self._train(job, start, resume=resume):
                return False
        elif job.optimized:
            job, final = optimized(job, start, self.recipe.name, python_layers=self.python_layers)
        if final != start:
            result.weights = {os.path.basename(f): results.sha256(f) for f in final}
        if "test" in job.nets and job.iterations:
            found = score(job, final, device=self.device, workers=self.workers, python_layers=self.python_layers)
            if found is None:
                return False
            result.scores = found.as_dict()
        else:
            weight_bits, activation_bits = bits(next(iter(job.nets.values())).doc.message)
            result.scores = {"weight_bits": weight_bits, "activation_bits": activation_bits}
        return True

    def _train(self, job: Job, weights: Sequence[str], *, resume: bool) -> bool:
        state = find_latest(job.solver.snapshot_prefix) if resume else None
        if resume and state is None:
            log.info("Stage %s was interrupted before its first snapshot: starting it anew", job.name)
        if self.elsewhere is not None:
            return self.elsewhere(job, () if state else weights, state)
        solver = Solver(
            load_solver(job.path("solver.prototxt")),
            device=device_of(job, self.device),
            dialect=self.dialect,
            compat=job.dialect.compat,
            weights=() if state else list(weights),
            workers=self.workers,
            python_layers=self.python_layers,
        )
        solver.metrics = Metrics(job.path("metrics.jsonl"))
        solver.solve(state)
        return not solver.stopped

    def _header(self, job: Job, name: str) -> str:
        """A comment on top of a file of the stage: how to repeat it by hand."""
        weights = ",".join(self.weights(job.origin))
        if name != "solver.prototxt" or job.stage.kind != TRAIN:
            return ""
        start = f" --weights={weights}" if weights else ""
        return f"# caffejacinto train --solver={job.path(name)}{start}\n"

    def _write_table(self) -> None:
        with atomic_write(os.path.join(self.recipe.output, "table.md"), "w") as f:
            f.write(table.markdown(self.recipe.name, self.results))


@contextmanager
def _explained(job: Job) -> Iterator[None]:
    """Says in which stage something went wrong, where the error does not have a place of its own."""
    try:
        yield
    except CaffeError as e:
        if e.loc is None and not getattr(e, "errors", ()):
            e.text = f"stage '{job.name}': {e.text}"
        raise


@contextmanager
def _run_log(path: str, *, append: bool) -> Iterator[None]:
    """The program's log also into a file, from level info on whatever the terminal shows."""
    logger = logging.getLogger(LOGGER)
    level, handlers = logger.level, [(h, h.level) for h in logger.handlers]
    file = logging.FileHandler(path, mode="a" if append else "w", encoding="utf-8")
    file.setFormatter(GlogFormatter())
    file.setLevel(logging.INFO)
    for handler, own in handlers:
        handler.setLevel(max(own, level))
    logger.setLevel(min(level or logging.INFO, logging.INFO))
    logger.addHandler(file)
    try:
        yield
    finally:
        logger.removeHandler(file)
        file.close()
        logger.setLevel(level)
        for handler, own in handlers:
            handler.setLevel(own)


def as_json(runner: Runner) -> Mapping[str, Any]:
    """The outcome of a run."""
    return {
        "recipe": runner.recipe.name,
        "output": runner.recipe.output,
        "stopped": runner.stopped,
        "stages": [
            {**r.scores, "stage": r.stage, "kind": r.kind, "iterations": r.iterations, "seconds": r.seconds}
            for r in runner.results
        ],
    }
