"""Weights of a net in and out of `ModelFile`: by layer name, blobs by index, as Caffe's CopyTrainedLayersFrom and
ToProto."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from caffejacinto_py.engine.arrays import lazy_array
from caffejacinto_py.errors import LayerError, WeightsError
from caffejacinto_py.schema.mark import mark_model
from caffejacinto_py.schema.weights import LayerBlobs, ModelFile, shapes_match

if TYPE_CHECKING:
    from caffejacinto_py.engine.net import Net


@dataclass
class LoadReport:
    """What a weights file did to a net: layer names, and lines worth logging."""

    loaded: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)  # in the file, not in the net
    untouched: list[str] = field(default_factory=list)  # with blobs in the net, not in the file
    warnings: list[str] = field(default_factory=list)


def load(net: Net, model: ModelFile, *, ignore_shape_mismatch: bool = False) -> LoadReport:
    """Copy blobs into the layers of the same name. Nothing is changed when an error is raised.

    ignore_shape_mismatch: blobs of equal size but other shape are copied flat, others are skipped, each with a warning
    (caffe-jacinto). Raises WeightsError naming layer, blob and both shapes.
    """
    report = LoadReport()
    layers = {n.name: n.layer for n in net.graph.nodes}
    copies: list[tuple[torch.nn.Parameter, np.ndarray]] = []
    for entry in model.layers:
        if entry.name not in net.params:
            if entry.blobs:
                report.ignored.append(entry.name)
            continue
        if entry.blobs:
            copies += _match(net, layers[entry.name], entry, model, ignore_shape_mismatch, report)
            report.loaded.append(entry.name)
    with torch.no_grad():
        for param, array in copies:
            param.copy_(torch.from_numpy(np.array(array)).reshape(param.shape))
    done = set(report.loaded)
    report.untouched += [name for name in net.params if name not in done]
    return report


def _match(
    net: Net, layer: Any, entry: LayerBlobs, model: ModelFile, tolerant: bool, report: LoadReport
) -> list[tuple[torch.nn.Parameter, np.ndarray]]:
    params = net.params[entry.name]
    targets = net.blob_shapes[entry.name]
    try:
        # None: the file leaves the blob to the layer that owns it (HDF5)
        whole = all(b is not None for b in entry.blobs)
        arrays = layer.adapt(list(entry.blobs), targets) if whole else list(entry.blobs)
    except LayerError as e:
        raise WeightsError(f"{model.path}: {e.text}", hint=e.hint) from e
    hint = "rename the layer in the prototxt to train it from scratch, or use weights of the same net"
    if len(arrays) != len(params):
        text = f"{model.path}: layer '{entry.name}' has {len(arrays)} blobs in the file, {len(params)} in the net"
        if not tolerant:
            raise WeightsError(text, hint=hint)
        report.warnings.append(text + ": the common ones are copied")
    found = []
    for i, (param, array) in enumerate(zip(params, arrays, strict=False)):
        if array is None:
            continue
        legacy = i < len(entry.legacy) and entry.legacy[i] and array.ndim == 4  # adapt may have reshaped
        if not shapes_match(array.shape, legacy, targets[i]):
            text = f"{model.path}: layer '{entry.name}', blob {i}: shape {array.shape} in the file, "
            text += f"{targets[i]} in the net"
            if not tolerant:
                raise WeightsError(text, hint=hint)
            if array.size != param.numel():
                report.warnings.append(text + ": skipped")
                continue
            report.warnings.append(text + ": copied as it lies in memory")
        found.append((param, array))
    return found


def model(net: Net, *, diffs: bool = False, lazy: bool = False) -> ModelFile:
    """The net's layers and blobs, copied to C-contiguous arrays. A shared blob appears in each of its layers, as in
    Caffe. lazy: LazyArrays instead, to be written before the net changes."""
    take = lazy_array if lazy else _array
    entries = []
    borrowed = {user for p in net.graph.params for user in p.users[1:]}
    for node in net.graph.nodes:
        params = net.params.get(node.name, [])
        shapes = net.blob_shapes.get(node.name, [])
        entries.append(
            LayerBlobs(
                name=node.name,
                type=node.type,
                blobs=[take(p).reshape(s) for p, s in zip(params, shapes, strict=True)],
                diffs=[take(p if p.grad is None else p.grad, zero=p.grad is None) for p in params] if diffs else [],
                proto=node.proto,
                bottoms=[v.name for v in node.inputs],
                tops=[v.name for v in node.outputs if v.name != "(automatic)"],
                shared=[i for i in range(len(params)) if (node.name, i) in borrowed],
            )
        )
    made = ModelFile(name=net.graph.name, layers=entries)
    made.dialect = net.graph.dialect.name
    if net.hook is not None:
        net.hook.saving(net, made)
    return mark_model(made, net.graph.dialect.name)


def _array(tensor: torch.Tensor, *, zero: bool = False) -> np.ndarray:
    return np.array(lazy_array(tensor, zero=zero))
