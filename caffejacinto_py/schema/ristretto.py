"""Ristretto's enum values under the names of today, whatever a file calls them.

Two forks gave `precision` and `rounding_scheme` of QuantizationParameter different numbers; where a layer is of a type
that only Ristretto has, the numbers and the names of its first versions are its own. Source: Ristretto's caffe.proto
before and after commit fc109ba; caffe-jacinto's caffe.proto.
"""

from __future__ import annotations

from typing import Any

from caffejacinto_py.errors import PrototxtError
from caffejacinto_py.schema.pool import descriptor
from caffejacinto_py.schema.scan import Locs

FIELD = "quantization_param"
_LONG = "QuantizationParameter_"  # caffe-jacinto's names start with it
_PRECISION = ("DYNAMIC_FIXED_POINT", "MINIFLOAT", "INTEGER_POWER_OF_2_WEIGHTS")
_NAMES: dict[str, dict[Any, str]] = {
    "precision": {
        **dict(enumerate(_PRECISION)),
        **dict(zip(("FIXED_POINT", "MINI_FLOATING_POINT", "POWER_2_WEIGHTS"), _PRECISION, strict=True)),
    },
    "rounding_scheme": {0: "NEAREST", 1: "STOCHASTIC"},
}


def is_ristretto(kind: str) -> bool:
    """Whether only Ristretto has this layer type."""
    return kind.endswith("Ristretto")


def ristretto_names(message: Any, locs: Locs) -> list[str]:
    """An upgrade step: precision and rounding of Ristretto's layers, given as numbers or old names, get today's names.

    Raises PrototxtError for caffe-jacinto's names there, which mean something else, and for Ristretto's 2 elsewhere.
    """
    changed = 0
    for index, layer in enumerate(message.layer):
        if not layer.HasField(FIELD):
            continue
        param = getattr(layer, FIELD)
        for field, names in _NAMES.items():
            place = ("layer", index, FIELD, field)
            if not param.HasField(field):
                continue
            if is_ristretto(layer.type):
                _refuse_long(layer.name, locs, index, field)
                changed += _rename(param, field, names)
            elif getattr(param, field) == 2:
                text = f"layer '{layer.name}': {field} 2 is Ristretto's, but a {layer.type} has caffe-jacinto's 0 or 1"
                raise PrototxtError(text, loc=locs.find(place), hint="types of Ristretto end in Ristretto")
    return [f"{changed} precision and rounding values of Ristretto under today's names"] if changed else []


def _rename(param: Any, field: str, names: dict[Any, str]) -> bool:
    """Whether the value was given as a number or under an old name."""
    values: Any = descriptor("QuantizationParameter").fields_by_name[field].enum_type
    number = getattr(param, field)
    new = names.get(number, names.get(values.values_by_number[number].name))
    if new is not None:
        setattr(param, field, values.values_by_name[new].number)
    return new is not None


def _refuse_long(layer: str, locs: Locs, index: int, field: str) -> None:
    group = locs.root.children.get("layer", [])
    param = group[index].first(FIELD) if index < len(group) else None
    value = param.first(field) if param else None
    if value is not None and (value.value or "").startswith(_LONG):
        text = f"layer '{layer}': {value.value} is a value of caffe-jacinto, but this is a layer of Ristretto"
        hint = f"one of: {', '.join(dict.fromkeys(_NAMES[field].values()))}"
        raise PrototxtError(text, loc=locs.find(("layer", index, FIELD, field)), hint=hint)
