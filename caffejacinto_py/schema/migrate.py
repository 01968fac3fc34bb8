"""Weights files of every age as today's: a net of `layer` messages around the same blobs."""

from __future__ import annotations

from typing import Any

from caffejacinto_py.schema.modelfile import LayerBlobs, ModelFile
from caffejacinto_py.schema.pool import pb
from caffejacinto_py.schema.upgrade import upgrade_net

_LAYERS = ("name", "layer", "layers")


def upgrade_model(model: ModelFile) -> tuple[ModelFile, list[str]]:
    """The model with its net upgraded, and what was upgraded; the model itself where nothing was old.

    Blobs are not copied. Raises WeightsError where the stored net is not valid or cannot be upgraded.
    """
    net = pb.NetParameter()
    net.CopyFrom(model.net())  # V0 and V1 are upgraded there
    notices = [f"{model.version} layers upgraded to `layer`"] if model.old else []
    notices += upgrade_net(net)
    return (with_net(model, net) if notices else model), notices


def with_net(model: ModelFile, net: Any) -> ModelFile:
    """The blobs of `model`, by layer name, in the layers of another net: its types, bottoms, tops and fields.

    net: an upgraded NetParameter. Layers of the file that the net does not have are left out.
    """
    held = {entry.name: entry for entry in model.layers}
    head = pb.NetParameter()
    head.CopyFrom(net)
    for name in _LAYERS:
        head.ClearField(name)
    dialect = model.dialect
    layers = [_entry(layer, held.get(layer.name)) for layer in net.layer]
    return ModelFile(net.name or model.name, layers, model.path, dialect, head=head.SerializeToString())


def _entry(layer: Any, held: LayerBlobs | None) -> LayerBlobs:
    proto = pb.LayerParameter()
    proto.CopyFrom(layer)
    proto.ClearField("blobs")
    entry = LayerBlobs(layer.name, layer.type, proto=proto, bottoms=layer.bottom, tops=layer.top)
    if held is not None:
        entry.blobs, entry.diffs, entry.legacy = list(held.blobs), list(held.diffs), list(held.legacy)
        entry.shared = held.shared
    return entry
