"""Torch side of RNN, LSTM and LSTMUnit.

Two roads to the same numbers. `fused`: torch's own kernels (oneDNN, cuDNN), called once for every stretch of time in
which no sequence starts; for few stretches. The loop: any `cont`; the input part of all steps is one matrix product, so
is each weight gradient, and a step is one product and a few element-wise operations, with a backward pass by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _LSTMSequence(torch.autograd.Function):
    """(gates' input part (T, N, 4H), W_hc (4H, H), cont (T, N), h_0, c_0 (N, H)) -> h (T, N, H), c_T (N, H).

    `limit` > 0 bounds the gradients of the gates' pre-activations, step by step.
    """

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, cont: Tensor, h0: Tensor, c0: Tensor, limit: float
    ) -> tuple[Tensor, ...]:
        ctx.limit = limit
        steps, n, hidden = len(inputs), len(h0), weight.shape[1]
        gates = torch.empty_like(inputs)
        h = inputs.new_empty(steps, n, hidden)
        h_in, c, c_in, squashed = inputs.new_empty(4, steps, n, hidden).unbind()
        keep = cont.unsqueeze(2)
        transposed = weight.t()
        logistic = gates[..., : 3 * hidden]
        # all views of single steps at once: one by one they cost a tenth of the time
        whole = (keep, inputs, gates, logistic, *gates.split(hidden, 2), h_in, c_in, c, squashed, h)
        for k, x, z, ifo, i, f, o, g, hk, ck, ct, st, ht in zip(*(v.unbind() for v in whole)):
            torch.mul(h0, k, out=hk)
            torch.mul(c0, k, out=ck)
            torch.addmm(x, hk, transposed, out=z)
            ifo.sigmoid_()
            g.tanh_()
            torch.mul(f, ck, out=ct).addcmul_(i, g)
            torch.tanh(ct, out=st)
            torch.mul(o, st, out=ht)
            h0, c0 = ht, ct
        ctx.save_for_backward(weight, keep, gates, h_in, c_in, squashed)
        return h, c[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh_out: Tensor, dc: Tensor) -> tuple[Tensor | None, ...]:
        weight, keep, gates, h_in, c_in, squashed = ctx.saved_tensors
        steps, n, hidden = h_in.shape
        i, f, o, g = gates.split(hidden, 2)
        # what a step multiplies dc (or dh, for the gate o) with, for all steps at once
        factor = gates * (1 - gates)
        factor[..., 3 * hidden :] = i * (1 - g * g)
        factor[..., :hidden] *= g
        factor[..., hidden : 2 * hidden] *= c_in
        factor[..., 2 * hidden : 3 * hidden] *= squashed
        through = o * (1 - squashed * squashed)
        forget = f * keep
        d = torch.empty_like(gates)
        dh = torch.zeros_like(dh_out[0])
        per_gate, factors = d.view(steps, n, 4, hidden), factor.view(steps, n, 4, hidden)
        both = [v for pair in zip(factors.split((2, 1, 1), 2), per_gate.split((2, 1, 1), 2)) for v in pair]
        whole = (dh_out, through, forget, keep, d, *both)
        for dy, th, fg, k, dt, q_if, d_if, q_o, d_o, q_g, d_g in zip(*(reversed(v.unbind()) for v in whole)):
            dh = dy + dh
            dc = torch.addcmul(dc, dh, th)
            each = dc.unsqueeze(1)
            torch.mul(q_if, each, out=d_if)
            torch.mul(q_o, dh.unsqueeze(1), out=d_o)
            torch.mul(q_g, each, out=d_g)
            if ctx.limit > 0:
                dt.clamp_(-ctx.limit, ctx.limit)
            dc = dc * fg
            dh = (dt @ weight).mul_(k)
        dw = d.view(-1, 4 * hidden).t() @ h_in.view(-1, hidden) if ctx.needs_input_grad[1] else None
        return d, dw, None, dh, dc, None


class _RNNSequence(torch.autograd.Function):
    """(input part (T, N, H), W_hh (H, H), cont (T, N), h_0 (N, H)) -> h (T, N, H)."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, cont: Tensor, h0: Tensor) -> Tensor:
        h, h_in = torch.empty_like(inputs), torch.empty_like(inputs)
        keep = cont.unsqueeze(2)
        transposed = weight.t()
        for k, x, hk, ht in zip(*(v.unbind() for v in (keep, inputs, h_in, h))):
            torch.mul(h0, k, out=hk)
            h0 = torch.addmm(x, hk, transposed, out=ht).tanh_()
        ctx.save_for_backward(weight, keep, h, h_in)
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh_out: Tensor) -> tuple[Tensor | None, ...]:
        weight, keep, h, h_in = ctx.saved_tensors
        through = 1 - h * h
        d = torch.empty_like(through)
        dh = torch.zeros_like(through[0])
        for dy, th, k, dt in zip(*(reversed(v.unbind()) for v in (dh_out, through, keep, d))):
            torch.mul(dh.add_(dy), th, out=dt)
            dh = (dt @ weight).mul_(k)
        hidden = weight.shape[0]
        dw = d.view(-1, hidden).t() @ h_in.view(-1, hidden) if ctx.needs_input_grad[1] else None
        return d, dw, None, dh


