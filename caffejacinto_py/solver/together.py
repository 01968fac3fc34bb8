"""What makes several ranks one training: the same files and weights at the start, shares of the data, requests that all
follow, and random layers that differ where they should.
"""

from __future__ import annotations

import logging
import random
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from caffejacinto_py.data.make import records
from caffejacinto_py.engine.net import Net
from caffejacinto_py.engine.ranks import Ranks
from caffejacinto_py.errors import InputError, RankError
from caffejacinto_py.solver.nets import NetSource
from caffejacinto_py.solver.signals import Signals
from caffejacinto_py.solver.snapshot import checksum, find_latest

log = logging.getLogger(__name__)
REQUESTS = (None, "snapshot", "stop")  # in the order of their urgency
_LARGE = 1 << 63


class DifferentError(InputError):
    """Ranks of one run were given different files."""


# --- the same everywhere ---------------------------------------------------------------------------------------------
def facts(
    param: Any, sources: Mapping[str, NetSource], weights: Iterable[str], *, options: Mapping[str, Any]
) -> dict[str, Any]:
    """What must be the same on all ranks, by the name to tell the user. Reads files, not data. options: of the
    command line, by their names."""
    found: dict[str, Any] = {"the version of torch": torch.__version__, "the solver": _crc(param), **options}
    for name, source in sources.items():
        found[f"{name} ({source.label})"] = [_crc(source.doc.message), source.level, list(source.stages)]
    for path in weights:
        found[f"the weights '{path}'"] = checksum(path, what="weights file")
    return found


def data_facts(nets: Mapping[str, Net]) -> dict[str, Any]:
    """How much data each source layer of these nets has."""
    layers = [(name, s.layer) for name, net in nets.items() for s in net.sources if s.layer.source != "teacher"]
    return {f"the data of layer '{layer.name}' of {name}": records(layer) for name, layer in layers}


def check_same(ranks: Ranks, mine: Mapping[str, Any]) -> None:
    """Raises DifferentError on all ranks when one was given something else than rank 0."""
    everybody = ranks.gather(dict(mine))
    first = everybody[0]
    for rank, other in enumerate(everybody):
        wrong = [name for name in (*first, *(n for n in other if n not in first)) if first.get(name) != other.get(name)]
        if wrong:
            text = f"rank {rank} and rank 0 do not train the same: {', '.join(wrong)} differ{'s' * (len(wrong) == 1)}"
            raise DifferentError(text, hint="give all ranks the same files")


def spread_statistics(ranks: Ranks, net: Net) -> None:
    """Before a test: everybody takes rank 0's blobs that no gradient changes (BatchNorm). A snapshot will hold them."""
    blobs = {id(p): p for one in net.params.values() for p in one if not p.requires_grad}
    ranks.spread(list(blobs.values()))


def check_weights(ranks: Ranks, net: Net) -> None:
    """Raises RankError when the learned blobs of two ranks are not the same, bit for bit: they are if all went well."""
    if ranks.alone:
        return
    sums = [zlib.crc32(b.param.detach().cpu().numpy().tobytes()) for b in net.learnable if b.param.requires_grad]
    for rank, other in enumerate(ranks.gather(sums)):
        bad = [b.node for b, x, y in zip([b for b in net.learnable if b.param.requires_grad], sums, other) if x != y]
        if bad:
            text = f"the weights of rank {rank} have left those of rank {ranks.rank}: layers {', '.join(bad[:5])}"
            hint = "a layer whose gradient is not the same mean everywhere; was a Python layer at work?"
            raise RankError(text, hint=hint)


def reseed(seed: int, iteration: int, ranks: Ranks) -> None:
    """Random layers of an iteration: other numbers on each rank, the same ones however often it is run."""
    if ranks.alone:
        return
    mixed = np.random.SeedSequence([seed, iteration, ranks.rank]).generate_state(2, np.uint64)
    # not torch.manual_seed: where CUDA sleeps it would keep every call for later, with its traceback
    torch.default_generator.manual_seed(int(mixed[0] % _LARGE))
    if ranks.device.type == "cuda":
        torch.cuda.manual_seed(int(mixed[0] % _LARGE))
    np.random.seed(int(mixed[1] % (1 << 32)))
    random.seed(int(mixed[1]))


# --- requests --------------------------------------------------------------------------------------------------------
class Requests:
    """Requests of signals that reached any rank, served by all of them after the same iteration."""

    def __init__(self, signals: Signals, ranks: Ranks) -> None:
        self.signals, self.ranks = signals, ranks
        self._answer: Callable[[], int] | None = None

    def begin(self) -> None:
        """At the start of an iteration: ask the others, without waiting."""
        if not self.ranks.alone:
            self._answer = self.ranks.ask(REQUESTS.index(self.signals.poll()))

    def poll(self) -> str | None:
        """The most urgent request since the last call."""
        if self.ranks.alone:
            return self.signals.poll()
        if self._answer is None:
            self.begin()
        assert self._answer is not None
        number, self._answer = self._answer(), None
        if REQUESTS[number] == "stop":
            self.signals.stopped = True
        return REQUESTS[number]


def connect(ranks: Ranks, nets: Sequence[Net], *, sync_bn: bool) -> None:
    """Before the first pass of a training net and its test nets: data of one size, weights of rank 0, ranges over all
    ranks."""
    if ranks.alone:
        return
    check_same(ranks, data_facts({"the train net" if i == 0 else f"test net {i - 1}": n for i, n in enumerate(nets)}))
    ranks.spread([p for blobs in nets[0].params.values() for p in blobs])
    for net in nets:
        if net.hook is not None:
            net.hook.ranks = ranks
    if sync_bn:
        modules: Iterable[Any] = nets[0].modules()
        for module in modules:
            if hasattr(module, "together"):
                module.together = ranks.sum


# --- going on --------------------------------------------------------------------------------------------------------
def positions(saved: Mapping[str, int], then: Mapping[str, int], now: Mapping[str, int]) -> dict[str, int]:
    """Where sources go on that delivered `saved` batches of `then` records each (over all ranks), when a batch has
    `now`: at the next whole batch. Sources that `then` lacks: as many as now."""
    found = {}
    for name, count in saved.items():
        before, after = then.get(name), now.get(name)
        found[name] = count if before is None or not after else -(-count * before // after)
        if before is not None and after and found[name] * after != count * before:
            skipped = found[name] * after - count * before
            log.warning(
                "layer '%s': %d records are skipped, as a batch has %d now, not %d", name, skipped, after, before
            )
    return found


def with_snapshot(error: RankError, prefix: str) -> RankError:
    """Tell the user what is left of a run that a rank's end has ended."""
    latest = find_latest(prefix) if prefix else None
    if latest is not None:
        error.hint = f"the last whole snapshot is '{latest}': go on with --snapshot {latest}, on any number of ranks"
    elif error.hint is None:
        error.hint = "there is no snapshot yet; the log of the rank that ended first says why"
    return error


def _crc(message: Any) -> int:
    return zlib.crc32(message.SerializeToString(deterministic=True))
