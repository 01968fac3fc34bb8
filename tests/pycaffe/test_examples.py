"""The scripts in examples/, unchanged: they say `import caffe` and know nothing of this package."""

from __future__ import annotations

import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from caffejacinto_py import pycaffe
from caffejacinto_py.pycaffe.mode import MODE

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def caffe_installed() -> Iterator[None]:
    before = set(sys.modules)
    pycaffe.install_as_caffe()
    sys.path.insert(0, str(EXAMPLES))
    yield
    sys.path.remove(str(EXAMPLES))
    MODE.seed = None
    for name in set(sys.modules) - before:
        if name == "bars" or name.split(".")[0] == "caffe":
            del sys.modules[name]


def load(script: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / script))


@pytest.fixture(scope="module")
def folder(caffe_installed: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With nets and a trained model, as the first two examples leave it."""
    path = tmp_path_factory.mktemp("work")
    load("make_nets.py")["main"](str(path))
    assert load("train.py")["main"](str(path), 120) > 0.9
    return path


def test_nets_and_training(folder: Path) -> None:
    losses = np.load(folder / "losses.npy")
    assert losses[-20:].mean() < 0.2 * losses[:5].mean()
    assert "BarsData" in (folder / "train.prototxt").read_text()
    assert (folder / "train.dot").read_text().startswith("digraph")
    assert "accuracy" not in (folder / "train.dot").read_text()
    assert (folder / "bars.caffemodel").stat().st_size > 1000


def test_finetuning_starts_ahead(folder: Path) -> None:
    losses = load("finetune.py")["main"](str(folder), 15)
    assert losses["fine-tuned"].mean() < losses["from scratch"].mean()


def test_features(folder: Path) -> None:
    features, classes, kinds = load("features.py")["main"](str(folder))
    assert features.shape == (20, 16)
    assert (features >= 0).all(), "relu2 works in place"
    assert np.mean(classes == kinds) > 0.8


def test_surgery(folder: Path) -> None:
    one, many = load("surgery.py")["main"](str(folder))
    assert many.shape == (1, 4, 13, 13)
    np.testing.assert_allclose(many[0, :, 0, 0], one.ravel(), rtol=1e-4, atol=1e-6)


def test_plot(folder: Path) -> None:
    pytest.importorskip("matplotlib")
    load("plot_filters.py")["main"](str(folder), str(folder / "filters.png"))
    assert (folder / "filters.png").read_bytes().startswith(b"\x89PNG")


def run(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "caffejacinto_py.pycaffe", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


def test_runner(tmp_path: Path) -> None:
    done = run(str(EXAMPLES / "make_nets.py"), "made", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "made/solver_train.prototxt").is_file()


def test_runner_without_a_script(tmp_path: Path) -> None:
    done = run("absent.py", cwd=tmp_path)
    assert done.returncode == 2
    assert "there is no script 'absent.py'" in done.stderr
