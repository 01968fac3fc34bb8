"""`caffe.proto.caffe_pb2`: message classes, enums and their values, of the private schema."""

from __future__ import annotations

from caffejacinto_py.schema import pb
from caffejacinto_py.schema.pool import pool


def __getattr__(name: str) -> object:
    if name == "DESCRIPTOR":
        return pool().FindFileByName("caffe.proto")
    if name == "__all__":
        return dir(pb)
    return getattr(pb, name)


def __dir__() -> list[str]:
    return dir(pb)
