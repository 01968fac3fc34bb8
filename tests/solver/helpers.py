"""Small nets and databases for the solver tests, with what is random in training: mirror, crop, dropout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import torch

from caffejacinto_py.schema.datum import make_datum
from caffejacinto_py.schema.text import parse
from caffejacinto_py.schema.upgrade import upgrade_solver
from caffejacinto_py.solver import Solver

NET = """
name: "tiny"
layer {{ name: "data" type: "Data" top: "data" top: "label" include {{ phase: TRAIN }}
  transform_param {{ mirror: true crop_size: 8 scale: 0.01 }}
  data_param {{ source: "{folder}/db" batch_size: 4 backend: LMDB }} }}
layer {{ name: "data" type: "Data" top: "data" top: "label" include {{ phase: TEST }}
  transform_param {{ crop_size: 8 scale: 0.01 }} data_param {{ source: "{folder}/db" batch_size: 3 backend: LMDB }} }}
layer {{ name: "conv" type: "Convolution" bottom: "data" top: "conv"
  param {{ lr_mult: 1 }} param {{ lr_mult: 2 decay_mult: 0 }}
  convolution_param {{ num_output: 6 kernel_size: 3 weight_filler {{ type: "xavier" }} }} }}
layer {{ name: "bn" type: "BatchNorm" bottom: "conv" top: "bn" }}
layer {{ name: "relu" type: "ReLU" bottom: "bn" top: "bn" }}
layer {{ name: "drop" type: "Dropout" bottom: "bn" top: "bn" }}
layer {{ name: "ip" type: "InnerProduct" bottom: "bn" top: "ip"
  param {{ lr_mult: 1 }} param {{ lr_mult: 2 decay_mult: 0 }}
  inner_product_param {{ num_output: 5 weight_filler {{ type: "xavier" }} }} }}
layer {{ name: "loss" type: "SoftmaxWithLoss" bottom: "ip" bottom: "label" top: "loss" }}
layer {{ name: "accuracy" type: "Accuracy" bottom: "ip" bottom: "label" top: "accuracy" include {{ phase: TEST }} }}
"""
SOLVER = """
base_lr: 0.05 lr_policy: "inv" gamma: 0.01 power: 0.75 momentum: 0.9 weight_decay: 0.001 solver_mode: CPU random_seed: 7
snapshot_after_train: false
"""


def make_db(path: Path, *, count: int = 22, size: int = 10, classes: int = 5) -> None:
    """An LMDB of random images; the class moves the mean of a channel, so that there is something to learn."""
    rng = np.random.default_rng(5)
    with lmdb.open(str(path), map_size=1 << 24) as env, env.begin(write=True) as txn:
        for i in range(count):
            label = i % classes
            image = rng.integers(0, 120, (3, size, size), np.uint8)
            image[label % 3] += np.uint8(20 * label)
            txn.put(b"%08d" % i, make_datum(image, label=label))


def make_files(folder: Path) -> None:
    """db and net.prototxt in `folder`."""
    make_db(folder / "db")
    (folder / "net.prototxt").write_text(NET.format(folder=folder))


def solver_text(folder: Path, extra: str = "") -> str:
    """A solver text. extra: fields, which replace those of the same name in the usual ones."""
    text = SOLVER
    names = {part.split(":")[0].split()[-1] for part in extra.split("\n") if ":" in part}
    words = text.split()
    kept, skip = [], False
    for word in words:
        if word.endswith(":"):
            skip = word[:-1] in names
        if not skip:
            kept.append(word)
    net = f'net: "{folder}/net.prototxt"' if not names & {"net", "net_param", "train_net", "train_net_param"} else ""
    prefix = f'snapshot_prefix: "{folder}/snap"' if "snapshot_prefix" not in names else ""
    most = "max_iter: 12" if "max_iter" not in names else ""
    return "\n".join([" ".join(kept), net, prefix, most, extra]) + "\n"


def document(folder: Path, extra: str = "") -> Any:
    """A solver Document with locations. extra: one field a line."""
    doc = parse(solver_text(folder, extra), "SolverParameter", file="solver.prototxt")
    doc.notices += upgrade_solver(doc.message, doc.locs)
    return doc


def make_solver(folder: Path, extra: str = "", **options: Any) -> Solver:
    torch.set_num_threads(1)
    if not (folder / "net.prototxt").exists():
        make_files(folder)
    return Solver(document(folder, extra), **{"device": "cpu", "workers": 0, **options})


def params(solver: Solver) -> dict[str, np.ndarray]:
    """Copies of all parameters, by layer/index."""
    return {f"{n}/{i}": p.detach().numpy().copy() for n, ps in solver.net.params.items() for i, p in enumerate(ps)}


def assert_equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    """Bit for bit."""
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
