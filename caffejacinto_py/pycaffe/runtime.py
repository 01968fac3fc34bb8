"""Timer, logging, and the functions of C++ Caffe's multi-process training, which here is always one process."""

from __future__ import annotations

import logging
import time

from caffejacinto_py.errors import UsageError
from caffejacinto_py.solver import logs

_SEVERITIES = (logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL)  # glog's numbers


class Timer:
    """A stopwatch. On a GPU it waits for the work that was started. `ms`: milliseconds from start to stop."""

    def __init__(self) -> None:
        self._began: float | None = None
        self._seconds = 0.0

    def start(self) -> None:
        self._began = self._now()

    def stop(self) -> None:
        if self._began is not None:
            self._seconds, self._began = self._now() - self._began, None

    @property
    def ms(self) -> float:
        """Of the last start and stop; while it runs, until now."""
        return 1000 * (self._seconds if self._began is None else self._now() - self._began)

    @staticmethod
    def _now() -> float:
        import torch

        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return time.perf_counter()


def init_log(level: int = 0, stderr: bool = True) -> None:
    """Show the log (of training, for example) on stderr, in glog's shape. level: 0 info, 1 warning, 2 error, 3 fatal.
    stderr False: nothing below error.
    """
    if not 0 <= level < len(_SEVERITIES):
        raise UsageError(f"init_log: level {level} is not one of 0 (info) to 3 (fatal)")
    logs.setup(_SEVERITIES[level] if stderr else max(_SEVERITIES[level], logging.ERROR))


def log(message: str) -> None:
    """A line in the log."""
    logging.getLogger(logs.LOGGER).info("%s", message)


def has_nccl() -> bool:
    """Whether caffe.NCCL is there: no."""
    return False


def solver_count() -> int:
    return 1


def solver_rank() -> int:
    return 0


def set_solver_count(count: int) -> None:
    """Accepts 1. Raises UsageError for more: solvers in several processes are not supported here."""
    if count != 1:
        raise UsageError(f"set_solver_count({count}): one process trains alone here")


def set_solver_rank(rank: int) -> None:
    """Accepts 0."""
    if rank != 0:
        raise UsageError(f"set_solver_rank({rank}): one process trains alone here")


def set_multiprocess(value: bool) -> None:
    """Accepts False."""
    if value:
        raise UsageError("set_multiprocess(True): one process trains alone here")
