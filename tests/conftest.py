"""Shared fixtures: where the reference data is, and skipping with a clear message where it is not."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
from hypothesis import settings

# the same examples in every run, on machines of any speed; HYPOTHESIS_PROFILE=search looks for new ones
settings.register_profile("suite", derandomize=True, deadline=None)
settings.register_profile("search", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))

SHARED = Path(os.environ.get("CAFFEJACINTO_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def shared(path: str) -> Path:
    """A path in the reference data folder; skips the test (or module) where the folder is absent."""
    found = SHARED / path
    if not found.exists():
        pytest.skip(f"reference data {found} is not here (set CAFFEJACINTO_SHARED)", allow_module_level=True)
    return found


@pytest.fixture(autouse=True)
def _fresh_log() -> None:
    """Every test starts with the program's log as an import leaves it, whatever ran before it in this process.

    Every command sets the log up. Undoing that after each test is not enough: a fixture of wider scope may run commands
    too, and is older than any test's own fixtures: it would set the level for all that follows.
    """
    logger = logging.getLogger("caffejacinto_py")
    logger.setLevel(logging.NOTSET)
    logger.propagate = True
    logger.handlers.clear()
