"""Weights in float16, as NVCaffe stores those of layers in FLOAT16: raw_data with its type."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from caffejacinto_py.schema.modelfile import ModelFile

LARGEST = float(np.finfo(np.float16).max)


@dataclass
class Halved:
    """What became of a model. blobs: how many are float16 now. kept: (layer, blob) that stay as they are because a
    value is beyond float16's 65504 or NaN. lost: values that became zero."""

    blobs: int = 0
    kept: list[tuple[str, int]] = field(default_factory=list)
    lost: int = 0


def halve(model: ModelFile, takes_part: Callable[[str], bool]) -> Halved:
    """Blobs of the layers whose type `takes_part` become float16 arrays, in place; the others (statistics) stay."""
    found = Halved()
    for layer in model.layers:
        if not takes_part(layer.type):
            continue
        for i, blob in enumerate(layer.blobs):
            if blob is None:
                continue
            if blob.size and not float(np.abs(blob).max()) <= LARGEST:  # NaN too
                found.kept.append((layer.name, i))
                continue
            layer.blobs[i] = np.asarray(blob).astype(np.float16)
            found.lost += int(np.count_nonzero(blob)) - int(np.count_nonzero(layer.blobs[i]))
            found.blobs += 1
    return found
