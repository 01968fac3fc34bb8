"""From a stage of a recipe to what runs: one solver, the nets of each phase, the weights it starts from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from caffejacinto_py.errors import CaffeError, Loc, UsageError, misplaced, near, raise_all
from caffejacinto_py.ir.build import kept
from caffejacinto_py.recipes.document import RecipeError, Scalar
from caffejacinto_py.recipes.recipe import NO_WEIGHTS, OPTIMIZE, TEST, TRAIN, Assignment, Inline, Recipe, Stage
from caffejacinto_py.schema import pb
from caffejacinto_py.schema.compat import Compat
from caffejacinto_py.schema.dialect import Dialect, resolve_dialect
from caffejacinto_py.schema.edit import set_field
from caffejacinto_py.schema.mark import mark
from caffejacinto_py.schema.text import dumps
from caffejacinto_py.schema.upgrade import load_net, load_solver
from caffejacinto_py.solver import build, nets, settings
from caffejacinto_py.solver.lr import Where
from caffejacinto_py.solver.nets import Embedded, NetFiles, NetSource

_NET_FIELDS = ("net", "net_param", "train_net", "train_net_param", "test_net", "test_net_param")
_OURS = ("snapshot_prefix", "snapshot_after_train")
_SETS_OF = {"train": ("set_net", "set_train_net"), "test": ("set_net", "set_test_net"), "deploy": ("set_net",)}


@dataclass(frozen=True)
class Origin:
    """Where weights come from: an earlier stage (its index), files, or neither."""

    stage: int | None = None
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """A stage ready to run.

    solver: for training, its nets and snapshots in `folder`; for tests None where the recipe gives none. nets: by file
    name without ending: train, test (test_2, ... where there are more), deploy. iterations: test batches, 0 where
    nothing is tested. optimized: batch norm is absorbed before the test, by this stage or by one before it.
    """

    stage: Stage
    folder: str
    solver: Any
    nets: Mapping[str, NetSource]
    origin: Origin
    iterations: int
    dialect: Dialect
    optimized: bool
    where: Where = field(compare=False, repr=False)

    @property
    def name(self) -> str:
        return self.stage.name

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def texts(self) -> dict[str, str]:
        """The files of the stage: name -> content."""
        found = {f"{name}.prototxt": dumps(source.doc.message) for name, source in self.nets.items()}
        if self.solver is not None:
            found["solver.prototxt"] = dumps(self.solver)
        return found


def resolve(recipe: Recipe, *, dialect: str | None = None, compat: Compat | None = None) -> list[Job]:
    """All stages. Touches no data and no weights. Raises CaffeError of the recipe, solvers and nets, with places."""
    jobs: list[Job] = []
    optimized: list[bool] = []
    errors: list[CaffeError] = []
    for index, stage in enumerate(recipe.stages):
        try:
            job = _job(recipe, index, stage, dialect, compat)
        except CaffeError as e:
            errors += getattr(e, "errors", (e,))
            optimized.append(False)
            continue
        origin = job.origin.stage
        optimized.append(stage.kind == OPTIMIZE or (origin is not None and optimized[origin]))
        if optimized[-1] and stage.kind == TRAIN:
            text = f"stage '{stage.name}' cannot train an optimized net: its batch norm is gone"
            hint = "weights: a stage before the one of kind optimize"
            errors.append(RecipeError(text, loc=(stage.weights or stage).loc, hint=hint))
        jobs.append(replace(job, optimized=optimized[-1]))
    raise_all(list({(e.loc, e.text): e for e in errors}.values()))  # stages share files: each of their errors once
    return jobs


def _job(recipe: Recipe, index: int, stage: Stage, dialect: str | None, compat: Compat | None) -> Job:
    folder = os.path.join(recipe.output, stage.name)
    origin = _origin(recipe, index, stage)
    message, where = _solver(stage)
    files = NetFiles(where)
    sources: dict[str, NetSource] = {}
    if stage.kind == TRAIN:
        if not message.max_iter:
            hint = "say how long to train: set: {max_iter: 10000}"
            raise RecipeError(f"stage '{stage.name}': the solver has no max_iter", loc=stage.loc, hint=hint)
        sources["train"] = _filtered(nets.train_source(message, where, files), "TRAIN")
        tests = nets.test_sources(message, where, files)
    else:
        tests = _test_source(stage, message, where, files)
    for i, source in enumerate(tests):
        sources["test" if not i else f"test_{i + 1}"] = _filtered(source, "TEST")
    if stage.deploy is not None:
        doc = _net(stage.deploy)
        locs = _Kept(doc.locs, tuple(range(len(doc.message.layer))))
        sources["deploy"] = NetSource(Embedded(doc.message, locs, doc.file, doc.notices), stage.deploy.text)
    own = _first(sources)
    _set_nets(stage, sources)
    chosen = resolve_dialect(_without_simulation(_first(sources), own), message, dialect, compat=compat)
    for source in sources.values():
        mark(source.doc.message, chosen.name)
    solver = None
    if stage.solver is not None or stage.kind == TRAIN:
        settings.check(message, where, chosen)
        solver = _placed(message, sources, folder, recipe.name)
    if origin.stage is None and not origin.files and message.weights:
        origin = Origin(files=tuple(build.split_names(list(message.weights))))
        for name in origin.files:
            _must_exist(Scalar(name, where("weights") or stage.loc), "weights file")
    _needs_weights(stage, origin)
    count = message.test_iter[0] if message.test_iter else 0
    return Job(stage, folder, solver, sources, origin, stage.iterations or count, chosen, False, where)


# --- weights ---------------------------------------------------------------------------------------------------------
def _origin(recipe: Recipe, index: int, stage: Stage) -> Origin:
    given = stage.weights
    if given is None:
        return Origin(stage=index - 1) if index else Origin()
    if given.text == NO_WEIGHTS:
        return Origin()
    names = [s.name for s in recipe.stages]
    if given.text in names:
        found = names.index(given.text)
        if found >= index:
            text = f"stage '{stage.name}' cannot take its weights from '{given.text}', which does not run before it"
            raise RecipeError(text, loc=given.loc)
        return Origin(stage=found)
    if os.path.isfile(given.text):
        return Origin(files=(given.text,))
    before = names[:index]
    hint = near(given.text, before) or misplaced(given.text, recipe.file)
    hint = hint or f"stages before it: {', '.join(before) or 'none'}; files: from the directory the program runs in"
    raise RecipeError(f"weights '{given.text}': neither an earlier stage nor a file", loc=given.loc, hint=hint)


def _needs_weights(stage: Stage, origin: Origin) -> None:
    if stage.kind != TRAIN and origin == Origin():
        text = f"stage '{stage.name}' of kind {stage.kind} needs weights"
        raise RecipeError(text, loc=stage.loc, hint="weights: a stage before it, or a file")


# --- solver ----------------------------------------------------------------------------------------------------------
def _solver(stage: Stage) -> tuple[Any, Where]:
    """The solver's message with the recipe's fields, and where each field stands."""
    message: Any = pb.SolverParameter()
    places: dict[str, Loc] = {}
    locs, fallback = None, stage.loc
    if isinstance(stage.solver, Scalar):
        _must_exist(stage.solver, "solver")
        doc = load_solver(stage.solver.text)
        message, locs, fallback = doc.message, doc.locs, Loc(doc.file)
    elif isinstance(stage.solver, Inline):
        fallback = stage.solver.loc
        _apply(message, stage.solver.fields, places)
    elif stage.kind == TRAIN:
        hint = "solver: path/to/solver.prototxt, or a table of its fields"
        raise RecipeError(f"stage '{stage.name}' of kind train needs a solver", loc=stage.loc, hint=hint)
    if stage.net is not None:
        for name in _NET_FIELDS:
            message.ClearField(name)
        message.net = stage.net.text
        places["net"] = stage.net.loc
    _apply(message, stage.assignments("set"), places)

    def where(*path: str | int) -> Loc | None:
        if path and path[0] in places:
            return places[str(path[0])]
        return (locs.find(path) if locs is not None else None) or fallback

    return message, where


def _apply(message: Any, assignments: tuple[Assignment, ...], places: dict[str, Loc]) -> None:
    for one in assignments:
        if one.text.split("=")[0] in _OURS:
            raise RecipeError("the recipe says where snapshots go", loc=one.loc, hint="see 'output:' and 'name:'")
        _assign(message, one)
        places[one.text.split("=")[0].split(".")[0].split("[")[0]] = one.loc


def _assign(message: Any, one: Assignment) -> None:
    try:
        set_field(message, one.text)
    except UsageError as e:
        raise RecipeError(e.text.removeprefix("--set "), loc=one.loc, hint=e.hint) from e


def _must_exist(path: Scalar, what: str) -> None:
    if not os.path.isfile(path.text):
        folder = Path(path.text).parent
        hint = near(Path(path.text).name, os.listdir(folder)) if folder.is_dir() else None
        hint = hint or misplaced(path.text, path.loc.file) or "paths are relative to the directory the program runs in"
        raise RecipeError(f"the {what} '{path.text}' does not exist", loc=path.loc, hint=hint)


def _first(sources: Mapping[str, NetSource]) -> Any:
    """A copy of the first net."""
    message = next(iter(sources.values())).doc.message
    net = type(message)()
    net.CopyFrom(message)
    return net


def _without_simulation(net: Any, own: Any) -> Any:
    """The net, in place, without the simulated quantization that the recipe asks for: a stage that measures what it
    costs counts and normalizes as the stage before it. own: the net without the recipe's changes."""
    for name in ("quantize", "net_quantization_param"):
        if not own.HasField(name):
            net.ClearField(name)
    return net


