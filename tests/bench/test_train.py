"""bench/train.py runs; no speed is asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parents[2] / "bench" / "train.py"


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(BENCH), *args], capture_output=True, text=True)


def test_lenet(tmp_path: Path) -> None:
    """Also that both sides compute the same losses: the bench refuses to time them otherwise."""
    out = tmp_path / "out.json"
    done = run("--nets=lenet", "--rounds=1", "--iterations=2", "--threads=1", f"--json={out}")
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())["nets"][0]
    assert found["net"] == "lenet"
    assert found["batch"] == 64
    assert set(found["images_per_second"]) == {"ours", "nchw", "channels_last"}
    assert len(found["ratios"]) == 1
    assert "geometric mean" in done.stdout


def test_unknown_net_is_a_usage_error() -> None:
    done = run("--nets=lenet,nothing")
    assert done.returncode == 2
    assert "unknown nets: nothing" in done.stderr
