"""Message classes of proto/caffe.proto, from a descriptor pool of our own.

A private pool, because the default one refuses a second file that defines the same names (any installed `caffe_pb2`),
and a committed descriptor, because generated `_pb2` modules refuse protobuf runtimes older than their compiler.
"""

from __future__ import annotations

import functools
from importlib import resources
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor import Descriptor
from google.protobuf.internal import enum_type_wrapper

PACKAGE = "caffejacinto"


@functools.cache
def pool() -> descriptor_pool.DescriptorPool:
    """The private pool, loaded at first use."""
    data = resources.files("caffejacinto_py.schema").joinpath("caffe.desc").read_bytes()
    loaded = descriptor_pool.DescriptorPool()
    loaded.Add(descriptor_pb2.FileDescriptorProto.FromString(data))
    return loaded


def descriptor(name: str) -> Descriptor:
    """The descriptor of a message by its short name, e.g. ``NetParameter``. KeyError: no such message."""
    return pool().FindMessageTypeByName(f"{PACKAGE}.{name}")


class _Schema:
    """Attribute access to the schema: ``pb.NetParameter()``, ``pb.Phase.Value("TEST")``, ``pb.TEST``."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = _find(name)
        setattr(self, name, found)
        return found

    def __dir__(self) -> list[str]:
        file = pool().FindFileByName("caffe.proto")
        values = [v for e in file.enum_types_by_name.values() for v in e.values_by_name]
        return sorted([*file.message_types_by_name, *file.enum_types_by_name, *values])


def _find(name: str) -> Any:
    file = pool().FindFileByName("caffe.proto")
    if name in file.message_types_by_name:
        return _message_class(file.message_types_by_name[name])
    if name in file.enum_types_by_name:
        return enum_type_wrapper.EnumTypeWrapper(file.enum_types_by_name[name])
    for enum in file.enum_types_by_name.values():
        if name in enum.values_by_name:
            return enum.values_by_name[name].number
    raise AttributeError(f"the schema has no message or enum '{name}'")


def _message_class(schema: Descriptor) -> Any:
    found: Any = message_factory.GetMessageClass(schema)
    for nested in schema.nested_types:
        if not hasattr(found, nested.name):  # protobuf's pure Python implementation sets them in generated code only
            setattr(found, nested.name, _message_class(nested))
    return found


pb: Any = _Schema()