class _Bounded(torch.autograd.Function):
    """x, with its gradient bounded to [-limit, limit]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: float) -> Tensor:
        ctx.limit = limit
        return x.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy.clamp(-ctx.limit, ctx.limit), None


def lstm_plain(
    inputs: Tensor, weight: Tensor, cont: Tensor, h: Tensor, c: Tensor, limit: float
) -> tuple[Tensor, Tensor]:
    """What `_LSTMSequence` computes, in operations that torch.compile can trace."""
    out = []
    for t, keep in enumerate(cont.unsqueeze(2).unbind()):
        z = F.linear(h * keep, weight).add(inputs[t])
        i, f, o, g = (_Bounded.apply(z, limit) if limit > 0 else z).chunk(4, 1)
        c = torch.sigmoid(f) * (c * keep) + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        out.append(h)
    return torch.stack(out), c


def rnn_plain(inputs: Tensor, weight: Tensor, cont: Tensor, h: Tensor) -> Tensor:
    """What `_RNNSequence` computes, in operations that torch.compile can trace."""
    out = []
    for t, keep in enumerate(cont.unsqueeze(2).unbind()):
        h = torch.tanh(F.linear(h * keep, weight) + inputs[t])
        out.append(h)
    return torch.stack(out)


def stretches(cont: Tensor) -> list[int] | None:
    """Where to cut time so that within a stretch every cont is 1: [0, .., T]; None when that is often.

    Looks at the values, so on a GPU the host waits for them; the fused kernels win that back many times.
    """
    steps = len(cont)
    cuts = ((cont[1:] != 1).any(1).nonzero().flatten() + 1).tolist()
    return [0, *cuts, steps] if len(cuts) <= steps // 4 else None


class _Recurrent(nn.Module):
    """Hidden state that lives from pass to pass in buffers, or comes in and goes out as blobs (`expose`)."""

    state_names: tuple[str, ...] = ()
    kernel: Callable[..., Any]
    fused_on: tuple[str, ...] = ()  # devices where torch's kernel beats the loop

    def __init__(self, wx: nn.Parameter, bias: nn.Parameter, ws: nn.Parameter | None, wh: nn.Parameter) -> None:
        super().__init__()
        self.wx, self.bias = wx, bias
        if ws is not None:
            self.ws = ws
        self.wh = wh
        self.static, self.expose = ws is not None, False

    def keep_state(self, n: int, *, expose: bool) -> None:
        """n: sequences side by side. expose: no state of our own."""
        self.expose = expose
        for name in () if expose else self.state_names:
            self.register_buffer(name, self.wh.new_zeros(n, self.wh.shape[1]).detach(), persistent=False)

    def start(self, n: int, given: Sequence[Tensor]) -> list[Tensor]:
        """The state before the first step, each (N, H); a kept state of another batch size is forgotten."""
        if self.expose:
            return [s.reshape(n, -1) for s in given]
        kept = [getattr(self, name) for name in self.state_names]
        return [s if len(s) == n else s.new_zeros(n, s.shape[1]) for s in kept]

    def finish(self, states: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The tops behind the first one; else the states are kept, without gradient."""
        if self.expose:
            return tuple(s.unsqueeze(0) for s in states)
        with torch.no_grad():
            for name, value in zip(self.state_names, states):
                kept = getattr(self, name)
                if len(kept) == len(value):
                    kept.copy_(value)
                else:
                    setattr(self, name, value.detach().clone())
        return ()

    def cuts(self, x: Tensor, cont: Tensor, *, whole: bool = False) -> list[int] | None:
        """`stretches` where torch's fused kernel is the better road, else None. whole: see `sequence`."""
        if self.static or x.device.type not in self.fused_on or x.dtype != torch.float32:
            return None
        if torch.compiler.is_compiling():
            return None
        return [0, len(cont)] if whole else stretches(cont)

    def input_part(self, x: Tensor, rest: Sequence[Tensor]) -> Tensor:
        """What the input and the static input add to the pre-activations, for all steps at once."""
        y = F.linear(x.flatten(2), self.wx, self.bias)
        return y + F.linear(rest[0].flatten(1), self.ws) if self.static else y

    def fused(self, x: Tensor, cont: Tensor, cuts: Sequence[int], states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """(h (T, N, H), states at the end (N, H)) by torch's kernels."""
        x, weights, pieces = x.flatten(2), self.kernel_weights(), []
        grad = torch.is_grad_enabled()  # what cuDNN calls training: keep what backward needs
        for a, b in pairwise(cuts):
            before = tuple((s * cont[a].unsqueeze(1)).unsqueeze(0) for s in states)
            hx = before if len(before) > 1 else before[0]
            y, *after = type(self).kernel(x[a:b], hx, weights, True, 1, 0.0, grad, False, False)
            states = [s.squeeze(0) for s in after]
            pieces.append(y)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces), states

    def kernel_weights(self) -> list[Tensor]:
        """W_ih, W_hh, b_ih, b_hh as torch orders the gates, one behind the other in memory, as cuDNN likes them."""
        hidden = self.wh.shape[1]
        parts = [self.ordered(w) for w in (self.wx, self.wh, self.bias)] + [torch.zeros_like(self.bias)]
        sizes = [p.numel() for p in parts]
        flat = torch.cat([p.reshape(-1) for p in parts]).split(sizes)
        return [flat[0].view(-1, self.wx.shape[1]), flat[1].view(-1, hidden), flat[2], flat[3]]

    def ordered(self, blob: Tensor) -> Tensor:
        return blob

    def extra_repr(self) -> str:
        wx = tuple(self.wx.shape)
        return f"W_x={wx}, hidden={self.wh.shape[1]}, static={self.static}, expose_hidden={self.expose}"


