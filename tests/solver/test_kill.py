"""kill -9 while snapshots are written loses nothing. bench/kill_resume.py does it twenty times."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "kill_resume.py"


def test_killed_runs_resume() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "--kills", "3"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "after 3 kills the weights equal" in done.stdout
