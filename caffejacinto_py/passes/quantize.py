"""What quantization simulation does to a net: which weights and tops become fixed-point numbers, and why others do not.

Pure data from a graph whose layers are made; running it is `compress/quantize.py`. Source: caffe-jacinto 0.17 net.cpp
(EnableQuantizationForSelectedLayers, IsLayerMerged).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from caffejacinto_py.ir.graph import Graph, Node, Value
from caffejacinto_py.schema import pb
from caffejacinto_py.schema.compat import SOUND

Place = tuple[str, int]  # layer name, number of the top
TOP0_ONLY = ("source", "input")  # roles of which only the first top is quantized: the others are labels
BARE_SOURCES = ("hdf5", "memory", "dummy")  # feeders without a quantization hook in the binary
PREFETCHED = ("database", "images", "windows")  # those whose hook its GPU build lacks


@dataclass(frozen=True)
class Settings:
    """NetQuantizationParameter, its two spellings merged. Widths in bits; `float_only`: precision FLOAT."""

    weights: bool = True
    activations: bool = True
    bits_weights: int = 12
    bits_activations: int = 8
    bits_bias: int = 16
    power2_weights: bool = False
    power2_activations: bool = False
    offset_weights: bool = True
    offset_activations: bool = False
    float_only: bool = False
    stochastic: bool = False
    display: int = 2000
    update: bool = True
    start: int = 1
    rate: float = 0.01
    expansion: float = 1.25
    ignored: tuple[str, ...] = ()
    per_channel: bool = False


@dataclass(frozen=True)
class Part:
    """One layer. role: the trait `quantizes`. weights, tops: per blob and per top, whether it is quantized.

    reason: why tops are left alone ("" where they are quantized). inputs: who makes each bottom. alone: per bottom,
    whether this layer is its only reader. stored: the layer's quantization_param where it has qparams.
    """

    name: str
    number: int
    role: str | None
    weights: tuple[bool, ...]
    tops: tuple[bool, ...]
    reason: str
    inputs: tuple[Place | None, ...]
    alone: tuple[bool, ...]
    stored: Any = None


@dataclass(frozen=True)
class Scheme:
    """A whole net. simulated: `quantize: true` with quantization_start > 0. fixed: qparams are read, never computed."""

    settings: Settings
    parts: Mapping[str, Part]
    simulated: bool
    fixed: bool
    compat: str = SOUND

    @property
    def sound(self) -> bool:
        return self.compat == SOUND


def settings_of(net: Any) -> Settings:
    """Of a NetParameter; caffe-jacinto 0.16's insert_quantization_param and power2_range stand for today's fields."""
    p = net.net_quantization_param
    update = p.update_quantization_param
    if p.HasField("insert_quantization_param") and not p.HasField("update_quantization_param"):
        update = p.insert_quantization_param
    return Settings(
        weights=p.quantize_weights,
        activations=p.quantize_activations,
        bits_weights=p.bitwidth_weights,
        bits_activations=p.bitwidth_activations,
        bits_bias=p.bitwidth_bias,
        power2_weights=p.power2_scale_weights or p.power2_range,
        power2_activations=p.power2_scale_activations or p.power2_range,
        offset_weights=p.apply_offset_weights,
        offset_activations=p.apply_offset_activations,
        float_only=p.precision == pb.QuantizationParameter.QuantizationParameter_Precision_FLOAT,
        stochastic=is_stochastic(p),
        display=p.display_quantization,
        update=update,
        start=p.quantization_start,
        rate=p.range_update_factor,
        expansion=p.range_expansion_factor,
        ignored=tuple(p.ignored_layer_names),
        per_channel=p.per_channel_weights,
    )


def is_stochastic(param: Any) -> bool:
    """Whether rounding_scheme of a message is STOCHASTIC, in any fork's spelling."""
    q = pb.QuantizationParameter
    return param.rounding_scheme in (q.QuantizationParameter_Rounding_STOCHASTIC, q.STOCHASTIC)


def is_stored(proto: Any) -> bool:
    """Whether a layer carries qparams (Ristretto's fields of the same message are not)."""
    q = proto.quantization_param
    return bool(q.qparam_in or q.qparam_w or q.qparam_out)


def is_float(proto: Any) -> bool:
    """Whether a layer says `precision: FLOAT`: what is stored for it is not applied."""
    q = proto.quantization_param
    return bool(q.HasField("precision")) and q.precision == type(q).QuantizationParameter_Precision_FLOAT


def plan(graph: Graph) -> Scheme | None:
    """What to simulate in this net; None: nothing."""
    net = graph.proto
    quantize = bool(net is not None and net.quantize)
    stored = any(is_stored(n.proto) for n in graph.nodes)
    settings = settings_of(net) if net is not None else Settings()
    simulated = quantize and settings.start > 0
    if not simulated and not stored:
        return None
    fixed = not (simulated and settings.update)
    compat = graph.dialect.compat.quantization
    return Scheme(settings, parts(graph, settings, compat), simulated, fixed, compat)


