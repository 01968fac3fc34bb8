"""The converters as CLI verbs and as programs in tools/: Caffe's arguments and flag spellings, exit codes, messages."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from caffejacinto_py.cli import main
from caffejacinto_py.data.sources import Database
from caffejacinto_py.schema.datum import parse_datum

from .helpers import images, picture, raw_lmdb
from .test_convert import cifar, idx

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for i in range(3):
        cv2.imwrite(f"{i}.png", picture(i))
    Path("list.txt").write_text("".join(f"{i}.png {i}\n" for i in range(3)))
    return tmp_path


def first(path: str):  # type: ignore[no-untyped-def]
    with Database(path).read([0]) as (value,):
        return parse_datum(bytes(value))


@pytest.mark.parametrize(
    "flags",
    [
        ["--gray", "--resize_height=10", "--resize_width=6"],
        ["-gray", "-resize_height", "10", "-resize_width", "6", "-backend=lmdb"],
        ["--gray=true", "--resize-height", "10", "--resize-width", "6", "--noshuffle"],
    ],
)
def test_convert_imageset(listed: Path, flags: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["convert_imageset", *flags, "./", "list.txt", "db"]) == 0
    datum = first("db")
    assert (datum.channels, datum.height, datum.width, datum.label) == (1, 10, 6, 0)
    assert "Processed 3 files." in capfd.readouterr().err


def test_errors_have_exit_codes_and_hints(listed: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["convert_imageset", "./", "list.txt", "db"]) == 0
    assert main(["convert_imageset", "./", "list.txt", "db"]) == 3
    err = capfd.readouterr().err
    assert "exists already" in err
    assert "hint: remove it first" in err
    assert main(["convert_imageset", "./", "list.txt"]) == 2
    assert main(["convert_imageset", "--backend=leveldb", "./", "list.txt", "db2"]) == 2
    assert main(["convert_imageset", "./", "gone.txt", "db2"]) == 3
    assert main(["compute_image_mean", "gone"]) == 3
    assert main(["convert_mnist_data", "gone", "gone", "db2"]) == 3
    assert main(["convert_cifar_data", "gone", ".", "lmdb"]) == 3
    assert "Traceback" not in capfd.readouterr().err
    assert sorted(os.listdir()) == ["0.png", "1.png", "2.png", "db", "list.txt"]


def test_compute_image_mean(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    stored = raw_lmdb(tmp_path / "db", 5)
    assert main(["compute_image_mean", "-backend=lmdb", str(tmp_path / "db"), str(tmp_path / "mean.binaryproto")]) == 0
    out = capfd.readouterr().out
    assert f"mean_value channel [2]: {stored[:, 2].mean():.6g}" in out
    assert (tmp_path / "mean.binaryproto").exists()
    assert main(["compute_image_mean", str(tmp_path / "db")]) == 0


def test_digits(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    assert main(["digits", str(tmp_path / "data"), "--size", "8", "--test=100"]) == 0
    assert len(Database(str(tmp_path / "data" / "digits_test_lmdb"))) == 100
    assert first(str(tmp_path / "data" / "digits_train_lmdb")).height == 8


def test_old_program_names(tmp_path: Path) -> None:
    (tmp_path / "images.gz").write_bytes(gzip.compress(idx(images(3, 1, 6, 5)[:, 0], 2051)))
    (tmp_path / "labels").write_bytes(idx(np.arange(3, dtype=np.uint8), 2049))
    cifar(tmp_path / "cifar")
    env = {**os.environ, "PYTHONPATH": str(TOOLS.parent)}

    def run(program: str, *arguments: str) -> int:
        command = [sys.executable, str(TOOLS / f"{program}.py"), *arguments]
        return subprocess.run(command, cwd=tmp_path, env=env, timeout=60).returncode

    assert run("convert_mnist_data", "images.gz", "labels", "mnist_lmdb", "--backend=lmdb") == 0
    assert run("convert_cifar_data", "cifar", ".", "lmdb") == 0
    assert run("compute_image_mean", "cifar10_train_lmdb", "mean.binaryproto") == 0
    assert run("compute_image_mean", "nothing") == 3
    made = {"mnist_lmdb", "cifar10_train_lmdb", "cifar10_test_lmdb", "mean.binaryproto"}
    assert made <= set(os.listdir(tmp_path))
    assert run("convert_imageset", "--help") == 0
    assert run("make_digits", "--help") == 0
