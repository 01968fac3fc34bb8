"""The numbers of models/README.md, from the graphs of the committed files."""

from __future__ import annotations

import math
import re

import pytest

from caffejacinto_py.passes import prepare
from caffejacinto_py.schema.upgrade import load_net
from models import generate

MODELS = generate.Path(generate.__file__).parent
COUNTS = {
    folder: int(number.replace(",", ""))
    for folder, number in re.findall(
        r"^\| `(\w+)` \|.*?\| ([\d,]+) \|", (MODELS / "README.md").read_text(), re.MULTILINE
    )
}
GRAY = (1, 28, 28)
SHAPES = {
    "lenet": GRAY,
    "vgg_digits": GRAY,
    "jacintonet7_mnist": GRAY,
    "cifar10_quick": (3, 32, 32),
    "cifar10_full": (3, 32, 32),
}


def test_every_net_is_listed() -> None:
    assert COUNTS.keys() == generate.NETS.keys()


@pytest.mark.parametrize("folder", COUNTS)
def test_learnable_numbers(folder: str) -> None:
    doc = load_net(str(MODELS / folder / "train_val.prototxt"))
    graph = prepare(doc, phase="TRAIN", data_shape=SHAPES.get(folder, (3, 256, 256)))
    assert sum(math.prod(p.shape) for p in graph.params if p.lr_mult) == COUNTS[folder]


@pytest.mark.parametrize("folder", COUNTS)
def test_deploy_puts_out_probabilities_from_the_same_blobs(folder: str) -> None:
    """Every blob of the deploy net has the shape it has in the training net: trained weights fit."""
    train = load_net(str(MODELS / folder / "train_val.prototxt"))
    trained = prepare(train, phase="TRAIN", data_shape=SHAPES.get(folder, (3, 256, 256)))
    deploy = prepare(load_net(str(MODELS / folder / "deploy.prototxt")), phase="TEST")
    (prob,) = deploy.outputs
    assert prob.name == "prob"
    shapes = {(p.node, p.index): p.shape for p in trained.params}
    assert deploy.params
    assert all(shapes[p.node, p.index] == p.shape for p in deploy.params)
