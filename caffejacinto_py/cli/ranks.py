"""How many ranks a training has, which one this process is, and on which device it runs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

from caffejacinto_py.cli import devices
from caffejacinto_py.errors import UsageError

if TYPE_CHECKING:
    from caffejacinto_py.engine.ranks import Ranks
    from caffejacinto_py.solver.nets import NetSource

F = TypeVar("F", bound=Callable[..., Any])


def options(command: F) -> F:
    """--ranks, --sync-bn and --rank-timeout."""
    texts = {
        "ranks": "Train in N processes on this machine; with --gpu=0,1: one a GPU.  [default: 1]",
        "sync": "BatchNorm takes its statistics over all ranks, not per rank as Caffe.",
        "timeout": "End when another rank does not answer for so long.",
    }
    seconds: dict[str, Any] = {"type": click.FloatRange(min=1), "default": 600.0, "show_default": True}
    command = click.option("--rank-timeout", metavar="SECONDS", help=texts["timeout"], **seconds)(command)
    command = click.option("--sync-bn", is_flag=True, help=texts["sync"])(command)
    return click.option("--ranks", type=click.IntRange(min=1), metavar="N", help=texts["ranks"])(command)


@dataclass(frozen=True)
class Place:
    """world: ranks of the run. device: of this one. launch: whether this process is none of them and has to start
    them."""

    world: int
    device: str
    rank: int = 0
    launch: bool = False

    def join(self, timeout: float) -> Ranks:
        """Meet the other ranks."""
        from caffejacinto_py.engine import ranks

        ranks.follow_launcher()
        return ranks.join(self.rank, self.world, device=self.device, timeout=timeout)


def asked(given: dict[str, Any]) -> int:
    """How many ranks the command line asks for, whatever there is on this machine."""
    named = len((given["gpu"] or "").split(","))
    return given["ranks"] or named


def lines(train: NetSource, world: int) -> list[str]:
    """For a dry run: what each of several ranks does with a train net."""
    from caffejacinto_py.solver.nets import batches

    sizes = sorted({size for _, _, size in batches(train)})
    each = f"a batch of {', '.join(map(str, sizes))}" if sizes else "its own batch"
    return [f"{world} ranks, {each} each in the train net"] if world > 1 else []


def place(given: dict[str, Any], *, solver_mode: str | None, device_id: int = 0, log: logging.Logger) -> Place:
    """From --ranks, --gpu and the environment (torchrun). Raises UsageError where they contradict each other."""
    from caffejacinto_py.engine.ranks import environment

    asked, around, gpu = given["ranks"], environment(), given["gpu"]
    if around is not None and gpu is None and solver_mode == "GPU":
        gpu = _all_here()
    found = devices.several(gpu, solver_mode=solver_mode, device_id=device_id, log=log)
    cpu = found == ["cpu"]
    if around is None:
        world = asked or len(found)
        if not cpu and world != len(found):
            hint = "name as many GPUs as ranks, or leave --ranks out"
            raise UsageError(f"--ranks {world} with {len(found)} GPU{'s' * (len(found) > 1)}", hint=hint)
        return Place(world, found[0], launch=world > 1)
    rank, world, local = around
    if asked is not None and asked != world:
        raise UsageError(f"--ranks {asked}, but this process was started as one of {world}", hint="leave --ranks out")
    if not cpu and local >= len(found):
        text = f"local rank {local} finds no GPU of its own: {len(found)} of them are named or here"
        raise UsageError(text, hint="start as many ranks on a machine as it has GPUs, with --gpu=all")
    return Place(world, "cpu" if cpu else found[local], rank)


def _all_here() -> str | None:
    """What solver_mode: GPU means to a rank among several: all GPUs of its machine."""
    import torch

    return "all" if torch.cuda.is_available() else None
