"""The search for the shortest words: which layers, which widths, and what the joint check does."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch

from caffejacinto_py.checking import check
from caffejacinto_py.compress import search as s
from caffejacinto_py.engine.net import Net
from caffejacinto_py.errors import CaffeError, LayerError, UsageError
from caffejacinto_py.passes import prepare
from caffejacinto_py.passes.ristretto import shorten, shortened_document
from caffejacinto_py.schema.text import dumps, parse
from caffejacinto_py.schema.upgrade import load_net, upgrade_net
from tests.conftest import shared

FILL = 'weight_filler { type: "gaussian" std: 0.3 } bias_filler { type: "gaussian" std: 0.1 }'
NET = f"""
name: "all"
layer {{ name: "in" type: "Input" top: "x" top: "label"
  input_param {{ shape {{ dim: 32 dim: 2 dim: 6 dim: 6 }} shape {{ dim: 32 }} }} }}
layer {{ name: "conv" type: "Convolution" bottom: "x" top: "conv"
  convolution_param {{ num_output: 4 kernel_size: 3 group: 2 {FILL} }} include {{ phase: TEST }} }}
layer {{ name: "conv" type: "Convolution" bottom: "x" top: "conv"
  convolution_param {{ num_output: 4 kernel_size: 3 group: 2 {FILL} }} include {{ phase: TRAIN }} }}
layer {{ name: "relu" type: "ReLU" bottom: "conv" top: "conv" }}
layer {{ name: "dw" type: "DepthwiseConvolution" bottom: "conv" top: "dw"
  convolution_param {{ num_output: 4 kernel_size: 3 pad: 1 {FILL} }} }}
layer {{ name: "up" type: "Deconvolution" bottom: "dw" top: "up"
  convolution_param {{ num_output: 3 kernel_size: 2 stride: 2 {FILL} }} }}
layer {{ name: "ip" type: "InnerProduct" bottom: "up" top: "ip" inner_product_param {{ num_output: 5 {FILL} }} }}
layer {{ name: "top3" type: "Accuracy" bottom: "ip" bottom: "label" top: "top3" accuracy_param {{ top_k: 3 }}
  include {{ phase: TEST }} }}
