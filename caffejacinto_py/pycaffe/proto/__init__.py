"""`caffe.proto`: message classes of Caffe."""

from __future__ import annotations

from caffejacinto_py.pycaffe.proto import caffe_pb2

__all__ = ["caffe_pb2"]
