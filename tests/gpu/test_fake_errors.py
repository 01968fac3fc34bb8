"""GPUs that refuse, errors of torch in words, number types and layouts that only GPUs have."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from caffejacinto_py.cli import devices, explain, main
from caffejacinto_py.engine import gpu
from caffejacinto_py.engine.net import Net
from caffejacinto_py.engine.precision import choose
from caffejacinto_py.errors import DeviceError
from tests.cli import conftest
from tests.engine.test_precision import net as make_net
from tests.gpu.fake import CUDA, fake_cuda

Capture = pytest.CaptureFixture[str]
folder = conftest.folder


@pytest.fixture
def switches() -> Any:
    """What torch's libraries may do, as it was."""
    products, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    names = ("allow_tf32", "allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")
    kept = {(products, n): getattr(products, n) for n in names}
    kept |= {(cudnn, n): getattr(cudnn, n) for n in ("allow_tf32", "benchmark", "deterministic")}
    yield
    for (where, name), value in kept.items():
        setattr(where, name, value)
    torch.use_deterministic_algorithms(False)


# --- devices that refuse ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("error", "words", "hint"),
    [
        (
            "CUDA error: no kernel image is available for execution on the device\nmore",
            "9.0, but this torch",
            "install",
        ),
        ("CUDA error: all CUDA-capable devices are busy or unavailable", "busy", "nvidia-smi"),
        ("CUDA out of memory. Tried to allocate 2 MiB", "out of memory", "other processes"),
    ],
)
def test_a_gpu_that_does_not_compute(error: str, words: str, hint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(device: Any = None) -> None:
        raise RuntimeError(error)

    with fake_cuda():
        monkeypatch.setattr(torch.cuda, "synchronize", fail)
        with pytest.raises(DeviceError, match=words) as caught:
            make_net(device=CUDA)
    assert hint in str(caught.value.hint)


def test_solvers_name_their_gpu(folder: Path, capsys: Capture) -> None:
    log = logging.getLogger("test")
    with fake_cuda():
        torch.cuda.device_count = lambda: 2  # fake_cuda puts it back
        assert devices.several(None, solver_mode="GPU", device_id=1, log=log) == ["cuda:1"]
        assert devices.several("0", solver_mode="GPU", device_id=1, log=log) == ["cuda:0"]
        with pytest.raises(DeviceError, match="device_id 2: there are 2 GPUs"):
            devices.several(None, solver_mode="GPU", device_id=2, log=log)
        assert main(["train", "--solver", "solver.prototxt", "--set", "solver_mode=GPU", "--set", "device_id=7"]) == 1
    assert "device_id 7: there are" in capsys.readouterr().err
    assert devices.several(None, solver_mode="GPU", device_id=1, log=log) == ["cpu"] or torch.cuda.is_available()


# --- errors of torch -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB. GPU 0 has 79 GiB\nmore"), "iter_size"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 4 TB"), "budget"),
        (RuntimeError("CUDA error: device-side assert triggered\nCUDA kernel errors might be"), "label outside"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), "the GPU failed"),
    ],
)
def test_in_words(error: Exception, words: str) -> None:
    text, code = explain(error)
    assert code == 1
    assert words in text
    assert "internal" not in text
    assert "more" not in text.replace("one more", "")


def test_others_stay_internal() -> None:
    assert explain(RuntimeError("shape mismatch"))[0].startswith("internal error")
    assert explain(ValueError("out of memory"))[0].startswith("internal error")


# --- number types ----------------------------------------------------------------------------------------------------
def test_tf32_on_a_cpu_is_fp32(caplog: pytest.LogCaptureFixture) -> None:
    table, lines = choose(make_net().graph, torch.device("cpu"), "tf32")
    assert not table.tf32
    assert lines == ["TF32: only GPUs have it; products are computed in FLOAT"]


def test_tf32_is_what_each_net_says(switches: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_cuda():
        graph = make_net().graph
        table, lines = choose(graph, CUDA, "tf32")
        assert table.tf32
        assert not lines
        nets = {"fp32": Net(graph, device=CUDA), "tf32": Net(graph, device=CUDA, types=table)}
        batch = {t: torch.zeros(s, device=CUDA) for o in nets["fp32"].sources for t, s in zip(o.tops, o.shapes)}
        for name in ("tf32", "fp32", "tf32"):
            nets[name](batch).loss.backward()
            assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == (name == "tf32")
        assert not torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        table, lines = choose(graph, CUDA, "tf32")
        assert not table.tf32
        assert "7.5" in lines[0]


def test_layouts() -> None:
    """channels_last where tensor cores compute."""
    with fake_cuda():
        graph = make_net().graph
        found = {}
        for name in ("fp32", "tf32", "bf16", "fp16"):
            found[name] = Net(graph, device=CUDA, types=choose(graph, CUDA, name)[0]).layout.channels_last
    assert found == {"fp32": False, "tf32": True, "bf16": True, "fp16": True}
    assert Net(graph).layout.channels_last


def test_cudnn_searches_where_shapes_stay(switches: None) -> None:
    with fake_cuda():
        make_net(device=CUDA)
        assert torch.backends.cudnn.benchmark
        make_net(device=CUDA, phase="TEST")
        assert not torch.backends.cudnn.benchmark
        gpu.reproducible()
        make_net(device=CUDA)
        assert not torch.backends.cudnn.benchmark


def test_deterministic_training(folder: Path, switches: None) -> None:
    with fake_cuda():
        assert main(["train", "--solver", "solver.prototxt", "--gpu", "0", "--deterministic"]) == 0
    assert torch.backends.cudnn.deterministic
    assert torch.are_deterministic_algorithms_enabled()
