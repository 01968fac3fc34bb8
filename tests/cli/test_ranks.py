"""`train` in several processes: what starts them, what they say, and how a run ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from caffejacinto_py.cli import launch, main
from caffejacinto_py.cli.devices import pick
from caffejacinto_py.errors import CaffeError

Capture = pytest.CaptureFixture[str]
Capfd = pytest.CaptureFixture[str]
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def program(*args: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "caffejacinto_py", *args]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_ranks_from_the_command_line(folder: Path) -> None:
    out, err = program("train", "--solver", "solver.prototxt", "--ranks", "2", "--json", "--threads", "1").communicate()
    result = json.loads(out)  # one document, though there are two processes
    assert result["iter"] == 4
    assert result["model"] == "snap_iter_4.caffemodel"
    assert err.count("Iteration 4, loss =") == 1
    assert err.count("Starting 2 ranks") == 1
    assert "32 images" in err  # 4 iterations, 2 ranks of 4 in this dialect
    assert {p.name for p in folder.glob("snap*")} == {
        *(f"snap_iter_{i}.{end}" for i in (2, 4) for end in ("caffemodel", "solverstate", "solverstate.extra")),
        "snap_metrics.jsonl",
    }


def test_a_killed_rank_ends_the_run_with_its_last_snapshot(folder: Path) -> None:
    run = program("train", "--solver", "solver.prototxt", "--ranks", "2", "--iterations", "1000000")
    wait_for(lambda: (folder / "snap_iter_4.solverstate.extra").exists())
    os.kill(ranks_below(run.pid)[1], signal.SIGKILL)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 1
    assert "rank 1 was killed by signal 9 (SIGKILL)" in err
    assert "the last whole snapshot is 'snap_iter_" in err
    assert main(["train", "--solver", "solver.prototxt", "--snapshot", "auto", "--iterations", "5"]) == 0


@pytest.mark.slow
def test_torchrun_starts_a_killed_run_again(folder: Path) -> None:
    """It hands the second run the store of the first, with the addresses of dead processes."""
    train = ["-m", "caffejacinto_py", "train", "--solver", "solver.prototxt", "--gpu", "-1", "--snapshot", "auto"]
    words = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1", *train]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen([sys.executable, *words, "--iterations", "400"], env=env, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (folder / "snap_iter_4.solverstate.extra").exists())
    os.kill(ranks_below(run.pid)[1], signal.SIGKILL)
    _, err = run.communicate(timeout=120)
    assert run.returncode == 0, err[-2000:]
    assert "Restoring previous solver status from snap_iter_" in err
    assert (folder / "snap_iter_400.caffemodel").exists()


def wait_for(ready: object, seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not ready():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.02)


def ranks_below(pid: int) -> list[int]:
    """The processes that a launcher has started, by rank."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    if not children.exists():
        pytest.skip("this system does not list the children of a process")
    return sorted(int(child) for child in children.read_text().split())


# --- the launcher, with ranks that are no trainings ------------------------------------------------------------------
@pytest.fixture
def as_ranks(monkeypatch: pytest.MonkeyPatch) -> object:
    """Runs a Python text as every rank."""
    init = launch._Group.__init__

    def start(text: str, world: int = 2) -> int:
        def with_text(self: launch._Group, *args: object) -> None:
            init(self, *args)  # type: ignore[arg-type]
            self._command = [
                sys.executable,
                "-c",
                f"import os, signal, sys, time\nrank = int(os.environ['RANK'])\n{text}",
            ]

        monkeypatch.setattr(launch._Group, "__init__", with_text)
        return launch.run([], world)

    return start


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("", 0, ""),
        ("sys.exit(130)", 130, ""),
        ("print('mine', file=sys.stderr); sys.exit(3)", 3, "mine"),  # said once, by rank 0
        ("sys.exit('theirs' if rank else 5)", 1, "rank 1 of 2 ended with exit code 1:\nrank 1: theirs"),
        ("os.kill(os.getpid(), 9) if rank else sys.exit(5)", 1, "rank 1 was killed by signal 9 (SIGKILL)"),
        (
            "if rank == 0: os.kill(os.getpid(), 9)\nprint('last: x', file=sys.stderr); sys.exit(5)",
            1,
            "rank 0 was killed by signal 9 (SIGKILL)\nrank 1: last: x",
        ),
        ("sys.exit(5)", 5, ""),
    ],
)
def test_the_end_of_a_run(as_ranks: object, capfd: Capfd, text: str, code: int, said: str) -> None:
    assert as_ranks(text) == code  # type: ignore[operator]
    err = capfd.readouterr().err
    assert said in err
    assert err.count("mine") == said.count("mine")
    assert bool(err) == bool(said)


def test_ranks_that_do_not_end_are_ended(as_ranks: object, monkeypatch: pytest.MonkeyPatch, capfd: Capfd) -> None:
    monkeypatch.setattr(launch, "GRACE", 0.3)
    began = time.monotonic()
    assert as_ranks("time.sleep(100) if rank else sys.exit(5)") == 5  # type: ignore[operator]
    assert time.monotonic() - began < 30
    assert "error: rank 1 of 2 did not answer and was ended" in capfd.readouterr().err
    text = "if rank: print('last: x', file=sys.stderr); sys.exit(5)\ntime.sleep(100)"
    assert as_ranks(text) == 5  # type: ignore[operator]
    assert capfd.readouterr().err == "error: rank 0 of 2 did not answer and was ended\nrank 1: last: x\n"


