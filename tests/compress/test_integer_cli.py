"""export_int: files, table, JSON, exit codes; the run of a file without this package's help; golden nets."""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from caffejacinto_py.cli import main
from caffejacinto_py.compress import integer_run
from caffejacinto_py.compress.integer_check import verify
from caffejacinto_py.engine.net import Net
from caffejacinto_py.ir.emit import emit
from caffejacinto_py.passes import prepare
from caffejacinto_py.passes.absorb import absorb
from caffejacinto_py.passes.quantize import Settings
from caffejacinto_py.schema import text
from caffejacinto_py.schema.upgrade import load_net
from caffejacinto_py.schema.weights import read_model, write_model
from tests.cli.conftest import NET
from tests.compress.integer_nets import blobs_of, program_of, quantized, simulation
from tests.conftest import shared

Capture = pytest.CaptureFixture[str]
POW2 = Settings(bits_weights=8, offset_weights=False, power2_weights=True, power2_activations=True)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A quantized net, q.prototxt, and its weights, q.caffemodel."""
    monkeypatch.chdir(tmp_path)
    save(NET, POW2)
    return tmp_path


def save(source: str, settings: Settings) -> None:
    message, weights = quantized(source, settings)
    Path("q.prototxt").write_text(text.dumps(message))
    write_model("q.caffemodel", weights.model())


def export(*words: str) -> int:
    return main(
        ["export_int", "--model=q.prototxt", "--weights=q.caffemodel", "--output=p", "--log-level=error", *words]
    )


def test_table_and_files(folder: Path, capsys: Capture) -> None:
    assert export("--verify=2") == 0
    out = capsys.readouterr().out
    assert "conv+relu" in out
    assert "0 of 1472 numbers differ from the simulation in float64; 2 of 2 ops are exact" in out
    assert "Left out: accuracy (Accuracy), loss (SoftmaxWithLoss)" in out
    assert [line.split(":")[0] for line in out.splitlines()[-4:]] == ["accuracy", "loss", "Wrote p.json", "Wrote p.npz"]
    assert sorted(p.name for p in folder.iterdir()) == ["p.json", "p.npz", "q.caffemodel", "q.prototxt"]


def test_json(folder: Path, capsys: Capture) -> None:
    assert export("--json") == 0
    done = json.loads(capsys.readouterr().out)
    assert done["files"] == ["p.json", "p.npz"]
    assert [row["layers"] for row in done["layers"]] == [["conv", "relu"], ["ip"]]
    assert {row["differing"] for row in done["layers"]} == {0}
    assert [s["name"] for s in done["scores"]] == ["accuracy", "loss"]
    assert done["scores"][1]["integer"] == pytest.approx(done["scores"][1]["simulation"])
    assert done["outputs"] == ["ip"]


def test_without_verification(folder: Path, capsys: Capture) -> None:
    assert export("--verify=0", "--json") == 0
    row = json.loads(capsys.readouterr().out)["layers"][0]
    assert row["differing"] is None
    assert row["accumulator_bits"] > 8


def test_a_program_that_differs_is_not_written(folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = integer_run._round
    monkeypatch.setattr(integer_run, "_round", lambda *a: wrong(*a) + 2)
    assert export() == 4
    got = capsys.readouterr()
    assert "differs from the simulation at conv, ip" in got.err
    assert "Wrote" not in got.out
    assert not (folder / "p.json").exists()
    assert not (folder / "p.npz").exists()


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [
        (("--output=missing/p",), 1, "does not exist"),
        (("--model=none.prototxt",), 3, "no such file"),
        (("--weights=none.caffemodel",), 3, "no such weights file"),
        (("--verify=-1",), 2, "-1"),
        (("--compat=quantization=gpu",), 2, "default simulation only"),
    ],
)
def test_errors(folder: Path, capsys: Capture, words: tuple[str, ...], code: int, part: str) -> None:
    assert export(*words) == code
    assert part in capsys.readouterr().err
    assert not list(folder.glob("p*"))


def test_nets_without_data_get_random_numbers(folder: Path, capsys: Capture) -> None:
    source = 'layer { name: "i" type: "Input" top: "data" input_param { shape { dim: 2 dim: 3 dim: 8 dim: 8 } } }'
    save(source + NET[NET.index('layer { name: "conv"') : NET.index('layer { name: "accuracy"')], POW2)
    assert export() == 0
    assert "0 of 368 numbers differ" in capsys.readouterr().out


def test_the_file_runs_on_its_own(folder: Path) -> None:
    """A copy of integer_run.py beside the program, without the package on the path."""
    assert export() == 0
    script = folder / "integer_run.py"
    script.write_text(Path(integer_run.__file__).read_text())
    x = np.random.default_rng(0).standard_normal((3, 3, 8, 8)).astype(np.float32)
    np.save("x.npy", x)
    call = [sys.executable, "-S", "-c", "import sys; sys.path[:0] = sys.argv.pop(1).split(':'); import runpy; "
            "assert 'torch' not in sys.modules; runpy.run_path('integer_run.py', run_name='__main__')"]  # fmt: skip
    where = str(Path(np.__file__).parents[1])
    done = subprocess.run([*call, where, "p.json", "x.npy", "--output", "out.npz"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ip: int8 (3, 4)" in done.stdout
    program = integer_run.load("p.json")
    ours = integer_run.run(program, {"data": integer_run.quantize(program, "data", x)})
    assert np.array_equal(np.load("out.npz")["ip"], ours["ip"])
    np.save("x.npy", x[:, :2])
    done = subprocess.run([*call, where, "p.json", "x.npy"], capture_output=True, text=True)
    assert (done.returncode, done.stderr[:23]) == (3, "error: input 'data' has")


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_the_c_of_the_documentation(folder: Path) -> None:
    """docs/integer.md, compiled, computes the numbers of the reference."""
    page = (Path(__file__).parents[2] / "docs" / "integer.md").read_text()
    Path("op.c").write_text(page.split("```c\n")[1].split("```")[0])
    subprocess.run(["cc", "-shared", "-fPIC", "-Wall", "-Werror", "-o", "op.so", "op.c"], check=True)
    c = ctypes.CDLL("./op.so")
    c.conv_sum.restype = ctypes.c_int64
    for settings in (POW2, Settings(bits_weights=8, offset_activations=True)):
        message, weights = quantized(NET, settings)
        program = program_of(message, weights).program
        op, tensors = program.info["ops"][0], program.tensors
        x = np.random.default_rng(0).integers(*integer_run.limits(tensors["data"]), (1, 3, 8, 8))
        theirs = integer_run.run(program, {"data": x})[op["output"]]
        pointer = lambda a: np.ascontiguousarray(a, np.int32).ctypes.data_as(ctypes.c_void_p)  # noqa: E731
        arrays = {k: program.arrays[op[k]].ravel().tolist() for k in ("weight_zero", "add", "shift")}
        arrays["gain"] = program.arrays[op["gain"][0]].ravel().tolist()
        image, weight = np.ascontiguousarray(x, np.int32), np.ascontiguousarray(program.arrays[op["weight"]], np.int32)
        out = tensors[op["output"]]
        for o, y, u in np.ndindex(*theirs.shape[1:]):
            zero, gain, add, shift = (arrays[k][o % len(arrays[k])] for k in ("weight_zero", "gain", "add", "shift"))
            total = c.conv_sum(pointer(image), 3, 8, 8, tensors["data"]["zero"], pointer(weight), zero, 3, 3, 1, 0, 1,
                               o, y, u)  # fmt: skip
            wide = [ctypes.c_int64(v) for v in (total, gain, add)]
            n = c.finish(wide[0], wide[1], op["gain_kind"] == "shift", wide[2], op["relu"], shift, ctypes.c_int64(1),
                         out["zero"], *integer_run.limits(out))  # fmt: skip
            assert n == theirs[0, o, y, u]


# --- nets of caffe-jacinto --------------------------------------------------------------------------------------------
FOLDER = "golden/jacinto/quantization"


def test_stored_nets_with_batch_norm_are_refused_by_name(tmp_path: Path, capsys: Capture) -> None:
    where = shared(FOLDER)
    for name, bad in [("plain", ["bn1"]), ("residual", ["conv1/bn", "conv2a/bn", "conv2b/bn"])]:
        case = f"{name}_w8a8_wnooffset"
        words = [f"--model={where}/{name}_stored_w8a8_wnooffset.prototxt", f"--weights={where}/{case}.final.caffemodel"]
        assert main(["export_int", *words, f"--output={tmp_path}/p", "--log-level=error", "--pixels"]) == 3
        err = capsys.readouterr().err
        assert [line.split("layer '")[1].split("'")[0] for line in err.splitlines() if "error: layer" in line] == bad
        assert "caffejacinto optimize" in err
    assert not list(tmp_path.iterdir())


def test_a_residual_net_with_batch_norm_absorbed() -> None:
    """Groups, Deconvolution, Eltwise, Concat; calibrated after absorbing."""
    where = shared(FOLDER)
    doc = load_net(where / "residual.prototxt")
    graph = prepare(doc, phase="TEST")
    small = absorb(graph, read_model(where / "residual.caffemodel"))
    frames = torch.from_numpy(np.load(where / "residual_default.npz")["frames"])
    for settings in (POW2, Settings(bits_weights=8, offset_activations=True, per_channel=True)):
        message, weights = quantized(emit(small.graph), settings, batch={"data": frames[0]}, model=small.model)
        built = program_of(message, weights)
        checks = verify(built, simulation(message, weights), [{"data": f} for f in frames]).checks
        assert [c.op["op"] for c in checks].count("deconv") == 1
        assert all(c.good for c in checks)
        assert all(c.exact and c.whole.count == 0 for c in checks) == settings.power2_weights


@pytest.mark.parametrize("case", ["dyadic_pow2_w8_wnooffset", "dyadic_w8a8_wnooffset"])
def test_the_numbers_of_a_stored_net(case: str) -> None:
    """The qparams that the binary found for the dyadic net. Its Scale layer, which cannot be absorbed (two readers
    before it), is left out, and its Input, which the binary leaves in float, is quantized."""
    where = shared(FOLDER)
    arrays: Any = np.load(where / f"{case}.npz")
    message = text.parse(bytes(arrays["final_prototxt"]).decode(), "NetParameter").message
    kept = [layer for layer in message.layer if layer.type not in ("Scale", "Split")]
    for layer in kept:
        layer.bottom[:] = ["conv2" if b == "scale2" else b.split("_conv2_")[0].split("_split")[0] for b in layer.bottom]
    kept[0].quantization_param.qparam_out[0].quantize = True
    del message.layer[:]
    message.layer.extend(kept)
    message.net_quantization_param.update_quantization_param = False
    weights = Net(prepare(message, phase="TEST"), dtype=torch.float64, seed=0)
    weights.load(read_model(where / "dyadic.caffemodel"))
    built = program_of(message, weights)
    frames = [{"data": torch.from_numpy(f)} for f in arrays["frames"]]
    checks = verify(built, simulation(message, weights), frames).checks
    assert [c.op["layers"] for c in checks] == [["conv1", "relu1"], ["conv2"], ["sum"], ["pool"], ["fc"]]
    assert all(c.good for c in checks)
    if "pow2" in case:
        assert all(c.exact for c in checks)
        assert sum(c.whole.count for c in checks) == 0
    assert blobs_of(weights)["fc"][0].dtype == np.float64
