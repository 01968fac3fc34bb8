"""Runs integer programs (docs/integer.md): NAME.json and NAME.npz as `caffejacinto export_int` writes them.

Integers only, from the quantized input to the last blob: accumulators of 32 or 64 bits, shifts, multipliers. Needs
NumPy and nothing else: this file can be copied beside a program and started, `python integer_run.py NAME.json x.npy`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

FORMAT, VERSION = "caffejacinto-integer", 2
_CHUNK = 1 << 22  # numbers of an unfolded image at a time
Watch = Callable[[Mapping[str, Any], int, int], None]  # op, largest |accumulator|, largest |number before rounding|


class ProgramError(ValueError):
    """A program file or an input is not what docs/integer.md describes."""


@dataclass(frozen=True)
class Program:
    """info: the JSON document. arrays: the integers of the npz file, by name."""

    info: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray] = field(repr=False)

    @property
    def tensors(self) -> Mapping[str, Any]:
        return self.info["tensors"]  # type: ignore[no-any-return]


def load(path: str | Path) -> Program:
    """Read NAME.json and the npz file that it names, which lies beside it. Raises ProgramError."""
    path = Path(path)
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(info, dict) or info.get("format") != FORMAT:
            raise ProgramError(f"{path}: this is not an integer program (no format: {FORMAT})")
        if info.get("version") not in range(1, VERSION + 1):
            raise ProgramError(f"{path}: version {info.get('version')}; this reads versions 1 to {VERSION}")
        file = path.with_name(info["arrays"])
        if hashlib.sha256(file.read_bytes()).hexdigest() != info["sha256"]:
            raise ProgramError(f"{file} is not the file that {path.name} was written with")
        with np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        program = Program(info, arrays)
        _check(program)
    except ProgramError:
        raise
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as e:
        raise ProgramError(f"{path}: cannot read this program: {e!r}") from None
    return program


def _check(program: Program) -> None:
    """That every name means something: arrays, tensors, ops. Raises ProgramError or KeyError."""
    known = set(program.info["inputs"])
    for op in program.info["ops"]:
        if op["op"] not in (*SUMS, *MOVES):
            raise ProgramError(f"layer '{op['layer']}': unknown op '{op['op']}'")
        if not known.issuperset(op["inputs"]) or op["output"] not in program.tensors:
            raise ProgramError(f"layer '{op['layer']}': it reads or makes a tensor that is not there")
        known.add(op["output"])
        names = [op[k] for k in ("weight", "weight_zero") if op.get(k)]
        for part in (op, op.get("negative") or {}):
            names += [*part.get("gain", ()), *(part[k] for k in ("add", "shift") if part.get(k))]
        bad = [n for n in names if n not in program.arrays or program.arrays[n].dtype.kind not in "iu"]
        if bad:
            raise ProgramError(f"layer '{op['layer']}': array '{bad[0]}' is missing or does not hold integers")
    if not known.issuperset(program.info["outputs"]) or not set(program.tensors).issuperset(known):
        raise ProgramError("an input or output of the program is not there")


def limits(tensor: Mapping[str, Any]) -> tuple[int, int]:
    """Smallest and largest integer of a tensor."""
    bits = tensor["bits"]
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if tensor["signed"] else (0, (1 << bits) - 1)
    return (-high if tensor.get("symmetric") else low), high


def smallest(low: int, high: int) -> type[np.integer]:
    """The smallest type that holds low .. high."""
    kinds = (np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.int64)
    for kind in kinds:
        if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
            return kind
    raise ProgramError(f"{low} .. {high} does not fit 64 bits")


def quantize(program: Program, name: str, real: np.ndarray) -> np.ndarray:
    """Real numbers as the integers of a tensor: n = clip(round(x * scale + zero)), halves away from zero."""
    tensor = program.tensors[name]
    y = np.asarray(real, np.float64) * tensor["scale"] + tensor["zero"]
    whole = np.trunc(y)
    y = whole + (np.abs(y - whole) >= 0.5) * np.sign(y)
    low, high = limits(tensor)
    return np.clip(y, low, high).astype(smallest(low, high))


def dequantize(program: Program, name: str, whole: np.ndarray) -> np.ndarray:
    """The real numbers that a tensor's integers stand for: (n - zero) / scale."""
    tensor = program.tensors[name]
    return (whole.astype(np.float64) - tensor["zero"]) / tensor["scale"]


