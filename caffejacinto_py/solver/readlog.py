"""Training logs as tables: what Caffe and its forks print, old releases too, and our own metrics.jsonl."""

from __future__ import annotations

import calendar
import csv
import json
import os
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

from caffejacinto_py.errors import InputError, Loc

_NUMBER = r"([-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|nan|inf))"
_STAMP = re.compile(r"^(?:\[[\d.]+\] )?[IWEF](?:\d{4})?(\d\d)(\d\d) (\d\d):(\d\d):(\d\d(?:\.\d+)?)")
_TESTING = re.compile(r"Iteration (\d+)\b.*Testing net(?: \(#(\d+)\))?")
_LOSS = re.compile(r"Iteration (\d+)\b.*\bloss = " + _NUMBER, re.IGNORECASE)
_LR = re.compile(r"Iteration (\d+)\b.*\blr = " + _NUMBER, re.IGNORECASE)
_OUTPUT = re.compile(r"\b(Train|Test) net output #(\d+): (\S+) = " + _NUMBER + r"(.*)", re.IGNORECASE)
_SCORE = re.compile(r"\bTest score #(\d+): " + _NUMBER, re.IGNORECASE)  # before 2014
_DAYS = (0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334)  # before each month
_DAY = 86400.0
_OWN = ("event", "iter", "time", "lr", "net")  # of metrics.jsonl, besides the outputs


@dataclass
class Row:
    """One display or one test of one net.

    kind: "train" or "test". seconds: since training began, None where the log has no times. lr: None where unknown.
    values: net outputs by name, a name that comes twice with _2. losses: those of them that count in the loss.
    smoothed: the loss of the Iteration line (train). net: number of the test net.
    """

    kind: str
    iter: int
    seconds: float | None = None
    lr: float | None = None
    values: dict[str, float] = field(default_factory=dict)
    losses: set[str] = field(default_factory=set)
    smoothed: float | None = None
    net: int = 0

    def add(self, name: str, value: float, *, loss: bool) -> None:
        base, count = name, 1
        while name in self.values:
            count += 1
            name = f"{base}_{count}"
        self.values[name] = value
        if loss or "loss" in name.lower():
            self.losses.add(name)


def read_log(path: str | os.PathLike[str]) -> list[Row]:
    """The rows of a log (stderr of `caffe train`, ours or any fork's) or a metrics.jsonl, in order.

    Raises InputError for a file that cannot be read or has no training in it.
    """
    path = os.fspath(path)
    try:
        with open(path, encoding="utf-8", errors="replace") as f:
            first = f.readline()
            f.seek(0)
            year = time.localtime(os.fstat(f.fileno()).st_mtime).tm_year  # glog writes none
            rows = _read_metrics(f, path) if first.lstrip().startswith("{") else _read_text(f, year)
    except OSError as e:
        raise InputError(f"cannot read this log: {e.strerror}", loc=Loc(path)) from None
    rows = [r for r in rows if r.iter >= 0]
    if not rows:
        hint = "it should be what `caffe train` printed (2>&1 | tee train.log), or a metrics.jsonl"
        raise InputError("no iterations in this log", loc=Loc(path), hint=hint)
    _fill_rates(rows)
    return rows


@dataclass
class _Reader:
    """Takes the lines of a log, which ends in `year`, one by one."""

    year: int
    rows: list[Row] = field(default_factory=list)
    now: float | None = None
    start: float | None = None

    @property
    def elapsed(self) -> float | None:
        return None if self.now is None or self.start is None else round(self.now - self.start, 6)

    def last(self, kind: str) -> Row | None:
        return next((r for r in reversed(self.rows) if r.kind == kind), None)

    def open(self, kind: str, iteration: int, **values: Any) -> Row:
        self.rows.append(Row(kind, iteration, self.elapsed, **values))
        return self.rows[-1]

    def stamp(self, line: str) -> None:
        found = _STAMP.match(line)
        if not found:
            return
        month, day, hour, minute = (int(found[i]) for i in (1, 2, 3, 4))
        if not 1 <= month <= 12:
            return
        leap = calendar.isleap(self.year)
        now = (_DAYS[month - 1] + (leap and month > 2) + day) * _DAY + hour * 3600 + minute * 60 + float(found[5])
        while self.now is not None and now < self.now - 180 * _DAY:  # past the end of a year
            now += (366 if leap else 365) * _DAY
        self.now = now
        if self.start is None or "] Solving" in line:
            self.start = now

    def line(self, line: str) -> None:
        self.stamp(line)
        if found := _TESTING.search(line):
            self.open("test", int(found[1]), net=int(found[2] or 0))
        elif found := _OUTPUT.search(line):
            self.output(found[1].lower(), int(found[2]), found[3], float(found[4]), found[5])
        elif found := _LR.search(line):
            self.rate(int(found[1]), float(found[2]))
        elif found := _LOSS.search(line):
            self.open("train", int(found[1]), smoothed=float(found[2]))
        elif (found := _SCORE.search(line)) and (row := self.last("test")):
            row.add(f"score{found[1]}", float(found[2]), loss=False)

    def output(self, kind: str, index: int, name: str, value: float, rest: str) -> None:
        row = self.last(kind)
        fresh = index == 0 and row is not None and bool(row.values)
        if row is None or fresh:  # its Iteration line is missing; the one with lr behind it may tell
            row = self.open(kind, -1)
        row.add(name, value, loss="(*" in rest)

    def rate(self, iteration: int, lr: float) -> None:
        row = self.last("train")
        if row is None or row.iter not in (-1, iteration) or row.lr is not None:
            self.open("train", iteration, lr=lr)
            return
        row.iter, row.lr = iteration, lr


