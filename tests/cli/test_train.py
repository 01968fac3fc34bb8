from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from caffejacinto_py.cli import main

Capture = pytest.CaptureFixture[str]
GLOG = re.compile(r"^[IWE]\d{4} \d\d:\d\d:\d\d\.\d{6}\s+\d+ \S+:\d+\] ")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def files(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def test_trains_and_logs_like_caffe(folder: Path, capsys: Capture) -> None:
    assert main(["train", "--solver", "solver.prototxt"]) == 0
    out = capsys.readouterr()
    assert out.out == ""
    lines = out.err.splitlines()
    assert all(GLOG.match(line) for line in lines), [line for line in lines if not GLOG.match(line)][:3]
    assert re.search(r"Iteration 3 \([\d.]+ iter/s, [\d.e-]+s/1 iters\), loss = [\d.]+", out.err)
    assert re.search(r"Iteration 4, Testing net \(#0\)", out.err)
    assert re.search(r"    Test net output #0: accuracy = [\d.]+", out.err)
    assert "img/s" in lines[-1] or "img/s" in lines[-2]
    assert {"snap_iter_2.caffemodel", "snap_iter_4.solverstate"} <= files(folder)


def test_json_result_and_metrics(folder: Path, capsys: Capture) -> None:
    assert main(["train", "-solver=solver.prototxt", "-json", "--metrics", "m.jsonl", "-log_level", "error"]) == 0
    out = capsys.readouterr()
    assert out.err == ""
    result = json.loads(out.out)
    assert result["iter"] == result["max_iter"] == 4
    assert result["stopped"] is False
    assert result["loss"] > 0
    assert result["model"] == "snap_iter_4.caffemodel"
    assert result["tests"][0]["net"] == 0
    assert 0 <= result["tests"][0]["accuracy"] <= 1
    events = [json.loads(line)["event"] for line in Path("m.jsonl").read_text().splitlines()]
    assert events.count("train") == 4
    assert {"test", "snapshot", "end"} <= set(events)


def test_resume_auto_equals_the_uninterrupted_run(folder: Path, capsys: Capture) -> None:
    assert main(["train", "--solver", "solver.prototxt", "--set", 'snapshot_prefix="whole"']) == 0
    assert main(["train", "--solver", "solver.prototxt", "--iterations", "2"]) == 0
    assert "snap_iter_4.caffemodel" not in files(folder)
    capsys.readouterr()
    assert main(["train", "--solver", "solver.prototxt", "-snapshot", "auto"]) == 0
    assert "iter_2" in capsys.readouterr().err
    assert (folder / "snap_iter_4.caffemodel").read_bytes() == (folder / "whole_iter_4.caffemodel").read_bytes()


def test_resume_from_a_named_state(folder: Path) -> None:
    assert main(["train", "--solver", "solver.prototxt", "--iterations", "2"]) == 0
    assert main(["train", "--solver", "solver.prototxt", "--snapshot", "snap_iter_2.solverstate"]) == 0
    assert "snap_iter_4.solverstate" in files(folder)


def test_auto_without_a_snapshot_starts_anew(folder: Path, capsys: Capture) -> None:
    assert main(["train", "--solver", "solver.prototxt", "--snapshot", "auto"]) == 0
    assert "starting anew" in capsys.readouterr().err


def test_weights(folder: Path, capsys: Capture) -> None:
    assert main(["train", "--solver", "solver.prototxt"]) == 0
    capsys.readouterr()
    args = ["train", "--solver", "solver.prototxt", "-weights", "snap_iter_2.caffemodel,snap_iter_4.caffemodel"]
    assert main(args) == 0
    assert capsys.readouterr().err.count("Loaded 2 layers from") == 2


@pytest.mark.parametrize(
    "args",
    [
        ["train", "-solver", "solver.prototxt"],
        ["train", "--solver", "solver.prototxt"],
        ["train", "--solver=solver.prototxt"],
        ["train", "-solver=solver.prototxt", "-gpu=-1"],
        ["-solver", "solver.prototxt", "train", "-gpu", "-1"],
        ["train", "--solver=solver.prototxt", "-sigint_effect", "snapshot", "--sighup-effect=none"],
        ["train", "--solver=solver.prototxt", "-level", "1", "-stage", "a,b", "--workers=0", "--threads", "1"],
    ],
)
def test_spellings_and_dry_run_writes_nothing(args: list[str], folder: Path, capsys: Capture) -> None:
    assert main([*args, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "tiny (TRAIN)" in out
    assert "tiny (TEST)" in out
    assert "SGD with lr_policy fixed" in out
    assert files(folder) == {"net.prototxt", "solver.prototxt"}


def test_dry_run_tells_of_sparsity_and_quantization(folder: Path, capsys: Capture) -> None:
    with (folder / "net.prototxt").open("a") as f:
        f.write("quantize: true net_quantization_param { bitwidth_weights: 8 ignored_layer_names: 'ip' }")
    args = ["train", "--solver", "solver.prototxt", "--dry-run", "--set", "sparse_mode=SPARSE_UPDATE"]
    wanted = ["sparsity_target=0.6", "sparsity_step_iter=5", "sparsity_layer_type='InnerProduct'"]
    assert main([*args, *(x for w in wanted for x in ("--set", w))]) == 0
    out = capsys.readouterr().out
    line = "quantized from pass 1 on: weights 8 bits (biases 16), with offset; activations 8 bits; rounding nearest"
    assert out.count(line + "\nnot quantized: ip\n") == 2
    assert "SPARSE_UPDATE: zero weights stay zero\n" in out
    assert "target: 0.6 of 135 counted weights zero; 0 of 1 layers can be thresholded\n" in out
    assert "every 5 iterations from " in out
    assert main([*args, "--set", "sparsity_layer_type='InnerProdct'"]) == 3
    assert "did you mean 'InnerProduct'?" in capsys.readouterr().err


def test_dry_run_json_and_set(folder: Path, capsys: Capture) -> None:
    args = ["train", "--solver", "solver.prototxt", "--dry-run", "--json", "--set", "base_lr=0.5", "--set", "type=Adam"]
    assert main(args) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["solver"]["base_lr"] == 0.5
    assert plan["solver"]["type"] == "Adam"
    assert [n["phase"] for n in plan["nets"]] == ["TRAIN", "TEST"]


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["--snapshot", "x.solverstate", "--weights", "y.caffemodel"], 2, "not both"),
        (["--set", "base_rl=1"], 2, "did you mean 'base_lr'?"),
        (["--set", "base_lr"], 2, "write path.to.field=value"),
        (["--on-nan", "ignore"], 2, "--on-nan"),
        (["--dialect", "bvcl"], 2, "did you mean 'bvlc'?"),
        (["--gpu", "zero"], 2, "neither 'all' nor numbers"),
        (["--gpu", "0,-1"], 2, "not negative"),
        (["--snapshot", "absent.solverstate"], 3, "absent.solverstate"),
        (["--weights", "net.prototxt"], 3, "net.prototxt"),
        (["--weights", "absent.caffemodel"], 3, "absent.caffemodel"),
        (["--set", 'lr_policy="setp"'], 3, "did you mean 'step'?"),
        (["--set", 'snapshot_prefix="net.prototxt/x"'], 1, "net.prototxt"),
        (["--set", "base_lr=1e30", "--set", "max_iter=20"], 1, "iteration"),
        pytest.param(["--gpu", "0"], 1, "no CUDA GPU", marks=no_gpu),
        pytest.param(["--gpu", "all"], 1, "no CUDA GPU", marks=no_gpu),
    ],
)
def test_refusals(args: list[str], code: int, words: str, folder: Path, capsys: Capture) -> None:
    assert main(["train", "--solver", "solver.prototxt", *args]) == code
    err = capsys.readouterr().err
    assert words in err
    assert "Traceback" not in err
    assert "internal error" not in err


