"""V0 nets (2013: `layers { layer { type: "conv" ... } }`) to V1. Source: bvlc util/upgrade_proto.cpp."""

from __future__ import annotations

from typing import Any

from caffejacinto_py.errors import PrototxtError
from caffejacinto_py.schema.pool import pb
from caffejacinto_py.schema.scan import Field, Locs

_TYPES = {
    "accuracy": "ACCURACY",
    "bnll": "BNLL",
    "concat": "CONCAT",
    "conv": "CONVOLUTION",
    "data": "DATA",
    "dropout": "DROPOUT",
    "euclidean_loss": "EUCLIDEAN_LOSS",
    "flatten": "FLATTEN",
    "hdf5_data": "HDF5_DATA",
    "hdf5_output": "HDF5_OUTPUT",
    "im2col": "IM2COL",
    "images": "IMAGE_DATA",
    "infogain_loss": "INFOGAIN_LOSS",
    "innerproduct": "INNER_PRODUCT",
    "lrn": "LRN",
    "multinomial_logistic_loss": "MULTINOMIAL_LOGISTIC_LOSS",
    "pool": "POOLING",
    "relu": "RELU",
    "sigmoid": "SIGMOID",
    "softmax": "SOFTMAX",
    "softmax_loss": "SOFTMAX_LOSS",
    "split": "SPLIT",
    "tanh": "TANH",
    "window_data": "WINDOW_DATA",
}
_CONV, _IP, _POOL, _LRN = "convolution_param", "inner_product_param", "pooling_param", "lrn_param"
_SOURCES = {"data": "data_param", "hdf5_data": "hdf5_data_param", "images": "image_data_param"}
_WEIGHTED = {"conv": _CONV, "innerproduct": _IP}
_WINDOWED = {"conv": _CONV, "pool": _POOL}
_BATCHED = {**_SOURCES, "window_data": "window_data_param"}
_WINDOW = {"window_data": "window_data_param"}
_ANY = {"": "transform_param"}

# V0 field -> (new name, V0 layer type -> parameter message that gets it; "" = any type)
_FIELDS: dict[str, tuple[str, dict[str, str]]] = {
    "num_output": ("num_output", _WEIGHTED),
    "biasterm": ("bias_term", _WEIGHTED),
    "weight_filler": ("weight_filler", _WEIGHTED),
    "bias_filler": ("bias_filler", _WEIGHTED),
    "pad": ("pad", _WINDOWED),
    "kernelsize": ("kernel_size", _WINDOWED),
    "stride": ("stride", _WINDOWED),
    "group": ("group", {"conv": _CONV}),
    "pool": ("pool", {"pool": _POOL}),
    "dropout_ratio": ("dropout_ratio", {"dropout": "dropout_param"}),
    "local_size": ("local_size", {"lrn": _LRN}),
    "alpha": ("alpha", {"lrn": _LRN}),
    "beta": ("beta", {"lrn": _LRN}),
    "k": ("k", {"lrn": _LRN}),
    "source": ("source", {**_BATCHED, "infogain_loss": "infogain_loss_param"}),
    "scale": ("scale", _ANY),
    "meanfile": ("mean_file", _ANY),
    "cropsize": ("crop_size", _ANY),
    "mirror": ("mirror", _ANY),
    "batchsize": ("batch_size", _BATCHED),
    "rand_skip": ("rand_skip", {"data": "data_param", "images": "image_data_param"}),
    "shuffle_images": ("shuffle", {"images": "image_data_param"}),
    "new_height": ("new_height", {"images": "image_data_param"}),
    "new_width": ("new_width", {"images": "image_data_param"}),
    "concat_dim": ("concat_dim", {"concat": "concat_param"}),
    "det_fg_threshold": ("fg_threshold", _WINDOW),
    "det_bg_threshold": ("bg_threshold", _WINDOW),
    "det_fg_fraction": ("fg_fraction", _WINDOW),
    "det_context_pad": ("context_pad", _WINDOW),
    "det_crop_mode": ("crop_mode", _WINDOW),
}
_SAME = ("name", "blobs", "blobs_lr", "weight_decay", "hdf5_output_param")


def needs_v0(message: Any) -> bool:
    return any(layer.HasField("layer") for layer in message.layers)