def _read_text(lines: Iterable[str], year: int) -> list[Row]:
    reader = _Reader(year)
    for line in lines:
        reader.line(line)
    return reader.rows


def _read_metrics(lines: Iterable[str], path: str) -> list[Row]:
    rows: list[Row] = []
    start: float | None = None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            event = json.loads(line)
            kind, iteration, now = event["event"], int(event["iter"]), float(event["time"])
            net = int(event.get("net", 0))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            raise InputError("this line is no record of metrics.jsonl", loc=Loc(path, number, 1)) from None
        start = now if start is None else start
        if kind not in ("train", "test"):
            continue
        row = Row(kind, iteration, round(now - start, 6), net=net)
        for name, value in event.items():
            if name not in _OWN:
                _add(row, name, value)
        if kind == "train":
            row.lr, row.smoothed = _float(event.get("lr")), row.values.get("loss")
        rows.append(row)
    return rows


def _add(row: Row, name: str, value: Any) -> None:
    values = value if isinstance(value, list) else [value]
    for one in values:
        number = _float(one)
        if number is not None:
            row.add(name, number, loss=False)


def _float(value: Any) -> float | None:
    """A number of JSON; "nan" and "inf" stand in it as texts."""
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError):
        return None


def _fill_rates(rows: Sequence[Row]) -> None:
    """A row without a learning rate has that of its iteration where a row behind it tells, else the last one."""
    last: float | None = None
    for i, row in enumerate(rows):
        if row.lr is None:
            same = (r.lr for r in rows[i + 1 : i + 16] if r.iter == row.iter and r.lr is not None)
            row.lr = next(same, last)
        last = row.lr


def table(rows: Sequence[Row], kind: str) -> tuple[list[str], list[list[float]]]:
    """(column names, one line per row) of "train" or "test": NumIters, Seconds, LearningRate, outputs.

    The loss of the Iteration lines stands in only where a log has no train outputs. Outputs of further test nets are
    marked #1, #2. What a row does not have is nan.
    """
    chosen = [r for r in rows if r.kind == kind and r.values]
    if not chosen and kind == "train":
        chosen = [Row(kind, r.iter, r.seconds, r.lr, {"loss": r.smoothed})
                  for r in rows if r.kind == kind and r.smoothed is not None]  # fmt: skip
    names: dict[str, None] = {}
    lines: list[dict[str, float]] = []
    for row in chosen:
        suffix = f"#{row.net}" if row.net else ""
        lines.append({name + suffix: value for name, value in row.values.items()})
        names.update(dict.fromkeys(lines[-1]))
    nan = float("nan")
    heads = [[r.iter, nan if r.seconds is None else r.seconds, nan if r.lr is None else r.lr] for r in chosen]
    body = [[*head, *(line.get(name, nan) for name in names)] for head, line in zip(heads, lines)]
    return ["NumIters", "Seconds", "LearningRate", *names], body


def write_csv(file: IO[str], names: Sequence[str], body: Iterable[Sequence[float]], *, delimiter: str = ",") -> None:
    """The table as CSV, as Caffe's parse_log.py writes it."""
    writer = csv.writer(file, delimiter=delimiter, lineterminator="\n")
    writer.writerow(names)
    writer.writerows(body)
