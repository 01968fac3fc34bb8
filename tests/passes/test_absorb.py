"""Absorbing batch norm: caffe-jacinto's files, equal outputs, and a reason for every layer that stays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from caffejacinto_py.checking import fit
from caffejacinto_py.compress import verify
from caffejacinto_py.engine.net import Net
from caffejacinto_py.errors import LayerError, ManyErrors, UsageError, WeightsError
from caffejacinto_py.ir.graph import Graph
from caffejacinto_py.passes import prepare
from caffejacinto_py.passes.absorb import Absorbed, absorb
from caffejacinto_py.schema.compat import Compat
from caffejacinto_py.schema.dialect import resolve_dialect
from caffejacinto_py.schema.text import parse
from caffejacinto_py.schema.upgrade import load_net
from caffejacinto_py.schema.weights import ModelFile, read_model
from tests.conftest import SHARED, shared

torch.set_num_threads(1)
FOLDER = SHARED / "golden/jacinto/optimize"
CASES = sorted(p.name.split(".")[0] for p in FOLDER.glob("*.before.prototxt"))
EXACT = [c for c in CASES if not c.startswith("quirk_")]


def graph_of(text: str | Path, *, dialect: str = "bvlc", binary: bool = False) -> Graph:
    doc = load_net(text) if isinstance(text, Path) else parse(text, "NetParameter", file="net.prototxt")
    compat = Compat(optimize="binary" if binary else "sound")
    return prepare(doc, phase="TEST", dialect=resolve_dialect(None, None, dialect, compat=compat))


def randomize(net: Net, seed: int = 0) -> None:
    """Values of a trained net: statistics and scales that are no identity, activations of sensible size."""
    rng = np.random.default_rng(seed)
    for node in net.graph.nodes:
        for i, p in enumerate(net.params.get(node.name, [])):
            if node.layer.quantizes == "norm" and i == 2:
                value = np.full(p.shape, 1.0 if net.graph.dialect.batch_norm_ema else rng.uniform(0.5, 30))
            elif p.numel() > max(p.shape, default=1):
                value = rng.normal(0, 1 / np.sqrt(max(p[0].numel(), 1)), p.shape)
            else:
                value = rng.uniform(0.3, 1.5, p.shape) * (1 if i else rng.choice([-1, 1], p.shape))
            p.data.copy_(torch.from_numpy(np.asarray(value)))


def outputs(net: Net, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    feeds = {
        t: torch.randn(s, generator=generator, dtype=net.dtype) if len(s) > 1 else torch.zeros(s)
        for x in net.sources
        for t, s in zip(x.tops, x.shapes, strict=True)
    }
    with torch.no_grad():
        return net(feeds).outputs


def both(graph: Graph, *, dtype: torch.dtype = torch.float64, **options: object) -> tuple[Absorbed, float]:
    """Absorb random weights; the largest difference of all blobs (float64) and of the outputs, as part of the range."""
    net = Net(graph, dtype=dtype, seed=0)
    randomize(net)
    done = absorb(graph, net.model(), **options)  # type: ignore[arg-type]
    inside = verify.compare(graph, net.model(), done) if dtype is torch.float64 else None
    passing = sum(n.type == "Dropout" for n in graph.nodes)  # may stand between a product and what it absorbed
    assert inside is None or inside.blobs >= len(done.graph.nodes) - 2 * len(done.merged) - passing
    new = Net(done.graph, dtype=dtype, seed=1)
    report = new.load(done.model)
    assert not report.ignored
    assert not report.untouched
    before, after = outputs(net), outputs(new)
    assert list(before) == list(after)
    found = [float((after[k] - v).abs().max() / v.abs().max().clamp(min=1e-3)) for k, v in before.items()]
    return done, max([*found, inside.value if inside else 0.0])


def reasons(done: Absorbed) -> dict[str, str]:
    return {k.node: k.reason for k in done.kept}


# --- caffe-jacinto's files ---------------------------------------------------------------------------------------


def golden(case: str, *, binary: bool, keep: bool) -> tuple[Absorbed, dict[str, np.ndarray], Net, Net]:
    graph = graph_of(FOLDER / f"{case}.before.prototxt", dialect="jacinto", binary=binary)
    model = read_model(FOLDER / f"{case}.before.caffemodel")
    before = Net(graph)
    before.load(model)
    done = absorb(graph, model, keep_identity=keep)
    after = Net(done.graph)
    after.load(done.model)
    with np.load(FOLDER / f"{case}.npz") as z:
        return done, dict(z), before, after


def blobs(net: Net, data: np.ndarray) -> dict[str, np.ndarray]:
    found = {"data": torch.from_numpy(data)}
    for _ in net.run(found):
        pass
    return {k: v.detach().numpy() for k, v in found.items()}


@pytest.mark.parametrize("case", CASES)
def test_the_binary_mode_gives_the_binarys_files(case: str) -> None:
    done, z, before, after = golden(case, binary=True, keep=True)
    for key in (k for k in z if k.startswith("param_after/")):
        layer, index = key.removeprefix("param_after/").rsplit("/", 1)
        got = done.model.layer(layer).blobs[int(index)]
        np.testing.assert_allclose(got, z[key], rtol=2e-6, atol=2e-7, err_msg=key)
    wanted = read_model(FOLDER / f"{case}.after.caffemodel")
    names = [e.name for e in wanted.layers if "_split" not in e.name]
    assert [e.name for e in done.model.layers] == names
    for name in names:
        assert len(done.model.layer(name).blobs) == len(wanted.layer(name).blobs), name
    for net, kind in ((before, "blob_before"), (after, "blob_after")):
        got = blobs(net, z["data"])
        for key in (k for k in z if k.startswith(f"{kind}/") and "_split" not in k):
            name = key.split("/", 1)[1]
            if (case, name) == ("split_between", "bn1"):
                name = "sum"  # there the binary's Eltwise works in the memory of its first bottom
            np.testing.assert_allclose(got[name], z[key], rtol=1e-4, atol=1e-5, err_msg=key)


def test_the_written_fields_are_the_binarys() -> None:
    """A convolution without bias gets one, with the filler that the binary writes."""
    done, _, _, _ = golden("nobias_conv_bn", binary=True, keep=True)
    wanted = load_net(FOLDER / "nobias_conv_bn.after.prototxt").message
    for entry, layer in zip(done.model.layers, wanted.layer, strict=True):
        assert entry.proto.convolution_param == layer.convolution_param, entry.name


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_outputs_are_those_before(case: str, keep: bool) -> None:
    """Sound mode, quirk cases too: blob 2 divides, a Scale behind a fused BN counts, eps is the layer's."""
    _, z, before, after = golden(case, binary=False, keep=keep)
    old, new = blobs(before, z["data"]), blobs(after, z["data"])
    for name in (v.name for v in before.graph.outputs):
        np.testing.assert_allclose(new[name], old[name], rtol=1e-4, atol=1e-5)
        if case != "quirk_blob2_not_one":  # the binary never looks at blob 2; this file's is 3
            np.testing.assert_allclose(new[name], z[f"blob_before/{name}"], rtol=1e-4, atol=1e-5)


