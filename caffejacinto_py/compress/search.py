"""The shortest words with which a net still scores: Ristretto's search, with a joint check that widens what is too
short.

Source: Ristretto ristretto/quantization.cpp, Gysel et al. 2016. Ours: the back-off of the joint check, widths per
layer, more exponents for minifloats and powers of two, Deconvolution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from caffejacinto_py.compress.observe import Observer, observe
from caffejacinto_py.engine.evaluate import Feeds, evaluate
from caffejacinto_py.engine.net import Net
from caffejacinto_py.errors import CaffeError, UsageError, near
from caffejacinto_py.ir.graph import Graph, Node
from caffejacinto_py.passes.ristretto import SCHEME, shorten

if TYPE_CHECKING:
    from torch import Tensor

MODES = ("dynamic_fixed_point", "minifloat", "integer_power_of_2_weights")
WIDTHS = (16, 8, 4, 2, 1)
FULL = 32
GROUPS = ("conv_params", "fc_params", "activations")
_FRACTION = (-90, 126)  # what the layers take
_EXPONENT = (-126, 127)
Plan = Mapping[str, Mapping[str, int | str]]  # layer -> fields of quantization_param


class Rewindable(Feeds, Protocol):
    """Batches that can start again."""

    def rewind(self) -> None: ...


@dataclass(frozen=True)
class Part:
    """A layer that takes part. weights, activations: how many numbers it has, those of one batch. The others: largest
    magnitudes of bottoms, tops and weights."""

    name: str
    convolution: bool
    weights: int
    activations: int
    input: float
    output: float
    weight: float

    @property
    def group(self) -> str:
        return GROUPS[0] if self.convolution else GROUPS[1]


@dataclass(frozen=True)
class Trial:
    """One score. step: "sweep", "joint", "layer"; what: the group or layer tried; words: widths by group or fields."""

    step: str
    what: str
    words: Mapping[str, int]
    score: float
    passed: bool


@dataclass(frozen=True)
class Found:
    """What a search brought. plan: quantization_param fields by layer; layers not in it stay as they are. passed:
    whether `score` is within the margin of `baseline`."""

    mode: str
    metric: str
    baseline: float
    score: float
    passed: bool
    plan: Plan
    parts: tuple[Part, ...]
    trials: tuple[Trial, ...] = field(repr=False)


def score_blob(graph: Graph, name: str | None = None) -> str:
    """The output that says how good the net is: `name`, else the top of the strictest accuracy layer, of several equal
    ones the last (heads for training come first). Raises UsageError where there is none."""
    outputs = [v.name for v in graph.outputs]
    if name is not None:
        if name not in outputs:
            raise UsageError(f"--score {name}: no such output", hint=near(name, outputs) or f"one of: {outputs}")
        return name
    ranks = [(n.layer.metric(), n.outputs[0].name) for n in graph.nodes if n.outputs and n.layer.metric() is not None]
    ranks = [(rank, blob) for rank, blob in ranks if blob in outputs]
    if not ranks:
        hint = (
            "add an Accuracy layer with include { phase: TEST }, or name an output that is better when larger: --score"
        )
        raise UsageError("the net has no accuracy among its TEST outputs", hint=hint)
    best = min(rank for rank, _ in ranks)
    return [blob for rank, blob in ranks if rank == best][-1]


def find_parts(graph: Graph, ranged: Net, observer: Observer) -> tuple[Part, ...]:
    """The layers of `graph` that can be shortened, with their ranges.

    ranged: the net that `observer` has watched, usually of the other phase. Raises CaffeError where a range is missing
    or a weight is not finite; UsageError where no layer can be shortened.
    """
    nodes = {n.name: n for n in ranged.graph.nodes}
    found = []
    for node in graph.nodes:
        if SCHEME not in node.layer.low_precision:
            continue
        if node.name not in nodes:
            text = f"layer '{node.name}' is not in the {ranged.graph.phase} net, so its range is unknown"
            raise CaffeError(text, loc=node.loc, hint="take the ranges from test data: --ranges TEST")
        found.append(_part(graph, node, nodes[node.name], ranged.params[node.name][0], observer))
    if not found:
        raise UsageError("no layer of this net can be shortened", hint="convolutions and inner products can be")
    return tuple(found)


def _part(graph: Graph, node: Node, seen: Node, weight: Tensor, observer: Observer) -> Part:
    shapes = [graph.shapes[v] for v in (*node.inputs, *node.outputs)]
    prunable = node.layer.prunable([graph.shapes[v] for v in node.inputs])
    bottoms = [observer.bottom(seen, i) for i in range(len(seen.inputs))]
    tops = observer.stats.get(seen.name, ())
    if any(s is None or not s.finite for s in (*bottoms, *tops)) or not tops:
        raise CaffeError(f"layer '{node.name}': nothing was seen of its blobs", loc=node.loc)
    if not bool(weight.isfinite().all()):
        raise CaffeError(f"layer '{node.name}': its weights have NaN or infinite values", loc=node.loc)
    return Part(
        node.name,
        bool(prunable and prunable.kernel),
        weight.numel(),
        sum(math.prod(s) for s in shapes),
        max(max(-s.min, s.max) for s in bottoms if s is not None),
        max(max(-s.min, s.max) for s in tops),
        float(weight.detach().abs().max()) if weight.numel() else 0.0,
    )


def watch(net: Net, feed: Feeds, iterations: int) -> Observer:
    """Run batches through a net and note the ranges of its blobs."""
    return observe(net, feed, iterations, bins=0)


class Scorer:
    """Scores plans on the same batches; each only once."""

    def __init__(self, net: Net, feed: Rewindable, iterations: int, blob: str, margin: float) -> None:
        self.net, self.feed, self.iterations, self.blob = net, feed, iterations, blob
        self.margin = margin
        self.trials: list[Trial] = []
        self.told: Callable[[Trial], None] = lambda trial: None
        self._known: dict[str, float] = {}
        self.baseline = self({})

    def __call__(self, plan: Plan) -> float:
        """Mean of the score over the batches. Raises CaffeError where it is no number."""
        key = repr(sorted((name, sorted(fields.items())) for name, fields in plan.items()))
        if key not in self._known:
            net = Net(shorten(self.net.graph, plan), device=self.net.device, share=self.net) if plan else self.net
            self.feed.rewind()
            score = evaluate(net, self.feed, self.iterations)
            values = [o.value for o in score.outputs if o.name == self.blob]
            if len(values) != 1:
                text = f"output '{self.blob}' is not one number a batch, so it is no score"
                raise UsageError(text, hint="name an output with one element: --score")
            value = values[0]
            if not math.isfinite(value):
                raise CaffeError(f"output '{self.blob}' is {value}", hint="are the weights those of this net?")
            self._known[key] = value
        return self._known[key]

    def passes(self, score: float) -> bool:
        return score + self.margin / 100 >= self.baseline - 1e-9  # means of equal numbers may differ in the last digit

    def try_(self, step: str, what: str, words: Mapping[str, int], plan: Plan) -> Trial:
        """Score a plan and note it."""
        score = self(plan)
        trial = Trial(step, what, dict(words), score, self.passes(score))
        self.trials.append(trial)
        self.told(trial)
        return trial


def search(mode: str, scorer: Scorer, parts: Sequence[Part], *, per_layer: bool = False) -> Found:
    """The search of one of `MODES`. per_layer: go on to narrow single layers (dynamic fixed point only)."""
    parts = tuple(parts)
    if mode == MODES[0]:
        plan = _fixed_point(scorer, parts, per_layer)
    elif per_layer:
        raise UsageError(f"--per-layer goes with {MODES[0]}: the other modes have one width for all layers")
    else:
        plan = _minifloat(scorer, parts) if mode == MODES[1] else _power_of_two(scorer, parts)
    score = scorer(plan)
    passed = scorer.passes(score)
    return Found(mode, scorer.blob, scorer.baseline, score, passed, plan, parts, tuple(scorer.trials))


# --- dynamic fixed point ---------------------------------------------------------------------------------------------
Widths = dict[str, tuple[int, int]]  # layer -> bits of its parameters, of its activations


def _fixed_point(scorer: Scorer, parts: Sequence[Part], per_layer: bool) -> Plan:
    bits = {g: _sweep(scorer, parts, g)[0] for g in GROUPS[:2] if any(p.group == g for p in parts)}
    width, score = _sweep(scorer, parts, GROUPS[2])
    roomy = [replace(p, input=2 * p.input, output=2 * p.output) for p in parts]
    other, better = _sweep(scorer, roomy, GROUPS[2], f"{GROUPS[2]}, nothing clipped")
    if (other, -better) < (width, -score):
        width, parts = other, roomy
    bits[GROUPS[2]] = width
    trial = scorer.try_("joint", "all", bits, fixed_plan(parts, spread(parts, bits)))
    while not trial.passed:
        wider = _widen(scorer, parts, bits)
        if wider is None:
            break
        bits, trial = wider
    widths = spread(parts, bits)
    if per_layer and trial.passed:
        widths = _narrow(scorer, parts, widths)
    return fixed_plan(parts, widths)


def _sweep(scorer: Scorer, parts: Sequence[Part], group: str, what: str = "") -> tuple[int, float]:
    """The smallest width of one group, the others in full, and its score; FULL where even the largest fails."""
    best = FULL, -math.inf
    for width in WIDTHS:
        plan = fixed_plan(parts, spread(parts, {group: width}))
        trial = scorer.try_("sweep", what or group, {group: width}, plan)
        if not trial.passed:
            break
        best = width, trial.score
    return best


def _widen(scorer: Scorer, parts: Sequence[Part], bits: dict[str, int]) -> tuple[dict[str, int], Trial] | None:
    """One group a step wider: of those that then pass the cheapest in bits, else the one that scores best."""
    tried: list[tuple[bool, float, int, int, dict[str, int], Trial]] = []
    for group, width in bits.items():
        if width < FULL:
            wider = {**bits, group: min(FULL, 2 * width) if width < 16 else FULL}
            trial = scorer.try_("joint", group, wider, fixed_plan(parts, spread(parts, wider)))
            added = cost(parts, spread(parts, wider)) - cost(parts, spread(parts, bits))
            tried.append((not trial.passed, 0.0 if trial.passed else -trial.score, added, len(tried), wider, trial))
    return min(tried, key=lambda t: t[:4])[4:] if tried else None


def _narrow(scorer: Scorer, parts: Sequence[Part], widths: Widths) -> Widths:
    """Single layers narrower, those that save most first, as long as the whole net passes."""
    places = [(p, i) for p in parts for i in (0, 1)]
    for part, which in sorted(places, key=lambda c: -(c[0].activations if c[1] else c[0].weights)):
        for width in (w for w in WIDTHS if w < widths[part.name][which]):
            pair = list(widths[part.name])
            pair[which] = width
            tried: Widths = {**widths, part.name: (pair[0], pair[1])}
            words = {"params": pair[0], "activations": pair[1]}
            if not scorer.try_("layer", part.name, words, fixed_plan(parts, tried)).passed:
                break
            widths = tried
    return widths


def spread(parts: Sequence[Part], bits: Mapping[str, int]) -> Widths:
    """Widths of layers from widths of groups; what is not named is FULL."""
    return {p.name: (bits.get(p.group, FULL), bits.get("activations", FULL)) for p in parts}


def cost(parts: Sequence[Part], widths: Widths) -> int:
    """Bits of all weights and of the activations of a batch."""
    return sum(p.weights * widths[p.name][0] + p.activations * widths[p.name][1] for p in parts)


def fixed_plan(parts: Sequence[Part], widths: Widths) -> Plan:
    """Layers in full words stay what they are."""
    return {p.name: _fixed_fields(p, *widths[p.name]) for p in parts if min(widths[p.name]) < FULL}


def _fixed_fields(part: Part, params: int, activations: int) -> dict[str, int | str]:
    fields: dict[str, int | str] = {"precision": "DYNAMIC_FIXED_POINT"}
    fields.update(_word("layer_in", activations, integer_bits(part.input)))
    fields.update(_word("layer_out", activations, integer_bits(part.output)))
    fields.update(_word("params", params, integer_bits(part.weight, 1)))
    return fields


def integer_bits(largest: float, extra: float = 0.0) -> int:
    """Bits in front of the point, sign included; 0 for all zeros. extra 0 is one less than the largest value needs:
    Ristretto's rule for activations, which prefers steps half as wide to room for the rare largest values."""
    return math.ceil(math.log2(largest) + extra) if largest > 0 else 0


