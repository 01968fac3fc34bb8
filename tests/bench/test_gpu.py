"""bench/gpu.py runs; no speed is asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).resolve().parents[2] / "bench" / "gpu.py"
SMALL = ("--batch=2", "--size=64", "--rounds=1", "--seconds=0.01", "--threads=1")


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(BENCH), *args], capture_output=True, text=True)


@pytest.mark.slow
def test_without_a_gpu(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    more = ("--nets=resnet50,jacintonet11", "--types=fp32,bf16", "--iterations=10", "--seeds=1", f"--json={out}")
    done = run("--device=cpu", *SMALL, *more)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert [(r["net"], r["type"]) for r in found["nets"]] == [
        (net, kind) for net in ("resnet50", "jacintonet11") for kind in ("fp32", "bf16")
    ]
    assert all(r["bytes"] > 0 and r["images_per_second"] > 0 for r in found["nets"])
    assert [r["type"] for r in found["accuracies"]] == ["fp32", "bf16"]


def test_refusals() -> None:
    done = run("--device=cpu", "--nets=nothing")
    assert done.returncode == 2
    assert "unknown: nothing" in done.stderr
    if not torch.cuda.is_available():
        assert "no CUDA GPU" in run().stderr