layer {{ name: "acc" type: "Accuracy" bottom: "ip" bottom: "label" top: "acc" include {{ phase: TEST }} }}
layer {{ name: "loss" type: "SoftmaxWithLoss" bottom: "ip" bottom: "label" top: "loss" }}
"""


def document(text: str):
    doc = parse(text, "NetParameter")
    upgrade_net(doc.message, doc.locs)
    return doc


class Batches:
    """The same few batches again and again; labels are what the float net itself says."""

    def __init__(self, net: Net, count: int = 3) -> None:
        rng = torch.Generator().manual_seed(1)
        shape = net.sources[0].shapes[0]
        self.all = []
        for _ in range(count):
            x = torch.randn(shape, generator=rng)
            blobs = {"x": x, "label": torch.zeros(shape[0])}
            for _ in net.run(blobs, end="ip"):
                pass
            self.all.append({"x": x, "label": blobs["ip"].argmax(1).float()})
        self.at = 0

    def next(self) -> Mapping[str, torch.Tensor]:
        self.at += 1
        return self.all[(self.at - 1) % len(self.all)]

    def rewind(self) -> None:
        self.at = 0


@pytest.fixture(scope="module")
def net() -> Net:
    return Net(prepare(document(NET), phase="TEST"), seed=4)


@pytest.fixture(scope="module")
def feed(net: Net) -> Batches:
    return Batches(net)


@pytest.fixture(scope="module")
def parts(net: Net, feed: Batches) -> tuple[s.Part, ...]:
    feed.rewind()  # whichever test is the first to ask
    return s.find_parts(net.graph, net, s.watch(net, feed, 2))


def test_every_product_takes_part_with_its_ranges(net: Net, feed: Batches, parts: tuple[s.Part, ...]) -> None:
    assert [(p.name, p.group) for p in parts] == [
        ("conv", "conv_params"), ("dw", "conv_params"), ("up", "conv_params"), ("ip", "fc_params"),
    ]  # fmt: skip
    conv = parts[0]
    assert conv.weights == 4 * 1 * 9
    assert conv.activations == 32 * (2 * 36 + 4 * 16)
    assert conv.weight == float(net.params["conv"][0].detach().abs().max())
    assert conv.input == max(float(b["x"].abs().max()) for b in feed.all[:2])
    blobs = [dict(b) for b in feed.all[:2]]
    before_relu = []
    for b in blobs:
        for node, outs in net.run(b, end="conv"):
            if node.name == "conv":
                before_relu.append(float(outs[0].detach().abs().max()))
    assert conv.output == pytest.approx(max(before_relu))  # not what an in-place ReLU leaves


@pytest.mark.parametrize("mode", s.MODES)
def test_the_found_words_score_within_the_margin_and_are_what_the_file_says(
    mode: str, net: Net, feed: Batches, parts: tuple[s.Part, ...]
) -> None:
    margin = 40.0 if mode == s.MODES[2] else 8.0
    scorer = s.Scorer(net, feed, 3, s.score_blob(net.graph), margin)
    assert (scorer.blob, scorer.baseline) == ("acc", 1.0)
    found = s.search(mode, scorer, parts)
    assert found.passed
    assert found.score >= 1 - margin / 100 - 1e-9
    assert set(found.plan) <= {p.name for p in parts}
    assert found.plan
    doc = document(NET)
    message = shortened_document(doc.message, net.graph, shorten(net.graph, found.plan))
    again = Net(prepare(document(dumps(message)), phase="TEST"), share=net)
    feed.rewind()
    with torch.no_grad():
        scores = [float(again(feed.next()).outputs["acc"]) for _ in range(3)]
    assert np.mean(scores) == pytest.approx(found.score)
    prepare(document(dumps(message)), phase="TRAIN")


def test_no_margin_and_every_margin(net: Net, feed: Batches, parts: tuple[s.Part, ...]) -> None:
    exact = s.search(s.MODES[0], s.Scorer(net, feed, 3, "acc", 0.0), parts)
    assert exact.score == 1.0
    loose = s.search(s.MODES[0], s.Scorer(net, feed, 3, "acc", 100.0), parts)
    assert {(f["bw_params"], f["bw_layer_in"], f["bw_layer_out"]) for f in loose.plan.values()} == {(1, 1, 1)}
    small = s.search(s.MODES[1], s.Scorer(net, feed, 3, "acc", 100.0), parts)
    assert {(f["mant_bits"], f["exp_bits"]) for f in small.plan.values()} == {(3, 4)}  # 4 bits have no room for 4


def test_single_layers_may_be_narrower(net: Net, feed: Batches, parts: tuple[s.Part, ...]) -> None:
    scorer = s.Scorer(net, feed, 3, "acc", 6.0)
    grouped = s.search(s.MODES[0], scorer, parts)
    single = s.search(s.MODES[0], scorer, parts, per_layer=True)
    assert single.passed

    def bits(found: s.Found) -> int:
        words = {p.name: found.plan.get(p.name, {"bw_params": 32, "bw_layer_in": 32}) for p in parts}
        return s.cost(parts, {n: (int(w["bw_params"]), int(w["bw_layer_in"])) for n, w in words.items()})

    assert bits(single) <= bits(grouped)
    with pytest.raises(UsageError, match="--per-layer goes with dynamic_fixed_point"):
        s.search(s.MODES[1], scorer, parts, per_layer=True)


class Fake(s.Scorer):
    """Scores by a rule on the widths (conv weights, inner product weights, activations)."""

    def __init__(self, rule: Callable[[int, int, int], float], parts: tuple[s.Part, ...]) -> None:
        self.rule, self.parts, self.margin, self.blob = rule, parts, 1.0, "acc"
        self.trials = []
        self.told = lambda trial: None
        self.baseline = 1.0

    def __call__(self, plan: s.Plan) -> float:
        def width(which: int, name: str) -> int:
            fields = plan.get(self.parts[which].name, {name: 32})
            return int(fields.get(name, 16))  # a minifloat

        activations = min(width(0, "bw_layer_in"), width(1, "bw_layer_in"))
        return self.rule(width(0, "bw_params"), width(1, "bw_params"), activations)


def test_the_joint_check_widens_what_costs_least() -> None:
    parts = (s.Part("c", True, 100, 10_000, 1.0, 1.0, 1.0), s.Part("f", False, 20_000, 100, 1.0, 1.0, 1.0))

    def rule(conv: int, fc: int, act: int) -> float:
        single = min(conv, fc, act) >= 4  # each alone does with 4 bits
        together = [conv, fc, act].count(4) < 2 + (32 in (conv, fc, act))  # but not all of them at once
        return 1.0 if single and together else 0.9

    found = s.search(s.MODES[0], Fake(rule, parts), parts)
    joint = [(t.what, dict(t.words), t.passed) for t in found.trials if t.step == "joint"]
    assert joint[0] == ("all", {"conv_params": 4, "fc_params": 4, "activations": 4}, False)
    # none of the three passes a step wider; equal scores: the convolution weights are the cheapest
    assert [what for what, _, _ in joint[1:4]] == ["conv_params", "fc_params", "activations"]
    assert joint[-1][2]
    assert found.passed
    # then the activations are widened too, which cost less than the weights of the inner product
    assert {n: (f["bw_params"], f["bw_layer_in"]) for n, f in found.plan.items()} == {"c": (8, 8), "f": (4, 8)}


def test_a_group_that_cannot_be_short_stays_in_full() -> None:
    parts = (s.Part("c", True, 100, 100, 1.0, 1.0, 1.0), s.Part("f", False, 100, 100, 1.0, 1.0, 1.0))
    found = s.search(s.MODES[0], Fake(lambda conv, fc, act: 1.0 if act == 32 and fc == 32 else 0.5, parts), parts)
    assert list(found.plan) == ["c"]
    assert found.plan["c"]["bw_params"] == 1
    assert (found.plan["c"]["bw_layer_in"], found.plan["c"]["fl_layer_in"]) == (32, 31)
    nothing = s.search(s.MODES[1], Fake(lambda *widths: 1.0 if min(widths) == 32 else 0.5, parts), parts)
    assert (nothing.plan, nothing.passed) == ({}, True)
    failed = s.search(s.MODES[2], Fake(lambda *widths: 1.0 if min(widths) == 32 else 0.5, parts), parts)
    assert (len(failed.plan), failed.score, failed.passed) == (2, 0.5, False)


@pytest.mark.parametrize(
    ("largest", "bits", "weights"), [(1.0, 0, 1), (0.3, -1, 0), (5.0, 3, 4), (0.0, 0, 0), (1e-30, -99, -98)]
)
def test_bits_in_front_of_the_point(largest: float, bits: int, weights: int) -> None:
    assert (s.integer_bits(largest), s.integer_bits(largest, 1)) == (bits, weights)


@pytest.mark.parametrize(("largest", "bits"), [(0.0, 4), (1.0, 4), (500.0, 4), (600.0, 5), (1e6, 6), (1e38, 8)])
def test_exponents_of_minifloats(largest: float, bits: int) -> None:
    """4 exponent bits end just below 2^9, 5 below 2^17."""
    assert s.exponent_bits([s.Part("c", True, 1, 1, largest, 0.0, 0.0)]) == bits


def test_which_output_is_the_score(net: Net) -> None:
    assert s.score_blob(net.graph) == "acc"
    assert s.score_blob(net.graph, "top3") == "top3"
    with pytest.raises(UsageError, match="no such output") as e:
        s.score_blob(net.graph, "acx")
    assert e.value.hint == "did you mean 'acc'?"
    with pytest.raises(UsageError, match="no accuracy among its TEST outputs"):
        s.score_blob(prepare(document(NET), phase="TRAIN"))


def test_what_cannot_be_searched(net: Net, feed: Batches) -> None:
    text = 'layer { name: "in" type: "Input" top: "x" input_param { shape { dim: 2 } } }'
    empty = Net(prepare(document(text), phase="TEST"))
    with pytest.raises(UsageError, match="no layer of this net can be shortened"):
        s.find_parts(empty.graph, empty, s.watch(net, feed, 1))
    other = Net(prepare(document(NET.replace('name: "ip"', 'name: "ip2"')), phase="TEST"))
    with pytest.raises(CaffeError, match="'ip2' is not in the TEST net"):
        s.find_parts(other.graph, net, s.watch(net, feed, 1))
    broken = Net(net.graph, seed=1)
    watched = s.watch(broken, feed, 1)
    broken.params["dw"][0].data[0] = math.nan
    with pytest.raises(CaffeError, match="'dw': its weights have NaN"):
        s.find_parts(net.graph, broken, watched)
    wide = Net(prepare(document(NET.replace('top: "acc" ', 'top: "acc" top: "each" ')), phase="TEST"), share=net)
    with pytest.raises(UsageError, match="'each' is not one number a batch"):
        s.Scorer(wide, feed, 2, "each", 1.0)
    with pytest.raises(LayerError, match="'relu': Ristretto has no form of a ReLU"):
        shorten(net.graph, {"relu": {"bw_params": 8}})


def test_rules_and_both_phases_stay_and_groups_are_written_out(net: Net) -> None:
    doc = document(NET)
    fields = {"precision": "MINIFLOAT", "mant_bits": 4, "exp_bits": 5}
    after = shorten(net.graph, {"conv": fields, "dw": fields})
    message = shortened_document(doc.message, net.graph, after)
    assert dumps(doc.message) == dumps(document(NET).message)
    both = [layer for layer in message.layer if layer.name == "conv"]
    assert [(layer.type, layer.include[0].phase) for layer in both] == [("ConvolutionRistretto", 1)] + [
        ("ConvolutionRistretto", 0)
    ]
    assert both[0].quantization_param == both[1].quantization_param
    dw = next(layer for layer in message.layer if layer.name == "dw")
    assert (dw.type, dw.convolution_param.group) == ("ConvolutionRistretto", 4)


def test_squeezenet_of_the_fork(tmp_path) -> None:
    """Its demo's net, as its tool would write it, and its fine-tuning solver pass `check`."""
    folder = shared("prototxt/pmgysel_caffe/models/SqueezeNet")
    doc = load_net(folder / "train_val.prototxt")
    graph = prepare(doc, phase="TEST", data_shape=(3, 227, 227))
    fields = {"bw_layer_in": 8, "fl_layer_in": 0, "bw_layer_out": 8, "fl_layer_out": -1, "bw_params": 8, "fl_params": 7}
    names = [n.name for n in graph.nodes if "ristretto" in n.layer.low_precision]
    assert len(names) == 26
    message = shortened_document(doc.message, graph, shorten(graph, dict.fromkeys(names, fields)))
    path = tmp_path / "quantized.prototxt"
    path.write_text(dumps(message))
    for phase in ("TRAIN", "TEST"):
        report = check(path, phase=phase)
        assert report.ok, report.errors
    assert check(folder / "train_val.prototxt").ok
    solver = (folder / "RistrettoDemo/solver_finetune.prototxt").read_text()
    solver = solver.replace("models/SqueezeNet/RistrettoDemo/", f"{tmp_path}/")
    (tmp_path / "solver.prototxt").write_text(solver)
    report = check(tmp_path / "solver.prototxt")
    assert report.ok, report.errors
    assert all(n.ok for n in report.nets)
