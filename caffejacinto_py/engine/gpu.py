"""A GPU before a net lives on it, and what its kernels may do. Nothing here is called for the CPU."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from caffejacinto_py.errors import DeviceError


def claim(device: torch.device) -> None:
    """Make a GPU the current one (pinned memory and streams belong to that one) and see that it computes.

    Raises DeviceError where it does not: no driver, another process has it alone, no kernels for it in this torch.
    """
    try:
        if device.index is not None:
            torch.cuda.set_device(device)
        torch.ones(1, device=device).add_(1)
        torch.cuda.synchronize(device)
    except RuntimeError as e:
        raise _refused(device, e) from e


def _refused(device: torch.device, error: RuntimeError) -> DeviceError:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    hint = "see `nvidia-smi` and `caffejacinto device_query`; --gpu -1 runs on the CPU"
    if "no kernel image" in str(error):
        major, minor = torch.cuda.get_device_capability(device)
        kinds = ", ".join(torch.cuda.get_arch_list()) or "none"
        first = f"compute capability {major}.{minor}, but this torch has kernels for {kinds} only"
        hint = "install a torch built for this GPU; --gpu -1 runs on the CPU"
    elif isinstance(error, torch.cuda.OutOfMemoryError) or "out of memory" in str(error):
        hint = "other processes fill its memory: see `nvidia-smi`"
    return DeviceError(f"{device} cannot be used: {first}", hint=hint)


class Upload:
    """Brings tensors of the host to a GPU on a stream of their own: while the kernels of the batch before still run."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def __call__(self, tensor: Tensor) -> Tensor:
        """The copy. Kernels that are started from here on wait for it, the host does not."""
        with torch.cuda.stream(self.stream):
            found = tensor.pin_memory().to(self.device, non_blocking=True)
        kernels = torch.cuda.current_stream(self.device)
        kernels.wait_stream(self.stream)
        found.record_stream(kernels)  # its memory is not given away before they are through with it
        return found


def tf32_missing(device: torch.device) -> str | None:
    """Why a device has no TF32 (tensor cores that read float32 with 10 bits of mantissa), None where it has."""
    if device.type != "cuda":
        return "only GPUs have it"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"this GPU, of compute capability {major}.{minor}, does not have it"


def allow(*, tf32: bool, search: bool) -> None:
    """What kernels may do from here on, in the whole process; cheap enough for each pass.

    tf32: products of float32 numbers may read them with 10 bits of mantissa; torch's default is yes for convolutions.
    Sums of 16-bit products stay float32, which torch's default does not promise. search: cuDNN tries its algorithms
    for each new shape and takes the fastest one; not where results have to be reproducible.
    """
    products = torch.backends.cuda.matmul
    products.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    products.allow_fp16_reduced_precision_reduction = products.allow_bf16_reduced_precision_reduction = False
    torch.backends.cudnn.benchmark = search and not torch.backends.cudnn.deterministic


def reproducible() -> None:
    """Choose kernels that give the same bits in every run, where there are any; call it before the first one runs.
    Slower. Kernels that have no such form go on, with a warning of torch's."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
