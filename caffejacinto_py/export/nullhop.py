"""The convolutions of a net as the text file that the NullHop accelerator's tools read (.cnn).

A file holds a chain of stages: a square convolution with stride 1, then perhaps a ReLU, then perhaps 2x2 max pooling.
Numbers are whole: value * 2^8, cut off towards zero, as ADaPTION's exporter has them. Source: ADaPTION
python/caffe/nullhop/caffe2nullhop.py (which finds ReLU and pooling by fixed offsets; here they are found in the graph);
Aimar et al. 2017 for the accelerator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from caffejacinto_py.engine.net import Net
from caffejacinto_py.errors import LayerError
from caffejacinto_py.ir.graph import Graph, Node, Value
from caffejacinto_py.layers.conv import Convolution
from caffejacinto_py.layers.lp import LPAct, LPConvolution

FRACTION = 8  # bits behind the point: Q7.8
WIDTH = 16  # bits of a number
MAX_KERNEL = 7


@dataclass(frozen=True, eq=False)
class Stage:
    """One convolution and what follows it. kernels (out, in, k, k) and biases (out): int32, value * 2^fraction."""

    layer: str
    kernel: int
    pad: int
    channels: int
    height: int
    width: int
    relu: bool
    pooling: bool
    fraction: int
    kernels: np.ndarray
    biases: np.ndarray


def stages(net: Net, *, own_format: bool = False) -> tuple[list[Stage], str | None]:
    """The chain of convolutions from the net's input on, and the first layer behind it, which is left out (or None).

    Low-precision layers give their rounded weights. own_format: their own bits behind the point instead of 8.
    Raises LayerError with the layer's place where the accelerator has no such layer or a number does not fit 16 bits.
    """
    graph = net.graph
    value = _start(graph)
    found: list[Stage] = []
    node: Node | None = _next(graph, value)
    while node is not None:
        layer = node.layer
        if isinstance(layer, Convolution) and not layer.transposed:
            found.append(_convolution(net, node, own_format))
        elif not found and not _passes(node):
            break
        elif not _passes(node):
            last = _followed(graph, node, found[-1])
            if last is None:
                break
            found[-1] = last
        value = node.outputs[0]
        node = _next(graph, value)
    if not found:
        at = node.loc if node is not None else None
        raise LayerError("the net does not begin with a convolution", loc=at, hint="NullHop computes convolutions only")
    return found, node.name if node is not None else None


def render(found: Sequence[Stage], pixels: np.ndarray, *, compressed_input: bool = False) -> str:
    """The text of the file. pixels: the input image (C, H, W), floats. compressed_input: the accelerator gets it as
    sparsity maps and pixels.

    Raises LayerError where the image has another size or does not fit 16 bits.
    """
    first = found[0]
    want = (first.channels, first.height, first.width)
    if tuple(pixels.shape) != want:
        raise LayerError(f"the image has shape {tuple(pixels.shape)}, layer '{first.layer}' reads {want}")
    lines = [f"{len(found)} # num layers "]
    for i, s in enumerate(found):
        numbers = (
            (int(compressed_input or i > 0), "compression_enabled"),
            (s.kernel, "kernel_size "),
            (s.channels, "num input channels "),
            (s.width, "num_input_column "),
            (s.height, "num_input_rows "),
            (len(s.biases), "num_output_channels "),
            (int(s.pooling), "pooling_enabled "),
            (int(s.relu), "relu_enabled "),
            (s.pad, "padding "),
        )
        lines += [f" {value} #{name}" for value, name in numbers]
        blocks = [("#KERNELS#", s.kernels), ("#BIASES#", s.biases)]
        if i == 0:
            blocks.append(("#PIXELS#", _whole(pixels, FRACTION, "the image")))
        for marker, array in blocks:
            lines.append(marker)
            lines += map(str, array.ravel().tolist())
    return "\n".join(lines) + "\n"


def _start(graph: Graph) -> Value:
    """The image: the first top of the first source."""
    source = next((n for n in graph.nodes if n.layer.source), None)
    if source is None:
        raise LayerError("the net has no input layer")
    if len(graph.shapes[source.outputs[0]]) != 4:
        raise LayerError(f"layer '{source.name}': its top is no image (N, C, H, W)", loc=source.loc)
    return source.outputs[0]


def _next(graph: Graph, value: Value) -> Node | None:
    """The only reader of a value; None at the end. Raises LayerError where the net branches."""
    after = [node for node, _ in graph.readers()[value]]
    if len(after) > 1 and any(isinstance(n.layer, Convolution) for n in _later(graph, after)):
        names = " and ".join(f"'{n.name}'" for n in after[:2])
        raise LayerError(f"the net branches at '{value.name}', read by {names}: NullHop runs a chain", loc=after[1].loc)
    return after[0] if after else None


def _later(graph: Graph, nodes: Sequence[Node]) -> list[Node]:
    """These layers and all that depend on them."""
    seen = {v for n in nodes for v in n.outputs}
    found = list(nodes)
    for node in graph.nodes:
        if node not in found and any(v in seen for v in node.inputs):
            found.append(node)
            seen.update(node.outputs)
    return found


def _passes(node: Node) -> bool:
    """Layers that change nothing there: rounding, which the accelerator does itself, and what hands its bottom on."""
    return isinstance(node.layer, LPAct) or bool(node.layer.hands_through())


def _followed(graph: Graph, node: Node, stage: Stage) -> Stage | None:
    """The stage with a ReLU or pooling layer; None: it ends the chain. Raises LayerError where convolutions follow."""
    rest = any(isinstance(n.layer, Convolution) for n in _later(graph, [node]))
    if node.layer.quantizes == "relu" and not stage.relu:  # behind the pooling it is the same
        if getattr(node.layer.param, "negative_slope", 0):
            raise LayerError(f"layer '{node.name}': NullHop's ReLU has no negative_slope", loc=node.loc)
        return replace(stage, relu=True)
    ins = [graph.shapes[v] for v in node.inputs]
    form = node.layer.integer_form(ins) if len(ins) == 1 and len(ins[0]) == 4 else None
    if form is not None and form.op == "max_pool" and not stage.pooling:
        two, zero, numbers = (2, 2), (0, 0), form.numbers
        if (tuple(numbers["kernel"]), tuple(numbers["stride"]), tuple(numbers["pad"])) != (two, two, zero):
            raise LayerError(f"layer '{node.name}': NullHop pools 2x2 with stride 2, without padding", loc=node.loc)
        if any(size % 2 for size in ins[0][2:]):
            text = (
                f"layer '{node.name}': {ins[0][2]}x{ins[0][3]} cannot be halved; NullHop drops the last row or column"
            )
            raise LayerError(text, loc=node.loc, hint="choose an input size that every pooling layer halves")
        return replace(stage, pooling=True)
    if rest:
        text = f"layer '{node.name}' ({node.type}) stands between convolutions, and NullHop has no such layer there"
        hint = "`caffejacinto optimize` absorbs batch norm" if node.layer.quantizes in ("norm", "scale") else None
        raise LayerError(text, loc=node.loc, hint=hint)
    return None


def _convolution(net: Net, node: Node, own_format: bool) -> Stage:
    layer: Any = node.layer
    shape = net.graph.shapes[node.inputs[0]]
    g = layer.geometry([shape])
    problem = None
    if len(node.inputs) > 1:
        problem = "has several bottoms"
    elif len(g.kernel) != 2 or len(g.lead) != 1:
        problem = "is not over images"
    elif len(set(g.kernel)) > 1 or len(set(g.pad)) > 1:
        problem = "has an oblong kernel or padding"
    elif g.kernel[0] > MAX_KERNEL:
        problem = f"has a kernel of {g.kernel[0]}; {MAX_KERNEL} is the largest"
    elif set(g.stride) != {1} or set(g.dilation) != {1}:
        problem = "has a stride or dilation"
    elif layer.groups(g.channels) != 1:
        problem = "has groups"
    if problem:
        raise LayerError(f"layer '{node.name}' {problem}: NullHop has no such convolution", loc=node.loc)
    blobs = [p.detach().to("cpu", torch.float64, copy=True).numpy() for p in net.params[node.name]]
    fraction = FRACTION
    kernels, biases = blobs[0], blobs[1] if len(blobs) > 1 else np.zeros(len(blobs[0]))
    if isinstance(layer, LPConvolution):
        precision = layer.precision()
        fraction = precision.ad if own_format else FRACTION
        kernels = precision.round(kernels)
        biases = blobs[2] if len(blobs) > 2 else np.zeros(len(blobs[0]))
        biases = precision.round(biases) if precision.round_bias else biases
    what = f"layer '{node.name}'"
    try:
        numbers = _whole(kernels, fraction, f"{what}, weights"), _whole(biases, fraction, f"{what}, biases")
    except LayerError as e:
        e.loc = node.loc
        raise
    height, width = g.spatial
    return Stage(node.name, g.kernel[0], g.pad[0], g.channels, height, width, False, False, fraction, *numbers)


def _whole(values: np.ndarray, fraction: int, what: str) -> np.ndarray:
    """value * 2^fraction without what is behind the point. Raises LayerError for what 16 bits do not hold."""
    scaled = np.trunc(np.asarray(values, np.float64) * 2.0**fraction)
    limit = 2 ** (WIDTH - 1)
    bad = ~((scaled >= -limit) & (scaled < limit))
    if bad.any():
        text = f"{what}: {np.asarray(values)[bad][0]:g} does not fit Q{WIDTH - 1 - fraction}.{fraction}"
        hint = "scale the input (transform_param.scale), or use fewer bits behind the point"
        raise LayerError(text, hint=hint)
    return scaled.astype(np.int32)
