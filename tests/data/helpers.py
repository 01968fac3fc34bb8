"""Small databases and source layers for the tests of the data room."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np

from caffejacinto_py.data.convert import LmdbWriter
from caffejacinto_py.data.datasets import write_arrays
from caffejacinto_py.layers import registry
from caffejacinto_py.layers.base import Context, Layer
from caffejacinto_py.schema.datum import make_datum
from caffejacinto_py.schema.dialect import DIALECTS
from caffejacinto_py.schema.text import parse


def source_layer(text: str, *, phase: str = "TRAIN", dialect: str = "bvlc") -> Layer:
    """The Layer object of one `layer { ... }` text (the braces' content)."""
    proto = parse(f"layer {{ {text} }}", "NetParameter", file="net.prototxt").message.layer[0]
    return registry.make(proto, Context(phase, DIALECTS[dialect]), len(proto.top))


def data_layer(source: object, batch: int = 4, transform: str = "", data: str = "", **options: Any) -> Layer:
    return source_layer(
        f"""name: "data" type: "Data" top: "data" top: "label" transform_param {{ {transform} }}
        data_param {{ source: "{source}" batch_size: {batch} backend: LMDB {data} }}""",
        **options,
    )


def images(n: int, channels: int = 3, height: int = 8, width: int = 9, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, channels, height, width), np.uint8)


def raw_lmdb(path: Path, n: int = 10, **shape: int) -> np.ndarray:
    """An LMDB of n random raw records with labels 0, 1, ...; returns the images."""
    made = images(n, **shape)
    write_arrays(str(path), made, range(n))
    return made


def picture(seed: int = 0, height: int = 20, width: int = 24) -> np.ndarray:
    """A smooth BGR image, which JPEG keeps nearly as it is."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


def encoded_lmdb(path: Path, n: int = 6, kind: str = ".png") -> list[np.ndarray]:
    """An LMDB of n encoded images; returns them as decoded: H,W,3 BGR."""
    made = []
    with LmdbWriter(str(path)) as db:
        for i in range(n):
            packed = cv2.imencode(kind, picture(i))[1]
            db.put(b"%08d" % i, make_datum(packed.tobytes(), label=i))
            made.append(cv2.imdecode(packed, cv2.IMREAD_COLOR))
    return made


def write_mean(path: Path, mean: np.ndarray) -> Path:
    from caffejacinto_py.schema.blobs import write_blob

    write_blob(str(path), mean[None])
    return path
