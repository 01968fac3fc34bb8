"""The table at the end of a run: one line a stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from caffejacinto_py.recipes.results import Result

Cell = Callable[[Result], str]
ABSENT = "-"


def _value(name: str, form: str) -> Cell:
    def cell(result: Result) -> str:
        value = result.scores.get(name)
        return ABSENT if value is None else format(value, form)

    return cell


def _bits(name: str) -> Cell:
    def cell(result: Result) -> str:
        value = result.scores.get(name)
        return ABSENT if value is None else "float" if value == 32 else str(value)

    return cell


_LAST = ("loss", "sparsity", "weights", "activations", "seconds")
_COLUMNS: dict[str, Cell] = {
    "stage": lambda r: r.stage,
    "iterations": lambda r: str(r.iterations),
    "top-1": _value("top1", ".4f"),
    "top-5": _value("top5", ".4f"),
    "loss": _value("loss", ".4g"),
    "sparsity": _value("sparsity", ".3f"),
    "weights": _bits("weight_bits"),
    "activations": _bits("activation_bits"),
    "seconds": lambda r: f"{r.seconds:.1f}",
}


def rows(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """Header and one row a result. Columns that no stage has are left out; outputs of other kinds get their own."""
    columns = dict(_COLUMNS)
    for name in ("top-1", "top-5"):
        if all(columns[name](r) == ABSENT for r in results):
            del columns[name]
    for name in _others(results):
        columns[name] = _output(name)
    order = [c for c in columns if c not in _LAST] + list(_LAST)
    return [tuple(order), *(tuple(columns[c](r) for c in order) for r in results)]


def _others(results: Sequence[Result]) -> list[str]:
    """Outputs that are neither accuracies nor losses: those of nets without an accuracy."""
    if any(r.scores.get("top1") is not None for r in results):
        return []
    names = [n for r in results for n, v in r.scores.get("outputs", {}).items() if v != r.scores.get("loss")]
    return list(dict.fromkeys(names))


def _output(name: str) -> Cell:
    def cell(result: Result) -> str:
        value: Any = result.scores.get("outputs", {}).get(name)
        return ABSENT if value is None else f"{value:.4g}"

    return cell


def text(results: Sequence[Result]) -> str:
    """For the terminal: aligned, numbers to the right."""
    table = rows(results)
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = []
    for row in table:
        cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def markdown(title: str, results: Sequence[Result]) -> str:
    """table.md."""
    head, *body = rows(results)
    lines = [f"# {title}", "", _line(head), "|---|" + "---:|" * (len(head) - 1), *(_line(row) for row in body), ""]
    note = "sparsity: zero weights of all counted convolutions. weights, activations: bits. seconds: with tests."
    return "\n".join([*lines, note, ""])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"
