"""Numbers in short words, and the products that use them, on torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from caffejacinto_py.layers.modules.lrn import power, window_sums
from caffejacinto_py.layers.modules.rounding import half_away, half_even, stochastic, straight_through
from caffejacinto_py.layers.ristretto import Binary, Fixed, Minifloat, Number, PowerOfTwo, Words

Rounding = Callable[[Tensor], Tensor]
# per float type: the integer of the same size, bits of the mantissa
_BITS = {torch.float32: (torch.int32, 23), torch.float64: (torch.int64, 52)}


def quantize(x: Tensor, number: Number, rounding: Rounding = half_away, *, carry: bool = False) -> Tensor:
    """x with each value replaced by one that `number` can express. No gradient.

    rounding: half_away, half_even or stochastic. carry: see Binary.
    """
    if isinstance(number, Fixed):
        return fixed(x, number, rounding)
    if isinstance(number, PowerOfTwo):
        return power_of_two(x, number, rounding)
    return minifloat(x, number, rounding, carry=carry)


def fixed(x: Tensor, number: Fixed, rounding: Rounding) -> Tensor:
    step = 2.0**-number.fraction
    low, high = -(2.0 ** (number.bits - 1)), 2.0 ** (number.bits - 1) - 1
    return rounding(x.clamp(low * step, high * step) * 2.0**number.fraction) * step


def power_of_two(x: Tensor, number: PowerOfTwo, rounding: Rounding) -> Tensor:
    size = rounding(x.abs().log2()).clamp(number.low, number.high)  # 0: from minus infinity to the lowest
    return torch.where(x < 0, -torch.exp2(size), torch.exp2(size))


def minifloat(x: Tensor, number: Minifloat, rounding: Rounding, *, carry: bool = False) -> Tensor:
    """By the bits of x: rounding the mantissa is rounding an integer, and what it carries goes into the exponent."""
    if x.dtype not in _BITS:
        return minifloat(x.float(), number, rounding, carry=carry).to(x.dtype)
    integer, width = _BITS[x.dtype]
    drop = width - number.mantissa
    bias = 2 ** (number.exponent - 1) - 1
    top = min(2**number.exponent - 1 - bias, 127)  # float32 has no larger numbers, whatever x is
    size = x.abs()
    if drop:
        bits = size.view(integer)
        size = ((bits + _half(bits, drop, rounding)) & (-1 << drop)).view(x.dtype)
    lowest = max(2.0**-bias, torch.finfo(torch.float32).tiny)
    limit = 2.0 ** (top + 1)  # one step above the largest number
    largest = (2 - 2.0**-number.mantissa) * 2.0**top
    over = x.abs() if carry else size
    size = torch.where(over < limit, size, largest)  # infinity too
    size = torch.where(x.abs() < lowest, torch.zeros_like(size), size)
    quantized = torch.where(torch.signbit(x), -size, size)
    quantized = torch.where(size == 0, size, quantized)
    return quantized if carry else torch.where(x.isnan(), x, quantized)


def _half(bits: Tensor, drop: int, rounding: Rounding) -> Tensor | int:
    """What to add to a mantissa before its last `drop` bits are cut off."""
    half = 1 << (drop - 1)
    if rounding is half_away:
        return half
    if rounding is half_even:
        return half - 1 + ((bits >> drop) & 1)
    return torch.randint_like(bits, 1 << drop)


class Product(nn.Module):
    """A convolution or an inner product whose numbers are rounded; `inner` computes and holds the weights in full."""

    def __init__(self, inner: nn.Module, words: Words, binary: Binary) -> None:
        super().__init__()
        self.inner: Any = inner
        self.words, self.binary = words, binary
        self.rounding: Rounding = stochastic if words.stochastic else half_even if binary.half_even else half_away
        self.overwrites = binary.overwrite  # whoever shows blobs to people looks at it

    def forward(self, *xs: Tensor) -> Tensor | tuple[Tensor, ...]:
        rounding = stochastic if self.training else self.rounding
        weight = self.short(self.inner.weight, self.words.weight, rounding)
        bias = None if self.inner.bias is None else self.short(self.inner.bias, self.words.bias, rounding)
        if self.training:
            tops = [self.inner.compute(x, weight, bias) for x in xs]
        else:
            tops = [self.test(x, weight, bias) for x in xs]
        return tops[0] if len(tops) == 1 else tuple(tops)

    def test(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        seen = self.short(x, self.words.input, self.rounding)
        if self.overwrites and self.words.input is not None:
            x.data.copy_(seen.data)  # behind autograd's back: that blob's maker then computes with it, as in C++
        return self.short(self.inner.compute(seen, weight, bias), self.words.output, self.rounding)

    def short(self, x: Tensor, number: Number | None, rounding: Rounding) -> Tensor:
        if number is None:
            return x
        with torch.no_grad():
            y = quantize(x, number, rounding, carry=self.binary.carry)
        return straight_through(x, y)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self.words, name)}" for name in ("input", "weight", "bias", "output"))


class ShortLRN(nn.Module):
    """y = x (k + alpha / n * sum of x^2 over n channels)^-beta, every step of it rounded to minifloats."""

    def __init__(self, size: int, alpha: float, beta: float, k: float, number: Minifloat, binary: Binary) -> None:
        super().__init__()
        self.size, self.alpha, self.beta, self.k = size, alpha, beta, k
        self.number, self.binary = number, binary

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            seen = self.short(x)
            scale = self.scale(seen)
            y = self.short(seen * self.short(power(scale, self.beta)))
        return _LikeLRN.apply(x, y, scale, self.size, self.alpha, self.beta)

    def short(self, x: Tensor) -> Tensor:
        rounding = half_even if self.binary.half_even else half_away
        return minifloat(x, self.number, rounding, carry=self.binary.carry)

    def scale(self, x: Tensor) -> Tensor:
        """The running sum over the window, channel by channel."""
        squares = self.short(x * x)
        channels, after = x.shape[1], self.size - 1 - (self.size - 1) // 2
        total = torch.zeros_like(x[:, 0])
        sums = []
        for head in range(channels + after):
            if head < channels:
                total = self.short(total + squares[:, head])
            if head >= self.size:
                total = self.short(total - squares[:, head - self.size])
            if head >= after:
                sums.append(total)
        return self.short(self.k + self.short(torch.stack(sums, 1) * (self.alpha / self.size)))

    def extra_repr(self) -> str:
        return f"size={self.size}, alpha={self.alpha:g}, beta={self.beta:g}, k={self.k:g}, {self.number}"


class _LikeLRN(torch.autograd.Function):
    """Hands y on; dx = dy s^-b - 2 alpha / n b x sum(dy y / s)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, scale: Tensor, size: int, alpha: float, beta: float) -> Tensor:
        ctx.save_for_backward(x, y.clone(), scale)
        ctx.constants = size, alpha, beta
        return y.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, y, scale = ctx.saved_tensors
        size, alpha, beta = ctx.constants
        around = size // 2
        ratio = nn.functional.pad(grad * y / scale, (0, 0, 0, 0, around, around))
        sums = torch.empty_like(x)
        window_sums(ratio, size, sums)
        return grad * power(scale, beta) - 2 * alpha / size * beta * x * sums, None, None, None, None, None
