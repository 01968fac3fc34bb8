"""pycaffe: C++ Caffe's Python interface. `from caffejacinto_py import pycaffe as caffe`, or `install_as_caffe()`."""

from __future__ import annotations

from caffejacinto_py import __version__
from caffejacinto_py.layers.modules.blob import Blob
from caffejacinto_py.layers.modules.python import PythonLayer as Layer
from caffejacinto_py.pycaffe import coord_map, draw, io, proto
from caffejacinto_py.pycaffe.classifier import Classifier
from caffejacinto_py.pycaffe.detector import Detector
from caffejacinto_py.pycaffe.install import install_as_caffe
from caffejacinto_py.pycaffe.mode import (
    TEST,
    TRAIN,
    set_compat,
    set_device,
    set_mode_cpu,
    set_mode_gpu,
    set_random_seed,
)
from caffejacinto_py.pycaffe.net import Net
from caffejacinto_py.pycaffe.net_spec import NetSpec, layers, params, to_proto
from caffejacinto_py.pycaffe.runtime import (
    Timer,
    has_nccl,
    init_log,
    log,
    set_multiprocess,
    set_solver_count,
    set_solver_rank,
    solver_count,
    solver_rank,
)
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
    "TEST", "TRAIN", "AdaDeltaSolver", "AdaGradSolver", "AdamSolver", "Blob", "Classifier", "Detector", "Layer",
    "NesterovSolver", "Net", "NetSpec", "RMSPropSolver", "SGDSolver", "Timer", "__version__", "coord_map", "draw",
    "get_solver", "has_nccl", "init_log", "install_as_caffe", "io", "layer_type_list", "layers", "log", "params",
    "proto", "set_compat", "set_device", "set_mode_cpu", "set_mode_gpu", "set_multiprocess", "set_random_seed",
    "set_solver_count", "set_solver_rank", "solver_count", "solver_rank", "to_proto",
]  # fmt: skip


def layer_type_list() -> list[str]:
    """The names of all layer types, sorted."""
    from caffejacinto_py.layers import registry

    return registry.types()
