"""One run at a time in a recipe's folder, and no trace of dead ones."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from caffejacinto_py.cli import main
from caffejacinto_py.errors import CaffeError
from caffejacinto_py.recipes.lock import NAME, locked

Capture = pytest.CaptureFixture[str]
HOLD = """
import sys
from caffejacinto_py.recipes.lock import locked
with locked("out"):
    print("held", flush=True)
    sys.stdin.readline()
"""


def holder() -> subprocess.Popen[str]:
    """Another process that holds the lock of `out`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_another_run_is_named(folder: Path, capsys: Capture) -> None:
    process = holder()
    assert main(["run", "recipe.yaml", "--log-level=error"]) == 1
    err = capsys.readouterr().err
    assert f"another run is at work in 'out': process {process.pid} on " in err
    assert "--output DIR" in err
    assert {p.name for p in Path("out").iterdir()} == {NAME}
    assert main(["run", "recipe.yaml", "--dry-run"]) == 0  # looks only
    process.communicate("\n", timeout=30)
    assert not Path("out", NAME).exists()
    with locked("out"):
        assert f"process {os.getpid()} on " in Path("out", NAME).read_text()


def test_a_dead_run_keeps_nobody_out(folder: Path) -> None:
    process = holder()
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    assert Path("out", NAME).exists()
    with locked("out"):
        assert f"process {os.getpid()} on " in Path("out", NAME).read_text()
    assert not Path("out", NAME).exists()


def test_it_goes_with_an_error(folder: Path) -> None:
    with pytest.raises(ZeroDivisionError), locked("a/b"):
        raise ZeroDivisionError
    assert list(Path("a/b").iterdir()) == []


def test_a_child_does_not_keep_it(folder: Path) -> None:
    """A worker that outlives its killed run holds nothing."""
    child = (
        "    import os, time\n    if os.fork() == 0:\n        os.close(1)\n        time.sleep(5)\n        os._exit(0)\n"
    )
    text = HOLD.replace("    print(", child + "    print(")
    process = subprocess.Popen([sys.executable, "-c", text], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    with locked("out"):
        pass


def test_a_folder_that_cannot_be_made(folder: Path) -> None:
    Path("file").write_text("")
    with pytest.raises(CaffeError, match=r"cannot lock 'file': .*exists"), locked("file"):
        pass
    with pytest.raises(CaffeError, match="cannot lock 'file/out'"), locked("file/out"):
        pass
