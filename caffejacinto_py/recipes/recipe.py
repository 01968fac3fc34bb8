"""What a recipe says: stages in order, with what each changes. See docs/recipes.md for the format."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from caffejacinto_py.errors import CaffeError, Loc, UsageError, near, raise_all
from caffejacinto_py.recipes.document import EMPTY, RecipeError, Scalar, Sequence, Table, Variables, read

TRAIN, TEST, OPTIMIZE = "train", "test", "optimize"
KINDS = (TRAIN, TEST, OPTIMIZE)
NO_WEIGHTS = "none"
_SETS = ("set", "set_net", "set_train_net", "set_test_net")
_SHARED = ("solver", "net", "deploy", "iterations", *_SETS)
_TOP = ("name", "output", "vars", "defaults", "stages")
_STAGE = ("name", "kind", "weights", *_SHARED)
_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*\Z")


class Assignment(NamedTuple):
    """`path=value` of a field of a message, and the place of its key."""

    text: str
    loc: Loc


@dataclass(frozen=True)
class Inline:
    """A solver whose fields stand in the recipe."""

    fields: tuple[Assignment, ...]
    loc: Loc


@dataclass(frozen=True)
class Stage:
    """One stage as the recipe has it, defaults filled in.

    solver: a path, fields, or None. weights: None (the stage before), "none", a stage's name or a file. sets: by key of
    the recipe: the assignments of `set` (solver), `set_net` (all nets), `set_train_net`, `set_test_net`.
    """

    name: str
    kind: str
    loc: Loc
    solver: Scalar | Inline | None = None
    net: Scalar | None = None
    deploy: Scalar | None = None
    iterations: int | None = None
    weights: Scalar | None = None
    sets: Mapping[str, tuple[Assignment, ...]] | None = None

    def assignments(self, key: str) -> tuple[Assignment, ...]:
        return (self.sets or {}).get(key, ())


@dataclass(frozen=True)
class Recipe:
    """name: for files and the table. output: the run's folder."""

    name: str
    output: str
    file: str
    stages: tuple[Stage, ...]
    variables: Mapping[str, str]

    def index(self, name: str) -> int:
        """The position of a stage; UsageError for an unknown one."""
        names = [s.name for s in self.stages]
        if name not in names:
            hint = near(name, names) or f"stages: {', '.join(names)}"
            raise UsageError(f"the recipe has no stage '{name}'", hint=hint)
        return names.index(name)


def load(path: str | Path, *, variables: Mapping[str, str] | None = None, output: str | None = None) -> Recipe:
    """Read a recipe. variables, output: replace what the file says. RecipeError, ManyErrors; UsageError for a variable
    that the recipe does not have."""
    table = read(path)
    table.only(_TOP, "a recipe")
    filled = _variables(table, dict(variables or {}))
    raw = {key: filled.fill(value) for key, value in table.values.items() if key != "vars"}
    table = Table(raw, table.keys, table.loc)
    name = table.text("name")
    if name is not None and not _NAME.match(name.text):
        raise RecipeError(f"'{name.text}' cannot name files", loc=name.loc, hint="use letters, digits, _ . -")
    word = name.text if name else Path(path).stem
    place = table.text("output")
    stages = _stages(table)
    return Recipe(word, output or (place.text if place else f"runs/{word}"), str(path), stages, filled.values)


def _variables(table: Table, given: dict[str, str]) -> Variables:
    found = Variables()
    vars_ = table.table("vars") or EMPTY
    for key, value in vars_.values.items():
        if not isinstance(value, Scalar):
            raise RecipeError(f"the variable '{key}' must be a single value", loc=vars_.keys[key])
        found.values[key] = given.pop(key) if key in given else found.fill(value).text
    for key in given:
        known = ", ".join(found.values) or "none"
        hint = near(key, found.values) or f"variables of the recipe: {known}"
        raise UsageError(f"--set {key}: the recipe has no variable '{key}'", hint=hint)
    return found


def _stages(table: Table) -> tuple[Stage, ...]:
    items = table.values.get("stages")
    if items is None:
        raise RecipeError("the recipe has no 'stages:'", loc=Loc(table.loc.file, 1, 1))
    if not isinstance(items, Sequence) or not items.items:
        raise RecipeError("'stages' must be a list", loc=items.loc, hint="begin each stage with '- name: ...'")
    defaults = table.table("defaults") or EMPTY
    defaults.only(_SHARED, "'defaults'")
    stages: list[Stage] = []
    errors: list[CaffeError] = []
    for item in items.items:
        try:
            stages.append(_stage(item, defaults, stages))
        except CaffeError as e:
            errors += getattr(e, "errors", (e,))
    raise_all(errors)
    return tuple(stages)


def _stage(item: Any, defaults: Table, before: list[Stage]) -> Stage:
    if not isinstance(item, Table):
        raise RecipeError("a stage must be a table of 'name: value' lines", loc=item.loc)
    item.only(_STAGE, "a stage")
    name = item.text("name")
    if name is None:
        raise RecipeError("a stage without a name", loc=item.loc, hint="- name: initial")
    if not _NAME.match(name.text):
        raise RecipeError(f"'{name.text}' cannot name a folder", loc=name.loc, hint="use letters, digits, _ . -")
    for other in before:
        if other.name == name.text:
            raise RecipeError(f"two stages are named '{name.text}'; the first in line {other.loc.line}", loc=name.loc)
    kind = item.text("kind") or Scalar(TRAIN, item.loc)
    if kind.text not in KINDS:
        hint = near(kind.text, KINDS) or f"one of: {', '.join(KINDS)}"
        raise RecipeError(f"unknown kind of stage '{kind.text}'", loc=kind.loc, hint=hint)
    iterations = item.count("iterations") or (defaults.count("iterations") if kind.text != TRAIN else None)
    if iterations and kind.text == TRAIN:
        hint = "'set: {max_iter: ...}' says how long a stage trains"
        raise RecipeError("'iterations' belongs to stages that test", loc=item.keys["iterations"], hint=hint)
    return Stage(
        name=name.text,
        kind=kind.text,
        loc=name.loc,
        solver=_solver(item) or _solver(defaults),
        net=item.text("net") or defaults.text("net"),
        deploy=item.text("deploy") or defaults.text("deploy"),
        iterations=iterations,
        weights=item.text("weights"),
        sets={k: (*flatten(defaults.table(k)), *flatten(item.table(k))) for k in _SETS},
    )


def _solver(table: Table) -> Scalar | Inline | None:
    found = table.values.get("solver")
    if isinstance(found, Table):
        return Inline(flatten(found), table.keys["solver"])
    return table.text("solver")


def flatten(table: Table | None, prefix: str = "") -> tuple[Assignment, ...]:
    """A table of fields as assignments; inner tables go on with a dot, lists give all values of a repeated field."""
    found: list[Assignment] = []
    for key, value in (table.values if table else {}).items():
        assert table is not None
        path, loc = prefix + key, table.keys[key]
        if isinstance(value, Table):
            found += flatten(value, path + ".")
        elif isinstance(value, Sequence):
            found.append(Assignment(f"{path}=[{', '.join(_literal(v) for v in value.items)}]", loc))
        elif not value.text and not value.quoted:
            raise RecipeError(f"'{path}' has no value", loc=loc)
        else:
            found.append(Assignment(f"{path}={value.text}", loc))
    return tuple(found)


def _literal(value: Any) -> str:
    if not isinstance(value, Scalar):
        raise RecipeError("a list of values must hold single values", loc=value.loc)
    if not value.quoted:
        return value.text
    return '"' + value.text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
