"""Running recipes: folders, results, what is kept and what is done again, going on after interruptions."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from caffejacinto_py.cli import launch, main
from caffejacinto_py.errors import CaffeError, Loc, UsageError
from caffejacinto_py.recipes import results
from caffejacinto_py.recipes.recipe import load
from caffejacinto_py.recipes.resolve import resolve
from caffejacinto_py.recipes.runner import Runner
from caffejacinto_py.schema.upgrade import load_net
from caffejacinto_py.schema.weights import read_model
from caffejacinto_py.solver import Solver
from caffejacinto_py.solver.feed import Feed
from tests.recipes.test_recipe import edit

Capture = pytest.CaptureFixture[str]
FILES = {"test.prototxt", "deploy.prototxt", "solver.prototxt", "run.log", "result.json"}
STAGES = ["initial", "sparse", "test", "test_quantize"]


def runner(**options: Any) -> Runner:
    recipe = load("recipe.yaml", output=options.pop("output", None), variables=options.pop("variables", None))
    return Runner(recipe, resolve(recipe), workers=0, **options)


def weights(stage: str, output: str = "out", iteration: int = 10) -> bytes:
    return Path(output, stage, f"small_iter_{iteration}.caffemodel").read_bytes()


def actions(**options: Any) -> list[str]:
    return [action for _, action in runner(**options).plan()]


def test_folders_results_and_table(folder: Path) -> None:
    found = runner().run()
    assert [r.stage for r in found] == STAGES
    for stage in ("initial", "sparse"):
        names = {p.name for p in Path("out", stage).iterdir()}
        snapshots = {"small_iter_10.caffemodel", "small_iter_10.solverstate", "small_iter_8.caffemodel"}
        assert FILES | {"train.prototxt"} | snapshots <= names
    assert {p.name for p in Path("out", "test_quantize").iterdir()} == FILES
    assert load_net("out/test_quantize/deploy.prototxt").message.quantize
    log = Path("out/sparse/run.log").read_text()
    assert re.search(r"^I\d{4} [\d:.]+ +\d+ loop\.py:\d+\] Iteration 10, Testing net", log, re.MULTILINE)
    assert "Total Sparsity (zero_weights/count)" in log

    initial, sparse, test, quantized = (r.scores for r in found)
    conv = next(layer for layer in read_model("out/sparse/small_iter_10.caffemodel").layers if layer.name == "conv")
    assert (sparse["zeros"], sparse["count"]) == (int((conv.blobs[0] == 0).sum()), 288)
    assert initial["zeros"] == 0
    assert sparse["sparsity"] == test["sparsity"] == pytest.approx(1 / 3)  # 35 % of nine weights, rounded down
    assert test["top1"] == sparse["top1"]
    assert (test["iterations"], test["images"]) == (4, 40)
    assert (test["weight_bits"], quantized["weight_bits"], quantized["activation_bits"]) == (32, 8, 8)
    assert quantized["loss"] != test["loss"]

    lines = Path("out/table.md").read_text().splitlines()
    assert lines[2].split("|")[1:8] == [
        " stage ", " iterations ", " top-1 ", " top-5 ", " loss ", " sparsity ", " weights "
    ]  # fmt: skip
    assert [line.split("|")[1].strip() for line in lines[4:8]] == STAGES
    assert lines[5].split("|")[2:4] == [" 10 ", f" {sparse['top1']:.4f} "]


def test_finished_stages_are_kept_while_nothing_changes(folder: Path) -> None:
    first = runner().run()
    stamps = {p: p.stat().st_mtime_ns for p in Path("out").rglob("*.caffemodel")}
    assert actions() == ["keep"] * 4
    again = runner().run()
    assert {p: p.stat().st_mtime_ns for p in Path("out").rglob("*.caffemodel")} == stamps
    assert [r.scores for r in again] == [r.scores for r in first]

    edit(folder, "bitwidth_weights: 8", "bitwidth_weights: 6")  # the last stage only
    assert actions() == ["keep", "keep", "keep", "run"]
    edit(folder, "sparsity_target: 0.6", "sparsity_target: 0.3")
    assert actions() == ["keep", "run", "run", "run"]
    assert actions(variables={"iterations": "9"}) == ["run"] * 4
    assert actions(output="elsewhere") == ["run"] * 4
    assert actions(start="test") == ["keep", "keep", "run", "run"]


def test_lost_or_changed_weights_are_made_again(folder: Path) -> None:
    runner().run()
    whole = weights("initial")
    Path("out/initial/small_iter_10.caffemodel").write_bytes(whole[:-1])
    assert actions()[0] == "run"
    os.unlink("out/sparse/small_iter_10.caffemodel")
    runner().run()
    assert weights("initial") == whole
    assert actions() == ["keep"] * 4


def test_from_a_stage(folder: Path) -> None:
    with pytest.raises(UsageError, match="stage 'initial' before it has not finished"):
        runner(start="sparse").run()
    assert not Path("out").exists()
    with pytest.raises(UsageError, match="no stage 'spars'"):
        runner(start="spars")
    runner().run()
    before = results.load("out/initial")
    Path("out/sparse/small_iter_99.caffemodel").write_bytes(b"old")
    runner(start="sparse").run()
    assert results.load("out/initial") == before
    assert not Path("out/sparse/small_iter_99.caffemodel").exists()


class Killed(Exception):
    pass


@pytest.mark.parametrize("stage", ["initial", "sparse"])
def test_an_interrupted_stage_goes_on_bit_for_bit(folder: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    whole = runner(output="whole").run()
    update = Solver.apply_update

    def dies(self: Solver, **options: Any) -> None:
        if self.iter == 6 and stage in self.param.snapshot_prefix:
            raise Killed
        update(self, **options)

    monkeypatch.setattr(Solver, "apply_update", dies)
    with pytest.raises(Killed):
        runner().run()
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    assert actions() == (["resume", "run", "run", "run"] if stage == "initial" else ["keep", "resume", "run", "run"])
    known = results.load(f"out/{stage}")
    assert known is not None
    assert not known.done
    found = runner().run()
    assert "iter_4.solverstate" in Path(f"out/{stage}/run.log").read_text()
    for name in ("initial", "sparse"):
        assert weights(name) == weights(name, "whole")
    assert [r.scores for r in found] == [r.scores for r in whole]


def test_another_recipe_does_not_go_on_from_old_snapshots(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(self: Solver, **options: Any) -> None:
        raise Killed

    runner().run()
    monkeypatch.setattr(Solver, "apply_update", dies)
    with pytest.raises(Killed):
        runner(variables={"iterations": "6"}).run()
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    assert not list(Path("out/initial").glob("*.caffemodel"))
    runner(variables={"iterations": "6"}).run()
    runner(variables={"iterations": "6"}, output="whole").run()
    assert weights("initial", iteration=6) == weights("initial", "whole", 6)


def test_killed_for_good(folder: Path) -> None:
    """SIGKILL as soon as there is a snapshot; the next run ends as one that was never killed."""
    edit(folder, "iterations: 10", "iterations: 100")
    command = [sys.executable, "-m", "caffejacinto_py", "run", "recipe.yaml", "--threads=1", "--log-level=warning"]
    process = subprocess.Popen(command)
    deadline = time.monotonic() + 60
    while not list(Path("out/initial").glob("*.extra")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert actions()[0] == "resume"
    runner().run()
    runner(output="whole").run()
    assert weights("initial", iteration=100) == weights("initial", "whole", 100)
    assert weights("sparse") == weights("sparse", "whole")


def test_ctrl_c(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    update = Solver.apply_update

    def stops(self: Solver, **options: Any) -> None:
        update(self, **options)
        if self.iter == 6:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Solver, "apply_update", stops)
    assert main(["run", "recipe.yaml"]) == 130
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    assert Path("out/initial/small_iter_7.solverstate").exists()
    assert capsys.readouterr().out == ""
    assert main(["run", "recipe.yaml", "--log-level", "error"]) == 0
    assert main(["run", "recipe.yaml", "--output", "whole", "--log-level", "error"]) == 0
    assert weights("initial") == weights("initial", "whole")


def test_ctrl_c_in_a_test(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch = Feed.next

    def stops(self: Feed) -> Any:
        if Path("out/test/run.log").exists():
            os.kill(os.getpid(), signal.SIGINT)
        return fetch(self)

    monkeypatch.setattr(Feed, "next", stops)
    assert main(["run", "recipe.yaml"]) == 130
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    assert actions() == ["keep", "keep", "resume", "run"]
    assert len(Path("out/table.md").read_text().splitlines()) == 8
    assert [r.stage for r in runner().run()] == STAGES


def test_what_a_later_stage_lacks_is_said_first(folder: Path) -> None:
    edit(folder, "layer.data.data_param.source: digits_test_lmdb", "layer.data.data_param.source: gone")
    with pytest.raises(CaffeError, match="gone") as caught:
        runner().run()
    assert caught.value.loc == Loc("recipe.yaml", 12, 5)
    assert not Path("out").exists()


def test_optimize(folder: Path) -> None:
    """Absorbing batch norm changes no score; the stages behind it test the absorbed net."""
    edit(
        folder,
        "  - name: test\n    kind: test\n",
        "  - name: test\n    kind: test\n  - name: fold\n    kind: optimize\n",
    )
    found = runner().run()
    assert [r.stage for r in found] == ["initial", "sparse", "test", "fold", "test_quantize"]
    assert found[3].scores["top1"] == found[2].scores["top1"]
    assert found[3].scores["loss"] == pytest.approx(found[2].scores["loss"], rel=1e-5)
    assert found[3].scores["sparsity"] == found[2].scores["sparsity"]
    for stage in ("fold", "test_quantize"):
        for name in ("test", "deploy"):
            net = load_net(f"out/{stage}/{name}.prototxt").message
            assert "bn" not in [layer.name for layer in net.layer]
            assert net.quantize == (stage == "test_quantize")
        assert Path("out", stage, "small.caffemodel").exists()
    assert "Optimizing layer: Convolution conv (bn)" in Path("out/fold/run.log").read_text()
    assert actions() == ["keep"] * 5


# --- the verb --------------------------------------------------------------------------------------------------------
def test_dry_run_touches_nothing(folder: Path, capsys: Capture) -> None:
    before = sorted(folder.rglob("*"))
    edit(folder, "train: digits_train_lmdb", "train: not_there")
    assert main(["run", "recipe.yaml", "--dry-run", "--set", "iterations=12", "--output", "there"]) == 0
    out = capsys.readouterr().out
    assert sorted(folder.rglob("*")) == before
    assert "Stage initial (train, 12 iterations): run" in out
    assert out.count('snapshot_prefix: "there/') == 4
    assert "weights: there/initial/small_iter_12.caffemodel" in out
    assert "quantized: 8 bits for weights, 8 for activations" in out
    assert main(["run", "recipe.yaml", "-dry_run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [s["stage"] for s in found["stages"]] == STAGES
    assert "regularization_type" in found["stages"][1]["files"]["solver.prototxt"]


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_what_is_wrong_with_a_net_is_said_first(folder: Path, capsys: Capture, more: list[str]) -> None:
    edit(folder, "bitwidth_weights: 8", "bitwidth_weights: 1")
    assert main(["run", "recipe.yaml", *more]) == 3
    err = capsys.readouterr().err
    assert "recipe.yaml:34:32: error: net_quantization_param: bitwidth_weights is 2 to 16" in err
    assert err.count("error:") == 1  # said once for test and deploy net
    assert not Path("out").exists()


def test_table_and_json(folder: Path, capsys: Capture) -> None:
    assert main(["run", "recipe.yaml", "--log-level", "error"]) == 0
    out = capsys.readouterr()
    assert out.err == ""
    lines = out.out.splitlines()
    assert re.split(r"  +", lines[0])[:6] == ["stage", "iterations", "top-1", "top-5", "loss", "sparsity"]
    assert [line.split()[0] for line in lines[1:]] == STAGES
    assert lines[1].split()[6:8] == ["float", "float"]
    assert lines[4].split()[6:8] == ["8", "8"]
    assert "Optimization Done" in Path("out/initial/run.log").read_text()
    assert main(["run", "recipe.yaml", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["stages"][1]["sparsity"] == found["stages"][1]["zeros"] / 288
    assert not found["stopped"]


def test_errors_of_the_verb(folder: Path, capsys: Capture) -> None:
    assert main(["run", "recip.yaml"]) == 3
    assert "did you mean 'recipe.yaml'?" in capsys.readouterr().err
    assert main(["run", "recipe.yaml", "--set", "iterations"]) == 2
    assert main(["run", "recipe.yaml", "--from", "tests"]) == 2
    edit(folder, "kind: test", "kind: tests")
    assert main(["run", "recipe.yaml"]) == 3
    err = capsys.readouterr().err
    assert "recipe.yaml:29:11: error: unknown kind of stage 'tests'" in err
    assert "    kind: tests" in err


def test_stages_train_on_several_ranks(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same files and the same table as of one process; the log of rank 0 is in run.log."""
    text = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(text[: text.index("  - name: sparse")])
    assert main(["run", "recipe.yaml", "--ranks", "2", "--threads", "1", "--json"]) == 0
    out = capsys.readouterr()
    stage = json.loads(out.out)["stages"][0]
    assert (stage["stage"], stage["iterations"]) == ("initial", 10)
    assert stage["top1"] > 0
    (log,) = (folder).glob("**/initial/run.log")
    said = log.read_text()
    assert said.count("Optimization Done.") == 1
    assert "Stage initial (train)" in said
    assert "Optimization Done." in out.err


def test_a_stage_that_fails_on_several_ranks(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(launch, "run", lambda args, world, **more: seen.append([*args, str(world)]) or 3)
    args = ["run", "recipe.yaml", "--ranks", "3", "--threads", "1", "--dialect", "nvcaffe", "--sync-bn"]
    assert main(args) == 1
    err = capsys.readouterr().err
    assert "stage 'initial': training on 3 ranks ended with exit code 3" in err
    (command,) = seen
    assert command[:2] == ["train", "--solver"]
    assert {"--sync-bn", "--ranks", "--dialect", "--threads"} <= set(command)
