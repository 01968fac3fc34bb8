"""`caffe.io`: BlobProto and Datum messages to and from numpy, and images made ready for a net."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from caffejacinto_py.errors import DataError, Loc, UsageError
from caffejacinto_py.pycaffe.proto import caffe_pb2
from caffejacinto_py.schema import pb
from caffejacinto_py.schema.blobs import array_to_blob, blob_to_array

__all__ = [
    "Transformer", "array_to_blobproto", "array_to_datum", "arraylist_to_blobprotovecor_str",
    "arraylist_to_blobprotovector_str", "blobproto_to_array", "blobprotovector_str_to_arraylist", "caffe_pb2",
    "datum_to_array", "load_image", "oversample", "resize_image",
]  # fmt: skip


class ShapeError(DataError, ValueError):
    """Values without a shape, or of another number than the shape says."""


def blobproto_to_array(blob: Any, return_diff: bool = False) -> np.ndarray:
    """The values (or the gradients) of a BlobProto, in its shape; one value without a shape is a scalar. Raises
    ShapeError.
    """
    if return_diff:
        values = pb.BlobProto()
        values.CopyFrom(blob)
        del values.data[:]
        values.data.extend(blob.diff)
        blob = values
    legacy = any(blob.HasField(f) for f in ("num", "channels", "height", "width"))
    if not legacy and not blob.HasField("shape"):
        if len(blob.data) != 1:
            raise ShapeError(f"a BlobProto of {len(blob.data)} values has no shape")
        return np.array(blob.data[0], np.float32)
    return blob_to_array(blob)


def array_to_blobproto(arr: np.ndarray, diff: np.ndarray | None = None) -> Any:
    """A BlobProto with the array's shape and values, and gradients where given."""
    blob = array_to_blob(np.asarray(arr))
    if diff is not None:
        blob.diff.extend(np.asarray(diff, np.float32).ravel())
    return blob


def arraylist_to_blobprotovector_str(arraylist: Sequence[np.ndarray]) -> bytes:
    """Several arrays as a serialized BlobProtoVector."""
    vector = pb.BlobProtoVector()
    vector.blobs.extend([array_to_blobproto(a) for a in arraylist])
    return vector.SerializeToString()


arraylist_to_blobprotovecor_str = arraylist_to_blobprotovector_str  # as older releases spell it


def blobprotovector_str_to_arraylist(text: bytes) -> list[np.ndarray]:
    """The arrays of a serialized BlobProtoVector."""
    return [blobproto_to_array(b) for b in pb.BlobProtoVector.FromString(text).blobs]


def array_to_datum(arr: np.ndarray, label: int | None = None) -> Any:
    """A Datum of a C x H x W array: uint8 as bytes, anything else as floats."""
    if arr.ndim != 3:
        raise UsageError(f"array_to_datum takes channels x height x width, not {arr.ndim} axes")
    datum = pb.Datum(channels=arr.shape[0], height=arr.shape[1], width=arr.shape[2])
    if arr.dtype == np.uint8:
        datum.data = arr.tobytes()
    else:
        datum.float_data.extend(arr.astype(float).ravel())
    if label is not None:
        datum.label = label
    return datum


def datum_to_array(datum: Any) -> np.ndarray:
    """The C x H x W array of a Datum that is not encoded."""
    if datum.encoded:
        raise DataError("datum_to_array: the Datum holds an encoded image; decode it with cv2.imdecode")
    shape = (datum.channels, datum.height, datum.width)
    flat = np.frombuffer(datum.data, np.uint8) if datum.data else np.array(datum.float_data, np.float64)
    if flat.size != int(np.prod(shape)):
        raise DataError(f"the Datum has {flat.size} values for the shape {shape}")
    return flat.reshape(shape).astype(flat.dtype if flat.dtype == np.uint8 else float)


