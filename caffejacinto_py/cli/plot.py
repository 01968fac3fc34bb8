"""`caffejacinto plot`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from caffejacinto_py.cli import options
from caffejacinto_py.errors import UsageError

if TYPE_CHECKING:
    from caffejacinto_py.solver.readlog import Row

Series = tuple[list[float], list[float]]
_TITLES = ("loss", "learning rate", "accuracy and other outputs")


@click.command()
@click.argument("logs", nargs=-1, required=True, type=options.FILE)
@click.option("--output", "-o", type=options.FILE, default="training.png", show_default=True,
              help="The picture; its ending decides the kind: .png, .svg, .pdf.")  # fmt: skip
@click.option("--seconds", is_flag=True, help="Seconds on the horizontal axis instead of iterations.")
@click.option("--log-scale", is_flag=True, help="Logarithmic axis for the loss.")
def command(logs: tuple[Path, ...], output: Path, seconds: bool, log_scale: bool) -> int:
    """Plot loss, learning rate and accuracy of training logs.

    LOGS are what `train` printed, of this program or of any Caffe, or metrics.jsonl files; several are drawn into one
    picture. Needs matplotlib.
    """
    figure_class = _matplotlib()
    from caffejacinto_py.schema.files import atomic_write
    from caffejacinto_py.solver.readlog import read_log

    panels: list[dict[str, Series]] = [{}, {}, {}]
    for path, label in zip(logs, _labels(logs), strict=True):
        _collect(read_log(path), label, seconds, panels)
    drawn = [(title, lines) for title, lines in zip(_TITLES, panels, strict=True) if lines]
    if not drawn:
        raise UsageError(f"{', '.join(map(str, logs))}: nothing to plot", hint="do the logs have times? see --seconds")
    figure = _draw(figure_class, drawn, "seconds" if seconds else "iteration", log_scale)
    kind = output.suffix.lstrip(".").lower() or "png"
    known = figure.canvas.get_supported_filetypes()
    if kind not in known:
        raise UsageError(f"--output {output}: no picture of type '{kind}'", hint=f"one of {', '.join(sorted(known))}")
    with atomic_write(output, "w+b") as file:
        figure.savefig(file, format=kind)
    click.echo(f"Wrote {output}")
    return 0


def _matplotlib() -> Any:
    """The class of figures: drawn without a display, and without pyplot's global state."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("plot needs matplotlib", hint="pip install 'caffejacinto-py[plot]'") from None
    return Figure


def _labels(logs: Sequence[Path]) -> list[str]:
    """What tells the logs apart in the legend: nothing for one, else names, with folders where names are equal."""
    if len(logs) == 1:
        return [""]
    names = [path.name for path in logs]
    return [f"{p.name}: " if names.count(p.name) == 1 else f"{p}: " for p in logs]


def _collect(rows: Sequence[Row], label: str, seconds: bool, panels: Sequence[dict[str, Series]]) -> None:
    """Sort the values of one log into the panels."""
    for row in rows:
        x = row.seconds if seconds else row.iter
        if x is None:
            continue
        test = f"#{row.net}" if row.net else ""
        if row.smoothed is not None:
            _point(panels[0], f"{label}train loss", x, row.smoothed)
        if row.kind == "train" and row.lr is not None:
            _point(panels[1], f"{label}lr", x, row.lr)
        for name, value in row.values.items():
            if row.kind == "test" or name not in row.losses:
                panel = panels[0 if name in row.losses else 2]
                _point(panel, f"{label}{row.kind}{test} {name}", x, value)


def _point(panel: dict[str, Series], name: str, x: float, y: float) -> None:
    xs, ys = panel.setdefault(name, ([], []))
    xs.append(x)
    ys.append(y)


def _draw(figure_class: Any, panels: Sequence[tuple[str, dict[str, Series]]], x_title: str, log_scale: bool) -> Any:
    figure = figure_class(figsize=(8, 3 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (title, lines) in zip(axes, panels, strict=True):
        for name, (xs, ys) in lines.items():
            axis.plot(xs, ys, label=name, linewidth=1, marker="." if len(xs) < 40 else None)
        axis.set_ylabel(title)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
        if title == _TITLES[0] and log_scale:
            axis.set_yscale("log")
    axes[-1].set_xlabel(x_title)
    return figure