@no_gpu
def test_solver_mode_gpu_without_a_gpu_falls_back_with_a_warning(folder: Path, capsys: Capture) -> None:
    assert main(["train", "--solver", "solver.prototxt", "--set", "solver_mode=GPU"]) == 0
    err = capsys.readouterr().err
    assert re.search(r"^W.*no CUDA GPU can be used here: running on the CPU", err, re.MULTILINE)


def test_net_given_as_solver(folder: Path, capsys: Capture) -> None:
    assert main(["train", "--solver", "net.prototxt"]) == 3
    err = capsys.readouterr().err
    assert "net.prototxt" in err
    assert "--model" in err


def test_missing_net_file(folder: Path, capsys: Capture) -> None:
    (folder / "net.prototxt").unlink()
    assert main(["train", "--solver", "solver.prototxt"]) == 3
    assert "solver.prototxt:2:1: error: net file 'net.prototxt' does not exist" in capsys.readouterr().err


def test_sigint_stops_with_a_snapshot_and_130(folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    from caffejacinto_py.solver import Solver

    real = Solver.apply_update

    def update(self: Solver, **kw: bool) -> None:
        real(self, **kw)
        if self.iter == 0:
            self.signals.request("stop")

    monkeypatch.setattr(Solver, "apply_update", update)
    assert main(["train", "--solver", "solver.prototxt"]) == 130
    assert "snap_iter_1.caffemodel" in files(folder)


@pytest.mark.parametrize("way", ["forward", "backward"])
def test_python_layers_that_fail_are_named(
    way: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """With their layer and their line, not as a fault of this program."""
    bad = {
        "forward": "top[0].data[...] = bottom[0].data",
        "backward": "bottom[0].diff[...] = top[0].diff",
        way: "1 / 0",
    }
    (folder / f"failing_{way}.py").write_text(
        "import caffe\n"
        "class Bad(caffe.Layer):\n"
        "    def reshape(self, bottom, top): top[0].reshape(*bottom[0].data.shape)\n"
        f"    def forward(self, bottom, top): {bad['forward']}\n"
        f"    def backward(self, top, propagate_down, bottom): {bad['backward']}\n"
    )
    monkeypatch.syspath_prepend(folder)
    layer = f'layer {{ name: "mine" type: "Python" bottom: "ip" top: "py" python_param {{ module: "failing_{way}"'
    layer += ' layer: "Bad" } }\n'
    text = (folder / "net.prototxt").read_text()
    at = text.index('layer { name: "loss"')
    (folder / "net.prototxt").write_text(text[:at] + layer + text[at:].replace('bottom: "ip"', 'bottom: "py"'))
    assert main(["train", "--solver", "solver.prototxt", "--allow-python-layers"]) == 1
    err = capsys.readouterr().err
    assert "error: layer 'mine' (Python): Bad failed (" in err
    assert f"failing_{way}.py:{4 if way == 'forward' else 5}): ZeroDivisionError: division by zero" in err
