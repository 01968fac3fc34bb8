"""What SIGINT and SIGHUP do to a training run: stop, snapshot or nothing (Caffe's sigint_effect, sighup_effect)."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any, Literal

from caffejacinto_py.errors import UsageError, near

Effect = Literal["stop", "snapshot", "none"]
EFFECTS = ("stop", "snapshot", "none")


class Signals:
    """Context manager that turns signals into requests for the solver's loop; the former handlers come back at exit.

    A second SIGINT while a stop is pending kills the process at once: the loop may be stuck. Outside the main thread
    Python cannot install handlers: then nothing is caught, and only `request` makes requests.
    """

    def __init__(self, *, sigint: str = "stop", sighup: str = "snapshot") -> None:
        for option, effect in (("sigint_effect", sigint), ("sighup_effect", sighup)):
            if effect not in EFFECTS:
                hint = near(effect, EFFECTS) or f"one of: {', '.join(EFFECTS)}"
                raise UsageError(f"{option} '{effect}' is unknown", hint=hint)
        self._effects = {signal.SIGINT: sigint}
        if hasattr(signal, "SIGHUP"):
            self._effects[signal.SIGHUP] = sighup
        self._former: dict[int, Any] = {}
        self._pending: set[str] = set()
        self.stopped = False  # a stop was requested since __enter__

    def __enter__(self) -> Signals:
        self._pending.clear()
        self.stopped = False
        if threading.current_thread() is threading.main_thread():
            for number in self._effects:
                self._former[number] = signal.signal(number, self._caught)
        return self

    def __exit__(self, *exc: object) -> None:
        while self._former:
            number, former = self._former.popitem()
            signal.signal(number, signal.SIG_DFL if former is None else former)

    def _caught(self, number: int, frame: FrameType | None) -> None:
        effect = self._effects[signal.Signals(number)]
        if number == signal.SIGINT and effect == "stop" and self.stopped:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        self.request(effect)

    def request(self, effect: str) -> None:
        """Ask the loop for `effect` at its next look, as a signal would."""
        if effect == "stop":
            self.stopped = True
        if effect != "none":
            self._pending.add(effect)

    def poll(self) -> str | None:
        """The most urgent request since the last call, or None: a stop comes before a snapshot."""
        for effect in ("stop", "snapshot"):
            if effect in self._pending:
                self._pending.discard(effect)
                return effect
        return None
