"""Pictures of nets: as DOT text always, as PNG, SVG and so on where Graphviz is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import Any

from caffejacinto_py.errors import CaffeError, UsageError
from caffejacinto_py.layers import registry
from caffejacinto_py.pycaffe.mode import phase_name
from caffejacinto_py.schema.files import atomic_write

TEXT = ("dot", "gv", "raw")
BLOB = 'shape=octagon, style=filled, fillcolor="#E0E0E0"'
LAYER = 'shape=record, style=filled, fillcolor="{}"'
COLORS = {"convolution_param": "#FF5050", "pooling_param": "#FF9900", "inner_product_param": "#CC33FF"}


def to_dot(
    net: Any,
    rankdir: str = "LR",
    *,
    label_edges: bool = True,
    phase: int | str | None = None,
    display_lrm: bool = False,
) -> str:
    """The net as a DOT digraph: layers as boxes, blobs as octagons, in-place layers beside their blob.

    net: an upgraded NetParameter (`layer` entries). rankdir: LR, RL, TB or BT. label_edges: output and batch sizes on
    edges. phase: only layers of this phase. display_lrm: learning-rate multipliers of layers that have them.
    """
    if rankdir not in ("LR", "RL", "TB", "BT"):
        raise UsageError(f"rankdir '{rankdir}' is not one of LR, RL, TB, BT")
    nodes: dict[str, str] = {}
    edges: list[str] = []
    for layer in net.layer:
        if phase is not None and not _drawn(layer, phase_name(phase)):
            continue
        name = _quote(f"{layer.name}_{layer.type}")
        inplace = len(layer.bottom) == len(layer.top) == 1 and layer.bottom[0] == layer.top[0]
        color = "#90EE90" if inplace else COLORS.get(_field(layer), "#6495ED")
        label = _label(layer, rankdir, display_lrm)
        nodes[name] = f"label={_quote(label)}, {LAYER.format(color)}"
        for blob in [*layer.bottom, *layer.top]:
            nodes.setdefault(_quote(f"{blob}_blob"), f"label={_quote(blob)}, {BLOB}")
        for blob in layer.bottom:
            edges.append(f"{_quote(f'{blob}_blob')} -> {name}")
        text = _edge_label(layer) if label_edges else ""
        for blob in layer.top:
            edges.append(f"{name} -> {_quote(f'{blob}_blob')}" + (f" [label={_quote(text)}]" if text else ""))
    lines = [f"digraph {_quote(net.name or 'Net')} {{", f"  rankdir={rankdir};"]
    lines += [f"  {name} [{attributes}];" for name, attributes in nodes.items()]
    return "\n".join([*lines, *(f"  {edge};" for edge in edges), "}"]) + "\n"


def _drawn(layer: Any, phase: str) -> bool:
    """Whether the phases in a layer's rules let it be; levels and stages are left aside."""
    names = type(layer).DESCRIPTOR.fields_by_name["phase"].enum_type.values_by_number
    included = [names[r.phase].name for r in layer.include if r.HasField("phase")]
    excluded = [names[r.phase].name for r in layer.exclude if r.HasField("phase")]
    return (phase in included or len(included) < len(layer.include) or not layer.include) and phase not in excluded


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


def get_pydot_graph(
    caffe_net: Any,
    rankdir: str = "LR",
    label_edges: bool = True,
    phase: int | str | None = None,
    display_lrm: bool = False,
) -> Any:
    """The picture as a pydot graph. Raises UsageError where pydot is not installed."""
    try:
        import pydot
    except ImportError as e:
        hint = "pip install pydot, or use to_dot, draw_net"
        raise UsageError("get_pydot_graph needs the package pydot", hint=hint) from e
    text = to_dot(caffe_net, rankdir, label_edges=label_edges, phase=phase, display_lrm=display_lrm)
    return pydot.graph_from_dot_data(text)[0]


def draw_net(
    caffe_net: Any,
    rankdir: str = "LR",
    ext: str = "png",
    phase: int | str | None = None,
    display_lrm: bool = False,
) -> bytes:
    """The picture in a format of Graphviz (png, svg, pdf, ...); dot, gv and raw are the text.

    Raises UsageError where Graphviz is needed and not installed, CaffeError with its message where it fails.
    """
    text = to_dot(caffe_net, rankdir, phase=phase, display_lrm=display_lrm).encode()
    if ext in TEXT:
        return text
    program = shutil.which("dot")
    if program is None:
        hint = "install Graphviz, or draw into a .dot file"
        raise UsageError(f"a picture of type '{ext}' needs Graphviz (its program `dot`)", hint=hint)
    done = subprocess.run([program, f"-T{ext}"], input=text, capture_output=True)
    if done.returncode:
        raise CaffeError(f"Graphviz: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout


def draw_net_to_file(
    caffe_net: Any,
    filename: str | os.PathLike[str],
    rankdir: str = "LR",
    phase: int | str | None = None,
    display_lrm: bool = False,
) -> None:
    """Write the picture; the ending of the file name decides its type."""
    ext = os.path.splitext(filename)[1].lstrip(".").lower() or "dot"
    picture = draw_net(caffe_net, rankdir, ext, phase, display_lrm)
    with atomic_write(os.fspath(filename)) as file:
        file.write(picture)