def fold_padding(message: Any, locs: Locs) -> list[str]:
    """Remove `padding` layers: the convolution or pooling behind one gets its `pad` and its bottom."""
    if not needs_v0(message):
        return []
    fields = _layer_fields(locs, len(message.layers))
    kept: list[Any] = []
    kept_fields: list[Field] = []
    producer: dict[str, Any] = dict.fromkeys(message.input)
    for original, field in zip(message.layers, fields, strict=True):
        layer = pb.V1LayerParameter()
        layer.CopyFrom(original)
        for index, bottom in enumerate(layer.bottom):
            if bottom not in producer:
                raise _error(locs, field, layer, f"bottom '{bottom}' is not produced by any earlier layer")
            source = producer[bottom]
            if source is None or source.layer.type != "padding":
                continue
            if layer.layer.type not in ("conv", "pool"):
                raise _error(locs, field, layer, "only conv and pool can follow a padding layer")
            if len(layer.bottom) != 1 or len(source.bottom) != 1 or len(source.top) != 1:
                raise _error(locs, field, layer, "a padding layer and the layer behind it have one bottom and one top")
            layer.layer.pad = source.layer.pad
            layer.bottom[index] = source.bottom[0]
        producer.update(dict.fromkeys(layer.top, layer))
        if layer.layer.type != "padding":
            kept.append(layer)
            kept_fields.append(field)
    removed = len(fields) - len(kept)
    if removed:
        del message.layers[:]
        message.layers.extend(kept)
        locs.root.children["layers"] = kept_fields
    return [f"{removed} padding layers folded into the layers behind them"] if removed else []


def v0_to_v1(message: Any, locs: Locs) -> list[str]:
    """Each nested `layer` becomes fields of its V1 layer; what its type cannot hold is dropped with a notice."""
    if not needs_v0(message):
        return []
    fields = _layer_fields(locs, len(message.layers))
    notices = ["V0 layers upgraded to V1"]
    new_layers, new_fields = [], []
    for layer, field in zip(message.layers, fields, strict=True):
        new, new_field = _upgrade_layer(layer, field, locs, notices)
        new_layers.append(new)
        new_fields.append(new_field)
    del message.layers[:]
    message.layers.extend(new_layers)
    locs.root.children["layers"] = new_fields
    return notices


def _upgrade_layer(layer: Any, field: Field, locs: Locs, notices: list[str]) -> tuple[Any, Field]:
    old, old_field = layer.layer, field.first("layer") or Field()
    new = pb.V1LayerParameter(bottom=layer.bottom, top=layer.top)
    new_field = Field("layers", field.start, field.at, field.end)
    new_field.children = {k: v for k, v in field.children.items() if k != "layer"}
    for spec, _ in layer.ListFields():
        if spec.name not in ("layer", "bottom", "top"):  # a V1 field beside the nested layer
            notices.append(_dropped(locs, field.first(spec.name) or field, spec.name, layer))
    if old.HasField("type"):
        if old.type not in _TYPES:
            raise _error(locs, old_field, layer, f"unknown V0 layer type '{old.type}'")
        new.type = pb.V1LayerParameter.LayerType.Value(_TYPES[old.type])
    for spec, value in old.ListFields():
        if spec.name == "type":
            target, name = None, "type"
        elif spec.name in _SAME:
            target, name = new, spec.name
            _put(new, name, value)
        else:
            name, homes = _FIELDS[spec.name]
            target = homes.get(old.type, homes.get(""))
            if target is None:
                notices.append(_dropped(locs, old_field.first(spec.name) or field, spec.name, layer))
                continue
            _put(getattr(new, target), name, value)
        for place in old_field.children.get(spec.name, ()):
            home = new_field if not isinstance(target, str) else _child(new_field, target, place)
            home.add(place.moved(name))
    return new, new_field


def _put(message: Any, name: str, value: Any) -> None:
    """Set a field of any kind; a scalar goes to the end of a repeated one."""
    held = getattr(message, name)
    if hasattr(value, "CopyFrom"):
        held.CopyFrom(value)
    elif hasattr(held, "extend"):
        held.extend(value if hasattr(value, "extend") else [value])
    else:
        setattr(message, name, value)


def _child(parent: Field, name: str, place: Field) -> Field:
    """The (made up) message field `name`; it stands where the first field in it stands."""
    found = parent.first(name)
    if found is None:
        found = Field(name, place.start, place.at, place.end)
        parent.add(found)
    return found


def _layer_fields(locs: Locs, count: int) -> list[Field]:
    """The places of `layers`, one for each; empty places where there is no text (binary files)."""
    fields = locs.root.children.get("layers", [])
    return list(fields) if len(fields) == count else [Field("layers") for _ in range(count)]


def _name(layer: Any) -> str:
    return layer.layer.name or layer.name


def _error(locs: Locs, field: Field, layer: Any, text: str) -> PrototxtError:
    return PrototxtError(f"layer '{_name(layer)}': {text}", loc=locs.loc(field), hint="this is a V0 net (2013)")


def _dropped(locs: Locs, field: Field, name: str, layer: Any) -> str:
    where = locs.loc(field)
    kind = layer.layer.type or "this"
    return (
        f"{where}: " * bool(where)
        + f"layer '{_name(layer)}': '{name}' means nothing to a '{kind}' layer and is dropped"
    )
