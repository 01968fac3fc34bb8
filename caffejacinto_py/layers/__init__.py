"""Layer types. Importing this package registers all families; torch is loaded by `Layer.module()` only."""

from __future__ import annotations

from caffejacinto_py.layers import (
    activation,
    conv,
    dropout,
    elementwise,
    linear,
    loss,
    metric,
    norm,
    pooling,
    recurrent,
    shape,
    source,
)

__all__ = [
    "activation",
    "conv",
    "dropout",
    "elementwise",
    "linear",
    "loss",
    "metric",
    "norm",
    "pooling",
    "recurrent",
    "shape",
    "source",
]