def run(program: Program, inputs: Mapping[str, np.ndarray], *, watch: Watch | None = None) -> dict[str, np.ndarray]:
    """Every tensor of one pass, by name. inputs: integers for each of the program's inputs; any batch size.

    watch: called after each op with the largest magnitudes that it met. Raises ProgramError for inputs that are
    missing, of another shape, not integers or out of range.
    """
    values: dict[str, np.ndarray] = {}
    for name in program.info["inputs"]:
        if name not in inputs:
            raise ProgramError(f"input '{name}' is missing; the program reads {', '.join(program.info['inputs'])}")
        values[name] = _checked(program, name, inputs[name])
    for op in program.info["ops"]:
        values[op["output"]] = apply(program, op, [values[n] for n in op["inputs"]], watch=watch)
    return values


def _checked(program: Program, name: str, given: np.ndarray) -> np.ndarray:
    tensor = program.tensors[name]
    given = np.asarray(given)
    if given.shape[1:] != tuple(tensor["shape"][1:]) or given.ndim != len(tensor["shape"]):
        raise ProgramError(f"input '{name}' has shape {given.shape}, the program wants (N, *{tensor['shape'][1:]})")
    if given.dtype.kind not in "iu":
        raise ProgramError(f"input '{name}' holds {given.dtype}, not integers: quantize it first")
    low, high = limits(tensor)
    if given.size and not low <= int(given.min()) <= int(given.max()) <= high:
        raise ProgramError(f"input '{name}' holds numbers outside {low} .. {high}")
    return given


def apply(
    program: Program, op: Mapping[str, Any], inputs: Sequence[np.ndarray], *, watch: Watch | None = None
) -> np.ndarray:
    """One op on the integers of its inputs; returns its output's integers."""
    out = program.tensors[op["output"]]
    if op["op"] in MOVES:
        return MOVES[op["op"]](op, inputs[0], out["shape"])
    kind: Any = np.int32 if op["accumulator_bits"] <= 32 else np.int64
    centred = [x.astype(kind) - kind(program.tensors[n]["zero"]) for n, x in zip(op["inputs"], inputs)]
    if op["op"] == "product":
        centred = [np.multiply.reduce(centred)]
    sums = [SUMS[op["op"]](program, op, x) for x in centred]
    total, y = _finish(program, op, sums, out["zero"])
    largest = _largest(np.maximum(total, 0) if op["relu"] else total)
    if op.get("negative"):
        other, below = _finish(program, {**op, **op["negative"]}, sums, out["zero"])
        y, largest = np.where(total < 0, below, y), max(largest, _largest(other))
    if watch is not None:
        watch(op, max(_largest(s) for s in sums), largest)
    low, high = limits(out)
    return np.clip(y, low, high).astype(smallest(low, high))


def _finish(
    program: Program, op: Mapping[str, Any], sums: Sequence[np.ndarray], zero: int
) -> tuple[np.ndarray, np.ndarray]:
    """The total in front of ReLU and rounding, and what is rounded of it."""
    gained = [_gain(program, op, i, s.astype(np.int64)) for i, s in enumerate(sums)]
    total = _add(program, op, JOINS[op["op"]](op, gained) if op["op"] in JOINS else gained[0])
    shift = _spread(program.arrays[op["shift"]], op["axis"], total.ndim).astype(np.int64)
    return total, _round(program, op, np.maximum(total, 0) if op["relu"] else total, shift, zero)


def _largest(x: np.ndarray) -> int:
    return max(abs(int(x.max())), abs(int(x.min()))) if x.size else 0


def _spread(array: np.ndarray, axis: int, ndim: int) -> np.ndarray:
    """Numbers per channel laid over the axes from `axis` on; a single one stays as it is."""
    return array if array.size == 1 else array.reshape(array.shape + (1,) * (ndim - axis - array.ndim))


def _gain(program: Program, op: Mapping[str, Any], i: int, sums: np.ndarray) -> np.ndarray:
    gain = _spread(program.arrays[op["gain"][i]], op["axis"], sums.ndim).astype(np.int64)
    return np.left_shift(sums, gain) if op["gain_kind"] == "shift" else sums * gain


def _add(program: Program, op: Mapping[str, Any], total: np.ndarray) -> np.ndarray:
    if op["add"] is None:
        return total
    return total + _spread(program.arrays[op["add"]], op["axis"], total.ndim).astype(np.int64)