def test_more_is_absorbed_than_by_the_binary() -> None:
    done, _, _, _ = golden("not_mergeable", binary=False, keep=False)
    assert [(m.node, m.into) for m in done.merged] == [("bn2", "up"), ("bn3", "conv3")]
    assert [n.name for n in done.graph.nodes] == ["in_data", "bn0", "conv1", "relu1", "bn1", "up", "relu2", "conv3",
                                                  "relu3"]  # fmt: skip
    why = reasons(done)
    assert why["bn0"] == (
        "'in_data' (Input) before it has no weights that could take it in; "
        "'conv1' pads with zeros, which a shift before it would change"
    )
    assert "'up' (Deconvolution) lays kernels over each other" in why["bn1"]
    done, _, _, _ = golden("split_between", binary=False, keep=False)
    assert reasons(done)["bn1"].startswith("'conv1' before it is also read by 'sum'; ")


# --- equal outputs -----------------------------------------------------------------------------------------------

HEAD = 'layer {{ name: "data" type: "Input" top: "data" input_param {{ shape {{ {} }} }} }}\n'
CONV = "kernel_size: {k} stride: {s} pad: {p} group: {g} bias_term: {b}"


@st.composite
def nets(draw: st.DrawFn) -> tuple[str, str]:
    """(text, dialect): a chain of products, norms, scales and other layers with random options."""
    dialect = draw(st.sampled_from(["bvlc", "jacinto"]))
    channels, value, lines, flat = 4, "data", [HEAD.format("dim: 2 dim: 4 dim: 9 dim: 8")], False
    size = 8  # of the smaller side, at least
    for i in range(draw(st.integers(2, 7))):
        kinds = ["norm", "norm", "scale", "bias", "drop", "relu", "ip"] + ([] if flat else ["conv", "conv", "deconv"])
        kind = draw(st.sampled_from(kinds))
        inplace = kind not in ("conv", "deconv", "ip") and value != "data" and draw(st.booleans())
        top = value if inplace else f"v{i}"
        bias = str(draw(st.booleans())).lower()
        head = f'layer {{ name: "l{i}" bottom: "{value}" top: "{top}" '
        if kind in ("conv", "deconv"):
            group = draw(st.sampled_from([1, 2, channels]))
            new = draw(st.sampled_from([4, 8]))
            new = channels if group == channels else new
            k = draw(st.sampled_from([1, 2, 3])) if size > 4 else 1
            text = CONV.format(
                k=k, s=(stride := draw(st.sampled_from([1, 2]))), p=draw(st.integers(0, k // 2)), g=group, b=bias
            )
            body = f'type: "{"Convolution" if kind == "conv" else "Deconvolution"}" '
            body += f"convolution_param {{ num_output: {new} {text} }}"
            channels, size = new, (size - 2) // stride if kind == "conv" else size
        elif kind == "ip":
            transpose = str(draw(st.booleans())).lower()
            body = (
                f'type: "InnerProduct" inner_product_param {{ num_output: 4 bias_term: {bias} transpose: {transpose} }}'
            )
            channels, flat = 4, True
        elif kind == "norm":
            affine = "scale_bias: true" if dialect == "jacinto" and draw(st.booleans()) else ""
            body = f'type: "BatchNorm" batch_norm_param {{ eps: 1e-4 {affine} }}'
        else:
            body = {"scale": f'type: "Scale" scale_param {{ bias_term: {bias} }}', "bias": 'type: "Bias"',
                    "drop": 'type: "Dropout"', "relu": 'type: "ReLU"'}[kind]  # fmt: skip
        lines.append(head + body + " }\n")
        if draw(st.integers(0, 9)) == 9 and top != "data":  # a second reader
            lines.append(f'layer {{ name: "aside{i}" type: "AbsVal" bottom: "{top}" top: "aside{i}" }}\n')
        value = top
    return "".join(lines), dialect


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(nets(), st.booleans())
def test_random_nets_compute_the_same(net: tuple[str, str], keep: bool) -> None:
    graph = graph_of(net[0], dialect=net[1])
    done, difference = both(graph, keep_identity=keep)
    assert difference < 1e-11
    _, difference = both(graph, dtype=torch.float32, keep_identity=keep)
    assert difference < 1e-4
    if keep:
        assert [n.name for n in done.graph.nodes] == [n.name for n in graph.nodes]
    else:
        gone = {m.node for m in done.merged} | set(done.dropped)
        assert [n.name for n in done.graph.nodes] == [n.name for n in graph.nodes if n.name not in gone]
    again = absorb(done.graph, done.model)  # Caffe's form may be absorbed once more; ours has nothing left
    assert keep or not again.merged
    assert verify.compare(done.graph, done.model, again).value < 1e-6


def test_input_side() -> None:
    """BatchNorm and Scale before an unpadded convolution, before a product over a whole blob, and with padding."""
    text = (
        HEAD.format("dim: 2 dim: 4 dim: 6 dim: 5")
        + """
layer { name: "bn" type: "BatchNorm" bottom: "data" top: "bn" }
layer { name: "sc" type: "Scale" bottom: "bn" top: "sc" scale_param { bias_term: true } }
layer { name: "conv" type: "Convolution" bottom: "sc" top: "conv"
  convolution_param { num_output: 6 kernel_size: 3 group: 2 } }
layer { name: "relu" type: "ReLU" bottom: "conv" top: "conv" }
layer { name: "bn2" type: "BatchNorm" bottom: "conv" top: "conv" }
layer { name: "drop" type: "Dropout" bottom: "conv" top: "drop" }
layer { name: "ip" type: "InnerProduct" bottom: "drop" top: "ip"
  inner_product_param { num_output: 3 bias_term: false } }
"""
    )
    done, difference = both(graph_of(text))
    assert difference < 1e-12
    assert [n.name for n in done.graph.nodes] == ["data", "conv", "relu", "ip"]
    assert [(m.node, m.into, m.before) for m in done.merged] == [
        ("bn2", "ip", True), ("sc", "conv", True), ("bn", "conv", True),
    ]  # fmt: skip
    assert done.dropped == ("drop",)
    assert done.model.layer("ip").proto.inner_product_param.bias_term


def test_padding_allows_what_has_no_shift() -> None:
    text = (
        HEAD.format("dim: 1 dim: 4 dim: 5 dim: 5")
        + """
layer { name: "sc" type: "Scale" bottom: "data" top: "sc" }
layer { name: "up" type: "Deconvolution" bottom: "sc" top: "up"
  convolution_param { num_output: 4 kernel_size: 4 stride: 2 pad: 1 group: 2 } }
layer { name: "relu" type: "ReLU" bottom: "up" top: "up" }
layer { name: "sc2" type: "Scale" bottom: "up" top: "sc2" }
layer { name: "conv" type: "Convolution" bottom: "sc2" top: "conv"
  convolution_param { num_output: 4 kernel_size: 3 pad: 1 } }
"""
    )
    done, difference = both(graph_of(text))
    assert difference < 1e-12
    assert not done.kept
    assert len(done.merged) == 2


def test_the_kinds_of_batch_norm() -> None:
    """PSPNet's BN; BVLC's with use_global_stats false; a batch norm without channels."""
    text = (
        HEAD.format("dim: 2 dim: 4 dim: 5 dim: 5")
        + """
layer { name: "c1" type: "Convolution" bottom: "data" top: "c1" convolution_param { num_output: 6 kernel_size: 3 } }
layer { name: "bn1" type: "BN" bottom: "c1" top: "c1" }
layer { name: "r1" type: "ReLU" bottom: "c1" top: "c1" }
layer { name: "c2" type: "Convolution" bottom: "c1" top: "c2" convolution_param { num_output: 6 kernel_size: 1 } }
layer { name: "bn2" type: "BatchNorm" bottom: "c2" top: "c2" batch_norm_param { use_global_stats: false } }
layer { name: "c3" type: "Convolution" bottom: "c2" top: "c3" convolution_param { num_output: 6 kernel_size: 1 } }
layer { name: "bn3" type: "BN" bottom: "c3" top: "c3" bn_param { bn_mode: LEARN } }
"""
    )
    done, difference = both(graph_of(text))
    assert difference < 1e-10
    assert [m.node for m in done.merged] == ["bn1"]
    assert reasons(done) == {
        "bn2": "'bn2' normalizes with the batch in phase TEST too (use_global_stats: false)",
        "bn3": "'bn3' normalizes with the batch in phase TEST too (bn_mode: LEARN)",
    }


PLAIN = "convolution_param { num_output: 4 kernel_size: 1 }"
REASONS = {
    'layer { name: "c" type: "Convolution" bottom: "data" bottom: "data" top: "a" top: "b" ' + PLAIN + " }"
    'layer { name: "bn" type: "BatchNorm" bottom: "a" top: "a" }': "'c' has 2 bottoms for one set of weights",
    'layer { name: "c" type: "Convolution" bottom: "data" top: "a" ' + PLAIN + " quantization_param { } }"
    'layer { name: "bn" type: "BatchNorm" bottom: "a" top: "a" }': "'c' has a quantization_param that fits its present",
    'layer { name: "c" type: "Convolution" bottom: "data" top: "a" loss_weight: 1 ' + PLAIN + " }"
    'layer { name: "bn" type: "BatchNorm" bottom: "a" top: "b" }': "'a' is part of the loss; 'b' is an output",
    'layer { name: "ip" type: "InnerProduct" bottom: "data" top: "a" inner_product_param { num_output: 4 axis: 2 } }'
    'layer { name: "bn" type: "BatchNorm" bottom: "a" top: "a" }': "'ip' sums over the axes from 2 on, not from 1",
    'layer { name: "ip" type: "InnerProduct" bottom: "data" top: "a" '
    "inner_product_param { num_output: 4 normalize: true } }"
    'layer { name: "bn" type: "BatchNorm" bottom: "a" top: "a" }': "'ip' brings its weights to length 1",
    'layer { name: "c" type: "Convolution" bottom: "data" top: "a" ' + PLAIN + " }"
    'layer { name: "sc" type: "Scale" bottom: "a" top: "a" scale_param { num_axes: 2 } }':
        "the blobs of 'sc' do not lie over axis 1 alone",
    'layer { name: "c" type: "Convolution" bottom: "data" top: "a" ' + PLAIN + " }"
    'layer { name: "sc" type: "Scale" bottom: "a" bottom: "data" top: "b" scale_param { axis: 0 } }':
        "bottom 1 of 'sc' changes from pass to pass",
    'layer { name: "bn" type: "BatchNorm" bottom: "data" top: "a" }'
    'layer { name: "c" type: "Convolution" bottom: "a" top: "c" ' + PLAIN + " }"
    'layer { name: "d" type: "Convolution" bottom: "a" top: "d" ' + PLAIN + " }": "'a' is read by 'c', 'd'",
    'layer { name: "flat" type: "Flatten" bottom: "data" top: "f" flatten_param { end_axis: 0 axis: 0 } }'
    'layer { name: "bn" type: "BatchNorm" bottom: "f" top: "a" }': "'flat' (Flatten) before it has no weights",
}  # fmt: skip


@pytest.mark.parametrize("body", REASONS)
def test_every_refusal_has_its_reason(body: str) -> None:
    done, difference = both(graph_of(HEAD.format("dim: 2 dim: 4 dim: 3 dim: 3") + body))
    assert difference == 0
    assert not done.merged
    assert [REASONS[body] in k.reason for k in done.kept] == [True], done.kept
    assert done.kept[0].loc
    assert done.kept[0].loc.line == 2


def test_names_that_another_layer_overwrites() -> None:
    """What reads the dropped layer's top must not get what an in-place layer has made of its bottom since."""
    text = (
        HEAD.format("dim: 1 dim: 4 dim: 5 dim: 5")
        + """
layer { name: "c" type: "Convolution" bottom: "data" top: "c" convolution_param { num_output: 4 kernel_size: 1 } }
layer { name: "bn" type: "BatchNorm" bottom: "c" top: "bn" }
layer { name: "drop" type: "Dropout" bottom: "c" top: "drop" }
layer { name: "r" type: "ReLU" bottom: "c" top: "c" }
layer { name: "c2" type: "Convolution" bottom: "bn" top: "c2" convolution_param { num_output: 4 kernel_size: 1 } }
layer { name: "sum" type: "Eltwise" bottom: "drop" bottom: "c2" bottom: "c" top: "sum" }
"""
    )
    done, difference = both(graph_of(text))
    assert difference < 1e-12
    assert not done.merged
    assert not done.dropped
    assert "is also read by" in reasons(done)["drop"]
    assert "works in place on 'c' before 'c2' reads it" in reasons(done)["bn"]


def test_what_a_new_bias_learns() -> None:
    """It follows the weight: frozen where that is, and never decayed; entries that are not there stay away."""
    body = "convolution_param { num_output: 4 kernel_size: 1 bias_term: false }"
    text = (
        HEAD.format("dim: 1 dim: 4 dim: 5 dim: 5")
        + f"""
layer {{ name: "c" type: "Convolution" bottom: "data" top: "c" param {{ lr_mult: 0 }} {body} }}
layer {{ name: "bn" type: "BatchNorm" bottom: "c" top: "c" }}
layer {{ name: "r" type: "ReLU" bottom: "c" top: "c" }}
layer {{ name: "c2" type: "Convolution" bottom: "c" top: "c2" {body} }}
layer {{ name: "bn2" type: "BatchNorm" bottom: "c2" top: "c2" }}
"""
    )
    done, _ = both(graph_of(text))
    assert [(p.node, p.index, p.lr_mult, p.decay_mult) for p in done.graph.params] == [
        ("c", 0, 0, 1), ("c", 1, 0, 0), ("c2", 0, 1, 1), ("c2", 1, 1, 1),
    ]  # fmt: skip
    assert [len(e.proto.param) for e in done.model.layers] == [0, 2, 0, 0]


def test_zero_weights_stay_zero() -> None:
    graph = graph_of(FOLDER / "grouped.before.prototxt", dialect="jacinto") if FOLDER.exists() else None
    if graph is None:
        pytest.skip("reference data is not here")
    net = Net(graph, seed=0)
    randomize(net)
    net.params["conv1"][0].data[:, 1] = 0
    done = absorb(graph, net.model())
    assert not done.model.layer("conv1").blobs[0][:, 1].any()


TI = "tidsp_caffe-jacinto-models/trained/image_classification"
REAL = {  # file -> (dialect, layers that stay although they scale)
    "NVIDIA_caffe/models/resnet50/train_val.prototxt": ("nvcaffe", []),
    "NVIDIA_caffe/models/inception_v2/train_val.prototxt": ("nvcaffe", []),
    "NVIDIA_caffe/models/inception_v3/train_val.prototxt": ("nvcaffe", []),
    "NVIDIA_caffe/models/alexnet_bn/train_val.prototxt": ("nvcaffe", []),
    f"{TI}/imagenet_jacintonet11v2/initial/deploy.prototxt": ("jacinto", ["data/bias"]),
    f"{TI}/imagenet_mobilenet-0.5/initial/deploy.prototxt": ("jacinto", ["data/bias"]),
    f"{TI}/imagenet_mobilenet-0.5/backup/imagenet_mobilenet-0.5_bn+scale/initial/deploy.prototxt":
        ("bvlc", ["data/bias"]),
    "tidsp_caffe-jacinto-models/trained/image_segmentation/cityscapes5_jsegnet21v2/initial/deploy.prototxt":
        ("jacinto", ["data/bias"]),
    "BVLC_caffe/examples/cifar10/cifar10_full_sigmoid_train_test_bn.prototxt": ("bvlc", ["bn1"]),
}  # fmt: skip


def small(path: Path, dialect: str) -> Graph:
    """The TEST net with one image, cut where losses and metrics begin."""
    doc = load_net(path)
    for layer in doc.message.layer:
        if layer.HasField("data_param"):
            layer.data_param.batch_size = 1
        for shape in layer.input_param.shape:
            shape.dim[0] = 1
    return fit(doc, phase="TEST", dialect=resolve_dialect(None, None, dialect))[0]


@pytest.mark.slow
@pytest.mark.parametrize("file", REAL)
def test_real_nets(file: str) -> None:
    dialect, stay = REAL[file]
    graph = small(shared("prototxt") / file, dialect)
    done, difference = both(graph)
    assert difference < 1e-9
    assert [k.node for k in done.kept] == stay
    left = [n.name for n in done.graph.nodes if n.layer.quantizes == "norm"]
    assert left == [name for name in stay if graph.node(name).layer.quantizes == "norm"]


# --- bad input ---------------------------------------------------------------------------------------------------

TWINS = (
    HEAD.format("dim: 1 dim: 4 dim: 5 dim: 5")
    + """
layer { name: "a" type: "Convolution" bottom: "data" top: "a" param { name: "w" } param { name: "b" }
  convolution_param { num_output: 4 kernel_size: 1 } }
layer { name: "bn" type: "BatchNorm" bottom: "a" top: "a" }
layer { name: "r" type: "ReLU" bottom: "a" top: "a" }
layer { name: "c" type: "Convolution" bottom: "a" top: "c" param { name: "w" } param { name: "b" }
  convolution_param { num_output: 4 kernel_size: 1 } }
"""
)


def test_shared_weights() -> None:
    graph = graph_of(TWINS)
    with pytest.raises(LayerError, match="layer 'a' shares its weights with 'c' by the name 'w'") as e:
        both(graph)
    assert e.value.loc
    assert e.value.loc.line == 3
    done, difference = both(graph, shared="keep")
    assert difference == 0
    assert "shares its weights" in reasons(done)["bn"]


def test_weights_that_do_not_do() -> None:
    graph = graph_of(TWINS.replace('param { name: "w" } param { name: "b" }', ""))
    model = Net(graph, seed=0).model()

    def without(name: str) -> ModelFile:
        return ModelFile("", [e for e in model.layers if e.name != name], "x.caffemodel")

    with pytest.raises(WeightsError, match=r"x.caffemodel: no weights for layer 'bn' \(BatchNorm\)"):
        absorb(graph, without("bn"))
    model.layer("c").blobs[0][0, 0] = np.nan
    with pytest.raises(WeightsError, match="layer 'c', blob 0: 1 of 16 values are NaN"):
        absorb(graph, model)
    model.layer("c").blobs[0] = np.zeros((4, 3, 1, 1), np.float32)
    with pytest.raises(WeightsError, match="shape"):
        absorb(graph, model)
    model.layer("c").blobs.pop()
    with pytest.raises((WeightsError, ManyErrors)):
        absorb(graph, model)
    model.layer("bn").blobs[1][:] = -1
    train = prepare(parse(TWINS, "NetParameter"), phase="TRAIN")
    with pytest.raises(UsageError, match="phase TEST"):
        absorb(train, model)


def test_a_variance_without_root_is_a_reason() -> None:
    graph = graph_of(TWINS.replace('param { name: "w" } param { name: "b" }', ""))
    model = Net(graph, seed=0).model()
    model.layer("bn").blobs[2][:] = 1
    model.layer("bn").blobs[1][:] = -1
    done = absorb(graph, model)
    assert "variance + eps is -0.99999 in channel 0" in reasons(done)["bn"]
