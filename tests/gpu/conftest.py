"""`pytest -m gpu tests/gpu`: the tests of a device on the first GPU; without -m a part of them runs on the CPU.

CAFFEJACINTO_TEST_DEVICE: "cuda:1" for another GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

GPU = os.environ.get("CAFFEJACINTO_TEST_DEVICE", "cuda:0")


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The device under test; what CUDA's libraries may do is put back."""
    yield from _place(request.param)


def _place(kind: str) -> Iterator[str]:
    if kind == "cpu":
        yield "cpu"
        return
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA GPU here")
    products, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    kept = products.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic
    yield GPU
    products.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic = kept
    torch.use_deterministic_algorithms(False)
    torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(params=[pytest.param("gpu", marks=pytest.mark.gpu)])
def only_gpu(request: pytest.FixtureRequest) -> Iterator[str]:
    """For what a CPU does not have."""
    yield from _place(request.param)
