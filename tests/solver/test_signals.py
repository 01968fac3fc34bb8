"""Signals: their effects on a run, and that handlers come back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from caffejacinto_py.errors import UsageError
from caffejacinto_py.solver.signals import Signals
from tests.solver.helpers import make_solver


def send_after(solver: object, number: int, iteration: int) -> None:
    """Raise a signal from within the loop when it reaches an iteration."""
    feed = solver.feed  # type: ignore[attr-defined]
    original = feed.next

    def next_batch() -> object:
        if solver.iter == iteration:  # type: ignore[attr-defined]
            feed.next = original
            os.kill(os.getpid(), number)
        return original()

    feed.next = next_batch


@pytest.mark.parametrize(
    ("number", "option", "effect"),
    [
        (signal.SIGINT, "sigint", "stop"),
        (signal.SIGINT, "sigint", "snapshot"),
        (signal.SIGINT, "sigint", "none"),
        (signal.SIGHUP, "sighup", "stop"),
        (signal.SIGHUP, "sighup", "snapshot"),
    ],
)
def test_effects(tmp_path: Path, number: int, option: str, effect: str) -> None:
    before = signal.getsignal(number)
    solver = make_solver(tmp_path, "snapshot_after_train: true", **{option: effect})
    send_after(solver, number, 3)
    solver.solve()
    assert signal.getsignal(number) is before
    assert solver.stopped == (effect == "stop")
    assert solver.iter == (4 if effect == "stop" else 12)
    at = {int(p.name.split("_")[2].split(".")[0]) for p in tmp_path.glob("snap_iter_*.caffemodel")}
    assert at == {"stop": {4}, "snapshot": {4, 12}, "none": {12}}[effect]


def test_stop_during_a_test(tmp_path: Path) -> None:
    solver = make_solver(tmp_path, "test_iter: 50\ntest_interval: 3")
    feed = solver.test_feeds[0]
    original, seen = feed.next, []

    def next_batch() -> object:
        seen.append(1)
        if len(seen) == 55:
            os.kill(os.getpid(), signal.SIGINT)
        return original()

    feed.next = next_batch  # type: ignore[method-assign,assignment]
    solver.solve()
    assert solver.iter == 3
    assert len(seen) == 55


def test_second_interrupt_kills(tmp_path: Path) -> None:
    code = (
        "import time\n"
        "from caffejacinto_py.solver.signals import Signals\n"
        "with Signals():\n"
        "    print('ready', flush=True)\n"
        "    while True: time.sleep(0.05)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    child.stdout.readline()
    child.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert child.poll() is None
    child.send_signal(signal.SIGINT)
    assert child.wait(timeout=10) == -signal.SIGINT


def test_unknown_effect() -> None:
    with pytest.raises(UsageError, match="sighup_effect 'stp'") as error:
        Signals(sighup="stp")
    assert error.value.hint == "did you mean 'stop'?"


def test_other_thread() -> None:
    """Without the main thread nothing is caught, but requests work."""
    found: list[str | None] = []

    def body() -> None:
        with Signals() as signals:
            signals.request("snapshot")
            signals.request("stop")
            found.extend([signals.poll(), signals.poll(), signals.poll()])

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert found == ["stop", "snapshot", None]
