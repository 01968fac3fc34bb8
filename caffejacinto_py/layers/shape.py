"""Routing: layers that move, join, cut or summarise blobs without learnable parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from caffejacinto_py.layers.base import IntegerForm, Layer, Saved, Shape
from caffejacinto_py.layers.registry import layer
from caffejacinto_py.schema import pb

if TYPE_CHECKING:
    import torch
    from torch import nn


@layer("Concat", v1="CONCAT", bottoms=(1, None), field="concat_param")
class Concat(Layer):
    """Bottoms joined along one axis; they agree in all other axes.

    concat_param: axis (1, negative counts from the end), or the deprecated concat_dim. Source: BVLC concat_layer.
    """

    narrows = "moves"
    quantizes = "plain"

    def _axis(self, ndim: int) -> int:
        if not self.param.HasField("concat_dim"):
            return self.axis(self.param.axis, ndim, "concat_param", "axis")
        if self.param.HasField("axis"):
            raise self.fail("give axis or concat_dim, not both", "concat_param", "concat_dim")
        return self.axis(self.param.concat_dim, ndim, "concat_param", "concat_dim")

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        axis = self._axis(len(ins[0]))
        for i, s in enumerate(ins[1:], 1):
            if len(s) != len(ins[0]) or any(a != b for k, (a, b) in enumerate(zip(s, ins[0])) if k != axis):
                raise self.fail(
                    f"bottoms must agree in all axes but axis {axis}: bottom 0 '{self.proto.bottom[0]}' is {ins[0]}, "
                    f"bottom {i} '{self.proto.bottom[i]}' is {s}",
                    "bottom",
                    i,
                )
        return [(*ins[0][:axis], sum(s[axis] for s in ins), *ins[0][axis + 1 :])]

    def saved(self, ins: Sequence[Shape], outs: Sequence[Shape], item: int) -> Saved:
        return Saved()

    def integer_form(self, ins: Sequence[Shape]) -> IntegerForm | None:
        return IntegerForm("concat", {"axis": self._axis(len(ins[0]))})

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules.shape import Concat

        return Concat(self._axis(len(ins[0])))


@layer("Slice", v1="SLICE", tops=(1, None), field="slice_param")
class Slice(Layer):
    """The bottom cut along one axis into its tops, which are views of it.

    slice_param: axis (1, negative counts from the end) or the deprecated slice_dim; slice_point: where to cut,
    increasing, one fewer than tops; without it all tops are equal. Source: BVLC slice_layer.
    """

    narrows = "moves"
    is_view = True

    def _axis(self, ndim: int) -> int:
        if not self.param.HasField("slice_dim"):
            return self.axis(self.param.axis, ndim, "slice_param", "axis")
        if self.param.HasField("axis"):
            raise self.fail("give axis or slice_dim, not both", "slice_param", "slice_dim")
        return self.axis(self.param.slice_dim, ndim, "slice_param", "slice_dim")

    def _sizes(self, size: int) -> list[int]:
        points = list(self.param.slice_point)
        if not points:
            if size % self.ntop:
                raise self.fail(f"an axis of size {size} cannot be cut into {self.ntop} equal tops", "top")
            return [size // self.ntop] * self.ntop
        if len(points) != self.ntop - 1:
            raise self.fail(
                f"{len(points)} slice_point for {self.ntop} tops: give {self.ntop - 1}", "slice_param", "slice_point", 0
            )
        cuts = [0, *points, size]
        for i, (a, b) in enumerate(pairwise(cuts)):
            if b <= a:
                at = min(i, len(points) - 1)
                text = f"slice_point must increase between 0 and {size}, not {points}"
                raise self.fail(text, "slice_param", "slice_point", at)
        return [b - a for a, b in pairwise(cuts)]

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        axis = self._axis(len(ins[0]))
        return [(*ins[0][:axis], n, *ins[0][axis + 1 :]) for n in self._sizes(ins[0][axis])]

    def integer_form(self, ins: Sequence[Shape]) -> IntegerForm | None:
        return IntegerForm("slice", {"axis": self._axis(len(ins[0]))})

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules.shape import Slice

        axis = self._axis(len(ins[0]))
        explicit = self._sizes(ins[0][axis]) if self.param.slice_point else None
        return Slice(axis, self.ntop, explicit)


@layer("Split", v1="SPLIT", tops=(1, None))
class Split(Layer):
    """Every top is the bottom itself; their gradients add up. Source: BVLC split_layer."""

    narrows = "moves"
    is_view = True

    def keeps_memory(self) -> bool:
        return True

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        return [ins[0]] * self.ntop

    def integer_form(self, ins: Sequence[Shape]) -> IntegerForm | None:
        return IntegerForm("same")

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules.shape import Split

        return Split(self.ntop)


@layer("Flatten", v1="FLATTEN", field="flatten_param")
class Flatten(Layer):
    """Axes axis..end_axis become one.

    flatten_param: axis (1), end_axis (-1), both may count from the end. Caffe forbids it in place. Source: BVLC
    flatten_layer.
    """

    narrows = "moves"
    is_view = forbids_inplace = True

    def keeps_memory(self) -> bool:
        return True

    def _range(self, ndim: int) -> tuple[int, int]:
        start = self.axis(self.param.axis, ndim, "flatten_param", "axis")
        end = self.axis(self.param.end_axis, ndim, "flatten_param", "end_axis")
        if end < start:
            raise self.fail(f"end_axis {end} lies before axis {start}", "flatten_param", "end_axis")
        return start, end

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        a, b = self._range(len(ins[0]))
        return [(*ins[0][:a], math.prod(ins[0][a : b + 1]), *ins[0][b + 1 :])]

    def integer_form(self, ins: Sequence[Shape]) -> IntegerForm | None:
        return IntegerForm("reshape")

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules.shape import Flatten

        return Flatten(*self._range(len(ins[0])))


@layer("Reshape", field="reshape_param")
class Reshape(Layer):
    """The same numbers in C order under another shape.

    reshape_param: axis (0; negative -1 stands behind the last axis) and num_axes (-1: to the end) choose the bottom's
    axes that `shape` replaces. A dim of 0 copies the bottom's axis at the same place (axis + i), one dim may be -1:
    what remains. Caffe forbids it in place. Source: BVLC reshape_layer.
    """

    narrows = "moves"
    is_view = forbids_inplace = True

    def keeps_memory(self) -> bool:
        return True

    def _span(self, ndim: int) -> tuple[int, int]:
        axis, num = self.param.axis, self.param.num_axes
        start = axis if axis >= 0 else ndim + axis + 1
        if not 0 <= start <= ndim:
            raise self.fail(f"axis {axis} is out of range for a blob of {ndim} axes", "reshape_param", "axis")
        if num < -1 or start + num > ndim:
            raise self.fail(f"num_axes {num} from axis {start} does not fit {ndim} axes", "reshape_param", "num_axes")
        return start, ndim if num == -1 else start + num

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        bottom, dims, at = ins[0], list(self.param.shape.dim), ("reshape_param", "shape", "dim")
        start, end = self._span(len(bottom))
        if dims.count(-1) > 1:
            raise self.fail("only one dim may be -1", *at, len(dims) - 1 - dims[::-1].index(-1))
        for i, d in enumerate(dims):
            if d < -1:
                raise self.fail(f"dim {d}: a size, 0 (copy) or -1 (what remains) is needed", *at, i)
            if d == 0 and start + i >= len(bottom):
                raise self.fail(f"dim 0 at place {i} copies axis {start + i}, but the bottom is {bottom}", *at, i)
        top = [*bottom[:start], *(bottom[start + i] if d == 0 else d for i, d in enumerate(dims)), *bottom[end:]]
        count = math.prod(bottom)
        rest = math.prod(d for d in top if d != -1)
        if -1 in top:
            if rest == 0 or count % rest:
                text = f"the {count} numbers of {bottom} cannot be divided by {rest} for the dim of -1"
                raise self.fail(text, *at, dims.index(-1))
            top[top.index(-1)] = count // rest
        elif rest != count:
            raise self.fail(f"{bottom} has {count} numbers, the new shape {tuple(top)} has {rest}", *at[:2])
        return [tuple(top)]

    def integer_form(self, ins: Sequence[Shape]) -> IntegerForm | None:
        return IntegerForm("reshape")

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules.shape import Reshape

        return Reshape(*self._span(len(ins[0])), list(self.param.shape.dim))


@layer("Softmax", v1="SOFTMAX", field="softmax_param")
class Softmax(Layer):
    """y = exp(x) / sum of exp(x) along an axis, without overflow.

    softmax_param: axis (1). Source: BVLC softmax_layer.
    """

    is_softmax = True
    saves_output = True

    def _axis(self, ndim: int) -> int:
        return self.axis(self.param.axis, ndim, "softmax_param", "axis")

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        self._axis(len(ins[0]))
        return [ins[0]]

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules.shape import Softmax

        return Softmax(self._axis(len(ins[0])))


@layer("ArgMax", v1="ARGMAX", field="argmax_param")
class ArgMax(Layer):
    """Places (or values) of the top_k largest numbers; of equal ones the larger index comes first. No gradient.

    argmax_param: top_k (1), out_max_val (false), axis (none). Without axis each item is flattened: top (N, 1, k) of
    indices, or with out_max_val (N, 2, k), row 0 indices and row 1 values; a 4-D bottom gives (N, 1 or 2, k, 1) and
    so on. With axis the top is the bottom's shape with k there: indices, or values with out_max_val. Source: BVLC
    argmax_layer.
    """

    def differentiable(self, i: int) -> bool:
        return False

    def _axis(self, ndim: int) -> int | None:
        return self.axis(self.param.axis, ndim, "argmax_param", "axis") if self.param.HasField("axis") else None

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        bottom, k = ins[0], self.param.top_k
        axis = self._axis(len(bottom))
        if axis is None and not bottom:
            raise self.fail("the bottom is a scalar", "bottom", 0)
        size = math.prod(bottom[1:]) if axis is None else bottom[axis]
        if not 1 <= k <= size:
            raise self.fail(f"top_k {k} must lie between 1 and {size}", "argmax_param", "top_k")
        if axis is not None:
            return [(*bottom[:axis], k, *bottom[axis + 1 :])]
        return [(bottom[0], 2 if self.param.out_max_val else 1, k, *[1] * (len(bottom) - 3))]

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules.shape import ArgMax

        return ArgMax(self.param.top_k, self._axis(len(ins[0])), self.param.out_max_val, len(self.shapes(ins)[0]))


@layer("Reduction", field="reduction_param")
class Reduction(Layer):
    """All axes from `axis` on reduced to one number, times coeff; the top keeps the axes before (axis 0: a scalar).

    reduction_param: operation SUM (default), ASUM (of absolute values), SUMSQ (of squares), MEAN; axis (0); coeff (1).
    Source: BVLC reduction_layer.
    """

    def _axis(self, ndim: int) -> int:
        return self.axis(self.param.axis, ndim, "reduction_param", "axis")

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        return [ins[0][: self._axis(len(ins[0]))]]

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules.shape import Reduction

        name = pb.ReductionParameter.ReductionOp.Name(self.param.operation)
        return Reduction(name, self._axis(len(ins[0])), self.param.coeff)


@layer("Silence", v1="SILENCE", bottoms=(1, None), tops=(0, 0))
class Silence(Layer):
    """Takes bottoms so that they are no net outputs. No top, no gradient. Source: BVLC silence_layer."""

    narrows = "moves"

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        return []

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules.shape import Silence

        return Silence()