def _round(program: Program, op: Mapping[str, Any], total: np.ndarray, shift: np.ndarray, zero: int) -> np.ndarray:
    """round(total / 2^shift / divisor + zero), halves away from zero."""
    one = np.left_shift(np.int64(1), shift)
    if op["op"] != "average_pool":
        total = total + zero * one
        magnitude = np.right_shift(np.abs(total) + (one >> 1), shift)
    else:
        size = program.tensors[op["inputs"][0]]["shape"][2:]
        one = one * divisors(op, size)
        total = total + zero * one
        magnitude = (np.abs(total) + (one >> 1)) // one
    return np.sign(total) * magnitude


# --- the sums of each op, on numbers whose zero is 0 ------------------------------------------------------------------
def _weight(program: Program, op: Mapping[str, Any], kind: Any) -> np.ndarray:
    return program.arrays[op["weight"]].astype(kind) - program.arrays[op["weight_zero"]].astype(kind)


def _conv(program: Program, op: Mapping[str, Any], x: np.ndarray) -> np.ndarray:
    weight, group = _weight(program, op, x.dtype), op["group"]
    (top, left), (sy, sx), (dy, dx) = op["pad"], op["stride"], op["dilation"]
    kh, kw = weight.shape[2:]
    x = np.pad(x, ((0, 0), (0, 0), (top, top), (left, left)))
    h, w = (x.shape[2] - dy * (kh - 1) - 1) // sy + 1, (x.shape[3] - dx * (kw - 1) - 1) // sx + 1
    y = np.zeros((len(x), len(weight), h, w), x.dtype)
    if group == x.shape[1] == len(weight):  # one channel each: nothing to sum over but the kernel
        for i, j in np.ndindex(kh, kw):
            y += (
                x[:, :, i * dy : i * dy + h * sy : sy, j * dx : j * dx + w * sx : sx][:, :, :h, :w]
                * weight[:, 0, i, j, None, None]
            )
        return y
    windows = np.lib.stride_tricks.sliding_window_view(x, (dy * (kh - 1) + 1, dx * (kw - 1) + 1), (2, 3))
    windows = windows[:, :, ::sy, ::sx, ::dy, ::dx]  # N, C, h, w, kh, kw
    rows = weight.reshape(group, len(weight) // group, -1)
    step = max(1, _CHUNK // max(1, h * w * weight[0].size * group))
    for n in range(0, len(x), step):
        part = windows[n : n + step].reshape(-1, group, rows.shape[2] // (kh * kw), *windows.shape[2:])
        flat = np.ascontiguousarray(part.transpose(0, 1, 3, 4, 2, 5, 6)).reshape(len(part), group, h * w, -1)
        for g in range(group):
            done = np.einsum("npk,ok->nop", np.ascontiguousarray(flat[:, g]), rows[g])
            y[n : n + step, g * len(rows[g]) : (g + 1) * len(rows[g])] = done.reshape(len(part), -1, h, w)
    return y


def _deconv(program: Program, op: Mapping[str, Any], x: np.ndarray) -> np.ndarray:
    weight, group = _weight(program, op, x.dtype), op["group"]
    (py, px), (sy, sx), (dy, dx) = op["pad"], op["stride"], op["dilation"]
    n, channels, h, w = x.shape
    per, kh, kw = weight.shape[1:]
    full = np.zeros((n, group, per, sy * (h - 1) + dy * (kh - 1) + 1, sx * (w - 1) + dx * (kw - 1) + 1), x.dtype)
    split = x.reshape(n, group, channels // group, h, w)
    weight = weight.reshape(group, channels // group, per, kh, kw)
    for i, j in np.ndindex(kh, kw):
        part = np.einsum("ngchw,gco->ngohw", split, weight[..., i, j])
        full[..., i * dy : i * dy + sy * (h - 1) + 1 : sy, j * dx : j * dx + sx * (w - 1) + 1 : sx] += part
    full = full.reshape(n, group * per, *full.shape[3:])
    return full[:, :, py : full.shape[2] - py, px : full.shape[3] - px]


def _dense(program: Program, op: Mapping[str, Any], x: np.ndarray) -> np.ndarray:
    weight = _weight(program, op, x.dtype)
    lead = x.shape[: op["axis"]]
    return np.einsum("nk,ok->no", np.ascontiguousarray(x.reshape(-1, weight.shape[1])), weight).reshape(*lead, -1)


def _windows(op: Mapping[str, Any], x: np.ndarray, fill: int) -> np.ndarray:
    """N, C, out_h, out_w, kernel_h, kernel_w; what lies outside of the image is `fill`."""
    sizes = zip(x.shape[2:], op["kernel"], op["stride"], op["pad"], op["out"])
    ends = [(o - 1) * s + k for _, k, s, _, o in sizes]
    after = [max(0, e - p - h) for e, p, h in zip(ends, op["pad"], x.shape[2:])]
    x = np.pad(x, ((0, 0), (0, 0), (op["pad"][0], after[0]), (op["pad"][1], after[1])), constant_values=fill)
    x = x[:, :, : ends[0], : ends[1]]
    view = np.lib.stride_tricks.sliding_window_view(x, tuple(op["kernel"]), (2, 3))
    return view[:, :, :: op["stride"][0], :: op["stride"][1]]


def _max_pool(program: Program, op: Mapping[str, Any], x: np.ndarray) -> np.ndarray:
    return _windows(op, x, np.iinfo(x.dtype).min).max((4, 5))


def _average_pool(program: Program, op: Mapping[str, Any], x: np.ndarray) -> np.ndarray:
    return _windows(op, x, 0).sum((4, 5), dtype=x.dtype)


def divisors(op: Mapping[str, Any], size: Sequence[int]) -> np.ndarray:
    """How many numbers each average is over, (out_h, out_w): padding counts, what hangs over the padded image not."""
    rows = zip(size, op["kernel"], op["stride"], op["pad"], op["out"])
    y, x = ([min(i * s - p + k, h + p) - (i * s - p) for i in range(o)] for h, k, s, p, o in rows)
    return np.asarray(y, np.int64)[:, None] * np.asarray(x, np.int64)


def _same(program: Program, op: Mapping[str, Any], x: np.ndarray) -> np.ndarray:
    return x


def _slice(op: Mapping[str, Any], x: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    return x[(slice(None),) * op["axis"] + (slice(op["start"], op["end"]),)]


MOVES: dict[str, Callable[[Mapping[str, Any], np.ndarray, Sequence[int]], np.ndarray]] = {
    "reshape": lambda op, x, shape: x.reshape(x.shape[0], *shape[1:]),
    "slice": _slice,
    "permute": lambda op, x, shape: np.ascontiguousarray(x.transpose(op["order"])),
}
SUMS: dict[str, Callable[[Program, Mapping[str, Any], np.ndarray], np.ndarray]] = {
    "conv": _conv,
    "deconv": _deconv,
    "dense": _dense,
    "max_pool": _max_pool,
    "average_pool": _average_pool,
    "rescale": _same,
    "sum": _same,
    "max": _same,
    "concat": _same,
    "product": _same,
}
JOINS: dict[str, Callable[[Mapping[str, Any], list[np.ndarray]], np.ndarray]] = {
    "sum": lambda op, xs: np.sum(xs, axis=0),
    "max": lambda op, xs: np.maximum.reduce(xs),
    "concat": lambda op, xs: np.concatenate(xs, op["join"]),
}


def main(words: Sequence[str] | None = None) -> int:
    """`python integer_run.py NAME.json INPUT.npy [--output OUT.npz]`; exit code 3 for files that do not fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", help="NAME.json")
    parser.add_argument("input", help=".npy of the one input, or .npz with an array per input; floats are quantized")
    parser.add_argument("--output", help=".npz for the integers of every output")
    given = parser.parse_args(words)
    try:
        program = load(given.program)
        found = np.load(given.input, allow_pickle=False)
        arrays = {program.info["inputs"][0]: found} if isinstance(found, np.ndarray) else dict(found)
        arrays = {n: quantize(program, n, a) if a.dtype.kind == "f" and n in program.tensors else a
                  for n, a in arrays.items()}  # fmt: skip
        values = run(program, arrays)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as e:
        print(f"error: {e}", file=sys.stderr)
        return 3
    outputs = {name: values[name] for name in program.info["outputs"]}
    for name, value in outputs.items():
        tensor = program.tensors[name]
        print(f"{name}: {value.dtype} {value.shape}, real = (n - {tensor['zero']}) / {tensor['scale']:g}")
        print(value if value.size <= 100 else value.reshape(len(value), -1)[:, :8])
    if given.output:
        np.savez(given.output, **outputs)  # type: ignore[arg-type]
    return 0


if __name__ == "__main__":
    sys.exit(main())
