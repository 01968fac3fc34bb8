"""pycaffe: C++ Caffe's Python interface. `from caffejacinto_py import pycaffe as caffe`, or `install_as_caffe()`."""

from __future__ import annotations

from caffejacinto_py.layers.modules.blob import Blob
from caffejacinto_py.layers.modules.python import PythonLayer as Layer
from caffejacinto_py.pycaffe import io
from caffejacinto_py.pycaffe.install import install_as_caffe
from caffejacinto_py.pycaffe.mode import TEST, TRAIN, set_device, set_mode_cpu, set_mode_gpu, set_random_seed
from caffejacinto_py.pycaffe.net import Net
from caffejacinto_py.pycaffe.solvers import (
    AdaDeltaSolver,
    AdaGradSolver,
    AdamSolver,
    NesterovSolver,
    RMSPropSolver,
    SGDSolver,
    get_solver,
)

__all__ = [
    "TEST", "TRAIN", "AdaDeltaSolver", "AdaGradSolver", "AdamSolver", "Blob", "Layer", "NesterovSolver", "Net",
    "RMSPropSolver", "SGDSolver", "get_solver", "install_as_caffe", "io", "layer_type_list", "set_device", "set_mode_cpu",
    "set_mode_gpu", "set_random_seed",
]  # fmt: skip


def layer_type_list() -> list[str]:
    """The names of all layer types, sorted."""
    from caffejacinto_py.layers import registry

    return registry.types()
