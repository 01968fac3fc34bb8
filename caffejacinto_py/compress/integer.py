"""From a net with stored quantization parameters to an integer program (docs/integer.md).

Every tensor of the program is a blob whose qparams say `quantize: true`; a top that a later layer of its group
quantizes (Convolution before ReLU) never becomes a tensor: the ReLU joins the op. What a layer computes is its
`integer_form`; what follows the last integers (Softmax, losses, metrics) is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np

from caffejacinto_py.compress import integer_ops as ops
from caffejacinto_py.compress.integer_forms import Form, Stored, Tensor, masters, pixels, stored, tensor_form
from caffejacinto_py.compress.integer_run import FORMAT, MOVES, VERSION, Program
from caffejacinto_py.compress.numerics import QParams
from caffejacinto_py.compress.qparams import SUFFIX
from caffejacinto_py.errors import CaffeError, LayerError, Loc, PrototxtError, UsageError, raise_all
from caffejacinto_py.ir.graph import Graph, Node, Value
from caffejacinto_py.layers.base import IntegerForm
from caffejacinto_py.passes.quantize import plan

CALIBRATE = "`caffejacinto calibrate` writes a prototxt with the quantization parameters of every layer"
ABSORB = "absorb batch norm first: `caffejacinto optimize`"
UNQUANTIZED_INPUT = "an input of the net without qparams"
PIXELS = "for whole numbers 0 .. 255, such as pixels, give --pixels; " + CALIBRATE


@dataclass(frozen=True)
class Built:
    """A program and where its tensors come from. exact: names of the tensors that must equal the simulation bit for
    bit (every scale up to there is a power of two, nothing was rounded). notes: for people."""

    program: Program
    places: Mapping[str, Value]
    exact: frozenset[str]
    notes: tuple[str, ...] = ()


@dataclass
class _State:
    graph: Graph
    weights: Mapping[str, Sequence[np.ndarray]]
    pixels: bool
    fixed: bool  # its layers round by themselves, and there are no qparams
    tensors: dict[Value, Tensor] = field(default_factory=dict)
    places: dict[str, Value] = field(default_factory=dict)
    exact: set[str] = field(default_factory=set)
    done: set[str] = field(default_factory=set)  # layers that joined an earlier op
    ops: list[dict[str, Any]] = field(default_factory=list)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    left_out: list[dict[str, str]] = field(default_factory=list)
    without: dict[Value, str] = field(default_factory=dict)  # why a value is no tensor
    errors: list[CaffeError] = field(default_factory=list)


def build(graph: Graph, weights: Mapping[str, Sequence[np.ndarray]], *, pixels: bool = False) -> Built:
    """The program of a TEST graph. weights: float blobs by layer name.

    pixels: inputs without qparams are whole numbers 0 .. 255. Raises LayerError or ManyErrors with places: layers
    without qparams or without an integer form, widths outside 2..16, offsets that are not whole, weights that are not
    finite.
    """
    state = _State(graph, weights, pixels, fixed=_check(graph))
    for node in graph.nodes:
        if node.name in state.done:
            continue
        try:
            _add(state, node)
        except LayerError as e:
            if e.loc is None:
                e.loc = graph.where(node, *e.field)
            state.errors.append(e)
            for v in node.outputs:  # what reads them is not to blame
                state.without[v] = ""
    raise_all(state.errors)
    if not state.ops:
        raise LayerError(f"net '{graph.name}' has no quantized layer: nothing to write", hint=CALIBRATE)
    return _finish(state)


def _check(graph: Graph) -> bool:
    """The net as a whole: its qparams are there and final, and rounded as programs round. True: it needs none, its
    layers round by themselves."""
    scheme = plan(graph)
    if scheme is None:
        if any(_rounds(n) for n in graph.nodes):
            return True
        raise PrototxtError(f"net '{graph.name}' has no quantization parameters", loc=_place(graph), hint=CALIBRATE)
    at = ("net_quantization_param",)
    if not scheme.fixed:
        hint = (
            "where its qparams are final, set update_quantization_param: false in net_quantization_param; " + CALIBRATE
        )
        text = f"net '{graph.name}' computes its quantization parameters while it runs"
        raise PrototxtError(text, loc=_place(graph, *at, "update_quantization_param"), hint=hint)
    if scheme.settings.stochastic:
        text = "integer programs round to the nearest: rounding_scheme is STOCHASTIC"
        raise PrototxtError(text, loc=_place(graph, *at, "rounding_scheme"), hint="write rounding_scheme: NEAREST")
    if not scheme.sound:
        raise UsageError(f"--compat quantization={scheme.compat}: integer programs have the default simulation only")
    return False


def _rounds(node: Node) -> bool:
    """Whether a layer rounds by itself."""
    try:
        return node.layer.fixed_words() is not None
    except LayerError:  # raised again where the layer's own turn comes
        return True


def _place(graph: Graph, *fields: str | int) -> Loc | None:
    return graph.locate(fields or ("name",)) if graph.locate else None


def _finish(state: _State) -> Built:
    assert "" not in state.without.values(), "a layer is to blame, but there is no error"
    read = {name for op in state.ops for name in op["inputs"]}
    made = [op["output"] for op in state.ops]
    inputs = [name for name in state.inputs if name in read]
    kept = {t.name: t for t in state.tensors.values() if t.name in read or t.name in made}
    info = {
        "format": FORMAT,
        "version": VERSION,
        "name": state.graph.name.removesuffix(SUFFIX),
        "inputs": inputs,
        "outputs": [name for name in made if name not in read],
        "tensors": {name: t.describe() for name, t in kept.items()},
        "ops": state.ops,
        "left_out": state.left_out,
    }
    notes = [f"{op['layer']}: needs accumulators of {op['accumulator_bits']} bits, more than 32"
             for op in state.ops if op.get("accumulator_bits", 0) > 32]  # fmt: skip
    places = {name: v for name, v in state.places.items() if name in kept}
    return Built(Program(info, state.arrays), places, frozenset(state.exact & set(kept)), tuple(notes))


def _add(state: _State, node: Node) -> None:
    if node.layer.source:
        return _source(state, node)
    role = node.layer.quantizes
    form = node.layer.integer_form([state.graph.shapes[v] for v in node.inputs])
    if form is None and role is not None:
        raise node.layer.fail("this layer has no integer form", hint=ABSORB if role in ("norm", "scale") else None)
    ready = [v in state.tensors for v in node.inputs]
    found = stored(node)
    quantized = any(q is not None for q in (*found.weights, *found.outs))
    if form is None or (not any(ready) and not quantized):
        return _leave_out(state, node)
    missing = [v for v in node.inputs if v not in state.tensors]
    for v in missing:
        if state.without[v]:
            hint = PIXELS if state.without[v] == UNQUANTIZED_INPUT else CALIBRATE
            raise node.layer.fail(f"it reads '{v.name}', which is not quantized ({state.without[v]})", hint=hint)
    if missing:  # an earlier layer is to blame
        return _leave_out(state, node)
    if form.op in ("same", *MOVES):
        return _view(state, node, form)
    return _compute(state, node, form)


def _leave_out(state: _State, node: Node) -> None:
    """A layer that makes no integers. What quantized layers read of it is an error of theirs."""
    blamed = any(state.without.get(v) == "" for v in node.inputs)
    if not blamed:
        state.left_out.append({"layer": node.name, "type": node.type})
    for v in node.outputs:
        state.without[v] = "" if blamed else f"layer '{node.name}' ({node.type}) has no integer form"


def _source(state: _State, node: Node) -> None:
    found = stored(node)
    for i, value in enumerate(node.outputs):
        q = found.out(i)
        if q is None and state.pixels and i == 0:
            q = pixels(node)
        if q is None:
            state.without[value] = UNQUANTIZED_INPUT
            continue
        tensor = _tensor(state, value, tensor_form(node, q, "qparam_out", i))
        state.inputs.append(tensor.name)
        if tensor.form.power2:
            state.exact.add(tensor.name)


def _tensor(state: _State, value: Value, form: Form) -> Tensor:
    name = value.name if value.name not in state.places else str(value)
    tensor = Tensor(name, state.graph.shapes[value], form)
    state.tensors[value] = tensor
    state.places[name] = value
    return tensor


def _view(state: _State, node: Node, form: IntegerForm) -> None:
    before, start = state.tensors[node.inputs[0]], 0
    if form.numbers.get("order", [0])[0] != 0:
        raise node.layer.fail("the batch axis moves: integer programs keep it", "permute_param", "order", 0)
    if form.numbers.get("axis") == 0:
        raise node.layer.fail("the batch is cut: integer programs keep the batch axis", "slice_param", "axis")
    for v in node.outputs:
        if form.op == "same":
            state.tensors[v] = before
            continue
        if state.graph.shapes[v][:1] != before.shape[:1]:
            text = f"{before.shape} becomes {state.graph.shapes[v]}: integer programs keep the batch axis"
            raise node.layer.fail(text)
        numbers = dict(form.numbers)
        if form.op == "slice":
            end = start + state.graph.shapes[v][numbers["axis"]]
            numbers, start = {**numbers, "start": start, "end": end}, end
        tensor = _tensor(state, v, before.form)
        if before.name in state.exact:
            state.exact.add(tensor.name)
        state.ops.append({"op": form.op, "layer": node.name, "layers": [node.name], "inputs": [before.name],
                          "output": tensor.name, **numbers})  # fmt: skip


def _compute(state: _State, node: Node, form: IntegerForm) -> None:
    found = stored(node)
    ins = [state.tensors[v] for v in node.inputs]
    several = len(node.outputs) > 1  # a Convolution with several bottoms: one op a pair
    for i, value in enumerate(node.outputs):
        slope = ops.slope_of(form) if form.op == "relu" else None
        blobs = masters(found, state.weights.get(node.name, ()))
        kept = _kept(state, node, form, ins[i : i + 1] if several else ins, found, blobs)
        settled = _settle(state, node, value, found.out(i), slope, kept)
        if settled is None:
            state.without[value] = ""
            continue
        layers, last, made, slope = settled
        if not isinstance(made, Form):
            made = tensor_form(layers[-1], made, "qparam_out", 0 if len(layers) > 1 else i)
        out = _tensor(state, last, made)
        key = node.name if not several else f"{node.name}[{i}]"
        op = ops.emit(node, form, [ins[i]] if several else ins, out, found, blobs, slope=slope)
        state.arrays.update({f"{key}/{name}": array for name, array in op.arrays.items()})
        fields, relu = ops.placed(op.fields, key), slope == 0
        state.ops.append({"op": op.name, "layer": node.name, "layers": [n.name for n in layers],
                          "inputs": [t.name for t in ([ins[i]] if several else ins)], "output": out.name,
                          "relu": relu, **fields})  # fmt: skip
        state.done |= {n.name for n in layers[1:]}
        if op.exact and all(t.name in state.exact for t in ins):
            state.exact.add(out.name)


def _kept(
    state: _State, node: Node, form: IntegerForm, ins: Sequence[Tensor], found: Stored, blobs: Sequence[np.ndarray]
) -> Form | None:
    """In a net whose layers round by themselves: the form of a top that needs no rounding. None: it needs some."""
    if not state.fixed:
        return None
    if found.weight(0) is not None:
        return ops.wide(node, found, ins[0], blobs, form)
    moves = form.op in ("max_pool", "max", "concat") or (form.op == "relu" and not form.numbers)
    return ins[0].form if moves and all(t.form == ins[0].form for t in ins) else None


def _settle(
    state: _State, node: Node, value: Value, q: QParams | None, slope: Fraction | None, kept: Form | None
) -> tuple[list[Node], Value, QParams | Form, Fraction | None] | None:
    """From a top that is not quantized to the one that is: ReLU layers in between join, and one that rounds. (layers,
    value, qparams, slope below zero; None: there is no ReLU). None: a layer without integer form follows, which is an
    error of its own. kept: the form of the top where nothing that follows rounds it."""
    readers, layers, start = state.graph.readers(), [node], (value, slope)
    while q is None:
        found = readers[value]
        following = found[0][0] if len(found) == 1 else None
        form = _form(state.graph, following) if following else None
        if following and form is None and following.layer.quantizes is not None:
            return None
        joins = following is not None and form is not None and form.op in ("relu", "same", "round")
        if kept is not None and not joins:
            return [node], start[0], kept, start[1]
        if following is None or form is None or not joins or len(following.outputs) > 1:
            hint = "put an LPAct behind it" if state.fixed else CALIBRATE
            text = f"its top '{value.name}' has no quantization parameters with quantize: true"
            raise node.layer.fail(text, hint=hint)
        layers.append(following)
        if form.op == "relu":
            slope = ops.joined(following, slope, form)
        value, q = following.outputs[0], stored(following).out(0)
    return layers, value, q, slope


def _form(graph: Graph, node: Node) -> IntegerForm | None:
    try:
        return node.layer.integer_form([graph.shapes[v] for v in node.inputs])  # type: ignore[no-any-return]
    except LayerError:  # raised again where the layer's own turn comes
        return None
