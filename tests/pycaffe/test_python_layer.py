"""Layers written by users: through pycaffe, the solver, the command line and `check`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from google.protobuf import text_format

from caffejacinto_py import check
from caffejacinto_py import pycaffe as caffe
from caffejacinto_py.cli import main
from caffejacinto_py.engine.net import Net as Engine
from caffejacinto_py.errors import LayerError
from caffejacinto_py.passes import prepare
from caffejacinto_py.schema import pb
from caffejacinto_py.solver import Solver

HERE = Path(__file__).parent
MODULE = "user_layers"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """The user's folder is on the path, and `import caffe` means pycaffe; both end with the test."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.chdir(tmp_path)
    caffe.install_as_caffe()
    yield
    for name in set(sys.modules) - before:
        if name == MODULE or name.split(".")[0] == "caffe":
            del sys.modules[name]


def user(cls: str, name: str, bottoms: str = "", tops: str = "", more: str = "", param_str: str = "") -> str:
    blobs = "".join(f' bottom: "{b}"' for b in bottoms.split()) + "".join(f' top: "{t}"' for t in tops.split())
    quoted = param_str.replace('"', '\\"')
    return (
        f'layer {{ name: "{name}" type: "Python"{blobs} {more}'
        f' python_param {{ module: "{MODULE}" layer: "{cls}" param_str: "{quoted}" }} }}\n'
    )


def given(shape: str, name: str = "data") -> str:
    dims = " ".join(f"dim: {d}" for d in shape.split())
    return f'layer {{ name: "{name}" type: "Input" top: "{name}" input_param {{ shape {{ {dims} }} }} }}\n'


def write(text: str, name: str = "n.prototxt") -> str:
    Path(name).write_text(text)
    return name


def net(text: str, phase: int = caffe.TRAIN) -> caffe.Net:
    return caffe.Net(write(text), phase)


CHAIN = (
    "force_backward: true\n" + given("10 9 8") + user("TenTimes", "one", "data", "one")
    + user("TenTimes", "two", "one", "two") + user("TenTimes", "three", "two", "three")
)  # fmt: skip


def test_forward_backward_and_reshape() -> None:
    n = net(CHAIN)
    n.blobs["data"].data[...] = 8
    n.forward()
    assert (n.blobs["three"].data == 8000).all()
    n.blobs["three"].diff[...] = 7
    n.backward()
    assert (n.blobs["data"].diff == 7000).all()
    before = n.layers[1]
    n.blobs["data"].reshape(4, 4, 4, 4)
    n.forward()
    assert {b.data.shape for b in n.blobs.values()} == {(4, 4, 4, 4)}
    assert n.layers[1] is before, "the user's object lives on"
    assert before.calls[0] == (10, 9, 8)
    assert before.type == n.layer_dict["one"].type == "Python"


def test_learnable_blob(tmp_path: Path) -> None:
    text = "force_backward: true\n" + user("Parameter", "layer", "", "top")
    n = net(text)
    n.forward()
    n.backward()
    n.backward()
    layer = n.layers[0]
    assert layer.blobs[0].data[0] == 0
    assert layer.blobs[0].diff[0] == n.params["layer"][0].diff[0] == 1
    layer.blobs[0].data[0] += layer.blobs[0].diff[0]
    assert n.params["layer"][0].data[0] == 1
    n.clear_param_diffs()
    assert layer.blobs[0].diff[0] == 0
    for save, file in ((n.save, "x.caffemodel"), (n.save_hdf5, "x.h5")):
        save(file)
        other = net(text)
        assert other.layers[0].blobs[0].data[0] == 0
        other.copy_from(file)
        assert other.layers[0].blobs[0].data[0] == 1
        other.forward()
        assert other.blobs["top"].data[0] == 1
    third = net(text)
    third.share_with(n)
    n.params["layer"][0].data[0] = 5
    third.forward()
    assert third.blobs["top"].data[0] == 5


