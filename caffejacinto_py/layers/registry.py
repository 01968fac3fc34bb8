"""The one table of layer types. Nothing outside this room compares layer-type strings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from caffejacinto_py.errors import LayerError, Loc, near
from caffejacinto_py.layers.base import Layer


class UnknownLayer(LayerError):
    """A layer of `type`, of which nothing is known: not registered, or user code that may not run."""

    type = ""


_TYPES: dict[str, type[Layer]] = {}
L = TypeVar("L", bound=type[Layer])

_OWNERS = {  # types that a fork has and this program does not, yet
    "SSD / NVCaffe / caffe-jacinto": "AnnotatedData VideoData MultiBoxLoss PriorBox DetectionOutput DetectionEvaluate",
    "caffe-jacinto": "ImageLabelData ImageLabelListData SegmentationAccuracy IOUAccuracy",
    "NVCaffe": "TRT",
}


def layer(
    type: str,
    *,
    bottoms: tuple[int, int | None] = (1, 1),
    tops: tuple[int, int | None] = (1, 1),
    field: str | None = None,
    v1: str | None = None,
    forks: str = "all",
    spellings: tuple[str, ...] = (),
) -> Callable[[L], L]:
    """Register a layer class under its Caffe type name (and other spellings of it). A duplicate name raises."""

    def register(cls: L) -> L:
        cls.type, cls.v1, cls.bottoms, cls.tops, cls.field, cls.forks = type, v1, bottoms, tops, field, forks
        for name in (type, *spellings):
            if name in _TYPES:
                raise ValueError(f"layer type {name!r} is registered twice")
            _TYPES[name] = cls
        return cls

    return register


def known(type: str) -> bool:
    return type in _TYPES


def types() -> list[str]:
    """All registered type names, sorted."""
    return sorted(_TYPES)


def find(type: str, *, name: str = "", loc: Loc | None = None) -> type[Layer]:
    """The class of a layer type. Unknown: an error with near matches and the fork that owns it."""
    if type in _TYPES:
        return _TYPES[type]
    owner = next((fork for fork, names in _OWNERS.items() if type in names.split()), None)
    hint = f"'{type}' is a layer of {owner}, not supported yet" if owner else near(type, _TYPES)
    error = UnknownLayer(f"layer '{name}': unknown layer type '{type}'", loc=loc, field=("type",), hint=hint)
    error.type = type
    raise error


def make(proto: Any, context: Any, ntop: int, loc: Loc | None = None) -> Layer:
    """A Layer object for one LayerParameter."""
    return find(proto.type, name=proto.name, loc=loc)(proto, context, ntop)
