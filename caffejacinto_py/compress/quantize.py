"""Quantization simulation of a net: a Hook that replaces weights and blobs by what fixed-point numbers can express."""

from __future__ import annotations

from caffejacinto_py.compress.qparams import Table, read_table, write_qparams

__all__ = ["Table", "read_table", "write_qparams"]