class Transformer:
    """Brings images (H x W x C, as `load_image` makes them) into the form a net's input wants, and back.

    inputs: blob name -> shape, e.g. ``{"data": net.blobs["data"].data.shape}``. Order of `preprocess`: resize,
    transpose, channel swap, raw scale, minus mean, input scale.
    """

    def __init__(self, inputs: dict[str, Sequence[int]]) -> None:
        self.inputs = {name: tuple(shape) for name, shape in inputs.items()}
        self.transpose: dict[str, Sequence[int]] = {}
        self.channel_swap: dict[str, Sequence[int]] = {}
        self.raw_scale: dict[str, float] = {}
        self.mean: dict[str, np.ndarray] = {}
        self.input_scale: dict[str, float] = {}

    def preprocess(self, in_: str, data: np.ndarray) -> np.ndarray:
        """One image for input `in_`, float32."""
        self._check(in_)
        out = data.astype(np.float32, copy=True)
        if out.shape[:2] != self.inputs[in_][2:]:
            out = resize_image(out, self.inputs[in_][2:])
        if in_ in self.transpose:
            out = out.transpose(self.transpose[in_])
        if in_ in self.channel_swap:
            out = out[list(self.channel_swap[in_]), :, :]
        out = out * np.float32(self.raw_scale.get(in_, 1.0))
        if in_ in self.mean:
            out = out - self.mean[in_]
        return (out * np.float32(self.input_scale.get(in_, 1.0))).astype(np.float32)

    def deprocess(self, in_: str, data: np.ndarray) -> np.ndarray:
        """The image of what `preprocess` made (its size stays the net's)."""
        self._check(in_)
        out = np.squeeze(data).astype(np.float32, copy=True)
        out = out / np.float32(self.input_scale.get(in_, 1.0))
        if in_ in self.mean:
            out = out + self.mean[in_]
        out = out / np.float32(self.raw_scale.get(in_, 1.0))
        if in_ in self.channel_swap:
            out = out[np.argsort(self.channel_swap[in_]), :, :]
        if in_ in self.transpose:
            out = out.transpose(np.argsort(self.transpose[in_]))
        return out

    def set_transpose(self, in_: str, order: Sequence[int]) -> None:
        """Order of axes, (2, 0, 1) for H x W x C to C x H x W."""
        self._check(in_)
        if len(order) != len(self.inputs[in_]) - 1:
            raise UsageError(f"set_transpose: {len(order)} axes for an image of {len(self.inputs[in_]) - 1}")
        self.transpose[in_] = order

    def set_channel_swap(self, in_: str, order: Sequence[int]) -> None:
        """Order of channels, (2, 1, 0) for RGB to BGR."""
        self._check(in_)
        if len(order) != self.inputs[in_][1]:
            raise UsageError(f"set_channel_swap: {len(order)} channels for an input of {self.inputs[in_][1]}")
        self.channel_swap[in_] = order

    def set_raw_scale(self, in_: str, scale: float) -> None:
        """Factor before the mean is taken off: 255 for images in [0, 1]."""
        self._check(in_)
        self.raw_scale[in_] = scale

    def set_input_scale(self, in_: str, scale: float) -> None:
        """Factor after the mean is taken off."""
        self._check(in_)
        self.input_scale[in_] = scale

    def set_mean(self, in_: str, mean: np.ndarray) -> None:
        """What is subtracted: one value a channel (or for all), or a C x H x W or H x W image, which is resized to the
        input.
        """
        self._check(in_)
        mean = np.asarray(mean, np.float32)
        channels, size = self.inputs[in_][1], self.inputs[in_][2:]
        if mean.ndim == 2:
            mean = mean[None]
        if mean.ndim == 1:
            if mean.shape[0] not in (1, channels):
                raise UsageError(f"set_mean: {mean.shape[0]} values for {channels} channels")
            mean = mean[:, None, None]
        elif mean.ndim != 3 or mean.shape[0] not in (1, channels):
            raise UsageError(f"set_mean: a mean of shape {mean.shape} does not fit the input {self.inputs[in_]}")
        elif mean.shape[1:] != size:
            low, high = float(mean.min()), float(mean.max())
            mean = resize_image(mean.transpose(1, 2, 0), size).transpose(2, 0, 1).clip(low, high)
        self.mean[in_] = mean

    def _check(self, in_: str) -> None:
        if in_ not in self.inputs:
            raise UsageError(f"'{in_}' is not one of the inputs {sorted(self.inputs)}")


def load_image(filename: str | os.PathLike[str], color: bool = True) -> np.ndarray:
    """An image file as H x W x 3 RGB (color) or H x W x 1, float32 in [0, 1]. Raises DataError."""
    import cv2

    image = cv2.imread(os.fspath(filename), cv2.IMREAD_COLOR if color else cv2.IMREAD_GRAYSCALE)
    if image is None:
        raise DataError("cannot read this as an image", loc=Loc(os.fspath(filename)))
    image = image[:, :, ::-1] if color else image[:, :, None]
    return image.astype(np.float32) / np.float32(255)


def resize_image(im: np.ndarray, new_dims: Sequence[int] | np.ndarray, interp_order: int = 1) -> np.ndarray:
    """H x W x K float image to (height, width); interp_order 0: nearest, 1: linear, 3: cubic."""
    import cv2

    modes = {0: cv2.INTER_NEAREST, 1: cv2.INTER_LINEAR, 3: cv2.INTER_CUBIC}
    if interp_order not in modes:
        raise UsageError(f"interp_order {interp_order} is not one of 0, 1, 3")
    height, width = (int(d) for d in new_dims)
    mode = modes[interp_order]
    planes = [np.ascontiguousarray(im[:, :, k], np.float32) for k in range(im.shape[2])]
    return np.stack([cv2.resize(p, (width, height), interpolation=mode) for p in planes], axis=2)


def oversample(images: Sequence[np.ndarray], crop_dims: Sequence[int] | np.ndarray) -> np.ndarray:
    """Four corners and the center of each image, and their mirror images: (10 N) x H x W x K."""
    height, width = (int(d) for d in crop_dims)
    crops = []
    for im in images:
        h, w = im.shape[:2]
        ys, xs = (0, h - height), (0, w - width)
        places = [(y, x) for y in ys for x in xs] + [((h - height) // 2, (w - width) // 2)]
        five = [im[y : y + height, x : x + width] for y, x in places]
        crops += five + [c[:, ::-1] for c in five]
    return np.stack(crops).astype(np.float32)
