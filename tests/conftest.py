"""Shared fixtures: where the reference data is, and skipping with a clear message where it is not."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("CAFFEJACINTO_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def shared(path: str) -> Path:
    """A path in the reference data folder; skips the test (or module) where the folder is absent."""
    found = SHARED / path
    if not found.exists():
        pytest.skip(f"reference data {found} is not here (set CAFFEJACINTO_SHARED)", allow_module_level=True)
    return found


@pytest.fixture(autouse=True)
def _log_as_before() -> Iterator[None]:
    """A test that sets the program's log up (every command does) leaves it to the next one as it was."""
    logger = logging.getLogger("caffejacinto_py")
    before = logger.level, logger.propagate, list(logger.handlers)
    yield
    logger.level, logger.propagate = before[:2]
    logger.handlers[:] = before[2]
