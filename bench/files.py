"""Speed of reading and writing a caffemodel of 60 million floats: ours against the protobuf API (part of `make bench`).

Reading ends with every blob copied into arrays that exist, as a net's parameters do; writing ends with the file on disk
(fsync). The two take turns; medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from caffejacinto_py.schema import pb
from caffejacinto_py.schema.weights import LayerBlobs, ModelFile, read_model, write_model

SHAPES = {  # CaffeNet's weights, which are nearly all of its 60,965,224 numbers
    "conv1": (96, 3, 11, 11),
    "conv2": (256, 48, 5, 5),
    "conv3": (384, 256, 3, 3),
    "conv4": (384, 192, 3, 3),
    "conv5": (256, 192, 3, 3),
    "fc6": (4096, 9216),
    "fc7": (4096, 4096),
    "fc8": (1000, 4096),
}


def arrays() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(1)
    return {name: draw.standard_normal(shape, dtype=np.float32) for name, shape in SHAPES.items()}


def api_write(path: Path, blobs: dict[str, np.ndarray]) -> None:
    net = pb.NetParameter(name="bench")
    for name, array in blobs.items():
        blob = net.layer.add(name=name, type="InnerProduct").blobs.add()
        blob.shape.dim.extend(array.shape)
        blob.data.extend(array.ravel().tolist())  # three times as fast as from the array
    with open(path, "wb") as f:
        f.write(net.SerializeToString())
        f.flush()
        os.fsync(f.fileno())


def api_read(path: Path, into: dict[str, np.ndarray]) -> None:
    net = pb.NetParameter.FromString(path.read_bytes())
    for layer in net.layer:
        into[layer.name][...] = np.asarray(layer.blobs[0].data, dtype=np.float32).reshape(into[layer.name].shape)


def our_write(path: Path, blobs: dict[str, np.ndarray]) -> None:
    layers = [LayerBlobs(name=name, type="InnerProduct", blobs=[array]) for name, array in blobs.items()]
    write_model(path, ModelFile(name="bench", layers=layers))


def our_read(path: Path, into: dict[str, np.ndarray]) -> None:
    for layer in read_model(path).layers:
        into[layer.name][...] = layer.blobs[0]


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    blobs = arrays()
    with tempfile.TemporaryDirectory() as folder:
        ours, api = Path(folder, "ours.caffemodel"), Path(folder, "api.caffemodel")
        our_write(ours, blobs)
        api_write(api, blobs)
        into = {name: np.zeros_like(array) for name, array in blobs.items()}
        for path, read in ((ours, api_read), (api, our_read)):  # each reads what the other wrote
            read(path, into)
            for name, array in into.items():
                assert np.array_equal(array, blobs[name]), f"{path.name}: {name} differs"
                array.fill(0)
        work: dict[tuple[str, str], Callable[[], object]] = {
            ("read", "ours"): lambda: our_read(ours, into),
            ("read", "API"): lambda: api_read(api, into),
            ("write", "ours"): lambda: our_write(ours, blobs),
            ("write", "API"): lambda: api_write(api, blobs),
        }
        times = {key: [] for key in work}
        for _ in range(rounds):
            for key, run in work.items():
                times[key].append(seconds(run))
        size = ours.stat().st_size / 1e6
    median = {key: statistics.median(found) for key, found in times.items()}
    print(f"caffemodel of {size:.0f} MB; MB/s\n{'':<8}{'ours':>10}{'API':>10}{'ratio':>10}")
    for what in ("read", "write"):
        mine, theirs = median[what, "ours"], median[what, "API"]
        print(f"{what:<8}{size / mine:>10.0f}{size / theirs:>10.0f}{theirs / mine:>10.1f}")


if __name__ == "__main__":
    main()