class LSTM(_Recurrent):
    """Gates in Caffe's order: input, forget, output, candidate."""

    state_names = ("h", "c")
    kernel = torch.lstm
    fused_on = ("cpu", "cuda")
    limit = 0.0  # of the gradients of the pre-activations; 0 is none

    def forward(self, x: Tensor, cont: Tensor, *rest: Tensor) -> Tensor | tuple[Tensor, ...]:
        cont = cont.detach()
        out, states = self.sequence(x, cont, rest, self.start(x.shape[1], rest[-2:]))
        tops = self.finish(states)
        return (out, *tops) if tops else out

    def sequence(
        self, x: Tensor, cont: Tensor, rest: Sequence[Tensor], states: list[Tensor], *, whole: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """(h (T, N, H), h and c at the end). whole: every cont is 1."""
        cuts = self.cuts(x, cont, whole=whole)
        if cuts is not None:
            return self.fused(x, cont, cuts, states)
        inputs = self.input_part(x, rest)
        run = lstm_plain if torch.compiler.is_compiling() else _LSTMSequence.apply
        h, c = states
        out, c = run(inputs, self.wh, cont.to(x.dtype), h, c, self.limit)
        return out, [out[-1], c]

    def ordered(self, blob: Tensor) -> Tensor:
        i, f, o, g = blob.chunk(4)  # torch: i, f, g, o
        return torch.cat((i, f, g, o))


class ClippedLSTM(LSTM):
    """LSTM of rows (T * n, ..), or of (T, N, ..) with n None; bounded gradients; a state only next to marks."""

    def __init__(self, blobs: Sequence[nn.Parameter], *, n: int | None, limit: float) -> None:
        wx, wh, bias = blobs
        super().__init__(wx, bias, None, wh)
        self.n, self.limit = n, limit

    def cuts(self, x: Tensor, cont: Tensor, *, whole: bool = False) -> list[int] | None:
        return None if self.limit > 0 else super().cuts(x, cont, whole=whole)

    def forward(self, x: Tensor, *marks: Tensor) -> Tensor | tuple[Tensor, ...]:
        steps = x if self.n is None else x.reshape(-1, self.n, *x.shape[1:])
        if marks:
            cont = (marks[0].detach() != 0).to(x.dtype).reshape(steps.shape[:2])
            states = self.start(steps.shape[1], ())
        else:
            cont = x.new_ones(steps.shape[:2])
            states = [x.new_zeros(steps.shape[1], self.wh.shape[1]) for _ in self.state_names]
        out, states = self.sequence(steps, cont, (), states, whole=not marks)
        if marks:
            self.finish(states)
        return out if self.n is None else out.flatten(0, 1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, n={self.n}, limit={self.limit}"


class RNN(_Recurrent):
    """h = tanh(..), o = tanh(W_ho h + b_o); the second product of all steps is one."""

    state_names = ("h",)
    kernel = torch.rnn_tanh
    fused_on = ("cuda",)  # torch's CPU kernel is a loop over autograd operations

    def __init__(self, *blobs: nn.Parameter, static: bool) -> None:
        wx, bias, *ws, wh, wo, bo = blobs
        super().__init__(wx, bias, ws[0] if static else None, wh)
        self.wo, self.bo = wo, bo

    def forward(self, x: Tensor, cont: Tensor, *rest: Tensor) -> Tensor | tuple[Tensor, ...]:
        cont = cont.detach()
        states = self.start(x.shape[1], rest[-1:])
        cuts = self.cuts(x, cont)
        if cuts is not None:
            h, states = self.fused(x, cont, cuts, states)
        else:
            run = rnn_plain if torch.compiler.is_compiling() else _RNNSequence.apply
            h = run(self.input_part(x, rest), self.wh, cont.to(x.dtype), *states)
            states = [h[-1]]
        tops = self.finish(states)
        out = torch.tanh(F.linear(h, self.wo, self.bo))
        return (out, *tops) if tops else out


class LSTMUnit(nn.Module):
    """One step: c_prev (1, N, H), pre-activations (1, N, 4H), cont (1, N) -> c, h (1, N, H)."""

    def forward(self, c_prev: Tensor, x: Tensor, cont: Tensor) -> tuple[Tensor, Tensor]:
        i, f, o, g = x.chunk(4, 2)
        keep = cont.detach().unsqueeze(2)
        c = torch.sigmoid(f) * (c_prev * keep) + torch.sigmoid(i) * torch.tanh(g)
        return c, torch.sigmoid(o) * torch.tanh(c)
