"""parse_log and plot: logs of every age as tables and pictures."""

from __future__ import annotations

import builtins
import csv
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import pytest

from caffejacinto_py.cli import main
from caffejacinto_py.errors import InputError
from caffejacinto_py.solver.readlog import read_log, table

Capture = pytest.CaptureFixture[str]
BVLC = """I1231 23:59:50.000000  77 caffe.cpp:204] Using GPUs 0
I1231 23:59:58.500000  77 solver.cpp:273] Solving tiny
I1231 23:59:58.500001  77 solver.cpp:274] Learning Rate Policy: step
I1231 23:59:59.000000  77 solver.cpp:331] Iteration 0, Testing net (#0)
I1231 23:59:59.500000  77 solver.cpp:398]     Test net output #0: accuracy = 0.25
I1231 23:59:59.500000  77 solver.cpp:398]     Test net output #1: loss = 1.5 (* 1 = 1.5 loss)
I1231 23:59:59.600000  77 solver.cpp:331] Iteration 0, Testing net (#1)
I1231 23:59:59.600001  77 solver.cpp:398]     Test net output #0: accuracy = 0.3
I0101 00:00:00.500000  77 solver.cpp:219] Iteration 0 (0 iter/s, 1.2s/10 iters), loss = 1.75
I0101 00:00:00.500000  77 solver.cpp:238]     Train net output #0: loss = 1.8 (* 1 = 1.8 loss)
I0101 00:00:00.500000  77 solver.cpp:238]     Train net output #1: loss = 2e-05 (* 0.5 = 1e-05 loss)
I0101 00:00:00.500000  77 sgd_solver.cpp:105] Iteration 0, lr = 0.01
I0101 00:00:03.500000  77 solver.cpp:219] Iteration 10 (3.3 iter/s, 3s/10 iters), loss = -nan
I0101 00:00:03.500000  77 solver.cpp:238]     Train net output #0: loss = nan (* 1 = nan loss)
I0101 00:00:03.500000  77 sgd_solver.cpp:105] Iteration 10, lr = 1e-3
I0101 00:00:04.500000  77 solver.cpp:331] Iteration 11, Testing net (#0)
I0101 00:00:04.500000  77 solver.cpp:398]     Test net output #0: accuracy = 0.75
I0101 00:00:04.500000  77 solver.cpp:317] Iteration 11, loss = 0.5
I0101 00:00:04.500000  77 solver.cpp:322] Optimization Done.
"""
OLD = """I0203 10:00:00.000000 1 solver.cpp:45] Solving CaffeNet
I0203 10:00:20.000000 1 solver.cpp:60] Iteration 20, loss = 6.9
I0203 10:00:20.000000 1 solver.cpp:207] Iteration 20, lr = 0.01
I0203 10:00:30.000000 1 solver.cpp:106] Iteration 20, Testing net
I0203 10:00:40.000000 1 solver.cpp:142] Test score #0: 0.1
I0203 10:00:40.000000 1 solver.cpp:142] Test score #1: 6.5
"""
JACINTO = """    Train net output #0: loss = 0.9 (* 1 = 0.9 loss)
Iteration 0, lr = 0.05, m = 0.9, wd = 0.005, gs = 1
    Train net output #0: loss = 1.4 (* 1 = 1.4 loss)
Iteration 1, lr = 0.04, m = 0.9, wd = 0.005, gs = 1
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def columns(path: str, delimiter: str = ",") -> tuple[list[str], list[list[float]]]:
    with open(path) as f:
        rows = list(csv.reader(f, delimiter=delimiter))
    return rows[0], [[float(v) for v in row] for row in rows[1:]]


def test_tables_of_a_caffe_log(capsys: Capture) -> None:
    Path("run.log").write_text(BVLC)
    assert main(["parse_log", "run.log", "a/b", "--verbose"]) == 0
    out = capsys.readouterr().out
    assert "run.log.train: 2 rows" in out
    assert "accuracy 0.75" in out
    names, body = columns("a/b/run.log.train")
    assert names == ["NumIters", "Seconds", "LearningRate", "loss", "loss_2"]
    assert body[0] == [0, pytest.approx(2), 0.01, 1.8, 2e-05]
    assert body[1][1] - body[0][1] == pytest.approx(3)
    assert body[1][2] == 0.001
    assert math.isnan(body[1][3])
    names, body = columns("a/b/run.log.test")
    assert names == ["NumIters", "Seconds", "LearningRate", "accuracy", "loss", "accuracy#1"]
    assert [row[0] for row in body] == [0, 0, 11]
    assert body[0][1:5] == [pytest.approx(0.5), 0.01, 0.25, 1.5]
    assert body[1][5] == 0.3
    assert body[2][3] == 0.75
    assert body[2][2] == 0.001


def test_tables_of_an_old_log() -> None:
    Path("old.log").write_text(OLD)
    assert main(["parse_log", "old.log", ".", "--delimiter", "tab"]) == 0
    assert columns("old.log.train", "\t") == (["NumIters", "Seconds", "LearningRate", "loss"], [[20, 20, 0.01, 6.9]])
    assert columns("old.log.test", "\t")[1] == [[20, 30, 0.01, 0.1, 6.5]]


def test_a_log_without_times_and_iteration_lines() -> None:
    Path("j.log").write_text(JACINTO)
    rows = read_log("j.log")
    assert [(r.iter, r.lr, r.values["loss"], r.seconds) for r in rows] == [(0, 0.05, 0.9, None), (1, 0.04, 1.4, None)]
    assert all(math.isnan(line[1]) for line in table(rows, "train")[1])


@pytest.mark.parametrize(("year", "days"), [(2023, 1), (2024, 2)])
def test_the_end_of_february(year: int, days: int) -> None:
    Path("f.log").write_text(
        "I0228 12:00:00.000000 1 solver.cpp:1] Solving x\nI0301 12:00:00.000000 1 solver.cpp:2] Iteration 9, loss = 1\n"
    )
    when = time.mktime((year, 3, 2, 0, 0, 0, 0, 0, -1))
    os.utime("f.log", (when, when))
    assert read_log("f.log")[0].seconds == days * 86400


def test_our_own_log_and_metrics_agree(folder: Path, capsys: Capture) -> None:
    assert main(["train", "--solver", "solver.prototxt", "--metrics", "m.jsonl"]) == 0
    Path("run.log").write_text(capsys.readouterr().err)
    text, metrics = read_log("run.log"), read_log("m.jsonl")
    for kind in ("train", "test"):
        names, body = table(text, kind)
        other, values = table(metrics, kind)
        assert set(names) == set(other)
        assert len(body) == len(values) > 0
        for row, line in zip(body, values, strict=True):
            mine, its = dict(zip(names, row, strict=True)), dict(zip(other, line, strict=True))
            mine.pop("Seconds"), its.pop("Seconds")
            assert mine == pytest.approx(its, rel=1e-4)
    train = [r for r in text if r.kind == "train"]
    assert [r.iter for r in train] == [0, 1, 2, 3, 4]
    assert all(r.lr == 0.01 for r in train)


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"event": "test", "iter": 1e999, "time": 1}\n',
        '{"a":' * 9000,
        "hello\n",
        '{"a": 1}\n',
        "\x00\xff\n",
        '{"event": "end", "iter": 3, "time": 1}\n',
    ],
)
def test_no_log(text: str, here: Path, capsys: Capture) -> None:
    Path("x").write_text(text)
    assert main(["parse_log", "x", "out"]) == 3
    assert main(["plot", "x", "-o", "y.png"]) in (2, 3)
    assert "error: " in capsys.readouterr().err
    assert [p.name for p in here.iterdir()] == ["x"]
    with pytest.raises(InputError, match="cannot read"):
        read_log("absent")


def test_parse_log_usage(capsys: Capture) -> None:
    Path("run.log").write_text(BVLC)
    assert main(["parse_log", "run.log"]) == 2
    assert main(["parse_log", "run.log", ".", "--delimiter", "--"]) == 2
    assert "one character" in capsys.readouterr().err
    Path("file").write_text("")
    assert main(["parse_log", "run.log", "file"]) == 1


def test_plot(here: Path, capsys: Capture) -> None:
    pytest.importorskip("matplotlib")
    Path("a.log").write_text(BVLC)
    Path("b.log").write_text(OLD)
    events = [{"event": "train", "iter": i, "time": i, "loss": 1 / (i + 1), "lr": 0.1} for i in range(5)]
    Path("m.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    assert main(["plot", "a.log", "b.log", "m.jsonl", "--output", "p.png", "--log-scale"]) == 0
    assert Path("p.png").read_bytes().startswith(b"\x89PNG")
    assert main(["plot", "a.log", "-o", "p.svg", "--seconds"]) == 0
    svg = Path("p.svg").read_text()
    assert "<svg" in svg
    assert capsys.readouterr().out == "Wrote p.png\nWrote p.svg\n"
    assert main(["plot", "a.log", "-o", "p.xyz"]) == 2
    assert "no picture of type 'xyz'" in capsys.readouterr().err
    Path("j.log").write_text(JACINTO)
    assert main(["plot", "j.log", "--seconds"]) == 2
    assert "nothing to plot" in capsys.readouterr().err
    assert not Path("p.xyz").exists()


def test_plot_panels() -> None:
    """What goes into which panel, without drawing."""
    from caffejacinto_py.cli.plot import _collect

    Path("a.log").write_text(BVLC)
    panels: list[Any] = [{}, {}, {}]
    _collect(read_log("a.log"), "", False, panels)
    assert list(panels[0]) == ["test loss", "train loss"]
    assert panels[0]["train loss"][0] == [0, 10, 11]
    assert panels[1]["lr"][1][:2] == [0.01, 0.001]
    assert panels[2]["test accuracy"] == ([0, 11], [0.25, 0.75])
    assert panels[2]["test#1 accuracy"] == ([0], [0.3])


def test_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kw: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kw)

    Path("a.log").write_text(BVLC)
    monkeypatch.setattr(builtins, "__import__", refuse)
    assert main(["plot", "a.log"]) == 2
    err = capsys.readouterr().err
    assert "needs matplotlib" in err
    assert "caffejacinto-py[plot]" in err
