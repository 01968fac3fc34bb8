"""What a layer type is: one small class that knows its parameters, shapes, blobs and module. No torch here.

A `Layer` object is made per node of a graph. Its methods are pure: the same inputs give the same answers. The torch
side
lives in `layers/modules/` and is imported inside `module()` only, so that shapes, MACs and checks never load torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from caffejacinto_py.errors import LayerError
from caffejacinto_py.schema.dialect import BVLC, Dialect

if TYPE_CHECKING:
    import torch
    from torch import nn

    from caffejacinto_py.layers.folding import Affine, Folded

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Blob:
    """One learnable blob of a layer, in Caffe's order.

    filler: a FillerParameter message, or None for zeros. lr_mult / decay_mult: what the layer forces, whatever the
    prototxt says
    (BatchNorm statistics: 0); None: the prototxt decides, default 1. value: initial values instead of the filler's, a
    float32 array whose memory becomes the blob's (Python layers).
    """

    shape: Shape
    filler: Any = None
    lr_mult: float | None = None
    decay_mult: float | None = None
    value: Any = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Prunable:
    """Blob 0 as sparsity sees it; its rows (axis 0) are thresholded one by one.

    convolution: a plain one, the only kind that Caffe prunes and counts; others take part where a solver asks for it.
    ni, no: input and output channels.
    """

    convolution: bool
    kernel: Shape
    group: int
    ni: int
    no: int


@dataclass(frozen=True)
class IntegerForm:
    """What a layer computes, for integer programs. op: an operation of docs/integer.md; numbers: its plain sizes."""

    op: str
    numbers: Mapping[str, Any] = field(default_factory=dict)


class FixedWords(NamedTuple):
    """Numbers that a layer rounds to by itself: n 2^-fraction with |n| < 2^(bits - 1). (bits, fraction) of its weights,
    bias and top; None: floats."""

    weight: tuple[int, int] | None = None
    bias: tuple[int, int] | None = None
    top: tuple[int, int] | None = None


class Saved(NamedTuple):
    """What autograd keeps of a layer for its backward. inputs, outputs: positions of blobs; extra: bytes of its own.

    Parameters do not count. Masks, indices and what a loss works out are extra. scratch: bytes in use only while the
    layer itself runs backward, beside its bottoms, tops and their gradients; passing: while it runs forward, beside
    bottoms, tops and what it keeps; working: in both, on a CPU, where the layer works in pieces, and elsewhere.
    """

    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    extra: int = 0
    scratch: int = 0
    passing: int = 0
    working: tuple[int, int] = (0, 0)


class Copies(NamedTuple):
    """Copies of its weights that a layer and its kernels make, in sizes of all its blobs. kept: for backward; forward,
    backward: more, at most, while it runs, beside the gradients themselves."""

    kept: float = 0
    forward: float = 0
    backward: float = 0


class Head(NamedTuple):
    """The end of a classifier: bottom 0 has a score for every class on `axis`, bottom 1 the labels.

    ignore: a label that counts nothing, or None. top_k: of a layer that counts hits; None: it is a loss.
    """

    axis: int
    ignore: int | None = None
    top_k: int | None = None


@dataclass(frozen=True)
class Context:
    """What a layer may know of its surroundings.

    probe: opens the data of a source layer and returns the shapes of its tops; None where data must not be touched
    (`check`), then a source answers from its fields and `data_shape` (C, H, W). python_layers: whether Python layers
    may run the code they name. teacher: the shapes that a teacher gives the tops of a Teacher layer; None: no teacher.
    """

    phase: str = "TRAIN"
    dialect: Dialect = BVLC
    probe: Callable[[Layer], Sequence[Shape]] | None = None
    data_shape: Shape = (3, 224, 224)
    python_layers: bool = False
    teacher: Callable[[Layer], Sequence[Shape]] | None = None

    @property
    def train(self) -> bool:
        return self.phase == "TRAIN"


class Layer:
    """Base of all layer types. Class attributes are set by the `@layer(...)` decorator or overridden as traits."""

    # set by the decorator
    type: ClassVar[str] = ""
    v1: ClassVar[str | None] = None  # V1LayerParameter.LayerType name
    bottoms: ClassVar[tuple[int, int | None]] = (1, 1)  # (min, max); max None: any number
    tops: ClassVar[tuple[int, int | None]] = (1, 1)
    field: ClassVar[str | None] = None  # its parameter message in LayerParameter
    forks: ClassVar[str] = "all"

    # traits, as data
    equal_counts: ClassVar[bool] = False  # as many tops as bottoms
    auto_tops: ClassVar[bool] = False  # missing tops are made up (losses)
    loss_top: ClassVar[bool] = False  # top[0] has loss weight 1 unless the prototxt says otherwise
    source: ClassVar[str | None] = None  # a layer without bottoms that is fed: kind of feeder (data room)
    may_inplace: ClassVar[bool] = False  # top may overwrite bottom: module honours `inplace = True`
    forbids_inplace: ClassVar[bool] = False  # Caffe refuses an in-place prototxt of this type
    saves_output: ClassVar[bool] = False  # backward reads the layer's own output: nobody may overwrite it
    is_view: ClassVar[bool] = False  # the top may share memory with the bottom
    stateful_forward: ClassVar[bool] = False  # a training forward changes state (BN statistics, RNG)
    lasting: ClassVar[bool] = False  # holds user state: one object for the life of a net, also across reshapes
    # compression, as data
    quantizes: ClassVar[str | None] = None  # "product" (weights, tops) "norm" "scale" "relu" "plain" "source" "input"
    low_precision: ClassVar[Mapping[str, str]] = {}  # scheme -> the type that replaces this one there
    is_softmax: ClassVar[bool] = False  # Caffe's sparsity tables leave out the convolution right before it
    # float16 and bfloat16: "weights" multiplies in it, "values" reads and writes it but keeps its blobs and statistics,
    # "moves" hands on what it reads whatever its type; None: stays in float32
    narrows: ClassVar[str | None] = None
    channels_last: ClassVar[bool] = True  # runs on channels_last tensors without converting back
    copies: ClassVar[Copies] = Copies()

    def __init__(self, proto: Any, context: Context, ntop: int) -> None:
        self.proto = proto
        self.context = context
        self.ntop = ntop
        self.param: Any = getattr(proto, self.field) if self.field else None

    # --- what a layer type defines -------------------------------------------------------------------------------
    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        """Top shapes for these bottom shapes. Raises LayerError with a sentence the user can act on."""
        raise NotImplementedError(self.type)

    def blobs(self, ins: Sequence[Shape]) -> list[Blob]:
        """Learnable blobs in Caffe's order."""
        return []

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        """The torch module: `forward(*bottoms)` returns a tensor, or a tuple when there is more than one top; () for
        none.

        `blobs` are the parameters to register, in the order of `blobs()`; they may be shared with other modules. The
        phase is
        `module.training`. A module that `may_inplace` reads its attribute `inplace` (False at construction).
        """
        raise NotImplementedError(self.type)

    def differentiable(self, i: int) -> bool:
        """Whether a gradient can flow to bottom i (False: labels, and all bottoms of metrics)."""
        return True

    def force_backward(self, i: int) -> bool:
        """Caffe's AllowForceBackward: may `force_backward: true` ask for the gradient of bottom i?"""
        return self.differentiable(i)

    def expects(self, i: int, ins: Sequence[Shape | None]) -> Shape | None:
        """The shape bottom i must have, given the others; used where a data source cannot be opened. None: cannot
        tell."""
        return None

    def assumed(self, ntop: int) -> list[Shape | None]:
        """Top shapes of a source whose data is not opened; None: the consumer decides (see `expects`)."""
        return list(self.shapes([]))

    def fallback(self) -> Shape | None:
        """What a source takes a top for that neither it nor the reader can tell; None: one number an item."""
        return None

    def adapt(self, blobs: list[Any], targets: Sequence[Shape]) -> list[Any]:
        """Blobs (numpy arrays) of a weights file brought from another fork's layout into this layer's; raises
        LayerError.

        `targets` are the shapes of this layer's blobs. Default: as they are.
        """
        return blobs

    def param_entry(self, i: int, given: int) -> int | None:
        """Which of the `given` entries of `param` belongs to blob i; None: none does."""
        return i

    def param_doubt(self, given: int) -> str | None:
        """What to warn about when a layer has that many `param` entries."""
        return None

    def replacement(self, scheme: str, ins: Sequence[Shape]) -> Any:
        """A LayerParameter of the type that stands for this one in `scheme` (see low_precision) and computes the same
        from the same blobs; None: there is none."""
        if scheme not in self.low_precision:
            return None
        made = type(self.proto)()
        made.CopyFrom(self.proto)
        made.type = self.low_precision[scheme]
        return made

    def inplace_inputs(self) -> Sequence[int]:
        """Inputs that the module can overwrite with its output (it then has `inplace` and, unless only 0, `into`)."""
        return (0,) if self.may_inplace else ()

    def absorbs_affine(self) -> bool:
        """Whether the module takes a scale and a shift per channel as further arguments and applies them to its
        output.
        """
        return False

    def is_affine(self, ins: Sequence[Shape]) -> bool:
        """Whether the layer is x * scale + shift per channel with its own blobs; its module then has `affine()`."""
        return False

    def keeps_memory(self) -> bool:
        """Whether C++ (NVCaffe's family) has the tops in the memory of bottom 0."""
        return False

    def output_axis(self, ins: Sequence[Shape]) -> int | None:
        """The axis of blob 0 that counts output channels, for scales per channel; None: there is none."""
        return None

    def head(self, ins: Sequence[Shape]) -> Head | None:
        """What a layer that compares scores with labels reads; None for all others."""
        return None

    def prunable(self, ins: Sequence[Shape]) -> Prunable | None:
        """Whether blob 0 is a weight that sparsity may mask, and its sizes."""
        return None

    def integer_form(self, ins: Sequence[Shape]) -> IntegerForm | None:
        """The layer as an operation on integers; None: it has no such form. Raises LayerError where its options have
        none."""
        return None

    # absorbing (passes/absorb.py): blobs are arrays, `layers/folding.py` has the terms. A layer that could, but not
    # with these fields or values, raises `folding.Refused` with the reason.
    def hands_through(self) -> bool:
        """Whether in phase TEST the top is the bottom itself, so that the layer can be left out."""
        return False

    def as_affine(self, ins: Sequence[Shape], blobs: Sequence[Any]) -> Affine | None:
        """What the layer does in phase TEST as x * scale + shift per channel; None: it does something else."""
        return None

    def neutral(self, ins: Sequence[Shape], blobs: Sequence[Any]) -> list[Any]:
        """Blobs with which a layer that `as_affine` describes hands its bottom through."""
        raise NotImplementedError(self.type)

    def fold_output(self, ins: Sequence[Shape], blobs: Sequence[Any], affine: Affine) -> Folded | None:
        """Blobs with which the layer also does what `affine` does behind it; None: the type has no such blobs."""
        return None

    def fold_input(self, ins: Sequence[Shape], blobs: Sequence[Any], affine: Affine) -> Folded | None:
        """Blobs with which the layer also does what `affine` does before it; None: the type has no such blobs."""
        return None

    def metric(self) -> int | None:
        """For a layer whose first top is a share of hits, 1 at best: among how many guesses the right one may be, 1
        being the strictest. None: it is no metric."""
        return None

    def word_bits(self) -> tuple[int | None, int | None] | None:
        """Bits of the short words that the layer itself computes with: of weights, of activations (None: floats). None:
        it computes with floats."""
        return None

    def fixed_words(self) -> FixedWords | None:
        """The same for integer programs, with the point; blobs are pairs of a master and its rounded copy. None: there
        is no such form. Raises LayerError where the layer does not round to the nearest."""
        return None

    def saved(self, ins: Sequence[Shape], outs: Sequence[Shape], item: int) -> Saved:
        """What a training pass keeps for backward, for numbers of `item` bytes: from shapes, for plans and summaries.

        Default: the tops where the layer `saves_output`, nothing for views, else every bottom that gets a gradient; a
        factor as large as the top while it runs backward, but for products.
        """
        if self.saves_output:
            return Saved(outputs=tuple(range(len(outs))))
        scratch = 0 if self.quantizes == "product" else item * max((prod(s) for s in outs), default=0)
        if self.is_view:
            return Saved(scratch=scratch if len(outs) > 1 else 0)
        return Saved(tuple(i for i in range(len(ins)) if self.differentiable(i)), scratch=scratch)

    def unfolded(self, ins: Sequence[Shape]) -> int:
        """How many numbers the matrix has that a convolution without a kernel for its number type lays a bottom out
        in."""
        return 0

    def repeatable(self) -> bool:
        """Whether a pass may run the layer again on the same inputs to spare memory: with torch's generators set back
        and `module.update` False the tops are the same and nothing counts twice. Losses and metrics are never run
        again."""
        gets = not self.proto.bottom or any(self.differentiable(i) for i in range(len(self.proto.bottom)))
        return gets and not (self.stateful_forward or self.source or self.loss_top) and self.metric() is None

    def macs(self, ins: Sequence[Shape], outs: Sequence[Shape]) -> int:
        """Multiply-accumulates of one forward pass over the whole batch."""
        return 0

    # --- helpers for them ------------------------------------------------------------------------------------------
    @property
    def name(self) -> str:
        return str(self.proto.name)

    def fail(self, text: str, *field: str | int, hint: str | None = None) -> LayerError:
        """An error about this layer, to be raised. `field`: path below the layer, e.g. ("convolution_param", "pad")."""
        return LayerError(f"layer '{self.name}' ({self.type}): {text}", field=field, hint=hint)

    def axis(self, axis: int, ndim: int, *field: str | int) -> int:
        """Caffe's CanonicalAxisIndex: negative counts from the end; out of range raises."""
        if not -ndim <= axis < ndim:
            raise self.fail(f"axis {axis} is out of range for a blob of {ndim} axes", *field)
        return axis % ndim if ndim else 0
