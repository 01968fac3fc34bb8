"""Allocator tuning runs in a fresh process, so that it does not change this one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CODE = """
import resource, sys
from caffejacinto_py.engine.allocator import tune
assert "torch" not in sys.modules
tuned = tune()
import torch
def faults(n=6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(n):
        torch.ones(8 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(tuned, faults())
"""


def run(**env: str) -> tuple[str, int]:
    out = subprocess.run(
        [sys.executable, "-c", CODE], env={**os.environ, **env}, capture_output=True, text=True, check=True
    )
    tuned, faults = out.stdout.split()
    return tuned, int(faults)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_tuned_processes_reuse_their_pages():
    """32 MiB tensors made again and again come from memory that the process already has."""
    tuned, plain = run(CAFFEJACINTO_ALLOCATOR=""), run(CAFFEJACINTO_ALLOCATOR="default")
    assert (tuned[0], plain[0]) == ("True", "False")
    assert tuned[1] * 4 < plain[1], "page faults"  # a system that reclaims idle pages may add some to both
