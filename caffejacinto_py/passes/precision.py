"""Which number type each layer runs in, by NVCaffe's rules. Nothing is cast here: engine/precision.py does that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from caffejacinto_py.errors import CaffeError, PrototxtError, UsageError, raise_all
from caffejacinto_py.ir.graph import Graph, Node
from caffejacinto_py.schema import pb

FIELDS = ("forward_type", "backward_type", "forward_math", "backward_math")
WIDTHS = {"DOUBLE": 8, "FLOAT": 4, "FLOAT16": 2, "BFLOAT16": 2}  # the types that layers compute in, and their bytes
OVERRIDES = {"fp64": "DOUBLE", "fp32": "FLOAT", "tf32": "FLOAT", "fp16": "FLOAT16", "bf16": "BFLOAT16"}
AS_BOTTOMS = "as bottoms"


@dataclass(frozen=True)
class Row:
    """One layer. forward_type to backward_math: resolved, as NVCaffe would have them.

    runs: what ours computes in, a key of WIDTHS, or AS_BOTTOMS for layers that only hand numbers on. why: where that
    differs, the reason. last: it makes an output of the net.
    """

    layer: str
    type: str
    forward_type: str
    backward_type: str
    forward_math: str
    backward_math: str
    runs: str
    why: str = ""
    last: bool = False


@dataclass(frozen=True)
class Table:
    """The types of a net. base: what its weights, history and inputs are kept in, FLOAT or DOUBLE.

    tf32: products may read FLOAT with fewer digits. notes: one line for each setting that is read and changes nothing.
    """

    rows: Mapping[str, Row]
    base: str = "FLOAT"
    tf32: bool = False
    notes: tuple[str, ...] = ()

    @property
    def mixed(self) -> bool:
        """Whether a layer runs in something else than `base`."""
        return any(r.runs not in (self.base, AS_BOTTOMS) for r in self.rows.values())

    @property
    def types(self) -> tuple[str, ...]:
        """The types that layers run in, the widest first."""
        found = {r.runs for r in self.rows.values()} - {AS_BOTTOMS} | {self.base}
        return tuple(t for t in WIDTHS if t in found)

    @property
    def plain(self) -> bool:
        """Whether every layer asks for FLOAT and gets it."""
        return self.base == "FLOAT" and all(_asks(r) == {"FLOAT"} for r in self.rows.values())


def resolve(graph: Graph, override: str | None = None) -> Table:
    """The types of every layer of a shaped graph.

    A layer's type is its own, else the net's; its math its own, else its own type, else the net's default math where
    that is given, else the net's default type. Data layers have a FLOAT backward. override: "fp16" or "bf16" in place
    of the net's defaults, what single layers say stays; "fp32", "tf32" or "fp64" for the whole net, whatever it says.

    Raises PrototxtError for types that numbers are only stored in (INT, UINT, BOOL); UsageError for an unknown
    override.
    """
    if override is not None and override not in OVERRIDES:
        raise UsageError(f"precision '{override}' is unknown", hint=f"one of {', '.join(OVERRIDES)}")
    errors: list[CaffeError] = []
    net = _defaults(graph, override, errors)
    base = "DOUBLE" if net["forward_type"] == "DOUBLE" else "FLOAT"
    outputs = set(graph.outputs)
    whole = override in ("fp32", "tf32", "fp64")
    rows = {}
    for n in graph.nodes:
        rows[n.name] = _row(graph, n, net, base, errors, last=not outputs.isdisjoint(n.outputs), whole=whole)
    raise_all(errors)
    return Table(rows, base, override == "tf32", tuple(_notes(graph)))


def _defaults(graph: Graph, override: str | None, errors: list[CaffeError]) -> dict[str, str | None]:
    """The net's types; None for a math that is not given."""
    if override is not None:
        kind = OVERRIDES[override]
        return {"forward_type": kind, "backward_type": kind, "forward_math": None, "backward_math": None}
    message: Any = graph.proto if graph.proto is not None else pb.NetParameter()
    found: dict[str, str | None] = {}
    for name in FIELDS:
        field = f"default_{name}"
        given = message.HasField(field)
        found[name] = _type(graph, message, field, (field,), errors) if given or name.endswith("type") else None
    return found


def _row(
    graph: Graph,
    node: Node,
    net: dict[str, str | None],
    base: str,
    errors: list[CaffeError],
    *,
    last: bool,
    whole: bool,
) -> Row:
    given = [f for f in FIELDS if node.proto.HasField(f)] if not whole else []
    own = {f: _type(graph, node.proto, f, (*node.path, f), errors) if f in given else None for f in FIELDS}
    found: dict[str, str] = {}
    for way in ("forward", "backward"):
        kind, math = f"{way}_type", f"{way}_math"
        default = net[kind] or "FLOAT"
        found[kind] = own[kind] or default
        found[math] = own[math] or own[kind] or net[math] or default
    if node.layer.source or node.proto.HasField("transform_param"):
        found["backward_type"] = own["backward_type"] or "FLOAT"
    row = Row(node.name, node.type, **found, runs="", last=last)
    runs, why = _runs(node, row, base, trains=node.backward and graph.phase == "TRAIN")
    return replace(row, runs=runs, why=why)


