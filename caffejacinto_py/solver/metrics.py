"""Machine-readable records of a run: one JSON object per line, and TensorBoard where asked."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Mapping
from typing import IO, Any

from caffejacinto_py.errors import CaffeError, UsageError


class Metrics:
    """Writes `metrics.jsonl` and TensorBoard scalars; lines are flushed as they come.

    path: the file, or None. A run that starts anew truncates it at the first record, one that resumes appends
    (`append`). Each line has `event` (train, test, snapshot, resume, end), `iter`, `time` (seconds since the epoch) and
    its values. Not finite numbers are written as strings, because JSON has none.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, *, tensorboard: str | None = None) -> None:
        self.path = os.fspath(path) if path is not None else None
        self.append = False
        self._file: IO[str] | None = None
        self._writer = _writer(tensorboard) if tensorboard else None

    def check(self) -> None:
        """Make sure that the file can be written, before hours of training; changes nothing. Raises CaffeError."""
        if self.path is None:
            return
        existed = os.path.lexists(self.path)
        try:
            with open(self.path, "a", encoding="utf-8"):
                pass
            if not existed:
                os.unlink(self.path)
        except OSError as e:
            raise _unwritable(self.path, e) from e

    def record(self, event: str, iteration: int, values: Mapping[str, Any]) -> None:
        if self.path is not None:
            line = {"event": event, "iter": iteration, "time": round(time.time(), 3), **values}
            text = json.dumps({k: _plain(v) for k, v in line.items()}) + "\n"
            try:
                self._open().write(text)
            except OSError as e:
                self._abandon()
                raise _unwritable(self.path, e) from e
        if self._writer is not None:
            for name, value in _flat(values):
                self._writer.add_scalar(f"{event}/{name}", value, iteration)

    def _open(self) -> IO[str]:
        if self._file is None:
            assert self.path is not None
            mode = "a" if self.append else "w"
            self._file = open(self.path, mode, encoding="utf-8", buffering=1)  # noqa: SIM115 (closed by close)
        return self._file

    def _abandon(self) -> None:
        """Drop a file that takes no more: closing it would try again to write what is buffered."""
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):
                file.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        self.append = True
        if self._writer is not None:
            self._writer.flush()


def _unwritable(path: str, e: OSError) -> CaffeError:
    hint = "--metrics names another file; `--metrics none` leaves it out"
    return CaffeError(f"cannot write '{path}': {e.strerror}", hint=hint)


def _writer(folder: str) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as e:
        hint = "pip install 'caffejacinto-py[tb]'"
        raise UsageError(f"TensorBoard is not installed: {e}", hint=hint) from e
    return SummaryWriter(folder)  # type: ignore[no-untyped-call]


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return value


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found.append((prefix + key, float(value)))
    return found
