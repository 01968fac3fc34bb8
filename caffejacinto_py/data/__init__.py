"""Data: records from LMDB, image lists, HDF5 or memory, transformed as Caffe does, batched ahead of the solver. No
torch.
"""

from __future__ import annotations

from typing import Any

__all__ = ["make_feeder", "probe"]


def __getattr__(name: str) -> Any:  # lazy: the schema and OpenCV are loaded when data is really read
    if name in __all__:
        from caffejacinto_py.data import make

        return getattr(make, name)
    raise AttributeError(name)