def _word(name: str, bits: int, integer: int) -> Iterator[tuple[str, int]]:
    integer += bits == FULL  # there room costs nothing
    low, high = _FRACTION
    yield f"bw_{name}", bits
    yield f"fl_{name}", min(max(bits - integer, low), high)


# --- minifloat -------------------------------------------------------------------------------------------------------
def _minifloat(scorer: Scorer, parts: Sequence[Part]) -> Plan:
    """One format for all: Ristretto's exponent first, wider ones where it fails."""
    least = exponent_bits(parts)
    best: Plan = {}
    for width in WIDTHS:
        found: Plan | None = None
        for exponent in range(least, min(8, width - 2) + 1):
            plan = float_plan(parts, width - 1 - exponent, exponent)
            words = {"bits": width, "mant_bits": width - 1 - exponent, "exp_bits": exponent}
            if scorer.try_("sweep", "all", words, plan).passed:
                found = plan
                break
        if found is None:
            break
        best = found
    return best


def exponent_bits(parts: Sequence[Part]) -> int:
    """So many that the largest number of the net fits, at least 4."""
    largest = max(max(p.input, p.output, p.weight) for p in parts)
    need = math.log2(largest) - 1 if largest > 0 else 0.0
    return min(8, max(4, math.ceil(math.log2(need) + 1))) if need > 0 else 4


