"""Shared fixtures: where the reference data is, and skipping with a clear message where it is not."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("CAFFEJACINTO_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def shared(path: str) -> Path:
    """A path in the reference data folder; skips the test (or module) where the folder is absent."""
    found = SHARED / path
    if not found.exists():
        pytest.skip(f"reference data {found} is not here (set CAFFEJACINTO_SHARED)", allow_module_level=True)
    return found


@contextmanager
def log_as_before() -> Iterator[None]:
    """Undoes what a command does to the program's log (every one sets it up)."""
    logger = logging.getLogger("caffejacinto_py")
    before = logger.level, logger.propagate, list(logger.handlers)
    yield
    logger.level, logger.propagate = before[:2]
    logger.handlers[:] = before[2]


@pytest.fixture(autouse=True)
def _log_as_before() -> Iterator[None]:
    """A test leaves the program's log to the next one as it was."""
    with log_as_before():
        yield
