"""`import caffe` for programs written for C++ Caffe's Python module."""

from __future__ import annotations

import sys
from types import ModuleType

from caffejacinto_py.errors import UsageError
from caffejacinto_py.schema import pb


class Messages(ModuleType):
    """`caffe.proto.caffe_pb2`: message classes, enums and their values, of the private schema."""

    def __getattr__(self, name: str) -> object:
        return getattr(pb, name)

    def __dir__(self) -> list[str]:
        return dir(pb)


def install_as_caffe() -> None:
    """Let `import caffe`, `caffe.io` and `caffe.proto.caffe_pb2` mean this package from now on.

    Raises UsageError when another `caffe` has been imported already. Calling it twice is harmless.
    """
    from caffejacinto_py import pycaffe
    from caffejacinto_py.pycaffe import io

    there = sys.modules.get("caffe")
    if there is not None and there is not pycaffe:
        raise UsageError("another 'caffe' module is imported already: call install_as_caffe() before `import caffe`")
    proto = ModuleType("caffe.proto", "Message classes of Caffe.")
    proto.caffe_pb2 = Messages("caffe.proto.caffe_pb2", Messages.__doc__)  # type: ignore[attr-defined]
    pycaffe.proto = proto  # type: ignore[attr-defined]
    sys.modules["caffe"] = pycaffe
    sys.modules["caffe.io"] = io
    sys.modules["caffe.proto"] = proto
    sys.modules["caffe.proto.caffe_pb2"] = proto.caffe_pb2