def parts(graph: Graph, settings: Settings, compat: str = SOUND) -> dict[str, Part]:
    """Every layer of the graph, in order."""
    look = _Neighbours(graph)
    found = {}
    for number, node in enumerate(graph.nodes):
        reason = _reason(node, look, settings, compat)
        blobs = len(node.layer.blobs([graph.shapes[v] for v in node.inputs]))
        product = node.layer.quantizes == "product" and node.name not in settings.ignored
        stored = node.proto.quantization_param if is_stored(node.proto) else None
        found[node.name] = Part(
            name=node.name,
            number=number,
            role=node.layer.quantizes,
            weights=(product and settings.weights,) * blobs,
            tops=tuple(not reason and _wanted(node, k, look, compat) for k in range(len(node.outputs))),
            reason=reason,
            inputs=tuple(look.place(v) for v in node.inputs),
            alone=tuple(not look.shared(v) for v in node.inputs),
            stored=stored,
        )
    return found


def _reason(node: Node, look: _Neighbours, settings: Settings, compat: str) -> str:
    role = node.layer.quantizes
    if role is None:
        return "its type is not quantized"
    if node.name in settings.ignored:
        return "ignored_layer_names has it"
    if not settings.activations:
        return "quantize_activations is false"
    if compat != SOUND:
        if role == "input":
            return "caffe-jacinto leaves Input alone"
        bare = BARE_SOURCES if compat == "cpu" else (*BARE_SOURCES, *PREFETCHED)
        if node.layer.source in bare:
            return f"no data layer of this kind is quantized by that build ({compat})"
    return look.merged(node)


def _wanted(node: Node, top: int, look: _Neighbours, compat: str) -> bool:
    if node.layer.quantizes not in TOP0_ONLY:
        return True
    return top == 0 and (compat != SOUND or not look.is_label(node.outputs[0]))


class _Neighbours:
    """Who comes before and after a layer, as Caffe sees it with its Split layers: a blob with several readers has one
    reader, the Split, and they read the Split's tops."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.readers = graph.readers()
        self.makers: dict[Value, Place] = {v: (n.name, k) for n in graph.nodes for k, v in enumerate(n.outputs)}
        self.nodes = {n.name: n for n in graph.nodes}
        self.losses = {v for n in graph.nodes for v, w in zip(n.outputs, n.loss_weights, strict=False) if w}

    def place(self, v: Value) -> Place | None:
        return self.makers.get(v)

    def shared(self, v: Value) -> bool:
        return len(self.readers.get(v, ())) + (v in self.losses) > 1

    def after(self, node: Node) -> Node | None:
        """The only reader of the first top; None: none, or a Split."""
        if not node.outputs or self.shared(node.outputs[0]) or not self.readers[node.outputs[0]]:
            return None
        return self.readers[node.outputs[0]][0][0]

    def before(self, node: Node | None) -> list[Node | None]:
        """The makers of the first bottom, going back: the nearest, then the one before it; None for a Split."""
        if node is None or not node.inputs or node.inputs[0] not in self.makers:
            return []
        v = node.inputs[0]
        maker = self.nodes[self.makers[v][0]]
        return [None, maker] if self.shared(v) else [maker, *self.before(maker)[:1]]

    def convolution(self, node: Node | None) -> bool:
        """Whether it is a plain convolution; a deconvolution or inner product is not."""
        if node is None or node.layer.quantizes != "product":
            return False
        sizes = node.layer.prunable([self.graph.shapes[v] for v in node.inputs])
        return sizes is not None and sizes.convolution

    def merged(self, node: Node) -> str:
        """The layer behind that takes this one's work over, as a sentence; "" where there is none."""
        behind = self.after(node)
        if behind is None:
            return ""
        role, next_role = node.layer.quantizes, behind.layer.quantizes
        absorbing = {"product": ("norm", "scale", "relu"), "norm": ("scale", "relu"), "scale": ("relu",)}
        joined = next_role in absorbing.get(role or "", ())
        if not joined and role in ("norm", "scale") and self.convolution(behind):
            back = self.before(node)[: 1 if role == "norm" else 2]
            joined = not any(self.convolution(n) for n in back)
        return f"merged into '{behind.name}'" if joined else ""

    def is_label(self, v: Value) -> bool:
        """Whether nothing computes with it but losses' labels and metrics."""
        readers = self.readers.get(v, [])
        return bool(readers) and all(self._ends(node, i) for node, i in readers)

    def _ends(self, node: Node, i: int) -> bool:
        if not node.layer.differentiable(i):
            return True
        return node.layer.quantizes is None and all(self.readers[v] and self.is_label(v) for v in node.outputs)