def _placed(message: Any, sources: Mapping[str, NetSource], folder: str, prefix: str) -> Any:
    """The solver as it is written: nets and snapshots in the stage's folder, a snapshot at the end."""
    placed = type(message)()
    placed.CopyFrom(message)
    for name in _NET_FIELDS:
        placed.ClearField(name)
    if "train" in sources:
        placed.train_net = os.path.join(folder, "train.prototxt")
    placed.test_net.extend(os.path.join(folder, f"{n}.prototxt") for n in sources if n.startswith("test"))
    placed.ClearField("weights")
    placed.snapshot_prefix = os.path.join(folder, prefix)
    placed.snapshot_after_train = True
    return placed


# --- nets ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Kept:
    """Locations of a net that has lost the layers of other phases. layers: their indices in the file. changed: where
    the recipe sets a field."""

    locs: Any
    layers: tuple[int, ...]
    changed: dict[tuple[str | int, ...], Loc] = field(default_factory=dict)

    def find(self, path: tuple[str | int, ...]) -> Loc | None:
        for n in range(len(path), 0, -1):
            if path[:n] in self.changed:
                return self.changed[path[:n]]
        if len(path) > 1 and path[0] == "layer" and isinstance(path[1], int):
            path = ("layer", self.layers[path[1]], *path[2:])
        found: Loc | None = self.locs.find(path)
        return found


