"""Errors a user can act on: what is wrong, where (file:line:col), what to do, and the exit code.

Every failure that a user can cause is a `CaffeError`. Anything else that escapes is a defect of this program and
shows a
traceback.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Loc(NamedTuple):
    """A place in a text file; line and col count from 1. line 0: the file as a whole."""

    file: str
    line: int = 0
    col: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.col}" if self.line else self.file


class CaffeError(Exception):
    """Base of all errors shown without traceback. `exit_code` 1: failed while running."""

    exit_code = 1

    def __init__(self, text: str, *, loc: Loc | None = None, hint: str | None = None) -> None:
        super().__init__(text)
        self.text = text
        self.loc = loc
        self.hint = hint

    def __str__(self) -> str:
        where = f"{self.loc}: " if self.loc else ""
        return f"{where}{self.text}" + (f" (hint: {self.hint})" if self.hint else "")


class UsageError(CaffeError):
    """The command line or an API call is wrong."""

    exit_code = 2


class InputError(CaffeError):
    """A file that the user gave is invalid."""

    exit_code = 3


class PrototxtError(InputError):
    """A net or solver text does not parse or does not make sense."""


class LayerError(PrototxtError):
    """A layer refuses its parameters or inputs.

    Raised by layer classes without a location; `field` names the offending field below the layer
    (e.g. ``("convolution_param", "kernel_size")``) and the pass that called fills in `loc` from the source map.
    """

    def __init__(
        self, text: str, *, field: tuple[str | int, ...] = (), loc: Loc | None = None, hint: str | None = None
    ) -> None:
        super().__init__(text, loc=loc, hint=hint)
        self.field = field


class WeightsError(InputError):
    """A caffemodel, solverstate, binaryproto or HDF5 file is damaged or does not fit the net."""


class DataError(InputError):
    """A dataset (LMDB, image list, HDF5, image) is missing, damaged or does not fit the net. `missing`: the path that
    is not there."""

    missing: str | None = None


class DeviceError(CaffeError):
    """The device that was asked for is not here, or does not compute."""


class ComparisonError(CaffeError):
    """A comparison found differences."""

    exit_code = 4


class RankError(CaffeError):
    """Another rank ended or did not answer. Its own message says why; this one only says that the run is over."""

    exit_code = 5


class ManyErrors(InputError):
    """Several errors found in one file, in order of place. `errors` has at least one."""

    def __init__(self, errors: Iterable[CaffeError]) -> None:
        self.errors = tuple(errors)
        super().__init__(f"{len(self.errors)} errors", loc=self.errors[0].loc)

    def __str__(self) -> str:
        return "\n".join(str(e) for e in self.errors)


def raise_all(errors: Sequence[CaffeError]) -> None:
    """Raise what was collected: nothing, the one error itself, or `ManyErrors`."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise ManyErrors(errors)


def near(name: str, known: Iterable[str]) -> str | None:
    """A "did you mean" hint: the closest known name, or None."""
    lowered = {k.lower(): k for k in known}
    found = difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0.6)
    return f"did you mean '{lowered[found[0]]}'?" if found else None


def misplaced(path: str, named_in: str) -> str | None:
    """A hint for a missing relative path that is there beside the file which names it (Caffe looks in the working
    directory only), or None."""
    folder = os.path.dirname(named_in)
    if os.path.isabs(path) or not folder or not os.path.exists(os.path.join(folder, path)):
        return None
    return (
        f"'{os.path.join(folder, path)}' exists, but paths are relative to the working directory: "
        f"start the program in '{folder}', or write the path from here"
    )


def render(error: CaffeError, *, limit: int = 20) -> str:
    """The error as the terminal shows it: `file:line:col: error: text`, source line, caret, hint."""
    if isinstance(error, ManyErrors):
        shown = [render(e) for e in error.errors[:limit]]
        if len(error.errors) > limit:
            shown.append(f"... and {len(error.errors) - limit} more errors")
        return "\n".join(shown)
    loc = error.loc
    lines = [f"{loc}: error: {error.text}" if loc else f"error: {error.text}"]
    source = _source_line(loc) if loc else None
    if loc and source is not None:
        lines.append("  " + source.replace("\t", " "))
        lines.append("  " + " " * (loc.col - 1) + "^")
    if error.hint:
        lines.append(f"hint: {error.hint}")
    return "\n".join(lines)


def _source_line(loc: Loc) -> str | None:
    """The text line a location points at; None where the file is not readable text or the line is gone."""
    if not loc.line:
        return None
    try:
        with open(loc.file, encoding="utf-8-sig", errors="replace") as f:
            for number, line in enumerate(f, 1):
                if number == loc.line:
                    line = line.rstrip("\n")
                    return line if len(line) <= 200 else None
    except OSError:
        return None
    return None