def test_phase() -> None:
    for phase in (caffe.TRAIN, caffe.TEST):
        assert net(user("Phase", "p", "", "p"), phase).forward()["p"] == phase


def test_in_place() -> None:
    n = net("force_backward: true\n" + given("2 3") + user("InPlace", "i", "data", "data"))
    n.blobs["data"].data[...] = 3
    assert n.layers[1].same
    assert (n.forward()["data"] == -3).all()
    n.blobs["data"].diff[...] = 2
    n.backward()
    assert (n.blobs["data"].diff == -2).all()


def test_top_whose_shape_changes_between_forwards() -> None:
    n = net(user("Growing", "g", "", "g") + 'layer { name: "p" type: "Power" bottom: "g" top: "p" }')
    shapes = [n.forward()["p"].shape for _ in range(3)]
    assert [s[0] for s in np.diff(shapes, axis=0)] == [1, 1]


def test_what_the_user_writes_into_a_bottom_stays_there() -> None:
    n = net(
        given("2 3") + user("InPlace", "i", "data", "out") + 'layer { name: "p" type: "Power" bottom: "data" top: "p" }'
    )
    n.blobs["data"].data[...] = 3
    assert (n.forward()["p"] == 3).all()


# --- training --------------------------------------------------------------------------------------------------------
TRAINED = (
    user("Counter", "data", "", "data label", param_str="4,2")
    + user("Shift", "shift", "data", "shift", param_str='{"shape": [2], "value": 0.5}')
    + 'layer { name: "ip" type: "InnerProduct" bottom: "shift" top: "ip" param { lr_mult: 0 } param { lr_mult: 0 }'
    ' inner_product_param { num_output: 1 weight_filler { type: "constant" value: 1 } } }\n'
    + 'layer { name: "to" type: "Reshape" bottom: "label" top: "to" reshape_param { shape { dim: 0 dim: 1 } } }\n'
    + user("HalfSquare", "loss", "ip to", "loss", more="loss_weight: 3")
)  # fmt: skip
SOLVER = 'net: "n.prototxt" base_lr: 0.01 lr_policy: "fixed" max_iter: 5 snapshot_prefix: "s" random_seed: 1\n'


def expected(steps: int) -> np.ndarray:
    """Gradient descent by hand: loss = 3 * mean((sum(k + shift) - k)^2) / 2 for batch k."""
    shift = np.full(2, 0.5)
    for k in range(steps):
        shift = shift - 0.01 * 3 * (2 * k + shift.sum() - k)
    return shift


def test_solver_trains_user_blobs() -> None:
    write(TRAINED)
    solver = caffe.SGDSolver(write(SOLVER, "s.prototxt"))
    np.testing.assert_array_equal(solver.net.params["shift"][0].data, [0.5, 0.5])
    solver.step(3)
    np.testing.assert_allclose(solver.net.params["shift"][0].data, expected(3), rtol=1e-5)
    np.testing.assert_allclose(solver.net.layers[1].shift, expected(3), rtol=1e-5)
    assert solver.net.layers[0].k == 3
    assert (solver.net.blobs["data"].data == 2).all()
    step = 3 * (2 + expected(2).sum()) / 4
    np.testing.assert_allclose(solver.net.blobs["ip"].diff, np.full((4, 1), step), rtol=1e-5)


def test_whole_net_engine_and_layers_agree() -> None:
    """The engine that trains fast gives the same as pycaffe's, layer by layer."""
    write(TRAINED)
    run = Solver(write(SOLVER, "s.prototxt"), python_layers=True)
    run.solve()
    np.testing.assert_allclose(run.net.params["shift"][0].detach().numpy(), expected(5), rtol=1e-5)
    assert Path("s_iter_5.caffemodel").is_file()