def _filtered(source: NetSource, phase: str) -> NetSource:
    """The net of one phase, without rules."""
    message = type(source.doc.message)()
    message.CopyFrom(source.doc.message)
    state: dict[str, Any] = {"phase": phase, "level": source.level, "stages": source.stages}
    layers = [i for i, layer in enumerate(source.doc.message.layer) if kept(layer, **state)]
    del message.layer[:]
    for i in layers:
        layer = message.layer.add()
        layer.CopyFrom(source.doc.message.layer[i])
        layer.ClearField("include")
        layer.ClearField("exclude")
    locs = _Kept(source.doc.locs, tuple(layers))
    doc = Embedded(message, locs, source.doc.file, tuple(source.doc.notices))
    return NetSource(doc, source.label, source.level, source.stages)


def _net(path: Scalar) -> Any:
    _must_exist(path, "net")
    doc = load_net(path.text)
    return Embedded(doc.message, doc.locs, doc.file, tuple(doc.notices))


def _test_source(stage: Stage, message: Any, where: Where, files: NetFiles) -> list[NetSource]:
    """The net of a test stage: the first test net of the solver."""
    given = any(message.HasField(n) for n in ("net", "net_param")) or message.test_net or message.test_net_param
    if not given:
        text = f"stage '{stage.name}' of kind {stage.kind} has no net to test"
        raise RecipeError(text, loc=stage.loc, hint="net: path/to/train_val.prototxt, or a solver with a test net")
    if not message.test_iter:
        if not stage.iterations and stage.kind == TEST:
            text = f"stage '{stage.name}': how many batches are tested is not said"
            raise RecipeError(text, loc=stage.loc, hint="iterations: N, or a solver with test_iter")
        message.test_iter.append(stage.iterations or 0)
    message.test_interval = message.test_interval or 1
    return nets.test_sources(message, where, files)[:1]


def _set_nets(stage: Stage, sources: Mapping[str, NetSource]) -> None:
    """The recipe's changes of nets. An assignment must fit one of the nets it is for; layers differ between phases."""
    for key in ("set_net", "set_train_net", "set_test_net"):
        chosen = [s for name, s in sources.items() if key in _SETS_OF[name.split("_")[0]]]
        for one in stage.assignments(key):
            failed: list[RecipeError] = []
            for source in chosen:
                try:
                    _assign(source.doc.message, one)
                    _note(source.doc, one)
                except RecipeError as e:
                    failed.append(e)
            if failed and len(failed) == len(chosen):
                raise failed[0]


def _note(doc: Any, one: Assignment) -> None:
    """Remember that the recipe says what stands in this field, for errors about it."""
    path = one.text.partition("=")[0]
    if not isinstance(doc.locs, _Kept):
        return
    if not path.startswith("layer."):
        doc.locs.changed[tuple(path.split("."))] = one.loc
    for i, layer in enumerate(doc.message.layer):
        start = f"layer.{layer.name}."
        if path.startswith(start):
            doc.locs.changed[("layer", i, *path[len(start) :].split("."))] = one.loc
