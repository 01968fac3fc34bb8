"""Ranks meet in a store, also in one that an earlier run of theirs has left behind."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from caffejacinto_py.engine.meeting import room

SOON = timedelta(seconds=20)


def meet(store: dist.Store, world: int) -> list[dist.Store]:
    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(lambda rank: room(store, rank, world, timeout=SOON), range(world)))


def test_all_are_in_one_room_and_nobody_else_was() -> None:
    store = dist.HashStore()
    first = meet(store, 3)
    first[1].set("address", "of a process")
    assert first[0].get("address") == first[2].get("address") == b"of a process"
    again = meet(store, 3)  # torchrun starts them anew
    assert not any(one.check(["address"]) for one in again)
    again[2].set("address", "another one")
    assert again[0].get("address") == b"another one"
    assert first[0].get("address") == b"of a process"
    assert not meet(store, 2)[0].check(["address"])  # on fewer machines


def test_who_has_not_come() -> None:
    store = dist.HashStore()
    meet(store, 3)  # what they left does not count
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(room, store, 1, 3, timeout=SOON)
        with pytest.raises(RuntimeError, match=r"timed out after 0\.3 s without rank 2"):
            room(store, 0, 3, timeout=timedelta(seconds=0.3))
        waiting.result()
    with pytest.raises(RuntimeError):
        room(store, 2, 3, timeout=timedelta(seconds=0.1))
