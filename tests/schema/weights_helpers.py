"""Small models and wire messages made by hand, and what every damaged file must do."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from caffejacinto_py.schema import pb, wire
from caffejacinto_py.schema.weights import ModelFile


def net_of(*blobs: bytes, name: str = "l", kind: str = "InnerProduct") -> bytes:
    """A V2 net with one layer that holds these serialized BlobProtos."""
    body = wire.string(1, name) + wire.string(2, kind) + b"".join(wire.block(7, b) for b in blobs)
    return wire.string(1, "n") + wire.block(100, body)


def shape(*dims: int) -> bytes:
    return wire.block(7, wire.block(1, b"".join(wire.varint(d) for d in dims)))


def saved(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def by_protobuf(model: ModelFile, *, diffs: bool = False) -> bytes:
    """The file that protobuf's own library writes for a model of float32 and float64 blobs."""
    net = pb.NetParameter(name=model.name)
    for layer in model.layers:
        message = net.layer.add()
        message.CopyFrom(layer.proto)
        message.name = layer.name
        del message.blobs[:]
        for i, array in enumerate(layer.blobs):
            blob = message.blobs.add()
            double = array.dtype == np.float64
            if array.ndim:
                blob.shape.dim.extend(array.shape)
            (blob.double_data if double else blob.data).extend(array.reshape(-1).astype(float).tolist())
            if diffs:
                (blob.double_diff if double else blob.diff).extend(layer.diffs[i].reshape(-1).astype(float).tolist())
    return net.SerializeToString(deterministic=True)
