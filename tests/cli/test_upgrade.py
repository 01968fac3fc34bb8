"""upgrade_net_proto_text, upgrade_net_proto_binary, upgrade_solver_proto_text."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from caffejacinto_py.cli import main
from caffejacinto_py.schema import pb
from caffejacinto_py.schema.text import parse
from caffejacinto_py.schema.upgrade import load_net
from caffejacinto_py.schema.weights import read_model

Capture = pytest.CaptureFixture[str]
VERBS = ["upgrade_net_proto_text", "upgrade_net_proto_binary", "upgrade_solver_proto_text"]
V1 = """name: "old"
input: "data" input_dim: 1 input_dim: 1 input_dim: 4 input_dim: 4
layers { name: "ip" type: INNER_PRODUCT bottom: "data" top: "ip" blobs_lr: 1 blobs_lr: 2
  inner_product_param { num_output: 2 } }
layers { name: "prob" type: SOFTMAX bottom: "ip" top: "prob" }
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_net_text(here: Path, capsys: Capture) -> None:
    Path("old.prototxt").write_text(V1)
    assert main(["upgrade_net_proto_text", "old.prototxt", "new.prototxt"]) == 0
    out = capsys.readouterr().out
    assert "V1" in out
    assert "Input" in out
    assert out.endswith("Wrote new.prototxt\n")
    net = parse(Path("new.prototxt").read_text(), "NetParameter").message
    assert [layer.type for layer in net.layer] == ["Input", "InnerProduct", "Softmax"]
    assert not net.layers
    assert not net.input
    assert net.layer[1].param[1].lr_mult == 2
    assert net == load_net("old.prototxt").message
    assert main(["upgrade_net_proto_text", "new.prototxt", "new.prototxt"]) == 0
    assert capsys.readouterr().out == "Wrote new.prototxt: nothing was old\n"
    assert parse(Path("new.prototxt").read_text(), "NetParameter").message == net


def test_solver_text(here: Path, capsys: Capture) -> None:
    Path("s.prototxt").write_text('net: "n.prototxt" base_lr: 0.1 lr_policy: "fixed" solver_type: ADAM max_iter: 5')
    assert main(["upgrade_solver_proto_text", "s.prototxt", "t.prototxt"]) == 0
    assert 'solver_type: ADAM upgraded to type: "Adam"' in capsys.readouterr().out
    solver = parse(Path("t.prototxt").read_text(), "SolverParameter").message
    assert solver.type == "Adam"
    assert not solver.HasField("solver_type")
    assert not solver.HasField("snapshot_prefix")


def binary(layers_v1: bool) -> bytes:
    net = pb.NetParameter(name="old", input=["data"], input_dim=[1, 1, 2, 3])
    if layers_v1:
        layer = net.layers.add(name="ip", type="INNER_PRODUCT", bottom=["data"], top=["ip"])
    else:
        layer = net.layer.add(name="ip", type="InnerProduct", bottom=["data"], top=["ip"])
    layer.inner_product_param.num_output = 1
    blob = layer.blobs.add(num=1, channels=1, height=1, width=6)
    blob.data.extend(range(6))
    return bytes(net.SerializeToString())


@pytest.mark.parametrize("layers_v1", [True, False])
def test_net_binary(layers_v1: bool, here: Path, capsys: Capture) -> None:
    Path("old.caffemodel").write_bytes(binary(layers_v1))
    assert main(["upgrade_net_proto_binary", "old.caffemodel", "new.caffemodel"]) == 0
    out = capsys.readouterr().out
    assert ("V1 layers upgraded" in out) == layers_v1
    net = pb.NetParameter.FromString(Path("new.caffemodel").read_bytes())
    assert [layer.type for layer in net.layer] == ["Input", "InnerProduct"]
    assert not net.input
    assert net.layer[0].input_param.shape[0].dim == [1, 1, 2, 3]
    model = read_model("new.caffemodel")
    assert np.array_equal(np.array(model.layer("ip").blobs[0]).reshape(-1), np.arange(6))
    assert main(["upgrade_net_proto_binary", "new.caffemodel", "again.caffemodel"]) == 0
    assert "nothing was old" in capsys.readouterr().out
    assert Path("again.caffemodel").read_bytes() == Path("new.caffemodel").read_bytes()


@pytest.mark.parametrize("verb", VERBS)
def test_bad_input_leaves_nothing(verb: str, here: Path, capsys: Capture) -> None:
    Path("bad").write_text('layer { name: "x" ')
    for source in ("bad", "absent", "."):
        assert main([verb, source, "out"]) == 3
        assert "error: " in capsys.readouterr().err
    assert main([verb, "bad"]) == 2
    assert [p.name for p in here.iterdir()] == ["bad"]


def test_wrong_kinds_of_files(here: Path, capsys: Capture) -> None:
    Path("net.prototxt").write_text(V1)
    assert main(["upgrade_net_proto_binary", "net.prototxt", "out"]) == 3
    assert "net prototxt" in capsys.readouterr().err
    Path("w.caffemodel").write_bytes(binary(True))
    assert main(["upgrade_net_proto_text", "w.caffemodel", "out"]) == 3
    assert ".caffemodel" in capsys.readouterr().err
    assert main(["upgrade_net_proto_text", "net.prototxt", "no/such/dir/out"]) == 1
    assert "mkdir" in capsys.readouterr().err
    assert not Path("out").exists()


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "tools").glob("*.py")), ids=lambda p: p.name)
def test_old_programs_reach_their_verb(path: Path) -> None:
    done = subprocess.run([sys.executable, str(path), "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Usage: caffejacinto ")
