"""The processes that train one net together: who they are, and the few things they say to each other.

On the CPU through gloo; tensors on GPUs through NCCL, while numbers and requests still go through gloo, so that no one
waits for a device. Every exchange has a timeout, and one that fails becomes a `RankError`.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from caffejacinto_py.engine.meeting import room
from caffejacinto_py.errors import RankError, UsageError

TIMEOUT = 600.0  # seconds: longer than a snapshot of a large net takes on a slow disk
VARIABLES = ("MASTER_ADDR", "MASTER_PORT")
RENDEZVOUS = "CAFFEJACINTO_RENDEZVOUS"  # where the ranks of our own launcher meet, instead of env://
MEETING = "meeting"  # the name of that file, in a folder of the launcher's
LAUNCHER = "CAFFEJACINTO_LAUNCHER"  # process number of that launcher


class Ranks:
    """This process among those of a run. All methods that exchange something must be called by all ranks, in the same
    order; with one rank they return at once.

    rank: 0 writes files and talks to the user. world: how many there are.
    """

    def __init__(self, rank: int = 0, world: int = 1, *, device: str | torch.device = "cpu") -> None:
        self.rank, self.world = rank, world
        self.device = torch.device(device)

    @property
    def alone(self) -> bool:
        return self.world == 1

    @property
    def first(self) -> bool:
        """Whether this rank writes files and logs."""
        return self.rank == 0

    # --- values ------------------------------------------------------------------------------------------------------
    def gather(self, value: Any) -> list[Any]:
        """Everybody's value, by rank. Any plain Python object."""
        if self.alone:
            return [value]
        found: list[Any] = [None] * self.world
        with self._said("gather"):
            dist.all_gather_object(found, value, group=self._control)
        return found

    def share(self, value: Any) -> Any:
        """Rank 0's value."""
        return self.gather(value if self.first else None)[0]

    def ask(self, number: int) -> Callable[[], int]:
        """Start to find the greatest of everybody's numbers; the result is a function that waits for it."""
        if self.alone:
            return lambda: number
        cell = torch.tensor([number])
        with self._said("ask"):
            work = dist.all_reduce(cell, dist.ReduceOp.MAX, group=self._control, async_op=True)

        def answer() -> int:
            with self._said("ask"):
                work.wait()
            return int(cell)

        return answer

    # --- tensors -----------------------------------------------------------------------------------------------------
    def sum(self, tensor: Tensor) -> Tensor:
        """Add everybody's, in place."""
        self.start_sum(tensor)()
        return tensor

    def start_sum(self, tensor: Tensor) -> Callable[[], None]:
        """As `sum`, but at once; the result waits until the tensor may be used."""
        if self.alone:
            return _nothing
        with self._said("sum"):
            work = dist.all_reduce(tensor, async_op=True)

        def wait() -> None:
            with self._said("sum"):
                work.wait()

        return wait

    def least(self, tensor: Tensor) -> Tensor:
        """The least of everybody's elements, in place."""
        if not self.alone:
            with self._said("least"):
                dist.all_reduce(tensor, dist.ReduceOp.MIN)
        return tensor

    def spread(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite everybody's with rank 0's."""
        if self.alone:
            return
        with self._said("spread"), torch.no_grad():
            for tensor in tensors:
                whole = tensor.detach().clone(memory_format=torch.contiguous_format)
                dist.broadcast(whole, 0)
                tensor.copy_(whole)

    # --- beginning and end -------------------------------------------------------------------------------------------
    _control: Any = None  # the group for `gather` and `ask`: gloo

    def leave(self) -> None:
        """The end of this rank's part. Harmless when called twice."""
        if not self.alone and dist.is_initialized():
            dist.destroy_process_group()

    @contextmanager
    def _said(self, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as e:  # torch has no common class for it; in here nothing else can raise one
            late = "timed out" in str(e).lower() or "timeout" in str(e).lower()
            text = "another rank did not answer in time" if late else "another rank has ended"
            raise RankError(f"{text} ({what}: {_first_line(e)})") from e


ALONE = Ranks()


def environment(env: Mapping[str, str] = os.environ) -> tuple[int, int, int] | None:
    """(rank, world, local rank) as torchrun and our own launcher set them; None: this process runs by itself.

    Raises UsageError for variables that are no numbers or do not fit together.
    """
    if "WORLD_SIZE" not in env or "RANK" not in env:
        return None
    try:
        rank, world = int(env["RANK"]), int(env["WORLD_SIZE"])
        local = int(env.get("LOCAL_RANK", rank))
    except ValueError:
        names = ", ".join(f"{name}={env[name]!r}" for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name in env)
        raise UsageError(f"the environment of a distributed run is no set of numbers: {names}") from None
    if not 0 <= rank < world:
        raise UsageError(f"RANK={rank} does not fit WORLD_SIZE={world}", hint="unset both, or start with torchrun")
    return rank, world, local


def join(rank: int, world: int, *, device: str | torch.device = "cpu", timeout: float = TIMEOUT) -> Ranks:
    """Meet the other ranks, as the environment says (torch's `env://`). Waits for them, `timeout` seconds at most.

    device: this rank's. Raises UsageError where torch has no NCCL for a GPU, RankError when the others do not come.
    """
    ranks = Ranks(rank, world, device=device)
    if ranks.alone:
        return ranks
    gpu = ranks.device.type == "cuda"
    if not dist.is_available() or (gpu and not dist.is_nccl_available()):
        what = "NCCL, which several GPUs need" if gpu else "torch.distributed"
        raise UsageError(f"this build of torch has no {what}", hint="install one that has, or train on one device")
    meeting = os.environ.get(RENDEZVOUS, "env://")
    missing = [name for name in VARIABLES if name not in os.environ]
    if missing and meeting == "env://":
        text = f"the environment of a distributed run lacks {', '.join(missing)}"
        raise UsageError(text, hint="start with `--ranks`, `--gpu=0,1` or torchrun")
    if meeting == "env://" and not os.environ["MASTER_PORT"].isdecimal():
        raise UsageError(f"MASTER_PORT={os.environ['MASTER_PORT']} is no port number", hint="29500, say")
    wait = timedelta(seconds=timeout)
    more: dict[str, Any] = {"rank": rank, "world_size": world, "timeout": wait}
    if gpu:
        torch.cuda.set_device(ranks.device)
        more["device_id"] = ranks.device
    try:
        store, *_ = next(dist.rendezvous(meeting, rank, world, timeout=wait))
        more["store"] = room(store, rank, world, timeout=wait)
        dist.init_process_group("nccl" if gpu else "gloo", **more)
        ranks._control = dist.new_group(backend="gloo", timeout=wait)
    except (RuntimeError, ValueError) as e:
        text = f"rank {rank} of {world} does not find the others: {_first_line(e)}"
        raise RankError(text, hint="are MASTER_ADDR and MASTER_PORT the same for all, and reachable?") from e
    return ranks


def follow_launcher() -> None:
    """End this process when its launcher has been killed: nobody would tell it that another rank is gone. Raises
    RankError when that has happened already."""
    launcher = os.environ.get(LAUNCHER)
    if launcher is None:
        return
    if os.getppid() != int(launcher):
        raise RankError("the process that started the ranks is gone")

    def watch() -> None:
        while os.getppid() == int(launcher):
            time.sleep(1)
        print(f"rank {os.environ.get('RANK')}: the process that started the ranks is gone", file=sys.stderr)
        _clear(os.environ.get(RENDEZVOUS, ""))
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="follow-launcher", daemon=True).start()


def _clear(rendezvous: str) -> None:
    """Remove the folder that our launcher made and can no longer remove."""
    folder, file = os.path.split(rendezvous.removeprefix("file://"))
    if file == MEETING and rendezvous.startswith("file://"):
        shutil.rmtree(folder, ignore_errors=True)


def _first_line(error: BaseException) -> str:
    """What a library says, without its source lines and advice."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    text = re.sub(r"^(\[[^\]]*\.(cc|cpp|h|hpp):\d+\]\s*)+", "", text)
    return text.split(". ")[0][:200]


def _nothing() -> None:
    pass
