"""RNN, LSTM, LSTMUnit and Lstm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from caffejacinto_py.layers.base import Blob, Copies, Layer, Saved, Shape
from caffejacinto_py.layers.fillers import filled_blob
from caffejacinto_py.layers.registry import layer

if TYPE_CHECKING:
    import torch
    from torch import nn

    from caffejacinto_py.layers.base import Context

FIELD = "recurrent_param"


def _saved(outs: Sequence[Shape], item: int, parts: int) -> Saved:
    """Gates and states of all steps, and as much again for what backward makes of them. From measurements."""
    size = parts * item * math.prod(outs[0])
    return Saved(outputs=tuple(range(len(outs))), extra=size, scratch=size)


class _Recurrent(Layer):
    """Bottoms x (T, N, ..), cont (T, N), optionally static (N, ..), and with expose_hidden the states at the start."""

    stateful_forward = True
    saves_output = True
    is_view = True  # the last hidden state is the end of the first top, and the state the layer keeps
    states: ClassVar[int] = 1
    parts: ClassVar[int] = 4  # blobs of the size of h that a pass keeps, and that a backward pass makes

    def differentiable(self, i: int) -> bool:
        return i != 1

    def expects(self, i: int, ins: Sequence[Shape | None]) -> Shape | None:
        x, hidden = ins[0], self.states if self.param.expose_hidden else 0
        if not x or len(x) < 2:
            return None
        if i == 1:
            return x[:2]
        return (1, x[1], self.param.num_output) if i >= len(ins) - hidden else None

    def has_static(self, count: int) -> bool:
        """Whether there is a static input among `count` bottoms; raises when the count fits neither way."""
        hidden = self.states if self.param.expose_hidden else 0
        word = "true" if hidden else "false"
        if count not in (2 + hidden, 3 + hidden):
            text = f"expose_hidden {word} takes {2 + hidden} bottoms, or {3 + hidden} with a static input, not {count}"
            raise self.fail(text, "bottom")
        if self.ntop != 1 + hidden:
            raise self.fail(f"expose_hidden {word} makes {1 + hidden} tops, not {self.ntop}", "top")
        return count == 3 + hidden

    def checked(self, ins: Sequence[Shape]) -> bool:
        """Raise LayerError unless all bottoms fit each other; returns whether there is a static input."""
        if self.param.num_output < 1:
            raise self.fail("num_output must be given and positive", FIELD, "num_output")
        static, x = self.has_static(len(ins)), ins[0]
        if len(x) < 3:
            raise self.fail(f"bottom 0 must be (T, N, ..): time steps, sequences, input; it is {x}", "bottom", 0)
        if ins[1] != x[:2]:
            text = f"bottom 1, the sequence continuation marks, must be (T, N) = {x[:2]}; it is {ins[1]}"
            raise self.fail(text, "bottom", 1)
        if static and (len(ins[2]) < 2 or ins[2][0] != x[1]):
            text = f"the static input, bottom 2, must be (N, ..) with N = {x[1]}; it is {ins[2]}"
            raise self.fail(text, "bottom", 2)
        want = (1, x[1], self.param.num_output)
        for i in range(3 if static else 2, len(ins)):
            if ins[i] != want:
                raise self.fail(f"bottom {i}, a state at the start, must be {want}; it is {ins[i]}", "bottom", i)
        return static

    def saved(self, ins: Sequence[Shape], outs: Sequence[Shape], item: int) -> Saved:
        return _saved(outs, item, self.parts)

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        self.checked(ins)
        steps, n = ins[0][:2]
        return [(steps, n, self.param.num_output), *[(1, n, self.param.num_output)] * (self.ntop - 1)]

    def _input_blobs(self, ins: Sequence[Shape], rows: int) -> list[Blob]:
        """W_x, b and, with a static input, its weights."""
        static = self.checked(ins)
        weight = filled_blob(self, (rows, math.prod(ins[0][2:])), "weight_filler")
        blobs = [weight, filled_blob(self, (rows,), "bias_filler")]
        return [*blobs, filled_blob(self, (rows, math.prod(ins[2][1:])), "weight_filler")] if static else blobs

    def macs(self, ins: Sequence[Shape], outs: Sequence[Shape]) -> int:
        steps, n = ins[0][:2]
        static = 2 if self.has_static(len(ins)) else None
        sizes = [math.prod(b.shape) for b in self.blobs(ins)]
        return sum(n * size * (1 if i == static else steps) for i, size in enumerate(sizes) if i != 1)


@layer("LSTM", field=FIELD, bottoms=(2, 5), tops=(1, 3), forks="bvlc, nvcaffe, jacinto, ssd, adaption, ristretto")
class LSTM(_Recurrent):
    """Long short-term memory over a whole sequence: with k = cont_t (0 where a sequence starts, 1 where it goes on),
    gates i, f, o, g = W_xc x_t + b_c + W_xc_static static + W_hc (k h), c = sigmoid(f) k c + sigmoid(i) tanh(g),
    h = sigmoid(o) tanh(c).

    Bottoms: x (T, N, ..): T steps of N independent sequences; cont (T, N); optional: static (N, ..), an input of every
    step; with expose_hidden h_0 and c_0 (1, N, H). Tops: h (T, N, H); with expose_hidden h_T and c_T (1, N, H).
    Blobs: W_xc (4H, D), b_c (4H), W_xc_static (4H, Ds) if static, W_hc (4H, H): rows for the gates i, f, o, g in turn.
    Options: num_output H; weight_filler and bias_filler (zeros); expose_hidden (false): the states come in and go out
    as blobs; otherwise h and c of the last step are where the next pass starts (zeros at first), without gradient, in
    both phases. debug_info changes nothing.
    cont gets no gradient. A state kept for another N is forgotten (C++ reads what memory holds).
    Source: BVLC recurrent_layer.cpp, lstm_layer.cpp; Donahue et al. 2015.
    """

    states = 2
    parts = 20
    copies = Copies(kept=1, forward=1, backward=2.125)  # of the fused kernel

    def blobs(self, ins: Sequence[Shape]) -> list[Blob]:
        h = self.param.num_output
        return [*self._input_blobs(ins, 4 * h), filled_blob(self, (4 * h, h), "weight_filler")]

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules.recurrent import LSTM as Module

        wx, bias, *static, wh = blobs
        module = Module(wx, bias, static[0] if static else None, wh)
        module.keep_state(ins[0][1], expose=self.param.expose_hidden)
        return module


@layer("RNN", field=FIELD, bottoms=(2, 4), tops=(1, 2), forks="bvlc, nvcaffe, jacinto, ssd, adaption, ristretto")
class RNN(_Recurrent):
    """A plain recurrent net over a whole sequence: h_t = tanh(W_hh (cont_t h_{t-1}) + W_xh x_t + b_h + W_xh_static
    static), o_t = tanh(W_ho h_t + b_o).

    Bottoms: x (T, N, ..); cont (T, N), 0 where a sequence starts, 1 where it goes on; optional: static (N, ..); with
    expose_hidden h_0 (1, N, H). Tops: o (T, N, H); with expose_hidden h_T (1, N, H).
    Blobs: W_xh (H, D), b_h (H), W_xh_static (H, Ds) if static, W_hh (H, H), W_ho (H, H), b_o (H).
    Options: num_output H, of the hidden state and of o; the rest and the state between passes as in LSTM.
    Source: BVLC recurrent_layer.cpp, rnn_layer.cpp.
    """

    def blobs(self, ins: Sequence[Shape]) -> list[Blob]:
        h = self.param.num_output
        inner = [filled_blob(self, (h, h), "weight_filler") for _ in range(2)]
        return [*self._input_blobs(ins, h), *inner, filled_blob(self, (h,), "bias_filler")]

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules.recurrent import RNN as Module

        module = Module(*blobs, static=self.has_static(len(ins)))
        module.keep_state(ins[0][1], expose=self.param.expose_hidden)
        return module

    def macs(self, ins: Sequence[Shape], outs: Sequence[Shape]) -> int:
        return super().macs(ins, outs) - math.prod(outs[0])  # b_o


@layer("LSTMUnit", bottoms=(3, 3), tops=(2, 2), forks="bvlc, nvcaffe, jacinto, ssd, adaption, ristretto")
class LSTMUnit(Layer):
    """A step of an LSTM without its products: c = sigmoid(f) cont c_prev + sigmoid(i) tanh(g), h = sigmoid(o) tanh(c).

    Bottoms: c_prev (1, N, H); pre-activations (1, N, 4H) of the gates i, f, o, g in turn; cont (1, N). Tops: c, h
    (1, N, H). cont gets no gradient. No options. Source: BVLC lstm_unit_layer.cpp.
    """

    def differentiable(self, i: int) -> bool:
        return i != 2

    def expects(self, i: int, ins: Sequence[Shape | None]) -> Shape | None:
        return ins[0][:2] if i == 2 and ins[0] else None

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        c = ins[0]
        if len(c) != 3 or c[0] != 1:
            raise self.fail(f"bottom 0 must be (1, N, H), it is {c}", "bottom", 0)
        if ins[1] != (1, c[1], 4 * c[2]):
            raise self.fail(f"bottom 1 must be {(1, c[1], 4 * c[2])}: four gates, it is {ins[1]}", "bottom", 1)
        if ins[2] != c[:2]:
            raise self.fail(f"bottom 2, the continuation marks, must be {c[:2]}, it is {ins[2]}", "bottom", 2)
        return [c, c]

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules.recurrent import LSTMUnit as Module

        return Module()


@layer("Lstm", field="lstm_param", bottoms=(1, 2), forks="junhyukoh/caffe-lstm")
class ClippedLSTM(Layer):
    """The LSTM of junhyukoh/caffe-lstm and the CRNN ports: the numbers of type LSTM, other blobs, bounded gradients.

    Bottoms: x (T * N, ..): step after step, N = batch_size rows each; optional marks (T * N): 0 where a sequence
    starts, else it goes on. Top: h (T * N, H). x of three axes without batch_size is (T, N, D), as in CRNN, with
    marks (T, N) and top (T, N, H). Blobs: W_i (4H, D), W_h (4H, H), b (4H): rows for the gates i, f, o, g in turn.
    Options: num_output H; batch_size (1); weight_filler and bias_filler (zeros); clipping_threshold (0 is none): the
    gradients of the gates' pre-activations are held within +- it at every step, before they flow on.
    With marks the state of the last step is where the next pass starts, without gradient; without marks every pass
    starts from zero. Marks get no gradient.
    Not reproduced, faults of lstm_layer.cpp: on the CPU all N sequences get the first one's recurrent part; the
    gradient of W_h counts steps at which a sequence starts.
    Source: junhyukoh/caffe-lstm lstm_layer.cpp; three axes: the copy in the CRNN ports.
    """

    saves_output = True
    copies = LSTM.copies

    def __init__(self, proto: Any, context: Context, ntop: int) -> None:
        super().__init__(proto, context, ntop)
        self.stateful_forward = len(proto.bottom) > 1  # type: ignore[misc]

    def differentiable(self, i: int) -> bool:
        return i == 0

    def rows(self, x: Shape) -> int | None:
        """Rows per step, None where x has an axis for them."""
        return None if len(x) == 3 and not self.param.HasField("batch_size") else self.param.batch_size

    def lead(self, x: Shape) -> Shape:
        """The axes of x that are not input; raises LayerError where x does not fit."""
        n = self.rows(x)
        if self.param.num_output < 1:
            raise self.fail("num_output must be given and positive", "lstm_param", "num_output")
        if n is None:
            return x[:2]
        if n < 1:
            raise self.fail("batch_size must be positive", "lstm_param", "batch_size")
        if len(x) < 2 or x[0] % n:
            raise self.fail(f"bottom 0 must be (T * N, ..) with N = batch_size = {n}; it is {x}", "bottom", 0)
        return x[:1]

    def expects(self, i: int, ins: Sequence[Shape | None]) -> Shape | None:
        return self.lead(ins[0]) if i == 1 and ins[0] else None

    def shapes(self, ins: Sequence[Shape]) -> list[Shape]:
        lead = self.lead(ins[0])
        if len(ins) > 1 and math.prod(ins[1]) != math.prod(lead):
            raise self.fail(f"bottom 1, the sequence marks, must be {lead}; it is {ins[1]}", "bottom", 1)
        return [(*lead, self.param.num_output)]

    def saved(self, ins: Sequence[Shape], outs: Sequence[Shape], item: int) -> Saved:
        return _saved(outs, item, LSTM.parts)

    def blobs(self, ins: Sequence[Shape]) -> list[Blob]:
        h, d = self.param.num_output, math.prod(ins[0][len(self.lead(ins[0])) :])
        weights = [filled_blob(self, (4 * h, n), "weight_filler") for n in (d, h)]
        return [*weights, filled_blob(self, (4 * h,), "bias_filler")]

    def module(self, ins: Sequence[Shape], blobs: Sequence[torch.nn.Parameter]) -> nn.Module:
        from caffejacinto_py.layers.modules.recurrent import ClippedLSTM as Module

        n = self.rows(ins[0])
        module = Module(blobs, n=n, limit=self.param.clipping_threshold)
        module.keep_state(n or ins[0][1], expose=len(ins) == 1)
        return module

    def macs(self, ins: Sequence[Shape], outs: Sequence[Shape]) -> int:
        return math.prod(self.lead(ins[0])) * sum(math.prod(b.shape) for b in self.blobs(ins)[:2])
