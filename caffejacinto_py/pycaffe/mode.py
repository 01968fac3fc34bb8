"""What `caffe.set_mode_gpu()` and friends set. The one global of this room: pycaffe's interface consists of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from caffejacinto_py.errors import UsageError
from caffejacinto_py.schema.compat import Compat

TRAIN, TEST = 0, 1  # numbers of enum Phase, as in C++ Caffe
PHASES = ("TRAIN", "TEST")


@dataclass
class Mode:
    gpu: bool = False
    index: int = 0
    seed: int | None = None
    compat: Compat = field(default_factory=Compat)

    @property
    def device(self) -> str:
        return f"cuda:{self.index}" if self.gpu else "cpu"


MODE = Mode()


def set_mode_cpu() -> None:
    """Nets and solvers made from now on live on the CPU."""
    MODE.gpu = False


def set_mode_gpu() -> None:
    """Nets and solvers made from now on live on a CUDA GPU. Raises UsageError where there is none."""
    import torch

    if not torch.cuda.is_available():
        raise UsageError("set_mode_gpu: no CUDA GPU can be used here", hint="use set_mode_cpu()")
    MODE.gpu = True


def set_device(index: int) -> None:
    """The GPU that `set_mode_gpu` means."""
    MODE.index = int(index)


def set_random_seed(seed: int) -> None:
    """Fillers, dropout and data of nets made from now on are reproducible."""
    import torch

    MODE.seed = int(seed)
    torch.manual_seed(int(seed))


def set_compat(**switches: str) -> None:
    """Reproduce a C++ binary in nets and solvers made from now on: set_compat(quantization="cpu").

    Switches not named go back to their defaults; see docs/compat.md. Raises UsageError for an unknown switch or value.
    """
    MODE.compat = Compat().set(**switches)


def phase_name(phase: int | str) -> str:
    """ "TRAIN" or "TEST" from 0, 1 or the name. Raises UsageError."""
    if isinstance(phase, str) and phase.upper() in PHASES:
        return phase.upper()
    if isinstance(phase, int) and 0 <= phase < len(PHASES):
        return PHASES[phase]
    raise UsageError(f"phase is caffe.TRAIN or caffe.TEST, not {phase!r}")
