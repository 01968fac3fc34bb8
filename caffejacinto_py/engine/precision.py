"""Runs the layers of a net in the number types that passes/precision.py resolved, and knows which types a device has.

Masters, their gradients and their history keep the net's own type: a weight is cast where its layer runs, and autograd
brings its gradient back. Losses, metrics and BatchNorm's statistics are float32 sums.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from caffejacinto_py.engine import gpu
from caffejacinto_py.ir.graph import Graph, Node
from caffejacinto_py.passes.precision import AS_BOTTOMS, OVERRIDES, WIDTHS, Row, Table, resolve

log = logging.getLogger(__name__)
DTYPES = {
    "DOUBLE": torch.float64,
    "FLOAT": torch.float32,
    "FLOAT16": torch.float16,
    "BFLOAT16": torch.bfloat16,
}


class Cast(nn.Module):
    """A layer's module that computes in `dtype`: its inputs are cast, and with `weights` its parameters.

    out: the type of its floating tops; None: `dtype`. While `paused` the module is called as it is.
    In-place marks go through to the module inside, which then overwrites a copy or the bottom itself.
    """

    def __init__(
        self, inner: nn.Module, dtype: torch.dtype, *, bottoms: int, weights: bool, out: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.inner, self.bottoms = inner, bottoms
        self.dtype, self.weights, self.out = dtype, weights, out
        self.paused = False

    @property
    def inplace(self) -> bool:
        return bool(getattr(self.inner, "inplace", False))

    @inplace.setter
    def inplace(self, value: bool) -> None:
        self.inner.inplace = value  # type: ignore[assignment]

    def affine(self) -> Any:
        """Scale and shift of a layer that the one before applies."""
        return self.inner.affine()  # type: ignore[operator]

    def forward(self, *args: Tensor) -> Tensor | tuple[Tensor, ...]:
        if self.paused:
            return self.inner(*args)  # type: ignore[no-any-return]
        # behind the bottoms: scale and shift of an absorbed layer, which keep their type
        args = (*(_cast(a, self.dtype) for a in args[: self.bottoms]), *args[self.bottoms :])
        found = self._with_weights(args) if self.weights else self.inner(*args)
        out = self.out or self.dtype
        return tuple(_cast(t, out) for t in found) if isinstance(found, tuple) else _cast(found, out)

    def _with_weights(self, args: tuple[Tensor, ...]) -> Any:
        """Call the module with cast parameters. As torch.func.functional_call, which takes several times as long as a
        small layer on a GPU."""
        if torch.compiler.is_compiling():
            now = {name: _cast(p, self.dtype) for name, p in self.inner.named_parameters()}
            return torch.func.functional_call(self.inner, now, args)
        places: list[tuple[dict[str, Any], str, Tensor]] = [
            (m._parameters, name, p) for m in self.inner.modules() for name, p in m._parameters.items() if p is not None
        ]
        try:
            for table, name, p in places:
                table[name] = _cast(p, self.dtype)
            return self.inner(*args)
        finally:
            for table, name, p in places:
                table[name] = p

    def extra_repr(self) -> str:
        return f"{self.dtype}, weights={self.weights}"


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x is not None and x.dtype != dtype and x.is_floating_point() else x


def wrap(module: nn.Module, node: Node, table: Table | None) -> nn.Module:
    """The module of a node as `table` wants it run. Net outputs leave it in the base type."""
    if table is None or not table.mixed:
        return module
    row, base = table.rows[node.name], DTYPES[table.base]
    if row.runs == AS_BOTTOMS:
        return Leave(module, base) if row.last else module
    weights = row.runs != table.base and node.layer.narrows == "weights"
    return Cast(module, DTYPES[row.runs], bottoms=len(node.inputs), weights=weights, out=base if row.last else None)


class Leave(nn.Module):
    """A module that hands on what it reads, at the end of the net."""

    def __init__(self, inner: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner, self.dtype = inner, dtype

    def forward(self, *args: Tensor) -> Tensor | tuple[Tensor, ...]:
        found = self.inner(*args)
        return tuple(_cast(t, self.dtype) for t in found) if isinstance(found, tuple) else _cast(found, self.dtype)


def pause(modules: Iterable[nn.Module], paused: bool) -> None:
    """Let all layers run in the net's base type: whoever looks at blobs through a hook sees that."""
    found = [m for m in modules if isinstance(m, Cast)]
    if found and paused and not found[0].paused:
        log.warning(
            "What looks at this net or simulates quantization needs its base type: no layer runs in another one"
        )
    for m in found:
        m.paused = paused


def missing(kind: str, device: torch.device) -> str | None:
    """Why a type cannot pay on a device: None, or the reason in a few words. Every type can be computed everywhere,
    but without an instruction for it many times slower than in float32 (measured: convolutions 8 to 13 times).
    """
    if WIDTHS[kind] > 2:
        return None
    if device.type == "cuda":
        slow = kind == "BFLOAT16" and not torch.cuda.is_bf16_supported(including_emulation=False)
        return "this GPU has no bfloat16" if slow else None
    if device.type != "cpu":
        return None
    names = {
        "FLOAT16": ("_is_amx_fp16_supported",),
        "BFLOAT16": ("_is_avx512_bf16_supported", "_is_amx_tile_supported"),
    }
    if platform.machine().lower() in ("x86_64", "amd64"):
        found = any(_ask(torch.cpu, name) for name in names[kind])
        found = found or (kind == "FLOAT16" and _ask(torch.cpu, "_is_avx512_fp16_supported"))
    else:  # Arm: oneDNN knows
        found = _ask(torch.ops.mkldnn, f"_is_mkldnn_{'bf16' if kind == 'BFLOAT16' else 'fp16'}_supported")
    return None if found else f"this CPU has no instructions for {DTYPES[kind]}".replace("torch.", "")


def _ask(module: Any, name: str) -> bool:
    """A question that not every release of torch can answer; then the answer is no."""
    ask = getattr(module, name, None)
    return bool(ask()) if ask is not None else False


def choose(
    graph: Graph, device: torch.device, override: str | None = None, *, shared: torch.dtype | None = None
) -> tuple[Table, list[str]]:
    """The types of a net on a device, and lines to log. override: see `resolve`. shared: the type of the parameters
    that the net shares with another, which then is its base type. Raises as `resolve`."""
    table = resolve(graph, override)
    if shared is not None and DTYPES[table.base] != shared:
        table = resolve(graph, next(o for o, kind in OVERRIDES.items() if DTYPES[kind] == shared))
    return fit(table, device)


def fit(table: Table, device: torch.device) -> tuple[Table, list[str]]:
    """The table as the device can run it: a type that it has no instructions for becomes the base type. And a line to
    log for each of those types."""
    lines, rows = [], dict(table.rows)
    for kind in table.types:
        why = missing(kind, device)
        if why is None:
            continue
        low = [r.layer for r in rows.values() if r.runs == kind]
        lines.append(f"{kind}: {why}; {len(low)} layers run in {table.base} instead")
        rows |= {name: _raised(rows[name], table.base, why) for name in low}
    why = gpu.tf32_missing(device) if table.tf32 else None
    if why is not None:
        lines.append(f"TF32: {why}; products are computed in FLOAT")
    return replace(table, rows=rows, tf32=table.tf32 and why is None), lines


def _raised(row: Row, base: str, why: str) -> Row:
    return replace(row, runs=base, why=why)
