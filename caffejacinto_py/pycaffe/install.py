"""`import caffe` for programs written for C++ Caffe's Python module."""

from __future__ import annotations

import importlib
import sys

from caffejacinto_py.errors import UsageError

MODULES = ("classifier", "coord_map", "detector", "draw", "io", "net_spec", "proto", "proto.caffe_pb2")


def install_as_caffe() -> None:
    """Let `import caffe`, `caffe.io`, `caffe.proto.caffe_pb2` and so on mean this package from now on.

    Raises UsageError when another `caffe` has been imported already. Calling it twice is harmless.
    """
    from caffejacinto_py import pycaffe

    there = sys.modules.get("caffe")
    if there is not None and there is not pycaffe:
        raise UsageError("another 'caffe' module is imported already: call install_as_caffe() before `import caffe`")
    sys.modules["caffe"] = sys.modules["caffe.pycaffe"] = sys.modules["caffe._caffe"] = pycaffe
    for name in MODULES:
        sys.modules[f"caffe.{name}"] = importlib.import_module(f"caffejacinto_py.pycaffe.{name}")