def _runs(node: Node, row: Row, base: str, *, trains: bool) -> tuple[str, str]:
    """What a layer runs in here, and why if that is not its forward type."""
    layer, want = node.layer, row.forward_type
    if layer.source:
        return base, "" if want == base else "data come in the net's base type"
    if trains and row.backward_type != want:
        # one type for both ways: autograd's gradients have the type of the values
        want = max(want, row.backward_type, key=lambda t: WIDTHS[t])
        if WIDTHS[row.forward_type] == WIDTHS[row.backward_type]:
            want = base
        if want != row.forward_type:
            return _low(node, want, base, f"the wider of forward {row.forward_type}, backward {row.backward_type}")
    return _low(node, want, base, "")


def _low(node: Node, want: str, base: str, why: str) -> tuple[str, str]:
    layer = node.layer
    if layer.narrows == "moves":
        return AS_BOTTOMS, ""
    if want == base:
        return want, why
    if layer.loss_top or any(node.loss_weights):
        return base, "losses keep it"
    if layer.metric() is not None:
        return base, "metrics keep it"
    if "DOUBLE" in (want, base) and layer.narrows != "weights":
        return base, "beside DOUBLE only products have a type of their own"
    if layer.narrows is None:
        return base, "this layer type keeps it"
    if len(node.outputs) > 1 and layer.narrows == "values":
        return base, "its second top holds places"
    return want, why


def _type(graph: Graph, message: Any, field: str, path: tuple[str | int, ...], errors: list[CaffeError]) -> str:
    """The name of a field's type; one that nothing computes in goes into `errors`."""
    name = str(pb.Type.Name(getattr(message, field)))
    if name not in WIDTHS:
        loc = graph.locate(path) if graph.locate else None
        text = f"'{field}: {name}': numbers can be stored in {name}, layers do not compute in it"
        errors.append(PrototxtError(text, loc=loc, hint=f"one of {', '.join(WIDTHS)}"))
        return "FLOAT"
    return name


def _notes(graph: Graph) -> list[str]:
    """cuDNN's switches: torch chooses its algorithms itself."""
    found: list[tuple[tuple[str | int, ...], str]] = []
    message = graph.proto
    for field in ("default_conv_algos_override", "default_cudnn_math_override"):
        if message is not None and message.HasField(field) and getattr(message, field) != _initial(message, field):
            found.append(((field,), ""))
    for get, field in ((lambda n: n.proto, "cudnn_math_override"), (_convolution, "conv_algos_override")):
        users = [n for n in graph.nodes if get(n).HasField(field) and getattr(get(n), field) != _initial(get(n), field)]
        if users:
            inside = () if field == "cudnn_math_override" else ("convolution_param",)
            more = f" (and on {len(users) - 1} more layers)" if len(users) > 1 else ""
            found.append(((*users[0].path, *inside, field), more))
    lines = []
    for path, more in found:
        loc = graph.locate(path) if graph.locate else None
        lines.append(
            f"{f'{loc}: ' if loc else ''}'{path[-1]}' has no effect: torch chooses its algorithms itself{more}"
        )
    return lines


def _convolution(node: Node) -> Any:
    return node.proto.convolution_param


def _initial(message: Any, field: str) -> Any:
    return message.DESCRIPTOR.fields_by_name[field].default_value


def _asks(row: Row) -> set[str]:
    return {row.forward_type, row.backward_type, row.forward_math, row.backward_math}


def describe(table: Table) -> list[str]:
    """The table in a few lines, layers with equal types together; none where every layer asks for FLOAT and gets it."""
    if table.plain:
        return ["precision: FLOAT, products in TF32"] if table.tf32 else []
    groups: dict[tuple[str, ...], list[str]] = {}
    for r in table.rows.values():
        asked = f"{r.forward_type}/{r.backward_type}"
        math = f"{r.forward_math}/{r.backward_math}"
        groups.setdefault((r.runs, asked, math, r.why), []).append(r.layer)
    lines = [f"precision: weights, history and inputs in {table.base}"]
    for (runs, asked, math, why), names in groups.items():
        text = f"  {runs}: {_names(names)} (types {asked}, math {math})"
        lines.append(text + (f": {why}" if why else ""))
    return lines


def _names(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{names[0]}, {names[1]} ... {names[-1]}, {len(names)} layers"