def test_gradient_by_differences() -> None:
    text = given("4 3") + given("4 3", "t") + user("HalfSquare", "l", "data t", "l", "loss_weight: 2")
    message = text_format.Parse(text, pb.NetParameter())
    message.force_backward = True
    engine = Engine(prepare(message, phase="TRAIN", python_layers=True))
    rng = torch.Generator().manual_seed(0)
    data, target = (torch.randn(4, 3, generator=rng).requires_grad_() for _ in range(2))
    result = engine({"data": data, "t": target})
    result.loss.backward()
    torch.testing.assert_close(data.grad, 2 * (data - target).detach() / 4)
    torch.testing.assert_close(target.grad, -data.grad)
    assert result.outputs["l"].shape == (1,)


# --- errors ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("cls", "words"),
    [
        ("FailsInSetup", r"FailsInSetup.setup: ValueError: no thanks \(.*user_layers.py:\d+\)"),
        ("NotALayer", "no class 'NotALayer' derived from caffe.Layer"),
        ("Absent", "no class 'Absent'"),
    ],
)
def test_bad_user_code_while_the_net_is_made(cls: str, words: str) -> None:
    with pytest.raises(RuntimeError, match=words) as e:
        net(given("1") + user(cls, "x", "data", "y"))
    assert isinstance(e.value, LayerError)
    assert str(e.value).startswith("n.prototxt:2:")


def test_absent_module() -> None:
    with pytest.raises(RuntimeError, match="PYTHONPATH"):
        net(user("X", "x", "", "y").replace(MODULE, "no_such_module"))
    with pytest.raises(LayerError, match="needs layer"):
        net(user("", "x", "", "y"))


def test_setup_that_refuses_its_bottoms() -> None:
    with pytest.raises(RuntimeError, match="one bottom, please"):
        net(given("1") + user("TenTimes", "x", "data data", "y"))


def test_exceptions_of_forward_go_through() -> None:
    n = net(user("FailsInForward", "x", "", "y"))
    with pytest.raises(StopIteration, match="epoch"):
        n.forward()


def test_a_layer_without_backward_says_so() -> None:
    n = net("force_backward: true\n" + given("1") + user("Phase", "x", "data", "y"))
    n.forward()
    with pytest.raises(NotImplementedError, match="Phase has no backward"):
        n.backward()


# --- permission ------------------------------------------------------------------------------------------------------
def test_refused_unless_allowed() -> None:
    message = text_format.Parse(CHAIN, pb.NetParameter())
    with pytest.raises(LayerError, match="not allowed") as e:
        prepare(message, phase="TRAIN")
    assert "--allow-python-layers" in str(e.value)
    assert MODULE not in sys.modules, "nothing was imported"
    write(TRAINED)
    with pytest.raises(LayerError, match="not allowed"):
        Solver(write(SOLVER, "s.prototxt"))


def test_check_lists_them() -> None:
    report = check(write(CHAIN))
    assert report.status == "unknown_types"
    assert report.unknown_types == ("Python",)
    assert not report.errors
    assert "runs the code of class 'TenTimes' in Python module 'user_layers'" in report.notes[0].text
    assert check("n.prototxt", python_layers=True).status == "ok"


@pytest.mark.parametrize(
    "verb",
    [["summary", "n.prototxt"], ["check", "n.prototxt", "--phase", "TRAIN"], ["train", "--solver", "s.prototxt"],
     ["time", "--model", "n.prototxt", "--iterations", "1"],
     ["test", "--model", "n.prototxt", "--weights", "w.caffemodel", "--iterations", "1"],
     ["train", "--solver", "s.prototxt", "--dry-run"]],
)  # fmt: skip
def test_verbs(verb: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    write(TRAINED)
    write(SOLVER, "s.prototxt")
    caffe.Net("n.prototxt", caffe.TEST).save("w.caffemodel")
    assert main(verb) == 3
    assert "--allow-python-layers" in "".join(capsys.readouterr())
    assert main([*verb, "--allow-python-layers"]) == 0


def test_program_in_a_process_of_its_own() -> None:
    """Nothing imported beforehand: the option alone makes `import caffe` work for the user's module."""
    write(CHAIN)
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); from caffejacinto_py.cli import main; sys.exit(main())"
    words = ["summary", "n.prototxt", "--allow-python-layers"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "10x9x8" in done.stdout
