"""Where the ranks of a run meet: a room of their own in a store that they all reach.

torchrun hands a run that it starts again the store of the one that failed, with the addresses of its dead processes in
it (torch 2.13, static and c10d: gloo tries to reach them, and the restart fails). So rank 0 gives the room a name that
was never used, and tells it to those that knock now; whoever knocked in an earlier run does not come in.
"""

from __future__ import annotations

import time
import uuid
from datetime import timedelta

import torch.distributed as dist

LOOK = 0.02


def room(store: dist.Store, rank: int, world: int, *, timeout: timedelta) -> dist.Store:
    """The part of `store` that this run of `world` ranks uses. Waits for all of them; raises RuntimeError with the
    ranks that have not come, at rank 0, or as torch says it, at the others."""
    if rank == 0:
        return dist.PrefixStore(_invite(store, world, timeout), store)
    me = uuid.uuid4().hex
    store.set(_door(rank), me)
    store.wait([_letter(me)], timeout)
    name = store.get(_letter(me)).decode()
    store.set(_chair(name, rank), "")
    return dist.PrefixStore(name, store)


def _invite(store: dist.Store, world: int, timeout: timedelta) -> str:
    """Rank 0's part. A guest of an earlier run may get a letter, too; only one that lives sits down."""
    name, end = f"run-{uuid.uuid4().hex}", time.monotonic() + timeout.total_seconds()
    missing, invited = list(range(1, world)), set[str]()
    while missing:
        for rank in missing:
            guest = store.get(_door(rank)).decode() if store.check([_door(rank)]) else None
            if guest is not None and guest not in invited:
                store.set(_letter(guest), name)
                invited.add(guest)
        missing = [rank for rank in missing if not store.check([_chair(name, rank)])]
        if missing and time.monotonic() > end:
            raise RuntimeError(
                f"timed out after {timeout.total_seconds():g} s without rank {', '.join(map(str, missing))}"
            )
        if missing:
            time.sleep(LOOK)
    return name


def _door(rank: int) -> str:
    return f"caffejacinto/door/{rank}"


def _letter(guest: str) -> str:
    return f"caffejacinto/letter/{guest}"


def _chair(name: str, rank: int) -> str:
    return f"caffejacinto/{name}/{rank}"
