"""Log lines in the shape of glog, so that scripts made for Caffe's logs (parse_log.py, plots) keep working."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from caffejacinto_py.engine.evaluate import TestOutput

LOGGER = "caffejacinto_py"


class GlogFormatter(logging.Formatter):
    """`I1121 12:34:56.789012  4242 loop.py:87] message`: severity, date, time, process, place."""

    def format(self, record: logging.LogRecord) -> str:
        letter = "F" if record.levelno >= logging.CRITICAL else record.levelname[0]
        stamp = time.strftime("%m%d %H:%M:%S", time.localtime(record.created))
        micro = int(record.created % 1 * 1e6)
        head = f"{letter}{stamp}.{micro:06d} {record.process:5d} {record.filename}:{record.lineno}] "
        text = head + record.getMessage()
        return text + "\n" + self.formatException(record.exc_info) if record.exc_info else text


def setup(level: str | int = "info", *, stream: TextIO | None = None) -> logging.Handler:
    """Send this package's log to `stream` (stderr) in glog's shape; replaces what an earlier call set up.

    level: debug, info, warning, error, or a number of `logging`.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(GlogFormatter())
    logger = logging.getLogger(LOGGER)
    for old in [h for h in logger.handlers if isinstance(h.formatter, GlogFormatter)]:
        logger.removeHandler(old)
    logger.addHandler(handler)
    logger.setLevel(level.upper() if isinstance(level, str) else level)
    logger.propagate = False
    return handler


def number(value: float) -> str:
    """A number as C++ streams print it: six significant digits."""
    return f"{value:g}"


def output_lines(phase: str, outputs: Iterable[TestOutput]) -> list[str]:
    """Lines for net outputs: `    Test net output #0: loss = 0.5 (* 1 = 0.5 loss)`. phase: "Train" or "Test"."""
    lines = []
    for out in outputs:
        text = f"    {phase} net output #{out.index}: {out.name} = {number(out.value)}"
        if out.loss_weight:
            text += f" (* {number(out.loss_weight)} = {number(out.loss_weight * out.value)} loss)"
        lines.append(text)
    return lines
