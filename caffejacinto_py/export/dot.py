"""Pictures of nets: DOT text always; PNG, SVG and so on where Graphviz is installed."""

from __future__ import annotations

import shutil
import subprocess
from typing import Any

from caffejacinto_py.errors import CaffeError, UsageError
from caffejacinto_py.ir.build import PHASES
from caffejacinto_py.layers import registry

TEXT = ("dot", "gv", "raw")
DIRECTIONS = ("LR", "RL", "TB", "BT")
_BLOB = 'shape=octagon, style=filled, fillcolor="#E0E0E0"'
_LAYER = 'shape=record, style=filled, fillcolor="{}"'
_COLORS = {"convolution_param": "#FF5050", "pooling_param": "#FF9900", "inner_product_param": "#CC33FF"}
_INPLACE, _OTHER = "#90EE90", "#6495ED"


def to_dot(
    net: Any, rankdir: str = "LR", *, label_edges: bool = True, phase: str | None = None, display_lrm: bool = False
) -> str:
    """The net as a DOT digraph: layers as boxes, blobs as octagons, in-place layers beside their blob.

    net: an upgraded NetParameter (`layer` entries). rankdir: LR, RL, TB or BT. label_edges: output and batch sizes on
    edges. phase: "TRAIN" or "TEST", only layers of this phase. display_lrm: learning-rate multipliers of layers that
    have them. Raises UsageError for another rankdir or phase.
    """
    if rankdir not in DIRECTIONS:
        raise UsageError(f"rankdir '{rankdir}' is not one of {', '.join(DIRECTIONS)}")
    if phase not in (None, *PHASES):
        raise UsageError(f"phase '{phase}' is neither TRAIN nor TEST")
    nodes: dict[str, str] = {}
    edges: list[str] = []
    for layer in net.layer:
        if phase is not None and not _drawn(layer, phase):
            continue
        name = _quote(f"{layer.name}_{layer.type}")
        inplace = len(layer.bottom) == len(layer.top) == 1 and layer.bottom[0] == layer.top[0]
        color = _INPLACE if inplace else _COLORS.get(_field(layer), _OTHER)
        nodes[name] = f"label={_quote(_label(layer, rankdir, display_lrm))}, {_LAYER.format(color)}"
        for blob in [*layer.bottom, *layer.top]:
            nodes.setdefault(_quote(f"{blob}_blob"), f"label={_quote(blob)}, {_BLOB}")
        for blob in layer.bottom:
            edges.append(f"{_quote(f'{blob}_blob')} -> {name}")
        text = _edge_label(layer) if label_edges else ""
        for blob in layer.top:
            edges.append(f"{name} -> {_quote(f'{blob}_blob')}" + (f" [label={_quote(text)}]" if text else ""))
    lines = [f"digraph {_quote(net.name or 'Net')} {{", f"  rankdir={rankdir};"]
    lines += [f"  {name} [{attributes}];" for name, attributes in nodes.items()]
    return "\n".join([*lines, *(f"  {edge};" for edge in edges), "}"]) + "\n"


def render(text: str, kind: str) -> bytes:
    """DOT text as a file of this kind (an ending: png, svg, pdf, ...); dot, gv and raw are the text itself.

    Raises UsageError where Graphviz is needed and not installed, CaffeError with its message where it fails.
    """
    if kind in TEXT:
        return text.encode()
    program = shutil.which("dot")
    if program is None:
        hint = "install Graphviz (apt install graphviz, brew install graphviz), or draw into a .dot file"
        raise UsageError(f"a picture of type '{kind}' needs Graphviz (its program `dot`), which is not here", hint=hint)
    done = subprocess.run([program, f"-T{kind}"], input=text.encode(), capture_output=True)
    if done.returncode:
        raise CaffeError(f"Graphviz: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout


def _drawn(layer: Any, phase: str) -> bool:
    """Whether the phases in a layer's rules let it be; levels and stages are left aside."""
    number = PHASES.index(phase)
    included = [r.phase == number for r in layer.include if r.HasField("phase")]
    excluded = [r.phase == number for r in layer.exclude if r.HasField("phase")]
    return (any(included) or len(included) < len(layer.include) or not layer.include) and not any(excluded)


def _field(layer: Any) -> str:
    """The parameter message that its type uses, where the type is known."""
    return (registry.find(layer.type).field or "") if registry.known(layer.type) else ""


def _label(layer: Any, rankdir: str, display_lrm: bool) -> str:
    """Name, type, window and multipliers: in lines, or where the picture is tall in one line."""
    parts = [layer.name, f"({layer.type})"]
    own = getattr(layer, _field(layer)) if _field(layer) else None
    for word in ("kernel_size", "stride", "pad"):
        sizes = _sizes(own, word)
        if sizes:
            parts.append(f"{word.replace('_', ' ')}: {sizes}")
    multipliers = [f"{p.lr_mult:g}" for p in layer.param if p.HasField("lr_mult")]
    if display_lrm and multipliers:
        parts.append(f"lr mult: {', '.join(multipliers)}")
    return (" " if rankdir in ("TB", "BT") else "\n").join(parts)


def _sizes(own: Any, word: str) -> str:
    """kernel_size, stride or pad as the message gives it: one value, a list, or _h and _w."""
    fields = own.DESCRIPTOR.fields_by_name if own is not None else {}
    if "kernel_size" not in fields or word not in fields:
        return ""
    short = word.split("_")[0]
    pair = [getattr(own, f"{short}_{side}", 0) for side in "hw"]
    if any(pair):
        return "x".join(map(str, pair))
    value = getattr(own, word)
    sizes = [value] if isinstance(value, int) else list(value)
    return "x".join(map(str, sizes)) or ("0" if word == "pad" else "1" if word == "stride" else "")


def _edge_label(layer: Any) -> str:
    own = getattr(layer, _field(layer)) if _field(layer) else None
    for word, text in (("num_output", ""), ("batch_size", "Batch ")):
        value = getattr(own, word, 0)
        if value:
            return f"{text}{value}"
    return ""


def _quote(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    for sign in "{}|<>":  # they have a meaning in records
        escaped = escaped.replace(sign, f"\\{sign}")
    return f'"{escaped}"'
