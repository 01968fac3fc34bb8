"""Several ranks of one training on this machine: starts a process for each, hands signals on, and says who failed.

For several machines, and for restarts, there is torchrun; a rank does not care who started it.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import IO, Any

from caffejacinto_py.errors import RankError

GONE = RankError.exit_code  # of a rank that only noticed that another one had ended
TERMINATED = 128 + signal.SIGTERM  # as shells say it
GRACE = 30.0  # seconds that the others have to notice it
LOOK = 0.05
log = logging.getLogger(__name__)


def run(args: Sequence[str], world: int, *, threads: int | None = None, record: Path | None = None) -> int:
    """Run `caffejacinto ARGS` in `world` processes until all have ended; returns the exit code of the run.

    Rank 0 has this process's stdout and stderr. The others are quiet; what they wrote is shown when one of them was
    the first to fail. threads: CPU threads of each; None: they share the processors. record: a file to which rank 0's
    stderr is appended as well.
    """
    with tempfile.TemporaryDirectory(prefix="caffejacinto-") as folder:
        group = _Group(args, world, Path(folder), threads, record)
        with group:
            group.wait()
        return group.verdict()


class _Group:
    """The processes of a run. While it is entered, signals go to all of them."""

    def __init__(self, args: Sequence[str], world: int, folder: Path, threads: int | None, record: Path | None) -> None:
        self.folder, self.world, self.record = folder, world, record
        self.processes: list[subprocess.Popen[bytes]] = []
        self.failed: int | None = None  # the first rank that failed by itself
        self.hung: int | None = None  # the first one that did not notice the end of another
        self._former: dict[int, Any] = {}
        self._interrupted = self._terminated = False
        self._copier: threading.Thread | None = None
        self._command = [sys.executable, "-m", "caffejacinto_py", *args]
        self._env = {**os.environ, "WORLD_SIZE": str(world)}
        self._env["CAFFEJACINTO_RENDEZVOUS"] = f"file://{folder}/meeting"
        each = threads or max(1, (os.cpu_count() or 1) // world)
        self._env.setdefault("OMP_NUM_THREADS", str(each))
        if sys.platform == "linux":  # a host name that no one resolves is no reason to fail on one machine
            self._env.setdefault("GLOO_SOCKET_IFNAME", "lo")

    def __enter__(self) -> _Group:
        for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", None)):
            if number is not None:
                self._former[number] = signal.signal(number, self._hand_on)
        try:
            for rank in range(self.world):
                self.processes.append(self._start(rank))
        except OSError:
            self._end_all()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._end_all()
        if self._copier is not None:
            self._copier.join()
        for number, former in self._former.items():
            signal.signal(number, signal.SIG_DFL if former is None else former)

    def _start(self, rank: int) -> subprocess.Popen[bytes]:
        env = {**self._env, "RANK": str(rank), "LOCAL_RANK": str(rank), "CAFFEJACINTO_LAUNCHER": str(os.getpid())}
        # a session of its own: Ctrl-C reaches it once, through us
        if rank == 0 and self.record is None:
            return subprocess.Popen(self._command, env=env, start_new_session=True)
        if rank == 0:
            process = subprocess.Popen(self._command, env=env, start_new_session=True, stderr=subprocess.PIPE)
            self._copier = threading.Thread(target=_copy, args=(process.stderr, self.record), daemon=True)
            self._copier.start()
            return process
        with open(self._words(rank), "wb") as words:
            return subprocess.Popen(self._command, env=env, start_new_session=True, stdout=words, stderr=words)

    def _words(self, rank: int) -> Path:
        return self.folder / f"rank{rank}.log"

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        self._interrupted = self._interrupted or number == signal.SIGINT
        self._terminated = self._terminated or number == signal.SIGTERM
        self._send(number)

    def _send(self, number: int) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def wait(self) -> None:
        """Until all have ended. When one fails, the others get time to notice, then they are ended."""
        deadline: float | None = None
        while True:
            codes = [p.poll() for p in self.processes]
            if self.failed is None:
                self.failed = next((r for r, c in enumerate(codes) if c not in (None, 0, 130, GONE)), None)
            if None not in codes:
                return
            if deadline is None and any(c not in (None, 0, 130) for c in codes):
                deadline = time.monotonic() + GRACE
            if deadline is not None and time.monotonic() > deadline:
                self.hung = codes.index(None)
                return
            time.sleep(LOOK)

    def _end_all(self) -> None:
        self._send(signal.SIGTERM)
        for process in self.processes:
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def verdict(self) -> int:
        """Say what rank 0 did not say itself; the exit code of the run."""
        codes = [self._code(p.returncode) for p in self.processes]
        if self._interrupted and 130 in codes and set(codes) <= {0, 130, GONE}:
            return 130  # a second Ctrl-C: who ends later notices that the others have
        if self._terminated and -signal.SIGTERM in codes:
            print("error: terminated", file=sys.stderr)
            return TERMINATED
        if self.failed is None and self.hung is not None:
            return self._blame(self.hung, codes)
        failed = 0 if codes[0] not in (0, 130, GONE) else self.failed
        if failed is None or codes[failed] in (0, 130):
            failed = next((r for r, c in enumerate(codes) if c not in (0, 130)), None)
        if failed is None:
            return max(codes)
        code = codes[failed]
        if code < 0:
            print(f"error: rank {failed} was killed by signal {-code} ({_name(-code)})", file=sys.stderr)
        elif failed:
            print(f"error: rank {failed} of {self.world} ended with exit code {code}:", file=sys.stderr)
        if failed:
            self._show(failed)
        if failed == 0 and code < 0:
            self._ask_witness(codes)
        return code if code > 0 else 1

    def _blame(self, hung: int, codes: list[int]) -> int:
        """All others ended because this rank did not answer."""
        print(f"error: rank {hung} of {self.world} did not answer and was ended", file=sys.stderr)
        self._show(hung)
        if codes[0] != GONE:
            self._ask_witness(codes)
        return GONE

    def _ask_witness(self, codes: list[int]) -> None:
        """Somebody who lived on knows the last snapshot."""
        witness = next((r for r, c in enumerate(codes) if c == GONE), None)
        if witness is not None:
            self._show(witness)

    def _code(self, code: int) -> int:
        """A rank that Ctrl-C caught before it could train was stopped, too."""
        return 130 if self._interrupted and code == -signal.SIGINT else code

    def _show(self, rank: int) -> None:
        if rank == 0:  # it has said it here
            return
        text = self._words(rank).read_text(errors="replace").strip()
        if text:
            print(f"rank {rank}: {text}", file=sys.stderr)


def _copy(words: IO[bytes], record: Path) -> None:
    """What a process says, to stderr and into a file, line by line."""
    with open(record, "ab") as file:
        for line in words:
            file.write(line)
            file.flush()
            sys.stderr.write(line.decode(errors="replace"))
            sys.stderr.flush()


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"
