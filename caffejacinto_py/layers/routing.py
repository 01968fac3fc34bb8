"""Layers that choose, repeat or reorder parts of a blob; Parameter and Embed, which hand out learnable ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from caffejacinto_py.layers.base import Blob, IntegerForm, Layer, Shape
from caffejacinto_py.layers.fillers import filled_blob
from caffejacinto_py.layers.registry import layer

if TYPE_CHECKING:
    import torch
    from torch import nn


@layer("Tile", field="tile_param")
class Tile(Layer):
    """The whole bottom repeated `tiles` times along one axis.

    tile_param: axis (1), negative counts from the end; tiles, at least 1. Source: BVLC tile_layer.
    """

    def _axis(self, ndim: int) -> int:
        return self.axis(self.param.axis, ndim, "tile_param", "axis")

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        axis = self._axis(len(ins[0]))
        if self.param.tiles < 1:
            raise self.fail(f"tiles must be given and positive, not {self.param.tiles}", "tile_param", "tiles")
        return [(*ins[0][:axis], ins[0][axis] * self.param.tiles, *ins[0][axis + 1 :])]

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules.routing import Tile as Module

        return Module(self._axis(len(ins[0])), self.param.tiles)


@layer("BatchReindex", bottoms=(2, 2))
class BatchReindex(Layer):
    """top[i] = bottom 0[index[i]]: items chosen, repeated or reordered.

    Bottoms: x (N, ..); indices (M), whole numbers 0..N-1. Top: (M, ..). The gradient of an item is the sum over its
    copies; none to the indices. An index out of range raises DataError (on the CPU). Source: BVLC batch_reindex_layer.
    """

    def differentiable(self, i: int) -> bool:
        return i == 0

    def expects(self, i: int, ins: Sequence[Shape | None]) -> Shape | None:
        return ins[0][:1] if i == 1 and ins[0] else None

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        if not ins[0]:
            raise self.fail("bottom 0 is a single number: it has no items", "bottom", 0)
        if len(ins[1]) != 1:
            raise self.fail(f"bottom 1, the indices, must have one axis; it is {ins[1]}", "bottom", 1)
        return [(ins[1][0], *ins[0][1:])]

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules.routing import BatchReindex as Module

        return Module(f"layer '{self.name}' ({self.type}): blob '{self.proto.bottom[1]}'")


@layer("Filter", bottoms=(2, None), tops=(1, None))
class Filter(Layer):
    """Keeps the items whose selector is not 0.

    Bottoms: any number of blobs (N, ..); last: the selector, N numbers (N, 1, ..). Tops: one for each bottom but the
    selector, with as many items as were kept, perhaps none. Shape inference counts all N, as Caffe's first reshape
    does; the real number is known at run time only. No gradient to the selector. Source: BVLC filter_layer.
    """

    def differentiable(self, i: int) -> bool:
        return i < len(self.proto.bottom) - 1

    def expects(self, i: int, ins: Sequence[Shape | None]) -> Shape | None:
        return ins[0][:1] if i == len(ins) - 1 and ins[0] else None

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        *data, selector = ins
        if self.ntop != len(data):
            text = f"one top for each bottom but the selector, the last: {len(ins)} bottoms, {self.ntop} tops"
            raise self.fail(text, "top")
        if not selector or math.prod(selector[1:]) != 1:
            raise self.fail(f"the selector must have one number an item; it is {selector}", "bottom", len(data))
        for i, shape in enumerate(data):
            if not shape or shape[0] != selector[0]:
                raise self.fail(f"the selector has {selector[0]} items, bottom {i} is {shape}", "bottom", i)
        return data

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules.routing import Filter as Module

        return Module()


@layer("Permute", field="permute_param", forks="ssd, nvcaffe, jacinto, jacinto-0.16")
class Permute(Layer):
    """Axes in another order: axis i of the top is axis order[i] of the bottom. A view.

    permute_param: order: different axes; those not named follow in their old order; none: nothing changes.
    Source: SSD permute_layer.
    """

    narrows = "moves"
    is_view = True

    def _order(self, ndim: int) -> list[int]:
        order = list(self.param.order)
        for i, axis in enumerate(order):
            if axis >= ndim:
                text = f"axis {axis} is out of range for a blob of {ndim} axes"
                raise self.fail(text, "permute_param", "order", i)
            if axis in order[:i]:
                raise self.fail(f"axis {axis} is named twice", "permute_param", "order", i)
        return order + [a for a in range(ndim) if a not in order]

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        return [tuple(ins[0][a] for a in self._order(len(ins[0])))]

    def integer_form(self, ins: Sequence[Shape]) -> IntegerForm | None:
        return IntegerForm("permute", {"order": self._order(len(ins[0]))})

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules.routing import Permute as Module

        return Module(self._order(len(ins[0])))


@layer("Parameter", bottoms=(0, 0), field="parameter_param", forks="bvlc, ssd, adaption, ristretto")
class Parameter(Layer):
    """A learnable blob as a top. No bottoms.

    Blobs: one of the given shape, zeros at first. Top: that blob. parameter_param: shape.
    Source: BVLC parameter_layer.
    """

    is_view = True  # whoever overwrites the top would overwrite the parameter

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        dims = tuple(self.param.shape.dim)
        if not self.param.HasField("shape"):
            raise self.fail("parameter_param needs a shape", "parameter_param")
        for i, d in enumerate(dims):
            if d < 1:
                raise self.fail(f"a size must be positive, not {d}", "parameter_param", "shape", "dim", i)
        return [dims]

    def blobs(self, ins: Sequence[Shape]) -> list[Blob]:
        return [Blob(self.shapes(ins)[0])]

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules.routing import Parameter as Module

        return Module(blobs[0])


@layer("Embed", field="embed_param")
class Embed(Layer):
    """y = row x of W, plus b: a vector for every whole number of the bottom.

    Bottom: any shape, numbers 0..input_dim-1; top: (bottom.., num_output).
    Blobs: W (input_dim, num_output); b (num_output) if bias_term.
    embed_param: num_output; input_dim; bias_term (true); weight_filler and bias_filler (zeros). No gradient to the
    bottom. A number out of range raises DataError (on the CPU; C++ reads foreign memory). Source: BVLC embed_layer.
    """

    def differentiable(self, i: int) -> bool:
        return False

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        for field in ("num_output", "input_dim"):
            if getattr(self.param, field) < 1:
                raise self.fail(f"{field} must be given and positive", "embed_param", field)
        return [(*ins[0], self.param.num_output)]

    def blobs(self, ins: Sequence[Shape]) -> list[Blob]:
        self.shapes(ins)
        n = self.param.num_output
        weight = filled_blob(self, (self.param.input_dim, n), "weight_filler")
        return [weight, filled_blob(self, (n,), "bias_filler")] if self.param.bias_term else [weight]

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules.routing import Embed as Module

        where = f"layer '{self.name}' ({self.type}): blob '{self.proto.bottom[0]}'"
        return Module(blobs[0], blobs[1] if len(blobs) > 1 else None, where)
