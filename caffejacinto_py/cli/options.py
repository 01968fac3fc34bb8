"""Options that several verbs share, and the types that read them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])
FILE = click.Path(path_type=Path)


class CommaList(click.ParamType):
    """a,b,c -> ("a", "b", "c")."""

    name = "A,B"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        words = tuple(word.strip() for word in str(value).split(",") if word.strip())
        if not words and param is not None and param.name == "weights":  # not a silent start from scratch
            self.fail("names no file", param, ctx)
        return words


class DataShape(click.ParamType):
    """C,H,W (also CxHxW) -> three positive integers."""

    name = "C,H,W"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        words = str(value).replace("x", ",").split(",")
        if len(words) != 3 or not all(w.strip().isdecimal() and int(w) > 0 for w in words):
            self.fail(f"'{value}' is not three sizes such as 3,224,224", param, ctx)
        return tuple(int(w) for w in words)


def phases(*more: str, default: str) -> Callable[[F], F]:
    names = ["TRAIN", "TEST", *more]
    kind = click.Choice(names, case_sensitive=False)
    return click.option(
        "--phase", type=kind, metavar="|".join(names), default=default, show_default=True, help="Phase of the net."
    )


def state(command: F) -> F:
    """--level and --stage, for include and exclude rules."""
    command = click.option("--stage", type=CommaList(), default=(), help="Stages of the net, comma-separated.")(command)
    return click.option("--level", type=int, default=0, show_default=True, help="Level of the net.")(command)


def gpu(command: F) -> F:
    text = "GPU to use: a number or 'all'. -1: CPU. Default: CPU, unless a solver says solver_mode: GPU."
    return click.option("--gpu", "gpu", metavar="N", default=None, help=text)(command)


def dialect(command: F) -> F:
    text = "Whose numbers to follow where forks differ: bvlc, nvcaffe, jacinto, jacinto-0.16, ssd, adaption, ristretto."
    command = compat(command)
    return click.option("--dialect", default=None, metavar="NAME", help=text + " Default: from the net.")(command)


def compat(command: F) -> F:
    """--compat: the verb gets `compat`, a Compat. Comes with --dialect."""

    def read(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> Any:
        from caffejacinto_py.schema.compat import parse_compat

        return parse_compat(value)

    text = "Reproduce a C++ binary where we deviate, such as quantization=cpu; repeatable. See docs/compat.md."
    return click.option("--compat", multiple=True, metavar="SWITCH=VALUE", callback=read, help=text)(command)


def precision(command: F) -> F:
    """--precision: the verb gets `precision`, a key of passes.precision.OVERRIDES or None."""
    text = "Number type of the layers, for nets that say nothing: fp32, tf32, fp16, bf16, fp64. See docs/precision.md."
    kind = click.Choice(["fp32", "tf32", "fp16", "bf16", "fp64"], case_sensitive=False)
    return click.option("--precision", type=kind, metavar="TYPE", help=text)(command)


def threads(command: F) -> F:
    return click.option("--threads", type=click.IntRange(min=1), default=None, help="CPU threads.")(command)


def workers(command: F) -> F:
    text = "Threads that prepare data, per data layer."
    return click.option("--workers", type=click.IntRange(min=0), default=1, show_default=True, help=text)(command)


def data_shape(command: F) -> F:
    text = "What data layers deliver where the net does not say. Default: a usual size that fits, 3,224,224 first."
    return click.option("--data-shape", type=DataShape(), help=text)(command)


def python_layers(command: F) -> F:
    text = "Let Python layers run the code that they name (found on PYTHONPATH). Only for nets that you trust."
    return click.option("--allow-python-layers", "python_layers", is_flag=True, callback=_install, help=text)(command)


def _install(ctx: click.Context, param: click.Parameter, value: bool) -> bool:
    """User code says `import caffe`."""
    if value:
        from caffejacinto_py.pycaffe import install_as_caffe

        install_as_caffe()
    return value


def log_level(command: F) -> F:
    levels = click.Choice(["debug", "info", "warning", "error"], case_sensitive=False)
    return click.option("--log-level", type=levels, default="info", show_default=True,
                        help="What is logged to stderr.")(command)  # fmt: skip


def as_json(command: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")(command)


def print_json(value: Any) -> None:
    """One JSON document on stdout; numbers that JSON does not know (nan, inf) become null."""
    click.echo(json.dumps(_plain(value), indent=2))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def size(count: int) -> str:
    """Bytes for people: in B, KiB, MiB or GiB."""
    value, units = float(count), ["B", "KiB", "MiB", "GiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{count} B" if units[0] == "B" else f"{value:.1f} {units[0]}"


def table(rows: Sequence[tuple[str, ...]], right: str) -> str:
    """Rows as aligned columns; `right` has "r" for each column that is aligned to the right, "l" else."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(right))]
    lines = []
    for row in rows:
        cells = (c.rjust(w) if a == "r" else c.ljust(w) for c, w, a in zip(row, widths, right, strict=True))
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def running(command: F) -> F:
    """What verbs that run a net share: --gpu, --dialect, --compat, --workers, --threads, --allow-python-layers,
    --log-level and --json."""
    for option in (as_json, log_level, python_layers, threads, workers, dialect, gpu):
        command = option(command)
    return command
