"""Layer types. Importing this package registers all families; torch is loaded by `Layer.module()` only."""

from __future__ import annotations

from caffejacinto_py.layers import activation, elementwise, loss, metric, shape, source

__all__ = ["activation", "elementwise", "loss", "metric", "shape", "source"]
