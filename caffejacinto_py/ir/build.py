"""From an upgraded NetParameter to a Graph: filter by phase, level and stage, then resolve names to values.

Every problem of the file is collected, up to a limit, so that a user mends them in one go.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from caffejacinto_py.errors import CaffeError, LayerError, Loc, PrototxtError, near, raise_all
from caffejacinto_py.ir.graph import Graph, Node, Spec, Value
from caffejacinto_py.schema.dialect import BVLC, Dialect

log = logging.getLogger(__name__)
PHASES = ("TRAIN", "TEST")  # numbers of enum Phase
_PERMISSIVE = 1  # ParamSpec.DimCheckMode
_MAX_ERRORS = 100


class Traits(Protocol):
    """What name resolution must know of a layer type (a Layer class of the registry)."""

    bottoms: Any
    tops: Any
    equal_counts: Any
    auto_tops: Any
    loss_top: Any
    forbids_inplace: Any


Lookup = Callable[..., Traits]


def met(rule: Any, *, phase: str, level: int, stages: Sequence[str]) -> bool:
    """Whether a NetStateRule holds: phase equal, level within bounds, every `stage` present, no `not_stage` present."""
    if rule.HasField("phase") and PHASES[rule.phase] != phase:
        return False
    if rule.HasField("min_level") and level < rule.min_level:
        return False
    if rule.HasField("max_level") and level > rule.max_level:
        return False
    return all(s in stages for s in rule.stage) and not any(s in stages for s in rule.not_stage)


def kept(proto: Any, *, phase: str, level: int, stages: Sequence[str]) -> bool:
    """Whether a layer belongs to the net in this state. Raises LayerError when it has both include and exclude
    rules."""
    if proto.include and proto.exclude:
        raise LayerError(f"layer '{proto.name}': both include and exclude rules", hint="use one kind of rule per layer")
    if proto.include:
        return any(met(r, phase=phase, level=level, stages=stages) for r in proto.include)
    return not any(met(r, phase=phase, level=level, stages=stages) for r in proto.exclude)


@dataclass
class _Names:
    """Which value each blob name means right now, and who made it."""

    current: dict[str, Value] = field(default_factory=dict)
    maker: dict[str, str] = field(default_factory=dict)
    lost: set[str] = field(default_factory=set)  # made by layers that were filtered away: for hints


def build(
    message: Any,
    lookup: Lookup,
    *,
    phase: str = "TRAIN",
    level: int = 0,
    stages: Sequence[str] = (),
    dialect: Dialect = BVLC,
    locate: Callable[[tuple[str | int, ...]], Loc | None] | None = None,
) -> Graph:
    """Filter and resolve. `lookup(type, name=, loc=)` returns the layer class or raises. Raises PrototxtError or
    ManyErrors."""
    names = _Names()
    nodes: list[Node] = []
    errors: list[CaffeError] = []
    where = locate or (lambda path: None)
    kept_layers = []
    for index, proto in enumerate(message.layer):
        try:
            if kept(proto, phase=phase, level=level, stages=stages):
                kept_layers.append((index, proto))
            else:
                names.lost.update(proto.top)
        except LayerError as e:
            e.loc = where(("layer", index))
            errors.append(e)
    for index, proto in _distinct(kept_layers, where):
        node, found = _resolve(index, proto, names, lookup, where)
        nodes.append(node)
        errors += found
        if len(errors) >= _MAX_ERRORS:
            break
    if not nodes and not errors:
        errors.append(_empty(message, phase, where))
    raise_all(errors)
    return Graph(
        name=message.name,
        nodes=tuple(nodes),
        phase=phase,
        level=level,
        stages=tuple(stages),
        dialect=dialect,
        force_backward=message.force_backward,
        debug_info=message.debug_info,
        proto=message,
        locate=locate,
    )


def _distinct(layers: list[tuple[int, Any]], where: Any) -> list[tuple[int, Any]]:
    """The same layers, each with a name of its own. Caffe lets names repeat; weights are then matched to the first."""
    taken = {proto.name for _, proto in layers}
    seen: set[str] = set()
    out = []
    for index, proto in layers:
        if proto.name in seen:
            again, n = type(proto)(), 2
            again.CopyFrom(proto)
            while (name := f"{proto.name or proto.type}_{n}") in taken:
                n += 1
            again.name = name
            taken.add(name)
            if proto.name:
                place = where(("layer", index))
                prefix = f"{place}: " if place else ""
                log.warning("%sa second layer is named '%s': it is called '%s' here", prefix, proto.name, name)
            proto = again
        seen.add(proto.name)
        out.append((index, proto))
    return out


def _empty(message: Any, phase: str, where: Any) -> PrototxtError:
    loc = where(())
    if message.layer:
        return PrototxtError(
            f"no layer of net '{message.name}' is left in phase {phase}",
            loc=loc,
            hint="the include/exclude rules drop all layers: check --phase, --level and --stage",
        )
    return PrototxtError(f"net '{message.name}' has no layers", loc=loc)


def _resolve(index: int, proto: Any, names: _Names, lookup: Lookup, where: Any) -> tuple[Node, list[CaffeError]]:
    """One layer to one node. On errors the node is still made, so that later layers do not fail because of it."""
    errors: list[CaffeError] = []
    path = ("layer", index)

    def wrong(text: str, *fields: str | int, hint: str | None = None) -> None:
        errors.append(
            LayerError(
                f"layer '{proto.name}': {text}", field=fields, hint=hint, loc=where((*path, *fields)) or where(path)
            )
        )

    traits: Traits | None = None
    try:
        traits = lookup(proto.type, name=proto.name, loc=where((*path, "type")) or where(path))
    except CaffeError as e:
        errors.append(e)
    inputs = tuple(_bottom(i, name, names, wrong) for i, name in enumerate(proto.bottom))
    outputs = _tops(index, proto, names, traits, wrong)
    if traits is not None:
        _check_counts(proto, traits, len(inputs), len(outputs), wrong)
    propagate = tuple(proto.propagate_down)
    if propagate and len(propagate) != len(inputs):
        wrong(f"propagate_down is given {len(propagate)} times for {len(inputs)} bottoms", "propagate_down")
    node = Node(
        name=proto.name,
        type=proto.type,
        inputs=inputs,
        outputs=outputs,
        proto=proto,
        specs=tuple(_spec(p) for p in proto.param),
        loss_weights=_loss_weights(proto, traits, len(outputs), wrong),
        propagate=propagate or (None,) * len(inputs),
        loc=where(path),
        path=path,
    )
    return node, errors


def _bottom(i: int, name: str, names: _Names, wrong: Any) -> Value:
    if name in names.current:
        return names.current[name]
    hint = near(name, names.current)
    if hint is None and name in names.lost:
        hint = f"'{name}' is made only by layers that this phase, level and stage leave out"
    wrong(f"bottom '{name}' is not produced by any earlier layer", "bottom", i, hint=hint)
    return Value(name)


def _tops(index: int, proto: Any, names: _Names, traits: Traits | None, wrong: Any) -> tuple[Value, ...]:
    outputs = []
    for i, name in enumerate(proto.top):
        value = Value(name)
        if name in names.current:
            inplace = i < len(proto.bottom) and proto.bottom[i] == name
            if not inplace:
                wrong(
                    f"top '{name}' is already produced by layer '{names.maker[name]}'",
                    "top",
                    i,
                    hint="give it another name; only an in-place layer (same bottom) may reuse one",
                )
            elif traits is not None and traits.forbids_inplace:
                wrong(f"a {proto.type} layer cannot work in place", "top", i, hint="give the top another name")
            value = Value(name, names.current[name].version + 1)
        names.current[name] = value
        names.maker[name] = proto.name
        outputs.append(value)
    if traits is not None and traits.auto_tops:
        outputs += [Value("(automatic)", index) for _ in range(traits.tops[0] - len(outputs))]
    return tuple(outputs)


def _check_counts(proto: Any, traits: Traits, bottoms: int, tops: int, wrong: Any) -> None:
    for word, n, (low, high) in (("bottom", bottoms, traits.bottoms), ("top", tops, traits.tops)):
        if n < low or (high is not None and n > high):
            want = f"{low}" if low == high else f"at least {low}" if high is None else f"{low} to {high}"
            wrong(f"{proto.type} takes {want} {word} blob{'s' * (want != '1')}, not {n}", word)
    if traits.equal_counts and bottoms != tops:
        wrong(f"{proto.type} makes one top for each bottom: {bottoms} bottoms, {tops} tops", "top")


def _loss_weights(proto: Any, traits: Traits | None, ntop: int, wrong: Any) -> tuple[float, ...]:
    given = tuple(proto.loss_weight)
    if given and len(given) != ntop and not (len(given) == len(proto.top) < ntop):
        wrong(
            f"loss_weight is given {len(given)} times for {ntop} tops",
            "loss_weight",
            hint="give one loss_weight per top, or none",
        )
    if given:
        return (given + (0.0,) * ntop)[:ntop]
    return (1.0 if traits is not None and traits.loss_top and ntop else 0.0,)[:ntop] + (0.0,) * (ntop - 1)


def _spec(p: Any) -> Spec:
    return Spec(
        name=p.name,
        permissive=p.share_mode == _PERMISSIVE,
        lr_mult=p.lr_mult if p.HasField("lr_mult") else None,
        decay_mult=p.decay_mult if p.HasField("decay_mult") else None,
    )