def test_a_second_ctrl_c_is_no_error(as_ranks: object, tmp_path: Path, capfd: Capfd) -> None:
    """One rank is ended by it, the other notices that."""
    text = (
        "signal.signal(signal.SIGINT, (lambda *_: sys.exit(5)) if rank else signal.SIG_DFL)\n"
        f"open('{tmp_path}/' + str(rank), 'w').close()\n"
        f"while len(os.listdir('{tmp_path}')) < 2: time.sleep(0.01)\n"
        "if rank == 0: os.kill(os.getppid(), signal.SIGINT)\n"
        "time.sleep(60)"
    )
    assert as_ranks(text) == 130  # type: ignore[operator]
    assert capfd.readouterr().err == ""


def test_ranks_clear_up_behind_a_killed_launcher(tmp_path: Path) -> None:
    from caffejacinto_py.engine import ranks

    folder = tmp_path / "launched"
    folder.mkdir()
    (folder / "meeting").write_text("")
    ranks._clear("env://")
    ranks._clear(f"file://{tmp_path}/other")
    assert (folder / "meeting").exists()
    ranks._clear(f"file://{folder}/meeting")
    assert not folder.exists()


def test_signals_go_to_all_ranks(as_ranks: object, tmp_path: Path) -> None:
    """Each rank notes the signal and ends as a stopped training does."""
    text = (
        "def stop(*_):\n"
        f"    open('{tmp_path}/' + str(rank), 'w').close()\n"
        "    sys.exit(130)\n"
        "signal.signal(signal.SIGINT, stop)\n"
        f"open('{tmp_path}/ready' + str(rank), 'w').close()\n"
        "if rank == 0:\n"
        f"    while not os.path.exists('{tmp_path}/ready1'): time.sleep(0.01)\n"
        "    os.kill(os.getppid(), signal.SIGINT)\n"
        "time.sleep(60)"
    )
    before = signal.getsignal(signal.SIGINT)
    assert as_ranks(text) == 130  # type: ignore[operator]
    assert {p.name for p in tmp_path.iterdir()} == {"0", "1", "ready0", "ready1"}
    assert signal.getsignal(signal.SIGINT) is before


def test_a_terminated_launcher_ends_its_ranks(as_ranks: object, tmp_path: Path, capfd: Capfd) -> None:
    text = (
        f"open('{tmp_path}/ready' + str(rank), 'w').close()\n"
        "if rank == 0:\n"
        f"    while not os.path.exists('{tmp_path}/ready1'): time.sleep(0.01)\n"
        "    os.kill(os.getppid(), signal.SIGTERM)\n"
        "time.sleep(60)"
    )
    assert as_ranks(text) == 143  # type: ignore[operator]
    assert capfd.readouterr().err == "error: terminated\n"


# --- bad input -------------------------------------------------------------------------------------------------------
@no_gpu
def test_gpus_that_are_not_there(folder: Path, capsys: Capture) -> None:
    assert main(["train", "--solver", "solver.prototxt", "--gpu=0,1"]) == 1
    assert "--gpu 0,1: no CUDA GPU can be used here" in capsys.readouterr().err


def test_ranks_and_gpus_that_contradict_each_other(
    folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert main(["train", "--solver", "solver.prototxt", "--gpu=0,1", "--ranks", "3"]) == 2
    assert "--ranks 3 with 2 GPUs" in capsys.readouterr().err
    with pytest.raises(CaffeError, match="--gpu 0,1: this verb runs on one GPU"):
        pick("0,1", log=launch.log)


@pytest.mark.parametrize(
    ("env", "args", "said"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, ["--ranks", "3"], "--ranks 3, but this process was started as one of 2"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, [], "lacks MASTER_ADDR, MASTER_PORT"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "bla"},
            [],
            "MASTER_PORT=bla is no port number",
        ),
        ({"RANK": "zero", "WORLD_SIZE": "2"}, [], "no set of numbers: RANK='zero', WORLD_SIZE='2'"),
    ],
)
def test_environments_that_do_not_fit(
    folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, env: dict[str, str], args: list[str], said: str
) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT", "CAFFEJACINTO_RENDEZVOUS", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert main(["train", "--solver", "solver.prototxt", *args]) == 2
    assert said in capsys.readouterr().err


def test_the_others_do_not_come(folder: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("CAFFEJACINTO_RENDEZVOUS", f"file://{tmp_path}/meeting")
    assert main(["train", "--solver", "solver.prototxt", "--rank-timeout", "1"]) == 5
    assert "rank 0 of 2 does not find the others" in capsys.readouterr().err


def test_a_dry_run_shows_the_share_of_a_rank(folder: Path, capsys: Capture) -> None:
    text = (folder / "net.prototxt").read_text()
    sizes = "batch_size: 6 channels: 3 height: 8 width: 8"
    data = f'layer {{ name: "d" type: "MemoryData" top: "data" top: "label" memory_data_param {{ {sizes} }} }}\n'
    (folder / "net.prototxt").write_text('name: "tiny"\n' + data + text[text.index('layer { name: "conv"') :])
    args = ["train", "--solver", "solver.prototxt", "--dry-run", "--dialect", "nvcaffe"]
    assert main([*args, "--ranks", "2"]) == 0
    assert "2 ranks, a batch of 3 each in the train net" in capsys.readouterr().out
    assert main([*args, "--ranks", "4"]) == 3
    assert "a batch of 6 cannot be divided among 4 ranks" in capsys.readouterr().err
    assert main([*args[:-2], "--ranks", "4"]) == 0
    assert "4 ranks, a batch of 6 each in the train net" in capsys.readouterr().out
