"""V1 nets (2014: `layers { type: CONVOLUTION ... }`) to `layer`. Source: bvlc util/upgrade_proto.cpp."""

from __future__ import annotations

from typing import Any

from caffejacinto_py.errors import PrototxtError
from caffejacinto_py.schema.pool import pb
from caffejacinto_py.schema.scan import Field, Locs
from caffejacinto_py.schema.v1_types import V1_TYPES

_DATA = {"DATA": "data_param", "IMAGE_DATA": "image_data_param", "WINDOW_DATA": "window_data_param"}
_TRANSFORM = ("scale", "mean_file", "crop_size", "mirror")
# V1: one list per property, by blob; now: one ParamSpec per blob
_SPECS = {"param": "name", "blob_share_mode": "share_mode", "blobs_lr": "lr_mult", "weight_decay": "decay_mult"}


def data_transform(message: Any, locs: Locs) -> list[str]:
    """Move scale, mean_file, crop_size and mirror of V1 data layers into `transform_param`."""
    moved = 0
    for index, layer in enumerate(message.layers):
        home = _DATA.get(pb.V1LayerParameter.LayerType.Name(layer.type))
        if home is None or not layer.HasField(home):
            continue
        source = getattr(layer, home)
        place = _at(locs.root, "layers", index)
        for name in _TRANSFORM:
            if source.HasField(name):
                setattr(layer.transform_param, name, getattr(source, name))
                source.ClearField(name)
                moved += 1
                _move(place, home, "transform_param", name)
    return [f"{moved} transformation fields of data layers moved to transform_param"] if moved else []


def v1_to_v2(message: Any, locs: Locs) -> list[str]:
    """`layers` with enum types become `layer` with string types; lr and decay lists become ParamSpecs."""
    if not message.layers:
        return []
    if message.layer:
        place = locs.find(("layers", 0))
        raise PrototxtError(
            "a net has both 'layer' and 'layers'", loc=place, hint="use one of them, 'layer' is the new form"
        )
    places = [_at(locs.root, "layers", i) for i in range(len(message.layers))]
    for old in message.layers:
        _layer(old, message.layer.add())
    message.ClearField("layers")
    locs.root.children.pop("layers", None)
    locs.root.children["layer"] = [_layer_place(p) for p in places]
    return ["V1 layers upgraded"]


def _layer(old: Any, new: Any) -> None:
    for spec, value in old.ListFields():
        name = spec.name
        if name == "type":
            new.type = V1_TYPES[pb.V1LayerParameter.LayerType.Name(value)]
        elif name in _SPECS:
            for index, item in enumerate(value):
                while len(new.param) <= index:
                    new.param.add()
                setattr(new.param[index], _SPECS[name], item)
        elif hasattr(value, "CopyFrom"):
            getattr(new, name).CopyFrom(value)
        elif hasattr(value, "extend"):
            getattr(new, name).extend(value)
        else:
            setattr(new, name, value)


def _layer_place(old: Field) -> Field:
    new = Field("layer", old.start, old.at, old.end)
    for name, group in old.children.items():
        if name not in _SPECS:
            new.children[name] = group
            continue
        specs = new.children.setdefault("param", [])
        for index, place in enumerate(group):
            while len(specs) <= index:
                specs.append(Field("param", place.start, place.at, place.end))
            specs[index].add(place.moved(_SPECS[name]))
    return new


def _at(root: Field, name: str, index: int) -> Field:
    group = root.children.get(name, [])
    return group[index] if index < len(group) else Field(name)


def _move(layer: Field, source: str, target: str, name: str) -> None:
    home = layer.first(source)
    group = home.children.pop(name, []) if home else []
    if group:
        new = layer.first(target)
        if new is None:
            new = Field(target, group[0].start, group[0].at, group[0].end)
            layer.add(new)
        new.children[name] = group
