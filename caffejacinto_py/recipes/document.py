"""YAML with places: what a recipe file says, every scalar as it is written and with its file:line:col.

Scalars stay text. Who knows the type reads them: a solver field by the schema, a number of iterations here; so that
`1e-5` and `on` mean what Caffe's text format makes of them and not what YAML does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from caffejacinto_py.errors import InputError, Loc, near, raise_all

_VARIABLE = re.compile(r"\$\{([^{}]*)\}")
_MAX_BYTES = 1 << 20


class RecipeError(InputError):
    """A recipe file is wrong; `loc` says where."""


@dataclass(frozen=True)
class Scalar:
    """A value as it is written, without its quotes; quoted: whether it had some. text "" and not quoted: none."""

    text: str
    loc: Loc
    quoted: bool = False


@dataclass(frozen=True)
class Sequence:
    items: tuple[Any, ...]
    loc: Loc


@dataclass(frozen=True)
class Table:
    """A mapping: values by key, and where each key stands."""

    values: Mapping[str, Any]
    keys: Mapping[str, Loc]
    loc: Loc

    def only(self, known: Iterable[str], what: str) -> None:
        """Refuse keys that `what` does not have, all at once."""
        known = list(known)
        raise_all([
            RecipeError(f"{what} has no '{key}'", loc=loc, hint=near(key, known) or f"known: {', '.join(known)}")
            for key, loc in self.keys.items()
            if key not in known
        ])  # fmt: skip

    def text(self, key: str) -> Scalar | None:
        """A scalar, or None where the key is absent."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, Scalar) or not value.text:
            raise RecipeError(f"'{key}' must be a single value", loc=value.loc)
        return value

    def table(self, key: str) -> Table | None:
        value = self.values.get(key)
        if value is None or isinstance(value, Table):
            return value
        if isinstance(value, Scalar) and not value.text and not value.quoted:
            return None
        raise RecipeError(f"'{key}' must be a table of 'name: value' lines", loc=value.loc)

    def count(self, key: str) -> int | None:
        """A whole number from 1 on, or None where the key is absent."""
        value = self.text(key)
        if value is None:
            return None
        if not value.text.isdecimal() or int(value.text) < 1:
            raise RecipeError(f"'{key}' must be a whole number from 1 on, not '{value.text}'", loc=value.loc)
        return int(value.text)


EMPTY = Table({}, {}, Loc(""))


def read(path: str | Path) -> Table:
    """The file as a table. RecipeError: missing, not text, not YAML, two equal keys, not a table at the top."""
    file = str(path)
    try:
        if Path(path).is_file() and Path(path).stat().st_size > _MAX_BYTES:
            raise RecipeError("this is too big for a recipe", loc=Loc(file))
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        folder = Path(path).parent
        hint = near(Path(path).name, [p.name for p in folder.iterdir()]) if folder.is_dir() else None
        raise RecipeError("no such recipe", loc=Loc(file), hint=hint) from None
    except IsADirectoryError:
        raise RecipeError("this is a directory, not a recipe", loc=Loc(file)) from None
    except UnicodeDecodeError:
        raise RecipeError("this is no UTF-8 text", loc=Loc(file), hint="a recipe is a YAML file") from None
    except OSError as e:
        raise RecipeError(f"cannot read this recipe: {e.strerror}", loc=Loc(file)) from e
    return parse(text, file)


def parse(text: str, file: str) -> Table:
    """As `read`, of text."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as e:
        loc = _loc(e.problem_mark, file) if e.problem_mark else Loc(file)
        hint = "indent with spaces, one 'name: value' a line"
        raise RecipeError(f"this is no YAML: {e.problem or e.context}", loc=loc, hint=hint) from e
    except (yaml.YAMLError, RecursionError) as e:
        raise RecipeError(f"this is no YAML: {' '.join(str(e).split())}", loc=Loc(file)) from e
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError("a recipe is a table with 'stages:'", loc=Loc(file, 1, 1))
    found = _convert(node, file, set())
    assert isinstance(found, Table)
    return found


def _loc(mark: Any, file: str) -> Loc:
    return Loc(file, mark.line + 1, mark.column + 1)


def _convert(node: Any, file: str, above: set[int]) -> Any:
    loc = _loc(node.start_mark, file)
    if isinstance(node, yaml.ScalarNode):
        plain = node.style is None
        text = "" if plain and node.value in ("~", "null") else node.value
        return Scalar(text, loc, quoted=not plain)
    if id(node) in above:
        raise RecipeError("an alias stands inside its own anchor", loc=loc)
    above = {*above, id(node)}
    if isinstance(node, yaml.SequenceNode):
        return Sequence(tuple(_convert(item, file, above) for item in node.value), loc)
    return _table(node, file, above)


def _table(node: Any, file: str, above: set[int]) -> Table:
    """A mapping; `<<` takes over the keys of other tables, which the own ones override."""
    values: dict[str, Any] = {}
    keys: dict[str, Loc] = {}
    merged: list[Table] = []
    for key, value in node.value:
        at = _loc(key.start_mark, file)
        if not isinstance(key, yaml.ScalarNode):
            raise RecipeError("a key must be a word", loc=at)
        found = _convert(value, file, above)
        if key.value == "<<" and key.style is None:
            merged += _mergeable(found)
        elif key.value in values:
            raise RecipeError(f"'{key.value}' is given twice; first in line {keys[key.value].line}", loc=at)
        else:
            values[key.value], keys[key.value] = found, at
    for table in merged:
        values = {**table.values, **values}
        keys = {**table.keys, **keys}
    return Table(values, keys, _loc(node.start_mark, file))


def _mergeable(found: Any) -> list[Table]:
    tables = list(found.items) if isinstance(found, Sequence) else [found]
    for table in tables:
        if not isinstance(table, Table):
            raise RecipeError("'<<' takes over tables only", loc=table.loc, hint="<<: *anchor")
    return tables


@dataclass
class Variables:
    """Values of `${name}`."""

    values: dict[str, str] = field(default_factory=dict)

    def fill(self, value: Any) -> Any:
        """The same with every `${name}` replaced, in tables and sequences too. RecipeError for unknown names."""
        if isinstance(value, Scalar):
            return Scalar(_VARIABLE.sub(lambda m: self._one(m[1], value.loc), value.text), value.loc, value.quoted)
        if isinstance(value, Sequence):
            return Sequence(tuple(self.fill(v) for v in value.items), value.loc)
        return Table({k: self.fill(v) for k, v in value.values.items()}, value.keys, value.loc)

    def _one(self, name: str, loc: Loc) -> str:
        if name not in self.values:
            known = ", ".join(self.values) or "none"
            hint = near(name, self.values) or f"'vars:' has {known}"
            raise RecipeError(f"there is no variable '{name}'", loc=loc, hint=hint)
        return self.values[name]
