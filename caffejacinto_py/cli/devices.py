"""Which device a verb runs on: `--gpu` and solver_mode against what the machine has."""

from __future__ import annotations

import logging

from caffejacinto_py.errors import DeviceError, UsageError


def pick(gpu: str | None, *, solver_mode: str | None = None, log: logging.Logger) -> str:
    """The torch device of a verb that runs on one. See `several`."""
    found = several(gpu, solver_mode=solver_mode, log=log)
    if len(found) > 1:
        raise DeviceError(f"--gpu {gpu}: this verb runs on one GPU", hint=f"use --gpu {found[0].removeprefix('cuda:')}")
    return found[0]


def several(gpu: str | None, *, solver_mode: str | None = None, device_id: int = 0, log: logging.Logger) -> list[str]:
    """Torch device names, one at least. `--gpu` decides; without it the solver's mode ("CPU", "GPU", None) and its
    device_id.

    An explicit GPU that is not there raises DeviceError; a solver that merely says GPU falls back to the CPU with a
    warning. Raises UsageError for a `--gpu` that is no list of numbers.
    """
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpu is None:
        if solver_mode != "GPU":
            return ["cpu"]
        if count:
            if device_id >= count:
                raise DeviceError(f"device_id {device_id}: there are {count} GPUs, from 0 on", hint="use --gpu")
            return [f"cuda:{device_id}"]
        log.warning("solver_mode is GPU, but no CUDA GPU can be used here: running on the CPU")
        return ["cpu"]
    wanted = _numbers(gpu, count)
    if not wanted:
        return ["cpu"]
    if not count:
        raise DeviceError(f"--gpu {gpu}: no CUDA GPU can be used here", hint="leave --gpu out to run on the CPU")
    if wanted[-1] >= count:
        raise DeviceError(f"--gpu {gpu}: there are {count} GPUs, from 0 on", hint="see `caffejacinto device_query`")
    return [f"cuda:{n}" for n in wanted]


def _numbers(gpu: str, count: int) -> list[int]:
    """The GPU numbers, ascending; none for the CPU (-1)."""
    if gpu.strip().lower() == "all":
        return list(range(max(count, 1)))
    try:
        found = sorted({int(word) for word in gpu.split(",")})
    except ValueError:
        raise UsageError(f"--gpu {gpu}: neither 'all' nor numbers such as 0 or 0,1") from None
    if found == [-1]:
        return []
    if found[0] < 0:
        raise UsageError(f"--gpu {gpu}: GPU numbers are not negative; -1 alone means the CPU")
    return found
