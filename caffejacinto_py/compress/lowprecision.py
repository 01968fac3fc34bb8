"""Fixed-point formats for a net: bits before and after the point of every product's weights and activations.

A format is ADaPTION's Qbd.ad (layers/dual.py). The formats come from the weights themselves and from the activations of
a float net over some batches; `lp_net.py` writes them into a net.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from caffejacinto_py.compress import legacy_qmf, ranges
from caffejacinto_py.compress.numerics import Format, QParams
from caffejacinto_py.compress.observe import Observer, Stats, measure
from caffejacinto_py.engine.evaluate import Feeds, Score, evaluate
from caffejacinto_py.engine.hooks import Hooks
from caffejacinto_py.engine.net import Net
from caffejacinto_py.errors import CaffeError, LayerError, UsageError, near
from caffejacinto_py.ir.graph import Graph, Node, Value
from caffejacinto_py.layers.dual import MAX_BITS, Precision

SCHEME = "adaption"
CRITERIA = ("abs-max", "percentile", "mse")


@dataclass(frozen=True)
class Settings:
    """bits_weights, bits_activations: whole widths, sign included. criterion: how formats are chosen: abs-max (nothing
    is clipped), percentile (`percentile` of the magnitudes is not clipped), mse (least squared error). legacy: the
    fork's rule instead. round_bias, stochastic: written into the layers.
    """

    bits_weights: int = 16
    bits_activations: int = 16
    criterion: str = "abs-max"
    percentile: float = 99.9
    legacy: bool = False
    round_bias: bool = False
    stochastic: bool = False

    def check(self) -> None:
        """Raises UsageError for widths, criteria and percentiles that do not exist."""
        for bits in (self.bits_weights, self.bits_activations):
            if not 2 <= bits <= MAX_BITS:
                raise UsageError(f"{bits} bits; low-precision layers have 2 to {MAX_BITS}")
        if self.criterion not in CRITERIA:
            hint = near(self.criterion, CRITERIA) or "there are " + ", ".join(CRITERIA)
            raise UsageError(f"unknown criterion '{self.criterion}'", hint=hint)
        if not 50 < self.percentile <= 100:
            raise UsageError(f"percentile {self.percentile:g} is not above 50 and at most 100")


@dataclass(frozen=True, eq=False)
class LayerFormats:
    """One product of the net.

    activation: the layer that makes what is rounded: the product itself, or the ReLU behind it (rounding before a ReLU
    and behind it are the same, and only positive values matter). last: no product follows; its top is not rounded.
    """

    layer: str
    type: str
    activation: str
    last: bool
    weights: Precision
    activations: Precision
    weight_stats: Stats
    activation_stats: Stats

    def quality(self) -> tuple[float, float]:
        """Signal-to-noise ratio of weights and activations in dB."""
        pairs = ((self.weight_stats, self.weights), (self.activation_stats, self.activations))
        first, second = (ranges.sqnr(s.power, ranges.noise(s, _qparams(p))) for s, p in pairs)
        return first, second


def products(graph: Graph) -> list[tuple[Node, bool]]:
    """The layers that have a low-precision form, in order, and whether each is a last one."""
    found: list[tuple[Node, bool]] = []
    wanted: set[Value] = set()  # values from which a product can be reached
    for node in reversed(graph.nodes):
        leads = any(v in wanted for v in node.outputs)
        if SCHEME in node.layer.low_precision:
            found.append((node, not leads))
            leads = True
        if leads:
            wanted.update(node.inputs)
    return found[::-1]


def rounded_at(graph: Graph, node: Node) -> Node:
    """The layer whose top the rounding of a product's top decides: a plain ReLU, its only reader, or the product."""
    after = graph.readers()[node.outputs[0]]
    if len(after) != 1:
        return node
    reader = after[0][0]
    plain = reader.layer.quantizes == "relu" and not getattr(reader.layer.param, "negative_slope", 0)
    return reader if plain else node


def pick(stats: Stats, bits: int, *, criterion: str, percentile: float = 99.9) -> Precision:
    """The format for values like these: the finest that clips nothing (or what `criterion` allows).

    Where not even all bits before the point are enough, values are clipped.
    """
    formats = [Precision(bd, bits - bd) for bd in range(1, bits + 1)]
    if criterion == "mse":
        return min(formats, key=lambda p: ranges.noise(stats, _qparams(p)))
    low, high = stats.min, stats.max
    if criterion == "percentile":
        low, high = ranges.choose(stats, "percentile", form=Format(), percentile=percentile)
    reach = max(-low, high)
    return next((p for p in formats if reach <= p.limit + p.step / 2), formats[-1])


def analyse(net: Net, feeds: Feeds, iterations: int, settings: Settings) -> tuple[list[LayerFormats], Score]:
    """Formats for every product of a float net, and its outputs over the batches.

    Raises LayerError where weights are NaN or infinite, CaffeError where activations are or the net has no products,
    UsageError for settings.
    """
    settings.check()
    found = products(net.graph)
    if not found:
        raise CaffeError("the net has no layer with a low-precision form", hint="Convolution and InnerProduct have one")
    weights = [_weights(net, node) for node, _ in found]
    makers = {node.name: rounded_at(net.graph, node).name for node, _ in found}
    counting = legacy_qmf.Counting(set(makers) if settings.legacy else set(), settings.bits_activations)
    seen, score = watch(net, feeds, iterations, list(makers.values()), counting)
    rows = []
    for (node, last), weight in zip(found, weights, strict=True):
        maker = makers[node.name]
        if settings.legacy:
            forms = (
                legacy_qmf.of_biases(net.params[node.name], settings.bits_weights),
                counting.found[node.name].format(legacy_qmf.ACTIVATIONS),
            )
        else:
            forms = _formats(weight, seen[maker], settings)
        first = replace(forms[0], round_bias=settings.round_bias, stochastic=settings.stochastic)
        second = replace(forms[1], stochastic=settings.stochastic)
        rows.append(LayerFormats(node.name, node.type, maker, last, first, second, weight, seen[maker]))
    return rows, score


def watch(
    net: Net, feeds: Feeds, iterations: int, layers: Sequence[str], *more: legacy_qmf.Counting
) -> tuple[dict[str, Stats], Score]:
    """Run batches; statistics of the first top of some layers, and the net's outputs. Raises as `Observer.check`."""
    wanted = set(layers)
    observer, before = Observer(wanted=lambda n: n.name in wanted), net.hook
    net.hook = Hooks(*([before] if before else []), observer, *more)
    try:
        score = evaluate(net, feeds, iterations)
    finally:
        net.hook = before
    observer.check()
    return {name: stats[0] for name, stats in observer.stats.items()}, score


def _weights(net: Net, node: Node) -> Stats:
    found = measure(net.params[node.name][0].detach(), layer=node.name, blob="weights")
    if found.bad:
        text = f"layer '{node.name}': {found.bad} of {found.count} weights are NaN or infinite"
        raise LayerError(text, loc=node.loc, hint="do the weights come from a training that failed?")
    return found


def _formats(weights: Stats, activations: Stats, settings: Settings) -> tuple[Precision, Precision]:
    pairs = ((weights, settings.bits_weights), (activations, settings.bits_activations))
    first, second = (pick(s, n, criterion=settings.criterion, percentile=settings.percentile) for s, n in pairs)
    return first, second


def _qparams(p: Precision) -> QParams:
    return QParams(bits=p.bd + p.ad, scale=2.0**p.ad)
