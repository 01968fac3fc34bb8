"""The recipes of models/recipes: they resolve, and TI's have TI's hyper-parameters."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from caffejacinto_py.recipes.measure import bits
from caffejacinto_py.recipes.recipe import load
from caffejacinto_py.recipes.resolve import Job, resolve
from caffejacinto_py.schema.upgrade import load_solver
from models import generate
from tests.conftest import shared

ROOT = Path(generate.__file__).parents[1]
NAMES = sorted(p.name for p in (ROOT / "models" / "recipes").glob("*.yaml"))
TI = "prototxt/tidsp_caffe-jacinto-models/trained/image_classification/"
# where files are and how much is logged; gamma: lr_policy poly does not read it
ASIDE = {"train_net", "test_net", "snapshot_prefix", "display_sparsity", "solver_mode", "device_id", "gamma"}


@pytest.fixture(autouse=True)
def _root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def jobs(name: str, **variables: str) -> list[Job]:
    return resolve(load(f"models/recipes/{name}", variables=variables))


def settings(param: Any) -> dict[str, Any]:
    """The fields that say something."""
    found = {}
    for field, value in param.ListFields():
        if field.name not in ASIDE:
            plain = list(value) if hasattr(value, "append") else value
            if plain != field.default_value:
                found[field.name] = plain
    return found


@pytest.mark.parametrize("name", NAMES)
def test_stages(name: str) -> None:
    found = jobs(name)
    short = ["initial", "sparse", "test", "test_quantize"]
    assert [j.name for j in found] == (short if name == "imagenet.yaml" else [short[0], "l1reg", *short[1:]])
    for job in found:
        assert "deploy" in job.nets
        # every test runs over the whole test set
        batch = job.nets["test"].doc.message.layer[0].data_param.batch_size
        images = {"digits.yaml": 360, "imagenet.yaml": 50000}.get(name, 10000)
        assert job.iterations * batch == images
    wanted = (8, 8) if name in ("digits.yaml", "mnist.yaml") else (12, 8)
    assert bits(found[-1].nets["test"].doc.message) == wanted
    assert bits(found[-2].nets["test"].doc.message) == (32, 32)


@pytest.mark.parametrize("name", ["cifar10", "imagenet"])
def test_hyper_parameters_are_the_published_ones(name: str) -> None:
    for job in jobs(f"{name}.yaml")[:-2]:
        theirs = load_solver(shared(f"{TI}{name}_jacintonet11v2/{job.name}/solver.prototxt")).message
        assert settings(job.solver) == settings(theirs), job.name


def test_variables_shorten_the_schedule() -> None:
    short = {"initial_iter": "10", "l1reg_iter": "11", "sparse_iter": "12", "sparse_start": "1", "sparse_step": "2"}
    initial, l1reg, sparse, *_ = jobs("cifar10.yaml", **short, batch="8", test_iter="3")
    assert [j.solver.max_iter for j in (initial, l1reg, sparse)] == [10, 11, 12]
    assert (sparse.solver.sparsity_start_iter, sparse.solver.sparsity_step_iter) == (1, 2)
    assert initial.nets["train"].doc.message.layer[0].data_param.batch_size == 8


def test_the_readme_names_what_there_is() -> None:
    text = (ROOT / "models" / "recipes" / "README.md").read_text()
    assert set(re.findall(r"^\| `(\w+\.yaml)`", text, re.MULTILINE)) == set(NAMES)
    command = re.search(r"caffejacinto run models/recipes/cifar10\.yaml.*?```", text, re.DOTALL)
    assert command is not None
    variables = dict(re.findall(r"--set (\w+)=(\w+)", command[0]))
    assert jobs("cifar10.yaml", **variables)[2].solver.max_iter == int(variables["sparse_iter"])
