"""How pixels of one top map to pixels of another, through layers of a NetSpec; and the Crop layer that aligns them.

A map is (axis, scale, offset): the first spatial axis, and x -> scale * x + offset for each spatial axis.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from caffejacinto_py.errors import UsageError
from caffejacinto_py.pycaffe.net_spec import Function, Top, layers

Map = tuple[int | None, Any, Any]
IDENTITY: Map = (None, 1, 0)
PASS_THROUGH_LAYERS = (
    "AbsVal", "BatchNorm", "Bias", "BNLL", "Dropout", "Eltwise", "ELU", "Log", "LRN", "Exp", "MVN", "Power", "ReLU",
    "PReLU", "Scale", "Sigmoid", "Split", "TanH", "Threshold", "Clip", "Swish",
)  # fmt: skip


class UndefinedMapException(UsageError):
    """Pixels of a layer's top do not correspond to pixels of its bottom, or nobody knows how."""


class AxisMismatchException(UsageError):
    """Two maps begin at different axes."""


class DisconnectedError(UsageError, RuntimeError):
    """No chain of spatial layers leads from one top to the other."""


class CropError(UsageError, AssertionError):
    """Cropping alone cannot align the two tops."""


def _window(fn: Function) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
    """(axis, stride, size, pad) of a layer with a sliding window."""
    own: Mapping[str, Any] = fn.params
    for name in ("convolution_param", "pooling_param"):
        own = fn.params.get(name, own)
    rectangular = sorted(f"{a}_{b}" for a in ("pad", "kernel", "stride") for b in "hw" if f"{a}_{b}" in own)
    if rectangular:
        raise UndefinedMapException(f"{fn.type_name}: give a list instead of {', '.join(rectangular)}")
    if "kernel_size" not in own:
        raise UndefinedMapException(f"{fn.type_name} without kernel_size")
    kernel, dilation, stride, pad = (
        np.array(own.get(name, default), ndmin=1)
        for name, default in (("kernel_size", 1), ("dilation", 1), ("stride", 1), ("pad", 0))
    )
    return own.get("axis", 1), stride, (kernel - 1) * dilation + 1, pad


def _shrink(fn: Function) -> Map:
    axis, stride, size, pad = _window(fn)
    return axis, 1 / stride, (pad - (size - 1) / 2) / stride


def _grow(fn: Function) -> Map:
    axis, stride, size, pad = _window(fn)
    return axis, stride, (size - 1) / 2 - pad


def _cut(fn: Function) -> Map:
    own = fn.params.get("crop_param", fn.params)
    return own.get("axis", 2) - 1, 1, -np.array(own.get("offset", 0), ndmin=1)


_MAPS: dict[str, Callable[[Function], Map]] = {
    "Convolution": _shrink, "Pooling": _shrink, "Im2col": _shrink, "Deconvolution": _grow, "Crop": _cut,
    **{name: lambda fn: IDENTITY for name in PASS_THROUGH_LAYERS},
}  # fmt: skip


def coord_map(fn: Function) -> Map:
    """The map from a layer's bottom to its top. Raises UndefinedMapException."""
    if fn.type_name not in _MAPS:
        raise UndefinedMapException(f"{fn.type_name} layers have no coordinate map")
    return _MAPS[fn.type_name](fn)


def compose(base_map: Map, next_map: Map) -> Map:
    """First `next_map`, then `base_map`. Raises AxisMismatchException."""
    axis1, a1, b1 = base_map
    axis2, a2, b2 = next_map
    if None not in (axis1, axis2) and axis1 != axis2:
        raise AxisMismatchException(f"one map begins at axis {axis1}, the other at axis {axis2}")
    return axis2 if axis1 is None else axis1, a1 * a2, a1 * b2 + b1


def inverse(coord_map: Map) -> Map:
    """The map backwards."""
    axis, a, b = coord_map
    return axis, 1 / a, -b / a


def coord_map_from_to(top_from: Top, top_to: Top) -> Map:
    """The map from pixels of one top to pixels of another, which have a common ancestor.

    Raises DisconnectedError (a RuntimeError) where spatial layers do not connect them.
    """
    here = _ancestors(top_from)
    for top, there in _ancestors(top_to).items():
        if top in here:
            return compose(there, inverse(here[top]))
    raise DisconnectedError("no chain of spatial layers connects the two tops")


def _ancestors(top: Top) -> dict[Top, Map]:
    """A top and all it comes from, nearest first, with the map from each to it."""
    found: dict[Top, Map] = {top: IDENTITY}
    queue = [top]
    for here in queue:  # grows while it is walked
        try:
            step = coord_map(here.fn)
        except UndefinedMapException:
            continue
        sources = here.fn.inputs[:1] if _MAPS[here.fn.type_name] is _cut else here.fn.inputs
        for source in sources:
            if source not in found:
                found[source] = compose(found[here], step)
                queue.append(source)
    return found


def crop(top_from: Top, top_to: Top) -> Any:
    """A Crop layer that cuts `top_from` to the pixels of `top_to`. Raises CropError (an AssertionError)."""
    axis, a, b = coord_map_from_to(top_from, top_to)
    a, b = np.atleast_1d(a), np.atleast_1d(b)
    if (a != 1).any():
        raise CropError(f"the tops differ in scale by {a}: cropping does not align them")
    if (b > 0).any():
        raise CropError(f"the offset {-b} is negative: the first top begins inside of the second")
    if (np.round(b) != b).any():
        raise CropError(f"the offset {-b} is not a whole number of pixels")
    first = 1 if axis is None else axis
    offset = [int(-x) for x in np.round(b)]
    return layers.Crop(top_from, top_to, crop_param={"axis": first + 1, "offset": offset})
