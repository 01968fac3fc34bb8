"""draw_net."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from caffejacinto_py.cli import main
from caffejacinto_py.errors import UsageError
from caffejacinto_py.export.dot import to_dot
from caffejacinto_py.schema import pb

Capture = pytest.CaptureFixture[str]


def test_dot_text(folder: Path, capsys: Capture) -> None:
    assert main(["draw_net", "net.prototxt", "net.dot"]) == 0
    assert capsys.readouterr().out == "Wrote net.dot\n"
    text = Path("net.dot").read_text()
    assert text.startswith('digraph "tiny" {\n  rankdir=LR;')
    assert '"data_blob" -> "conv_Convolution";' in text
    assert '"conv_Convolution" -> "conv_blob" [label="5"];' in text
    assert '"ip_blob" -> "accuracy_Accuracy";' in text
    assert text.count("{") == text.count("}")


def test_options(folder: Path) -> None:
    assert main(["draw_net", "net.prototxt", "a.gv", "-rankdir=TB", "--phase", "TRAIN"]) == 0
    text = Path("a.gv").read_text()
    assert "rankdir=TB" in text
    assert "accuracy" not in text
    Path("m.prototxt").write_text(
        'layer { name: "i" type: "InnerProduct" bottom: "x" top: "y" param { lr_mult: 0.25 } }'
        'layer { name: "u" type: "NobodyKnows" bottom: "y" top: "z" unknown_param { a: 1 } }'
    )
    assert main(["draw_net", "m.prototxt", "m.dot", "--display_lrm"]) == 0
    text = Path("m.dot").read_text()
    assert "lr mult: 0.25" in text
    assert "NobodyKnows" in text


def test_pictures_need_graphviz(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("PATH", str(folder))
    assert main(["draw_net", "net.prototxt", "net.png"]) == 2
    err = capsys.readouterr().err
    assert "Graphviz" in err
    assert ".dot" in err
    assert not Path("net.png").exists()
    fake = folder / "dot"
    fake.write_text(
        '#!/bin/sh\n[ "$1" = -Tsvg ] && { echo "<svg/>"; exit 0; }\necho "Format not recognized" >&2; exit 1\n'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/bin{os.pathsep}/usr/bin")
    assert main(["draw_net", "net.prototxt", "net.svg"]) == 0
    assert Path("net.svg").read_text() == "<svg/>\n"
    assert main(["draw_net", "net.prototxt", "net.xyz"]) == 1
    assert "Format not recognized" in capsys.readouterr().err
    assert not Path("net.xyz").exists()


def test_bad_input(folder: Path, capsys: Capture) -> None:
    assert main(["draw_net", "absent.prototxt", "x.dot"]) == 3
    assert main(["draw_net", "solver.prototxt", "x.dot"]) == 3
    assert main(["draw_net", "net.prototxt", "x.dot", "--rankdir", "UP"]) == 2
    assert main(["draw_net", "net.prototxt", "no/dir/x.dot"]) == 1
    assert not Path("x.dot").exists()
    with pytest.raises(UsageError):
        to_dot(pb.NetParameter(), phase="train")
