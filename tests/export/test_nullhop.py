"""NullHop's .cnn: the file computes what the net computes; nets that it cannot express are refused with their place."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from caffejacinto_py.engine.net import Net
from caffejacinto_py.errors import LayerError
from caffejacinto_py.export.nullhop import Stage, render, stages
from caffejacinto_py.passes import prepare
from caffejacinto_py.schema.text import parse

IN = 'layer { name: "in" type: "Input" top: "data" input_param { shape { dim: 1 dim: 2 dim: 12 dim: 8 } } }\n'
LP = "lpfp_param { bd: 2 ad: 6 round_bias: true }"


def conv(name: str, bottom: str, out: int, *, lp: bool = True, more: str = "kernel_size: 3 pad: 1") -> str:
    kind, form = ("LPConvolution", LP) if lp else ("Convolution", "")
    return f"""layer {{ name: "{name}" type: "{kind}" bottom: "{bottom}" top: "{name}" {form} convolution_param {{
 num_output: {out} {more} weight_filler {{ type: "xavier" }} bias_filler {{ type: "constant" value: 0.13 }} }} }}\n"""


def inplace(name: str, kind: str, blob: str, more: str = "") -> str:
    return f'layer {{ name: "{name}" type: "{kind}" bottom: "{blob}" top: "{blob}" {more} }}\n'


def pool(name: str, bottom: str, more: str = "kernel_size: 2 stride: 2") -> str:
    return f'layer {{ name: "{name}" type: "Pooling" bottom: "{bottom}" top: "{name}" pooling_param {{ {more} }} }}\n'


CHAIN = (
    IN
    + conv("c1", "data", 3) + inplace("a1", "LPAct", "c1", LP) + inplace("r1", "ReLU", "c1") + pool("p1", "c1")
    + inplace("drop", "Dropout", "p1") + conv("c2", "p1", 4, more="kernel_size: 3 bias_term: false")
    + inplace("a2", "LPAct", "c2", LP) + pool("p2", "c2") + inplace("r2", "ReLU", "p2")
    + 'layer { name: "fc" type: "InnerProduct" bottom: "p2" top: "fc" inner_product_param { num_output: 3 } }'
)  # fmt: skip


def build(text: str) -> Net:
    return Net(prepare(parse(text, "NetParameter", file="n.prototxt"), phase="TEST"), seed=0)


def read(text: str) -> tuple[list[dict[str, Any]], np.ndarray]:
    """The file as its reader sees it: numbers before `#`, markers on lines of their own."""
    lines = iter(text.splitlines())
    count = int(next(lines).split("#")[0])
    found, pixels, line = [], np.zeros(0), next(lines)
    for i in range(count):
        head = []
        while line != "#KERNELS#":
            head.append(int(line.split("#")[0]))
            line = next(lines)
        names = ("compressed", "k", "channels", "width", "height", "outputs", "pooling", "relu", "pad")
        s = dict(zip(names, head, strict=True))
        size = s["outputs"] * s["channels"] * s["k"] ** 2
        kernels = [int(next(lines)) for _ in range(size)]
        assert next(lines) == "#BIASES#"
        biases = [int(next(lines)) for _ in range(s["outputs"])]
        if i == 0:
            assert next(lines) == "#PIXELS#"
            pixels = np.array([int(next(lines)) for _ in range(s["channels"] * s["height"] * s["width"])])
            pixels = pixels.reshape(s["channels"], s["height"], s["width"])
        found.append({**s, "kernels": np.array(kernels).reshape(s["outputs"], s["channels"], s["k"], s["k"]),
                      "biases": np.array(biases)})  # fmt: skip
        line = next(lines, "")
    assert not line
    return found, pixels


def test_the_file_computes_what_the_net_computes() -> None:
    net = build(CHAIN)
    found, left_out = stages(net)
    assert left_out == "fc"
    assert [(s.layer, s.kernel, s.pad, s.relu, s.pooling) for s in found] == [
        ("c1", 3, 1, True, True), ("c2", 3, 0, True, True)
    ]  # fmt: skip
    image = np.round(np.random.default_rng(0).uniform(-2, 2, (2, 12, 8)) * 256) / 256
    layers, pixels = read(render(found, image))
    assert [s["compressed"] for s in layers] == [0, 1]
    assert [(s["channels"], s["height"], s["width"]) for s in layers] == [(2, 12, 8), (3, 6, 4)]
    np.testing.assert_array_equal(pixels / 256, image)
    x = torch.from_numpy(pixels)[None] / 256
    for s in layers:
        x = F.conv2d(x, torch.from_numpy(s["kernels"]) / 256, torch.from_numpy(s["biases"]) / 256, padding=s["pad"])
        x = (x * 64).round().clamp(-127, 127) / 64  # LPAct
        x = x.relu() if s["relu"] else x
        x = F.max_pool2d(x, 2) if s["pooling"] else x
    blobs = {"data": torch.from_numpy(image)[None].float()}
    with torch.no_grad():
        for _ in net.run(blobs):
            pass
    np.testing.assert_allclose(x.numpy(), blobs["p2"].numpy(), atol=1e-6)
    assert read(render(found, image, compressed_input=True))[0][0]["compressed"] == 1


def test_formats_of_numbers() -> None:
    (plain,), _ = stages(build(IN + conv("c", "data", 2, lp=False)))
    weight = build(IN + conv("c", "data", 2, lp=False)).params["c"][0].detach().numpy()
    np.testing.assert_array_equal(plain.kernels, (weight * 256).astype(np.int32))  # cut off, as ADaPTION does
    assert (plain.biases.tolist(), plain.fraction) == ([33, 33], 8)
    (own,), _ = stages(build(IN + conv("c", "data", 2)), own_format=True)
    (low,), _ = stages(build(IN + conv("c", "data", 2)))
    assert own.fraction == 6
    np.testing.assert_array_equal(own.kernels * 4, low.kernels)
    assert own.biases.tolist() == [8, 8]


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        (conv("c", "data", 2, more="kernel_size: 3 stride: 2"), 2, "'c' has a stride"),
        (conv("c", "data", 2, more="kernel_size: 3 dilation: 2"), 2, "dilation"),
        (conv("c", "data", 2, more="kernel_size: 3 group: 2"), 2, "has groups"),
        (conv("c", "data", 2, more="kernel_h: 3 kernel_w: 1"), 2, "oblong"),
        (conv("c", "data", 2, more="kernel_size: 8"), 2, "7 is the largest"),
        (conv("c", "data", 2) + inplace("r", "ReLU", "c", "relu_param { negative_slope: 0.1 }") + conv("d", "c", 2), 4,
         "negative_slope"),
        (conv("c", "data", 2) + pool("p", "c", "kernel_size: 3 stride: 2") + conv("d", "p", 2), 4, "pools 2x2"),
        (conv("c", "data", 2, more="kernel_size: 2") + pool("p", "c") + conv("d", "p", 2), 4, "11x7 cannot be halved"),
        (conv("c", "data", 2) + 'layer { name: "n" type: "LRN" bottom: "c" top: "n" }\n' + conv("d", "n", 2), 4,
         "'n' .LRN. stands between"),
        (conv("c", "data", 2) + conv("d", "c", 2) + conv("e", "c", 2), 6, "branches at 'c'"),
        ('layer { name: "p" type: "Power" bottom: "data" top: "p" }\n' + conv("c", "p", 2), 2, "does not begin"),
    ],
)  # fmt: skip
def test_what_it_cannot_express(text: str, line: int, words: str) -> None:
    with pytest.raises(LayerError, match=words) as e:
        stages(build(IN + text))
    assert e.value.loc is not None
    assert (e.value.loc.file, e.value.loc.line) == ("n.prototxt", line)


def test_numbers_that_do_not_fit() -> None:
    net = build(IN + conv("c", "data", 2, lp=False))
    with torch.no_grad():
        net.params["c"][1][0] = 130.0
    with pytest.raises(LayerError, match=r"layer 'c', biases: 130 does not fit Q7.8"):
        stages(net)
    found, left_out = stages(build(IN + conv("c", "data", 2)))
    assert left_out is None
    with pytest.raises(LayerError, match="the image has shape"):
        render(found, np.zeros((2, 3, 3)))
    with pytest.raises(LayerError, match="the image: nan does not fit"):
        render(found, np.full((2, 12, 8), np.nan))
    assert isinstance(found[0], Stage)