def float_plan(parts: Sequence[Part], mantissa: int, exponent: int) -> Plan:
    return {p.name: {"precision": "MINIFLOAT", "mant_bits": mantissa, "exp_bits": exponent} for p in parts}


# --- powers of two ---------------------------------------------------------------------------------------------------
def _power_of_two(scorer: Scorer, parts: Sequence[Part]) -> Plan:
    """Ristretto's exponents -8 .. -1 and 8-bit activations; where they fail exponents that fit each layer, then wider
    activations. The best of all where none passes."""
    best: tuple[float, Plan] = (-math.inf, {})
    for own, width in ((False, 8), (True, 8), (True, 16), (True, FULL)):
        plan = power_plan(parts, width, own=own)
        words = {"activations": width, **({} if own else {"exp_min": -8, "exp_max": -1})}
        trial = scorer.try_("sweep", "exponents of each layer" if own else "all", words, plan)
        if trial.passed:
            return plan
        best = max(best, (trial.score, plan), key=lambda b: b[0])
    return best[1]


def power_plan(parts: Sequence[Part], width: int, *, own: bool) -> Plan:
    """own: 8 exponents up to that of the layer's largest weight, which are as many bits."""
    plan = {}
    for part in parts:
        high = round(math.log2(part.weight)) if own and part.weight > 0 else -1
        high = min(max(high, _EXPONENT[0] + 7), _EXPONENT[1])
        fields: dict[str, int | str] = {"precision": "INTEGER_POWER_OF_2_WEIGHTS", "exp_min": high - 7, "exp_max": high}
        fields.update(_word("layer_in", width, integer_bits(part.input)))
        fields.update(_word("layer_out", width, integer_bits(part.output)))
        plan[part.name] = fields
    return plan
