"""Our nets against the published ones: same layers, same wiring, same hyper-parameters."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf import text_format

from caffejacinto_py.schema import pb
from models import generate
from models.text import Net
from tests.conftest import shared

BVLC, TI = "prototxt/BVLC_caffe/", "prototxt/tidsp_caffe-jacinto-models/trained/image_classification/"
PATHS = {"source", "mean_file", "threads", "parser_threads", "propagate_down", "include"}
UNSET_REPEATED = {"stride": [1], "dilation": [1], "pad": [0]}


def parse(text: str) -> Any:
    return text_format.Parse(text, pb.NetParameter())


def published(path: str) -> Any:
    return parse(shared(path).read_text())


def ours(folder: str, *, deploy: bool = False, **options: Any) -> Any:
    net = Net(folder, deploy=deploy)
    generate.NETS[folder][1](net, **options)
    return parse(net.text())


def fields(message: Any) -> dict[str, Any]:
    """The fields that say something: no paths, no defaults, no options that a filler ignores."""
    found: dict[str, Any] = {}
    for field, v in message.ListFields():
        name = field.name
        if name in PATHS or (name == "std" and message.type in ("xavier", "msra")):
            continue
        if hasattr(v, "ListFields"):
            v = fields(v)
            if v and v != {"type": "constant"}:
                found[name] = v
        elif name == "param":
            found[name] = [(p.lr_mult, p.decay_mult) for p in v]
        elif not hasattr(v, "append"):
            if v != field.default_value and not (name == "loss_weight" and v == 1):
                found[name] = v
        elif list(v) != UNSET_REPEATED.get(name):
            found[name] = [fields(x) if hasattr(x, "ListFields") else x for x in v]
    if found.get("loss_weight") == [1]:
        del found["loss_weight"]
    if all(p == (1, 1) for p in found.get("param", ())):
        found.pop("param", None)
    return found


def layers(net: Any, phase: str, *, without: tuple[str, ...] = ()) -> dict[str, dict[str, Any]]:
    """Name -> fields of the layers of one phase; a layer in `without` is cut out of the wiring."""
    rename = {x.top[0]: x.bottom[0] for x in net.layer if x.name in without}
    found = {}
    for layer in net.layer:
        phases = [pb.Phase.Name(rule.phase) for rule in layer.include]
        if layer.name in without or (phases and phase not in phases):
            continue
        found[layer.name] = fields(layer)
        bottoms = [rename.get(b, b) for b in layer.bottom]
        if bottoms:
            found[layer.name]["bottom"] = bottoms
    return found


TRAIN_VAL = {
    "lenet": BVLC + "examples/mnist/lenet_train_test.prototxt",
    "cifar10_quick": BVLC + "examples/cifar10/cifar10_quick_train_test.prototxt",
    "cifar10_full": BVLC + "examples/cifar10/cifar10_full_train_test.prototxt",
    "caffenet": BVLC + "models/bvlc_reference_caffenet/train_val.prototxt",
    "alexnet": BVLC + "models/bvlc_alexnet/train_val.prototxt",
    "googlenet": BVLC + "models/bvlc_googlenet/train_val.prototxt",
}
DEPLOY = {
    "lenet": BVLC + "examples/mnist/lenet.prototxt",
    "cifar10_quick": BVLC + "examples/cifar10/cifar10_quick.prototxt",
    "cifar10_full": BVLC + "examples/cifar10/cifar10_full.prototxt",
    "caffenet": BVLC + "models/bvlc_reference_caffenet/deploy.prototxt",
    "alexnet": BVLC + "models/bvlc_alexnet/deploy.prototxt",
    "googlenet": BVLC + "models/bvlc_googlenet/deploy.prototxt",
}


@pytest.mark.parametrize("phase", ["TRAIN", "TEST"])
@pytest.mark.parametrize("folder", TRAIN_VAL)
def test_equals_caffe(folder: str, phase: str) -> None:
    assert layers(ours(folder), phase) == layers(published(TRAIN_VAL[folder]), phase)


@pytest.mark.parametrize("folder", DEPLOY)
def test_deploy_equals_caffe_without_fillers(folder: str) -> None:
    def bare(net: Any) -> dict[str, dict[str, Any]]:
        found = layers(net, "TEST")
        for layer in found.values():
            layer.pop("param", None)
            for name in ("convolution_param", "inner_product_param"):
                layer.get(name, {}).pop("weight_filler", None)
                layer.get(name, {}).pop("bias_filler", None)
        return found

    assert bare(ours(folder, deploy=True)) == bare(published(DEPLOY[folder]))


@pytest.mark.parametrize(("phase", "file"), [("TRAIN", "train"), ("TEST", "test")])
@pytest.mark.parametrize("data", ["cifar10", "imagenet"])
def test_jacintonet_equals_ti(data: str, phase: str, file: str) -> None:
    theirs = layers(published(f"{TI}{data}_jacintonet11v2/initial/{file}.prototxt"), phase)
    mine = layers(ours(f"jacintonet11v2_{data}"), phase)
    assert theirs["data"]["transform_param"].pop("mean_value") == [0, 0, 0]
    assert mine == {k: v for k, v in theirs.items() if phase == "TEST" or "accuracy" not in k}


def test_mobilenet_at_width_half_equals_ti() -> None:
    """TI's also has a Bias layer that adds 0, frozen: not copied."""
    path = f"{TI}imagenet_mobilenet-0.5/backup/imagenet_mobilenet-0.5_bn+scale/initial/train.prototxt"
    theirs = layers(published(path), "TRAIN", without=("data/bias",))
    assert layers(ours("mobilenet", width=0.5), "TRAIN") == theirs


