"""The cases that tests/layers gives to `check_layer`, collected by running those tests with a recorder in its place."""

from __future__ import annotations

import importlib
import inspect
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.layers.harness import Case

LAYERS = Path(__file__).parents[1] / "layers"
MODULES = sorted(p.stem for p in LAYERS.glob("test_*.py") if "check_layer" in p.read_text())


def cases(name: str) -> list[Case]:
    """All cases of a module of tests/layers, but for tests that want fixtures."""
    module = importlib.import_module(f"tests.layers.{name}")
    found: list[Case] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "check_layer", found.append)
        for function in _tests(module):
            for arguments in _arguments(function):
                if set(inspect.signature(function).parameters) <= set(arguments):
                    function(**arguments)
    return found


def _tests(module: ModuleType) -> Iterator[Any]:
    for name, function in vars(module).items():
        if name.startswith("test_") and "check_layer" in getattr(getattr(function, "__code__", None), "co_names", ()):
            yield function


def _arguments(function: Any) -> Iterator[dict[str, Any]]:
    """What `parametrize` gives to a test."""
    tables = []
    for mark in getattr(function, "pytestmark", ()):
        if mark.name == "parametrize":
            given, rows = mark.args
            names = given.replace(" ", "").split(",") if isinstance(given, str) else list(given)
            tables.append([dict(zip(names, _row(value, len(names)))) for value in rows])
    for combination in itertools.product(*tables):
        yield {k: v for part in combination for k, v in part.items()}


def _row(value: Any, names: int) -> Sequence[Any]:
    if hasattr(value, "marks"):  # pytest.param
        return value.values  # type: ignore[no-any-return]
    return value if names > 1 else (value,)
