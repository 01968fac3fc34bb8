"""What a recipe file says, and what is refused with its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from caffejacinto_py.errors import CaffeError, Loc, ManyErrors, UsageError
from caffejacinto_py.recipes.recipe import Inline, load
from caffejacinto_py.recipes.resolve import Job, Origin, resolve


def edit(folder: Path, old: str, new: str) -> None:
    path = folder / "recipe.yaml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def error(folder: Path) -> CaffeError:
    with pytest.raises(CaffeError) as caught:
        resolve(load("recipe.yaml"))
    assert caught.value.exit_code == 3
    return caught.value


def jobs(folder: Path, **variables: str) -> list[Job]:
    return resolve(load("recipe.yaml", variables=variables))


def test_stages_get_defaults_and_variables(folder: Path) -> None:
    initial, sparse, test, quantized = jobs(folder, iterations="7")
    assert (initial.solver.max_iter, sparse.solver.max_iter) == (7, 10)
    assert initial.solver.base_lr == sparse.solver.base_lr == pytest.approx(0.05)
    assert sparse.solver.regularization_type == "L1"
    assert sparse.solver.weight_decay == pytest.approx(1e-5)
    assert [j.origin for j in (initial, sparse, test, quantized)] == [Origin(), Origin(0), Origin(1), Origin(2)]
    assert test.iterations == 4
    assert initial.solver.train_net == "out/initial/train.prototxt"
    assert list(initial.solver.test_net) == ["out/initial/test.prototxt"]
    assert initial.solver.snapshot_prefix == "out/initial/small"
    assert initial.solver.snapshot_after_train
    assert not initial.solver.HasField("net")


def test_nets_are_those_of_their_phase(folder: Path) -> None:
    initial, *_, quantized = jobs(folder)
    assert list(initial.nets) == ["train", "test", "deploy"]
    train, test = (initial.nets[n].doc.message for n in ("train", "test"))
    assert train.layer[0].data_param.source == "digits_train_lmdb"
    assert test.layer[0].data_param.source == "digits_test_lmdb"
    assert [x.name for x in train.layer] == ["data", "conv", "bn", "relu", "ip", "loss"]
    assert [x.name for x in test.layer] == ["data", "conv", "bn", "relu", "ip", "top1", "top5", "loss"]
    assert not any(x.include for x in [*train.layer, *test.layer])
    assert initial.nets["test"].doc.locs.find(("layer", 1)).line == 7
    assert list(quantized.nets) == ["test", "deploy"]
    for source in quantized.nets.values():
        assert source.doc.message.quantize
        assert source.doc.message.net_quantization_param.bitwidth_weights == 8
    assert not test.quantize


@pytest.mark.parametrize(
    ("old", "new", "line", "col", "words", "hint"),
    [
        ("stages:", "stage:", 13, 1, "a recipe has no 'stage'", "did you mean 'stages'?"),
        ("    kind: test\n", "    knd: test\n", 29, 5, "a stage has no 'knd'", "did you mean 'kind'?"),
        ("    kind: test\n", "    kind: tset\n", 29, 11, "unknown kind of stage 'tset'", "did you mean 'test'?"),
        ("name: sparse", "name: initial", 17, 11, "two stages are named 'initial'; the first in line 14", None),
        ("  - name: sparse\n    set:", "  - set:", 17, 5, "a stage without a name", "- name: initial"),
        ("name: sparse", "name: a/b", 17, 11, "'a/b' cannot name a folder", "use letters, digits, _ . -"),
        ("${iterations}", "${iteration}", 16, 17, "no variable 'iteration'", "did you mean 'iterations'?"),
        ("regularization_type:", "regularisation_type:", 19, 7, "no field 'regularisation_type'",
         "did you mean 'regularization_type'?"),
        ("SPARSE_UPDATE", "SPARSE", 21, 7, "'sparse_mode' has no such value", "did you mean 'SPARSE_NONE'?"),
        ("sparsity_step_iter: 3", "sparsity_step_iter: x", 25, 7, "whole number in range", None),
        ("sparsity_step_iter: 3", "sparsity_step_iter:", 25, 7, "'sparsity_step_iter' has no value", None),
        ("sparsity_step_iter: 3", "snapshot_prefix: x", 25, 7, "the recipe says where snapshots go", None),
        ("layer.data.data_param.source: ${train}", "layer.dat.data_param.source: x", 10, 5, "no 'layer' is named 'dat'",
         "did you mean 'data'?"),
        ("quantize: true", "quantise: true", 33, 7, "no field 'quantise'", "did you mean 'quantize'?"),
        ("bitwidth_weights: 8", "bitwidth_weight: 8", 34, 32, "no field 'bitwidth_weight'",
         "did you mean 'bitwidth_weights'?"),
        ("solver: solver.prototxt", "solver: solvr.prototxt", 7, 11, "the solver 'solvr.prototxt' does not exist",
         "did you mean 'solver.prototxt'?"),
        ("deploy: deploy.prototxt", "deploy: gone/deploy.prototxt", 8, 11, "the net 'gone/deploy.prototxt'", None),
        ("max_iter: ${iterations}", "max_iter: 0", 14, 11, "the solver has no max_iter", None),
        ("max_iter: ${iterations}", "lr_policy: poli", 16, 7, "lr_policy", None),
        ("    set:\n      regul", "    weights: initia\n    set:\n      regul", 18, 14,
         "weights 'initia': neither an earlier stage nor a file", "did you mean 'initial'?"),
        ("    set:\n      regul", "    weights: test\n    set:\n      regul", 18, 14, "does not run before it", None),
        ("    set:\n      max", "    weights: w.caffemodel\n    set:\n      max", 15, 14, "neither an earlier", None),
        ("    kind: test\n", "    kind: test\n    weights: none\n", 28, 11, "needs weights", None),
        ("    set:\n      max", "    iterations: 5\n    set:\n      max", 15, 5, "belongs to stages", None),
        ("stages:", "stages: none\nvars:", 14, 1, "'vars' is given twice; first in line 3", None),
    ],
)  # fmt: skip
def test_errors_have_places(
    folder: Path, old: str, new: str, line: int, col: int, words: str, hint: str | None
) -> None:
    edit(folder, old, new)
    found = error(folder)
    found = found.errors[0] if isinstance(found, ManyErrors) else found
    assert words in found.text
    assert found.loc == Loc("recipe.yaml", line, col)
    assert hint is None or found.hint == hint


def test_an_optimized_net_is_not_trained(folder: Path) -> None:
    edit(folder, "  - name: sparse\n", "  - name: fold\n    kind: optimize\n  - name: sparse\n")
    found = error(folder)
    assert "cannot train an optimized net" in found.text
    assert found.loc == Loc("recipe.yaml", 19, 11)
    edit(folder, "  - name: sparse\n", "  - name: sparse\n    weights: initial\n")
    assert [j.optimized for j in jobs(folder)] == [False, True, False, False, False]


def test_a_mistake_in_the_solver_file_is_shown_there(folder: Path) -> None:
    (folder / "solver.prototxt").write_text('net: "net.prototxt"\nbase_lrr: 1\n')
    found = error(folder)
    assert found.loc == Loc("solver.prototxt", 2, 1)


def test_what_a_stage_simulates_does_not_make_it_another_forks(folder: Path) -> None:
    """`quantize` is a field of caffe-jacinto; the stage before counted as BVLC Caffe, and so does this one."""
    net = (folder / "net.prototxt").read_text().replace("batch_norm_param { scale_bias: true }", "")
    (folder / "net.prototxt").write_text(net)
    initial, sparse, test, quantized = jobs(folder)
    assert [j.dialect.name for j in (initial, test, quantized)] == ["bvlc"] * 3
    assert sparse.dialect.name == "jacinto"  # its solver says so
    assert quantized.texts()["test.prototxt"].startswith("# dialect: bvlc\n")
    assert sparse.texts()["train.prototxt"].startswith("# dialect: jacinto\n")
    assert "dialect" not in test.texts()["test.prototxt"]


def test_weights_that_a_solver_names(folder: Path) -> None:
    (folder / "solver.prototxt").write_text((folder / "solver.prototxt").read_text() + 'weights: "w.caffemodel"\n')
    found = error(folder)
    assert "the weights file 'w.caffemodel' does not exist" in str(found)
    assert found.loc == Loc("solver.prototxt", 14, 1)
    (folder / "w.caffemodel").write_bytes(b"")
    assert [j.origin for j in jobs(folder)[:2]] == [Origin(files=("w.caffemodel",)), Origin(0)]


def test_all_mistakes_are_shown_at_once(folder: Path) -> None:
    edit(folder, "regularization_type: L1", "regularization: L1")
    edit(folder, "quantize: true", "quantize: maybe")
    found = error(folder)
    assert isinstance(found, ManyErrors)
    assert [e.loc.line for e in found.errors if e.loc] == [19, 33]


def test_a_solver_in_the_recipe(folder: Path) -> None:
    edit(folder, "solver: solver.prototxt", "solver: {net: net.prototxt, base_lr: 0.1, lr_policy: multistep, "
         "gamma: 0.1, stepvalue: [3, 5], test_iter: [2], test_interval: 5}")  # fmt: skip
    stage = load("recipe.yaml").stages[0]
    assert isinstance(stage.solver, Inline)
    edit(folder, "regularization_type: L1", "max_iter: 10")
    first, second, *_ = jobs(folder)
    assert list(first.solver.stepvalue) == [3, 5]
    assert first.solver.train_net == "out/initial/train.prototxt"
    assert second.iterations == 2


def test_a_memory_budget_for_a_stage(folder: Path) -> None:
    edit(folder, "max_iter: ${iterations}", "max_iter: 10\n      memory: {budget: 1GB, strategy: revolve}")
    first, second, *_ = jobs(folder)
    assert (first.solver.memory.budget, first.solver.memory.strategy) == ("1GB", "revolve")
    assert not second.solver.HasField("memory")
    edit(folder, "budget: 1GB", "budget: lots")
    found = error(folder)
    assert "'lots' is no number of bytes" in found.text
    assert found.loc is not None
    assert (found.loc.file, found.loc.line) == ("recipe.yaml", 17)


def test_a_train_stage_without_a_solver(folder: Path) -> None:
    edit(folder, "  solver: solver.prototxt\n", "  net: net.prototxt\n")
    assert "needs a solver" in str(error(folder))


def test_a_test_stage_needs_no_solver(folder: Path) -> None:
    (folder / "w.caffemodel").write_bytes(b"")
    text = "stages:\n  - name: only\n    kind: test\n    net: net.prototxt\n    weights: w.caffemodel\n"
    (folder / "recipe.yaml").write_text(text + "    iterations: 3\n")
    (job,) = jobs(folder)
    assert (job.iterations, job.solver, job.origin, job.folder) == (
        3,
        None,
        Origin(files=("w.caffemodel",)),
        "runs/recipe/only",
    )
    (folder / "recipe.yaml").write_text(text)
    assert "how many batches" in str(error(folder))
    (folder / "recipe.yaml").write_text(text.replace("    net: net.prototxt\n", ""))
    assert "no net to test" in str(error(folder))


def test_variables_from_outside(folder: Path) -> None:
    with pytest.raises(UsageError, match="no variable 'iteration'") as caught:
        load("recipe.yaml", variables={"iteration": "3"})
    assert caught.value.hint == "did you mean 'iterations'?"
    assert load("recipe.yaml", output="elsewhere").output == "elsewhere"
