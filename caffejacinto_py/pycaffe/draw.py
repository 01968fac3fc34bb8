"""Pictures of nets: as DOT text always, as PNG, SVG and so on where Graphviz is installed."""

from __future__ import annotations

import os
from typing import Any

from caffejacinto_py.errors import UsageError
from caffejacinto_py.export import dot
from caffejacinto_py.pycaffe.mode import phase_name
from caffejacinto_py.schema.files import atomic_write

__all__ = ["draw_net", "draw_net_to_file", "get_pydot_graph", "to_dot"]


def to_dot(
    net: Any,
    rankdir: str = "LR",
    *,
    label_edges: bool = True,
    phase: int | str | None = None,
    display_lrm: bool = False,
) -> str:
    """The net as a DOT digraph, see `export.dot.to_dot`. phase: only layers of this phase."""
    name = None if phase is None else phase_name(phase)
    return dot.to_dot(net, rankdir, label_edges=label_edges, phase=name, display_lrm=display_lrm)


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
    return dot.render(to_dot(caffe_net, rankdir, phase=phase, display_lrm=display_lrm), ext)


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
