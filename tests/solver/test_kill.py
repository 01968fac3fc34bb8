"""kill -9 while snapshots are written loses nothing. bench/kill_resume.py does it twenty times."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "kill_resume.py"


@pytest.mark.parametrize("sparse", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["dense", "sparse"])
def test_killed_runs_resume(sparse: bool) -> None:
    command = [sys.executable, str(SCRIPT), "--kills", "2", *["--sparse"] * sparse]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    what = "weights, masks and factor" if sparse else "weights"
    assert f"after 2 kills the {what} equal" in done.stdout
