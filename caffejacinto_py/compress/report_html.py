"""A Report as one HTML file: tables and plots (SVG in the text), nothing to load, on light and dark screens."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from caffejacinto_py.compress.report import Report, Row
from caffejacinto_py.schema.files import atomic_write

_STYLE = """
:root { --ink: #1d2733; --soft: #66717e; --line: #d5dbe2; --paper: #ffffff; --band: #f4f6f8; --bar: #2b6cb0;
  --mark: #c05621; --span: #bcd3ea; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e9ef; --soft: #9aa5b1; --line: #38424d; --paper: #14191f;
  --band: #1c232b; --bar: #63a4e8; --mark: #f0955a; --span: #2d4a68; } }
body { margin: 2rem auto; max-width: 72rem; padding: 0 1rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem; }
p { max-width: 48rem; } .soft, caption { color: var(--soft); }
.alarm { color: var(--mark); font-weight: 600; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem .7rem .15rem 0; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 500; } .name { text-align: left; }
tbody tr:nth-child(even) { background: var(--band); }
svg { display: block; max-width: 100%; height: auto; } td svg { display: inline-block; }
svg text { fill: var(--ink); font: 12px system-ui, sans-serif; } svg .soft { fill: var(--soft); }
.bar { fill: var(--bar); } .mark { fill: var(--mark); } .span { fill: var(--span); }
.grid { stroke: var(--line); } .edge { stroke: var(--bar); stroke-width: 2; }
"""
_LEFT, _RIGHT, _WIDTH, _STEP = 230, 90, 860, 18  # of a plot, in pixels


def write(report: Report, folder: Path) -> tuple[Path, Path]:
    """Write `report.json` and `report.html`; makes the folder. CaffeError where the disk refuses."""
    data, page = folder / "report.json", folder / "report.html"
    text = html(report)
    with atomic_write(data, "w") as f:
        json.dump(report.as_dict(), f, indent=1)
        f.write("\n")
    with atomic_write(page, "w") as f:
        f.write(text)
    return data, page


def html(report: Report) -> str:
    """The page."""
    title = str(report.facts.get("net") or "net")
    parts = [f"<h1>{escape(title)}</h1>", _facts(report), _bad(report), _results(report), _sparsity(report)]
    parts += [_noise(report), _ranges(report), _tables(report)]
    body = "\n".join(p for p in parts if p)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{escape(title)}: test report</title>\n"
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{_STYLE}</style>\n</head>\n'
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _facts(report: Report) -> str:
    items = ((k.replace("_", " "), v) for k, v in report.facts.items() if k != "net" and v not in (None, "", [], {}))
    cells = "".join(
        f'<tr><th class="name">{escape(k)}</th><td class="name">{escape(_words(v))}</td></tr>' for k, v in items
    )
    return f"<table>{cells}</table>"


def _bad(report: Report) -> str:
    """What no other number tells of."""
    bad = [r for r in (*report.weights, *report.tops) if r.bad]
    if not bad:
        return ""
    first = f"{bad[0].bad:,} of {bad[0].count:,} values of blob {bad[0].name} of layer {bad[0].layer}"
    return f'<p class="alarm">NaN or infinite: {escape(first)}, the first of {len(bad)} such blobs.</p>'


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} = {_words(v)}" for k, v in value.items())
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else number(value)


def number(value: Any, digits: int = 4) -> str:
    """For people."""
    if value is None:
        return ""
    if isinstance(value, float):
        return "\u221e" if value == math.inf else f"{value:.{digits}g}"
    if isinstance(value, list):
        return f"{number(min(value), 3)} .. {number(max(value), 3)}"
    return str(value)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


# --- sections --------------------------------------------------------------------------------------------------------
def _results(report: Report) -> str:
    rows = [(r["scores"] + f": top-{r['k']}", r["value"], r["float"]) for r in report.ranks]
    rows += [(o["name"], o["mean"], o["float"]) for o in report.outputs]
    if not report.simulated:
        return "<h2>Results</h2>" + _table(("output", "mean"), [(n, number(v, 6)) for n, v, _ in rows])
    cells = [(n, number(f, 6), number(v, 6), _difference(v, f)) for n, v, f in rows]
    return "<h2>Results</h2>" + _table(("output", "float", "simulated", "difference"), cells)


def _difference(simulated: float, exact: float | None) -> str:
    return "" if exact is None else f"{simulated - exact:+.4g}"


def _sparsity(report: Report) -> str:
    s = report.sparsity
    weights = [r for r in report.weights if r.kind == "weight"]
    text = (
        f"{_percent(s['fraction'])} of the weights that count ({s['zeros']:,} of {s['count']:,}) are zero." if s else ""
    )
    first = bars([(r.layer, r.zeros, _percent(r.zeros)) for r in weights], 1.0) if weights else ""
    tops = [r for r in report.tops if _plotted(r)]
    words = "Exact zeros in the blobs, over all batches."
    if report.simulated:
        words += " The mark is the float net: rounding makes zeros of small values."
    second = bars([(_title(r), r.zeros, _percent(r.zeros)) for r in tops], 1.0,
                  marks=[r.float_zeros for r in tops])  # fmt: skip
    return f"<h2>Zeros in weights</h2><p>{text}</p>{first}<h2>Zeros in activations</h2><p>{words}</p>{second}"


def _noise(report: Report) -> str:
    rows = [r for r in (*report.weights, *report.tops) if r.sqnr is not None]
    if not rows:
        return ""
    tops = [r for r in rows if r.kind == "top" and _plotted(r)]
    weights = [r for r in rows if r.kind == "weight"]
    top = max([r.sqnr for r in (*tops, *weights) if r.sqnr is not None and math.isfinite(r.sqnr)] + [1.0])

    def chart(some: Sequence[Row], name: Callable[[Row], str]) -> str:
        return bars([(name(r), _finite(r.sqnr, top), f"{number(r.sqnr, 3)} dB") for r in some], top)

    text = "Signal to quantization noise of blobs: all noise that has gathered up to there. 6 dB are one bit."
    return (
        f"<h2>Noise in activations</h2><p>{text}</p>{chart(tops, _title)}"
        f"<h2>Noise in weights</h2>{chart(weights, lambda r: r.layer)}"
    )


def _plotted(r: Row) -> bool:
    """Whether a top is more than a label or a score."""
    return math.prod(r.shape[1:]) > 1


def _title(r: Row) -> str:
    """The layer, and its blob where it makes several."""
    return f"{r.layer}: {r.name}" if r.several else r.layer


def _finite(value: float | None, most: float) -> float:
    return 0.0 if value is None or math.isnan(value) or value < 0 else min(value, most)


def _ranges(report: Report) -> str:
    rows = [r for r in report.tops if _plotted(r) and r.rms > 0]
    if not rows:
        return ""
    text = "Largest magnitude (line) and root mean square (mark) of blobs, on a scale of powers of two."
    if report.simulated:
        text += " The band is what the integers can express, from one step to their end."
    return f"<h2>Ranges of activations</h2><p>{text}</p>{spans(rows)}"


def _tables(report: Report) -> str:
    return (
        "<h2>Weights</h2>" + _rows(report.weights, report.simulated)
        + "<h2>Activations</h2>" + _rows(report.tops, report.simulated)
    )  # fmt: skip


def _rows(rows: Sequence[Row], simulated: bool) -> str:
    head = ["layer", "blob", "shape", "zeros", "min", "max", "rms", "distribution"]
    head += ["bits", "scale", "offset", "SQNR dB"] if simulated else []
    cells = []
    for r in rows:
        shape = "\u00d7".join(map(str, r.shape)) or "1"
        row = [r.layer, r.name, shape, _percent(r.zeros), number(r.min), number(r.max), number(r.rms), histogram(r)]
        if simulated:
            bits = "" if r.bits is None else f"{r.bits}{'u' if r.unsigned else 's'}"
            row += [bits, number(r.scale), number(r.offset), "" if r.sqnr is None else number(r.sqnr, 3)]
        cells.append(tuple(row))
    return _table(tuple(head), cells, left=(0, 1), raw=(7,))


def _table(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, left: Sequence[int] = (0,), raw: Sequence[int] = ()
) -> str:
    def cell(tag: str, i: int, text: str) -> str:
        kind = ' class="name"' if i in left else ""
        return f"<{tag}{kind}>{text if i in raw and tag == 'td' else escape(text)}</{tag}>"

    top = "".join(cell("th", i, h) for i, h in enumerate(head))
    body = "\n".join("<tr>" + "".join(cell("td", i, c) for i, c in enumerate(row)) + "</tr>" for row in rows)
    return f'<div class="wide"><table>\n<thead><tr>{top}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


# --- plots -----------------------------------------------------------------------------------------------------------
def bars(rows: Sequence[tuple[str, float, str]], most: float, *, marks: Sequence[float | None] = ()) -> str:
    """A horizontal bar for each (name, value, text). marks: a second value for each."""
    plot = _WIDTH - _LEFT - _RIGHT
    lines = []
    for i, (name, value, text) in enumerate(rows):
        y = i * _STEP
        width = plot * max(value, 0.0) / most
        lines.append(_label(name, y))
        lines.append(f'<rect class="bar" x="{_LEFT}" y="{y + 4}" width="{width:.1f}" height="10"/>')
        mark = marks[i] if i < len(marks) else None
        if mark is not None:
            lines.append(
                f'<rect class="mark" x="{_LEFT + plot * mark / most - 1:.1f}" y="{y + 2}" width="2" height="14"/>'
            )
        lines.append(f'<text x="{_WIDTH - _RIGHT + 8}" y="{y + 13}">{escape(text)}</text>')
    return _svg(lines, len(rows))


def _label(name: str, y: int) -> str:
    short = name if len(name) <= 31 else name[:15] + "\u2026" + name[-15:]
    return f'<text x="{_LEFT - 10}" y="{y + 13}" text-anchor="end">{escape(short)}<title>{escape(name)}</title></text>'


def spans(rows: Sequence[Row]) -> str:
    """Magnitudes on a logarithmic scale: what is there, and what the integers can express."""
    points = [v for r in rows for v in (r.rms, _magnitude(r), _step(r), _reach(r)) if v]
    low, high = math.floor(math.log2(min(points))), math.ceil(math.log2(max(points)))
    high = max(high, low + 1)
    plot = _WIDTH - _LEFT - _RIGHT

    def x(value: float) -> float:
        return _LEFT + plot * (math.log2(value) - low) / (high - low)

    bottom = len(rows) * _STEP
    every = max(1, math.ceil((high - low) / 10))
    lines = []
    for power in range(low, high + 1, every):
        at = x(2.0**power)
        lines.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="0" y2="{bottom}"/>')
        lines.append(f'<text class="soft" x="{at:.1f}" y="{bottom + 14}" text-anchor="middle">{_power(power)}</text>')
    for i, r in enumerate(rows):
        y, step, reach, most = i * _STEP, _step(r), _reach(r), _magnitude(r)
        lines.append(_label(_title(r), y))
        if step and reach:
            lines.append(
                f'<rect class="span" x="{x(step):.1f}" y="{y + 4}" width="{x(reach) - x(step):.1f}" height="10"/>'
            )
        lines.append(f'<line class="edge" x1="{x(most):.1f}" x2="{x(most):.1f}" y1="{y + 2}" y2="{y + 16}"/>')
        lines.append(f'<circle class="mark" cx="{x(r.rms):.1f}" cy="{y + 9}" r="4"/>')
        lines.append(f'<text x="{_WIDTH - _RIGHT + 8}" y="{y + 13}">{number(most, 3)}</text>')
    return _svg(lines, len(rows) + 1)


def _power(power: int) -> str:
    return f"{2**power}" if 0 <= power <= 12 else f'2<tspan dy="-4" font-size="9">{power}</tspan>'


def _magnitude(r: Row) -> float:
    return max(abs(r.min), abs(r.max))


def _step(r: Row) -> float | None:
    scale = min(r.scale) if isinstance(r.scale, list) else r.scale
    return 1 / scale if scale and math.isfinite(scale) and scale > 0 else None


def _reach(r: Row) -> float | None:
    ends = [abs(v) for v in (r.low, r.high) if v is not None and math.isfinite(v)]
    return max(ends) if ends and max(ends) > 0 else None


def histogram(r: Row) -> str:
    """A small picture of the non-zero values, heights by the root of the counts."""
    if not r.hist:
        return ""
    most = math.sqrt(max(r.hist)) or 1.0
    rects = [
        f'<rect class="bar" x="{2 * i}" y="{24 - h:.1f}" width="2" height="{h:.1f}"/>'
        for i, n in enumerate(r.hist)
        if (h := 24 * math.sqrt(n) / most) >= 0.2
    ]
    zero = f'<line class="grid" x1="{_zero(r):.1f}" x2="{_zero(r):.1f}" y1="0" y2="24"/>' if r.min < 0 < r.max else ""
    width = 2 * len(r.hist)
    return f'<svg width="{width}" height="24" viewBox="0 0 {width} 24" role="img">{zero}{"".join(rects)}</svg>'


def _zero(r: Row) -> float:
    return 2 * len(r.hist) * -r.min / (r.max - r.min)


def _svg(lines: Sequence[str], rows: int) -> str:
    height = rows * _STEP + 4
    inside = "\n".join(lines)
    return f'<svg width="{_WIDTH}" height="{height}" viewBox="0 0 {_WIDTH} {height}" role="img">\n{inside}\n</svg>'
