"""Records per second of the data room alone: LMDB and transform, for raw 28x28 images and 256x256 JPEGs.

    python bench/feeder.py [--seconds 3] [--lmdb PATH]

--lmdb: a database of raw images to read instead of the synthetic one (e.g. an MNIST LMDB). Workers: 0 prepares in the
caller's thread; then threads and processes. The best of three runs is shown.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np

from caffejacinto_py.data import make_feeder, probe
from caffejacinto_py.data.convert import LmdbWriter
from caffejacinto_py.data.datasets import write_arrays
from caffejacinto_py.layers import registry
from caffejacinto_py.layers.base import Context, Layer
from caffejacinto_py.schema.datum import make_datum
from caffejacinto_py.schema.text import parse


def data_layer(source: str, batch: int, transform: str) -> Layer:
    text = f"""layer {{ name: "data" type: "Data" top: "data" top: "label" transform_param {{ {transform} }}
      data_param {{ source: "{source}" batch_size: {batch} backend: LMDB }} }}"""
    proto = parse(text, "NetParameter", file="bench").message.layer[0]
    return registry.make(proto, Context(), 2)


def synthetic(folder: Path) -> tuple[str, str]:
    rng = np.random.default_rng(0)
    raw, jpeg = str(folder / "raw"), str(folder / "jpeg")
    write_arrays(raw, rng.integers(0, 256, (20000, 1, 28, 28), np.uint8), [0] * 20000)
    with LmdbWriter(jpeg) as db:
        for i in range(512):
            noise = rng.integers(0, 256, (32, 32, 3), np.uint8)
            packed = cv2.imencode(".jpg", cv2.resize(noise, (256, 256), interpolation=cv2.INTER_CUBIC))[1]
            db.put(b"%08d" % i, make_datum(packed.tobytes(), label=i % 10))
    return raw, jpeg


def rate(layer: Layer, batch: int, workers: int, kind: str, seconds: float) -> float:
    feeder = make_feeder(layer, shapes=probe(layer), seed=1, workers=workers, workers_kind=kind)
    for _ in range(8):
        feeder.next()
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        feeder.next()
        count += batch
    taken = time.perf_counter() - start
    feeder.close()
    return count / taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--lmdb")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        raw, jpeg = synthetic(Path(folder))
        cases = [
            ("raw 28x28 b64", data_layer(options.lmdb or raw, 64, "scale: 0.00390625"), 64),
            (
                "JPEG 256x256 crop 224 mirror b32",
                data_layer(jpeg, 32, "crop_size: 224 mirror: true mean_value: 104"),
                32,
            ),
        ]
        for name, layer, batch in cases:
            for workers, kind in ((0, "thread"), (1, "thread"), (2, "thread"), (1, "process"), (2, "process")):
                best = max(rate(layer, batch, workers, kind, options.seconds / 3) for _ in range(3))
                print(f"{name:34} {workers} {kind:8} {best:10,.0f} records/s", flush=True)


if __name__ == "__main__":
    main()
