"""summary --memory and plan."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from caffejacinto_py.cli import main

Capture = pytest.CaptureFixture[str]


def test_summary_memory(folder: Path, capsys: Capture) -> None:
    assert main(["summary", "net.prototxt", "--memory", "--batch=8"]) == 0
    out = capsys.readouterr().out
    assert "tiny (TRAIN), batch 8" in out
    assert re.search(r"^relu +ReLU +0 B +0 B +5.6 KiB$", out, re.MULTILINE)
    assert re.search(r"^weights +3.4 KiB\ngradients +3.4 KiB\nhistory +3.4 KiB \(SGD\)$", out, re.MULTILINE)
    assert main(["summary", "net.prototxt", "--memory", "--phase=TEST"]) == 0
    out = capsys.readouterr().out
    assert "gradients" not in out
    assert re.search(r"^live +\S+ KiB at most in a forward pass$", out, re.MULTILINE)


def test_summary_memory_as_json(folder: Path, capsys: Capture) -> None:
    text = Path("solver.prototxt").read_text()
    Path("adam.prototxt").write_text(text + 'type: "Adam"\n')
    assert main(["summary", "net.prototxt", "--memory", "--json", "--solver=adam.prototxt"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["batch"], found["solver"], found["params"]) == (4, "Adam", 4 * 864)
    assert found["history"] == 2 * found["gradients"] == 8 * 864
    assert found["saved"] == sum(layer["saved"] for layer in found["layers"])
    assert found["total"] == 4 * 4 * 864 + found["saved"]


def test_summary_memory_refuses(folder: Path, capsys: Capture) -> None:
    assert main(["summary", "net.prototxt", "--solver=solver.prototxt"]) == 2
    assert "--memory" in capsys.readouterr().err
    Path("odd.prototxt").write_text(Path("solver.prototxt").read_text() + 'type: "Adma"\n')
    assert main(["summary", "net.prototxt", "--memory", "--solver=odd.prototxt"]) == 3
    assert re.search(r"odd.prototxt:\d+:\d+: error: .*'Adma'(.|\n)*'Adam'", capsys.readouterr().err)
    assert main(["summary", "net.prototxt", "--memory", "--batch=0"]) == 2
