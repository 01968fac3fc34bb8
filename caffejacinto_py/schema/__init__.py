"""Files and messages: the only room that knows protobuf."""

from __future__ import annotations

from caffejacinto_py.schema.pool import pb

__all__ = ["pb"]
