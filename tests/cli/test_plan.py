"""summary --memory and plan."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from caffejacinto_py.cli import main
from caffejacinto_py.passes.memory import HISTORY_TYPES

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


def test_plan_lists_stages_and_choices(folder: Path, capsys: Capture) -> None:
    assert main(["plan", "net.prototxt", "--batch=64"]) == 0
    out = capsys.readouterr().out
    assert "tiny, batch 64" in out
    assert re.search(r"^ +0 +relu ", out, re.MULTILINE)
    assert re.search(r"loss .*never run again$", out, re.MULTILINE)
    assert re.search(r"^ +budget +activations, gradients +time$", out, re.MULTILINE)
    assert main(["plan", "--solver=solver.prototxt", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["batch"], found["budget"], found["ratio"]) == (4, None, 1)
    assert (found["fixed"], found["gradients"], found["update"]) == (2 * 4 * 864, 4 * 864, 3 * 4 * 864)
    assert found["all"] == dict.fromkeys(("plain", "planned"), found["fixed"] + found["plain"]["peak"])
    assert found["choices"][0]["peak"] == found["plain"]["peak"]
    assert found["stages"][0]["name"] == "relu"


def test_plan_with_a_budget(folder: Path, capsys: Capture) -> None:
    args = ["plan", "net.prototxt", "--batch=64", "--json"]
    assert main(args) == 0
    choice = json.loads(capsys.readouterr().out)["choices"][-1]
    for strategy in ("rotor", "sequential:2", "revolve"):
        assert main([*args, f"--memory-budget={choice['budget'] + 20000}", f"--strategy={strategy}"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["fixed"] + found["planned"]["peak"] <= found["all"]["planned"] <= found["budget"]
        assert found["ratio"] >= 1
    assert "[" in found["schedule"]
    assert main([*args[:-1], "--profile", f"--memory-budget={choice['budget'] + 20000}"]) == 0
    assert "of the unplanned" in capsys.readouterr().out


def test_plan_refuses(folder: Path, capsys: Capture) -> None:
    assert main(["plan"]) == 2
    assert main(["plan", "net.prototxt", "--solver=solver.prototxt"]) == 2
    assert main(["plan", "net.prototxt", "--memory-budget=lots"]) == 2
    assert "'lots' is no number of bytes" in capsys.readouterr().err
    assert main(["plan", "net.prototxt", "--strategy=best"]) == 2
    assert main(["plan", "net.prototxt", "--memory-budget=1000"]) == 1
    err = capsys.readouterr().err
    assert "weights, gradients and history alone take" in err
    assert "give it at least" in err
    assert main(["plan", "net.prototxt", "--strategy=none", "--memory-budget=11kB"]) == 1
    assert re.search(r"batch 4 the least is .* most is needed at layer", capsys.readouterr().err)


def test_the_table_of_resnets(capsys: Capture) -> None:
    """Activations in MiB as computed elsewhere from torchvision's nets: within 1 %."""
    assert main(["plan", "--table", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    for name, weights, *activations in (
        ("ResNet-18", 44.6, 21, 169, 106, 850),
        ("ResNet-34", 83.2, 31, 246, 155, 1240),
        ("ResNet-50", 97.5, 82, 656, 415, 3315),
        ("ResNet-101", 169.9, 121, 968, 619, 4947),
        ("ResNet-152", 229.6, 170, 1354, 868, 6939),
    ):
        assert rows[name]["params"] / 2**20 == pytest.approx(weights, rel=0.01)
        found = [n / 2**20 for n in rows[name]["activations"].values()]
        assert found == pytest.approx(activations, rel=0.01, abs=0.6)
        assert rows[name]["state"] / 2**20 == pytest.approx(3 * weights, rel=0.01)


def test_plan_of_a_net_that_computes_nothing(folder: Path, capsys: Capture) -> None:
    text = 'layer { name: "in" type: "Input" top: "in" input_param { shape { dim: 2 dim: 3 } } }'
    Path("idle.prototxt").write_text(text)
    assert main(["plan", "idle.prototxt"]) == 0
    assert main(["plan", "idle.prototxt", "--memory-budget=1kB", "--strategy=revolve"]) == 0
    assert "0 stages" in capsys.readouterr().out


def test_the_table_of_a_net(folder: Path, capsys: Capture) -> None:
    assert main(["plan", "net.prototxt", "--table"]) == 0
    assert re.search(r"^tiny +0 ", capsys.readouterr().out, re.MULTILINE)


def test_training_within_a_budget_gives_the_same_snapshot(folder: Path, capsys: Capture) -> None:
    """Also of a net whose quantization is simulated."""
    for quantize in (False, True):
        net = Path("net.prototxt").read_text()
        Path("net.prototxt").write_text(net + "quantize: true\n" if quantize else net)
        assert main(["plan", "--solver=solver.prototxt", "--json"]) == 0
        least = json.loads(capsys.readouterr().out)["choices"][-1]["budget"]
        assert main(["train", "--solver=solver.prototxt"]) == 0
        plain = Path("snap_iter_4.caffemodel").read_bytes()
        budget = f"--memory-budget={least + 20000}"
        assert main(["train", "--solver=solver.prototxt", budget, "--memory-strategy=sequential:2"]) == 0
        assert "Memory: planned" in capsys.readouterr().err
        assert Path("snap_iter_4.caffemodel").read_bytes() == plain


def test_data_of_a_shape_that_nothing_says(folder: Path, capsys: Capture) -> None:
    """`plan` says what it assumes; a dry run does not refuse for it what a training might do."""
    first = 'layer { name: "data" type: "Data" top: "data" top: "label" data_param { source: "db" batch_size: 4 } }'
    text = Path("net.prototxt").read_text()
    Path("net.prototxt").write_text(first + text[text.index('layer { name: "conv"') :])
    assert main(["plan", "net.prototxt"]) == 0
    assert "Data is taken as 3x224x224; --data-shape says otherwise." in capsys.readouterr().err
    assert main(["plan", "net.prototxt", "--data-shape", "1,9,9", "--memory-budget=10kB"]) == 1
    assert "Data is taken" not in capsys.readouterr().err
    assert main(["train", "--solver=solver.prototxt", "--dry-run", "--memory-budget=10kB"]) == 0
    assert "With data as assumed here: a memory budget of" in capsys.readouterr().out


def test_the_budget_of_a_solver(folder: Path, capsys: Capture) -> None:
    """Its field and the option are one thing; the command line wins."""
    text = Path("solver.prototxt").read_text()
    Path("solver.prototxt").write_text(text + 'memory { budget: "5kB" strategy: "sequential:2" }\n')
    train = ["train", "--solver=solver.prototxt"]
    for args in (train, [*train, "--dry-run"], ["plan", "--solver=solver.prototxt"]):
        assert main(args) == 1
        assert "too small" in capsys.readouterr().err
    for words in (["--memory-budget=1MB"], ["--memory-budget=none"], ["--set=memory.budget=1MB"]):
        assert main([*train, *words, "--dry-run"]) == 0
        assert ("Memory: planned" in capsys.readouterr().out) == ("none" not in words[0])
    assert main([*train, "--memory-budget=1MB"]) == 0
    assert "Memory: planned" in capsys.readouterr().err
    assert main([*train, "--memory-budget=none", "--memory-strategy=rotor"]) == 2
    assert main(["plan", "--solver=solver.prototxt", "--memory-budget=1MB", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["strategy"] == "sequential:2"
    Path("solver.prototxt").write_text(text + 'memory { budget: "lots" }\n')
    for args in (train, [*train, "--dry-run"], ["check", "solver.prototxt"], ["plan", "--solver=solver.prototxt"]):
        assert main(args) == 3
        found = capsys.readouterr()
        assert re.search(r"solver.prototxt:\d+:10: (error: )?.*'lots' is no number of bytes", found.out + found.err)


@pytest.mark.parametrize("strategy", ["rotor", "revolve", "sequential:2", "none"])
def test_an_infeasible_budget_is_answered(folder: Path, capsys: Capture, strategy: str) -> None:
    """With the least budget, a batch and its iter_size, and the layer that needs most; what is named then fits."""
    net = Path("net.prototxt").read_text().replace("dim: 4 ", "dim: 64 ")
    Path("net.prototxt").write_text(net)
    solver = Path("solver.prototxt").read_text()
    words = [f"--memory-strategy={strategy}", "--memory-budget=100kB"]
    for args in (["train", "--solver=solver.prototxt"], ["train", "--solver=solver.prototxt", "--dry-run"]):
        assert main([*args, *words]) == 1
        err = capsys.readouterr().err
        assert re.search(rf"with '{strategy.split(':')[0]}' and batch 64 the least is \S+ .*needed at layer '\w+'", err)
    least = re.search(r"give it at least (\S+),", err)
    batch = re.search(r"or batch_size (\d+) with (\d+) times the iter_size", err)
    assert least
    assert batch
    assert int(batch[1]) * int(batch[2]) == 64
    run = ["train", "--solver=solver.prototxt", words[0]]
    assert main([*run, "--dry-run", f"--memory-budget={least[1]}"]) == 0
    Path("net.prototxt").write_text(net.replace("dim: 64 ", f"dim: {batch[1]} "))
    Path("solver.prototxt").write_text(f"{solver}iter_size: {batch[2]}\n")
    assert main([*run, words[1]]) == 0
    assert "Memory: planned" in capsys.readouterr().err


def test_number_types_and_simulation_count(folder: Path, capsys: Capture) -> None:
    """What the net says, or --precision; copies that a simulation makes."""

    def saved() -> int:
        assert main(["summary", "net.prototxt", "--memory", "--json"]) == 0
        return int(json.loads(capsys.readouterr().out)["saved"])

    def peak(*words: str) -> tuple[int, int]:
        assert main(["plan", "net.prototxt", "--json", *words]) == 0
        found = json.loads(capsys.readouterr().out)
        return found["fixed"], found["plain"]["peak"]

    text = Path("net.prototxt").read_text()
    plain, single, half, double = saved(), peak(), peak("--precision=bf16"), peak("--precision=fp64")
    assert half[0] == single[0]
    assert half[1] < single[1]
    assert (double[0], double[1] > 1.9 * single[1]) == (2 * single[0], True)
    assert main(["plan", "net.prototxt", "--profile", "--precision=fp64"]) == 0
    capsys.readouterr()
    Path("net.prototxt").write_text("default_forward_type: FLOAT16 default_backward_type: FLOAT16" + text)
    assert saved() < plain
    assert peak() == half
    Path("net.prototxt").write_text(text + "quantize: true")
    assert saved() > plain
    capsys.readouterr()
    assert main(["plan", "net.prototxt", "--profile"]) == 2
    assert "simulated quantization" in capsys.readouterr().err


def test_train_refuses_a_budget(folder: Path, capsys: Capture) -> None:
    assert main(["train", "--solver=solver.prototxt", "--memory-budget=0"]) == 2
    assert main(["train", "--solver=solver.prototxt", "--memory-strategy=none"]) == 2
    assert "goes with --memory-budget" in capsys.readouterr().err
    assert main(["train", "--solver=solver.prototxt", "--memory-budget=5kB"]) == 1
    assert "too small" in capsys.readouterr().err
    assert not list(Path().glob("snap*"))
    assert main(["train", "--solver=solver.prototxt", "--memory-budget=1MB", "--dry-run"]) == 0
    assert "Memory: planned" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_history_type_counts(folder: Path, capsys: Capture, kind: str) -> None:
    """summary, plan and train --dry-run see the solver's history_type."""
    text = f'net: "net.prototxt" type: "Adam" base_lr: 0.1 lr_policy: "fixed" history_type: "{kind}"\n'
    (folder / "s.prototxt").write_text(text)
    assert main(["summary", "net.prototxt", "--memory", "--solver=s.prototxt", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["history_type"] == kind
    share = {"float32": 2.0, "bfloat16": 1.0, "int8": 2.0}[kind]  # blobs this small stay float32 in int8
    assert found["history"] == share * found["gradients"]
    assert main(["plan", "--solver=s.prototxt", "--json"]) == 0
    pieces = 0 if kind == "float32" else (2 + 5) * found["gradients"]  # the update's, here whole blobs
    assert json.loads(capsys.readouterr().out)["update"] == (
        found["params"] + found["gradients"] + found["history"] + pieces
    )
    assert main(["summary", "net.prototxt", "--memory", "--solver=s.prototxt"]) == 0
    assert ("(Adam)" if kind == "float32" else f"(Adam, {kind})") in capsys.readouterr().out


def test_unknown_history_type(folder: Path, capsys: Capture) -> None:
    (folder / "s.prototxt").write_text('net: "net.prototxt" base_lr: 1 lr_policy: "fixed"\nhistory_type: "int4"\n')
    for args in (["summary", "net.prototxt", "--memory", "--solver=s.prototxt"], ["plan", "--solver=s.prototxt"]):
        assert main(args) == 3
        err = capsys.readouterr().err
        assert "s.prototxt:2:" in err
        assert "one of float32, bfloat16, int8" in err


def test_train_takes_a_history_type(folder: Path, capsys: Capture) -> None:
    """The option replaces the solver's field; other words are a usage error that names the choices."""
    text = 'net: "net.prototxt" type: "Adam" base_lr: 0.1 lr_policy: "fixed" history_type: "int8" max_iter: 1\n'
    (folder / "s.prototxt").write_text(text + "snapshot_after_train: false solver_mode: CPU")
    assert main(["train", "--solver=s.prototxt", "--history-type=bfloat16", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["solver"]["history_type"] == "bfloat16"
    assert main(["train", "--solver=s.prototxt", "--history-type=bfloat16", "--metrics=none"]) == 0
    assert "History of Adam in bfloat16" in capsys.readouterr().err
    assert main(["train", "--solver=s.prototxt", "--history-type=int4"]) == 2
    err = capsys.readouterr().err
    assert all(word in err for word in HISTORY_TYPES)
    assert main(["train", "--solver=s.prototxt", "--precision=fp64"]) == 3
    assert "s.prototxt:1:" in capsys.readouterr().err