def test_resnet50_is_nvcaffes_but_for_names_and_batch_norm() -> None:
    """The convolutions: outputs, kernel, stride, pad. Its conv1 has no bias, that of the published weights has one."""

    def convolutions(net: Any) -> list[tuple[Any, ...]]:
        found = [x.convolution_param for x in net.layer if x.type == "Convolution"]
        return sorted((c.num_output, *c.kernel_size, *(c.stride or [1]), *(c.pad or [0])) for c in found)

    theirs = published("prototxt/NVIDIA_caffe/models/resnet50/train_val.prototxt")
    assert convolutions(ours("resnet50")) == convolutions(theirs)


def solver_fields(message: Any) -> dict[str, Any]:
    drop = {"net", "train_net", "test_net", "snapshot_prefix", "solver_mode", "device_id", "type"}
    drop.add("test_initialization")
    found = {f.name: v for f, v in message.ListFields() if f.name not in drop}
    return {k: list(v) if hasattr(v, "append") else v for k, v in found.items()}


@pytest.mark.parametrize(
    ("folder", "path"),
    [
        ("lenet", BVLC + "examples/mnist/lenet_solver.prototxt"),
        ("caffenet", BVLC + "models/bvlc_reference_caffenet/solver.prototxt"),
        ("alexnet", BVLC + "models/bvlc_alexnet/solver.prototxt"),
        ("googlenet", BVLC + "models/bvlc_googlenet/quick_solver.prototxt"),
        ("jacintonet11v2_cifar10", TI + "cifar10_jacintonet11v2/initial/solver.prototxt"),
        ("jacintonet11v2_imagenet", TI + "imagenet_jacintonet11v2/initial/solver.prototxt"),
    ],
)
def test_solver_equals_the_published_one(folder: str, path: str) -> None:
    def read(text: str) -> dict[str, Any]:
        found = solver_fields(text_format.Parse(text, pb.SolverParameter()))
        if found["lr_policy"] == "poly":
            found.pop("gamma", None)  # not used by poly
        defaults = {"debug_info": False, "snapshot_after_train": True, "iter_size": 1}
        return {k: v for k, v in found.items() if defaults.get(k) != v}

    assert read((generate.Path(generate.__file__).parent / folder / "solver.prototxt").read_text()) == read(
        shared(path).read_text()
    )
