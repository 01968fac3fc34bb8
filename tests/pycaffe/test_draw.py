from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from caffejacinto_py import pycaffe as caffe
from caffejacinto_py.errors import CaffeError, UsageError
from caffejacinto_py.pycaffe import draw
from caffejacinto_py.schema.upgrade import load_net
from tests.conftest import shared
from tests.pycaffe.test_net_spec import lenet

needs_graphviz = pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz is not installed")


def lines(**options) -> list[str]:  # type: ignore[no-untyped-def]
    return [line.strip() for line in draw.to_dot(lenet().to_proto(), **options).splitlines()]


def test_dot() -> None:
    found = lines()
    assert found[:2] == ['digraph "Net" {', "rankdir=LR;"]
    assert found[-1] == "}"
    assert '"data_blob" -> "conv1_Convolution";' in found
    assert '"conv1_Convolution" -> "conv1_blob" [label="20"];' in found
    assert '"relu1_ReLU" -> "pool1_blob";' in found
    conv = next(line for line in found if line.startswith('"conv1_Convolution" ['))
    assert r'label="conv1\n(Convolution)\nkernel size: 5\nstride: 1\npad: 0"' in conv
    assert sum("shape=octagon" in line for line in found) == 5


def test_options() -> None:
    assert not any("ip_InnerProduct" in line for line in lines(phase=caffe.TRAIN))
    assert any("ip_InnerProduct" in line for line in lines(phase="TEST"))
    assert any("lr mult: 1, 2" in line for line in lines(display_lrm=True))
    assert not any('label="20"' in line for line in lines(label_edges=False))
    assert any('label="relu1 (ReLU)"' in line for line in lines(rankdir="TB"))
    with pytest.raises(UsageError, match="rankdir"):
        lines(rankdir="XY")


def test_names_are_quoted() -> None:
    net = caffe.to_proto(caffe.layers.Input(shape=dict(dim=1)))
    net.name, net.layer[0].name = 'a "b"', "x{1}|<2>"
    text = draw.to_dot(net)
    assert r'digraph "a \"b\""' in text
    assert r"x\{1\}\|\<2\>" in text


def test_file(tmp_path: Path) -> None:
    caffe.draw.draw_net_to_file(lenet().to_proto(), tmp_path / "n.dot", "BT")
    assert "rankdir=BT" in (tmp_path / "n.dot").read_text()


def test_pictures_without_graphviz(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match=r"Graphviz.*\.dot file"):
        draw.draw_net_to_file(lenet().to_proto(), tmp_path / "n.png")
    assert not list(tmp_path.iterdir())


def test_what_graphviz_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the program: echoes its option and the length of its input, or fails."""
    program = tmp_path / "dot"
    program.write_text('#!/bin/sh\n[ "$1" = -Tbad ] && { echo "no format bad" >&2; exit 1; }\necho "$1"; /bin/cat\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    made = draw.draw_net(lenet().to_proto(), ext="svg")
    assert made.startswith(b"-Tsvg\ndigraph")
    with pytest.raises(CaffeError, match="no format bad"):
        draw.draw_net(lenet().to_proto(), ext="bad")


@needs_graphviz
@pytest.mark.parametrize(("ext", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_pictures(ext: str, start: bytes) -> None:
    assert draw.draw_net(lenet().to_proto(), ext=ext).startswith(start)


def test_pydot() -> None:
    try:
        import pydot  # noqa: F401
    except ImportError:
        with pytest.raises(UsageError, match="pydot"):
            draw.get_pydot_graph(lenet().to_proto())
    else:
        assert len(draw.get_pydot_graph(lenet().to_proto()).get_edges()) == 11


def test_published_nets() -> None:
    """Nets of every folder: drawing asks nothing of them but names."""
    files = sorted(shared("prototxt").rglob("*.prototxt"))[::40]
    drawn = 0
    for file in files:
        try:
            net = load_net(str(file), unknown="collect").message
        except CaffeError:
            continue
        assert draw.to_dot(net).endswith("}\n")
        drawn += 1
    assert drawn > 5
