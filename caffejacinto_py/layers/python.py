"""Layers that are written in Python by the user, and HDF5Output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from caffejacinto_py.layers.base import Blob, Layer, Shape
from caffejacinto_py.layers.registry import UnknownLayer, layer

if TYPE_CHECKING:
    import torch
    from torch import nn


class Refused(UnknownLayer):
    """A Python layer where user code may not run (`Context.python_layers`)."""


@layer("Python", bottoms=(0, None), tops=(0, None), field="python_param")
class Python(Layer):
    """A class of the user, derived from `caffe.Layer`: setup, reshape, forward and backward on blobs.

    Bottoms and tops: any number; without bottoms it is a data layer. python_param: module and layer (the class), both
    required; param_str, handed over as `self.param_str`; share_in_parallel has no effect. The user's `setup` runs once,
    when shapes are worked out; `reshape` again before every forward. Learnable blobs are what `setup` added to
    `self.blobs`, with the values it gave them. The user's arrays are copies: what it writes into `bottom[i].data` is
    not seen by other layers, unless top and bottom are the same blob. Runs only where python layers are allowed.
    Source: BVLC python_layer.
    """

    lasting = True
    stateful_forward = True
    channels_last = False

    def __init__(self, proto: Any, context: Any, ntop: int) -> None:
        super().__init__(proto, context, ntop)
        self._code: Any = None

    @property
    def instance(self) -> Any:
        """The user's object, once shapes have been worked out; None before."""
        return None if self._code is None else self._code.user

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        for name in ("module", "layer"):
            if not getattr(self.param, name):
                raise self.fail(f"python_param needs {name}", "python_param", hint='module: "file" layer: "Class"')
        if not self.context.python_layers:
            raise self._refused()
        from caffejacinto_py.layers.modules.python import UserCode

        if self._code is None:
            self._code = UserCode(self, ins)
        return list(self._code.shapes(ins))

    def _refused(self) -> Refused:
        text = f"runs the code of class '{self.param.layer}' in Python module '{self.param.module}'"
        hint = "if you trust that code, allow it with --allow-python-layers (pycaffe allows it)"
        error = Refused(f"layer '{self.name}' ({self.type}): {text}, which is not allowed", field=("type",), hint=hint)
        error.type = self.type
        return error

    def blobs(self, ins: Sequence[Shape]) -> list[Blob]:
        if self._code is None:
            self.shapes(ins)
        return [Blob(tuple(b.shape), value=b.data) for b in self._code.user.blobs]

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules.python import Python as Module

        return Module(self._code, blobs)


@layer("HDF5Output", bottoms=(2, 2), tops=(0, 0), field="hdf5_output_param", v1="HDF5_OUTPUT")
class HDF5Output(Layer):
    """Writes its bottoms to an HDF5 file: datasets "data" and "label", a row for each item.

    hdf5_output_param: file_name, required. The file is made anew at the first forward; later ones append their rows
    (Caffe fails at the second). Source: BVLC hdf5_output_layer.
    """

    stateful_forward = True

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        if not self.param.file_name:
            raise self.fail("hdf5_output_param needs file_name", "hdf5_output_param")
        if not ins[0] or not ins[1] or ins[0][0] != ins[1][0]:
            raise self.fail(f"data {ins[0]} and label {ins[1]} must have the same number of items", "bottom", 1)
        return []

    def differentiable(self, i: int) -> bool:
        return False

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules.python import HDF5Output as Module

        return Module(self.param.file_name)
