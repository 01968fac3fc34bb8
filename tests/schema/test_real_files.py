"""Every prototxt of the forks parses, and survives printing and reading back."""

from __future__ import annotations

import csv
from collections import Counter

import pytest

from caffejacinto_py.errors import PrototxtError
from caffejacinto_py.schema.dialect import resolve_dialect
from caffejacinto_py.schema.text import dumps, parse
from caffejacinto_py.schema.upgrade import load_net, load_solver
from tests.conftest import shared

# a Caffe built from C++ refuses this one too
TWICE = "tidsp_caffe-jacinto/models/bvlc_alexnet/solver.prototxt"


def test_all_files() -> None:
    folder = shared("prototxt")
    counts: Counter[str] = Counter()
    dialects: Counter[str] = Counter()
    with open(folder / "index.csv", newline="") as rows:
        for row in csv.DictReader(rows):
            path, kind = folder / row["file"], row["kind"]
            if row["file"] == TWICE:
                with pytest.raises(PrototxtError, match="'max_iter' is given 2 times, first in line 9"):
                    load_solver(path)
                continue
            if row["syntax"] == "item":
                doc = parse(path.read_text(), "LabelMap", file=str(path))
                kind = "labels"
            elif kind == "solver" or "base_lr" in row["syntax"]:
                doc = load_solver(path)
                kind = "solver"
            else:
                doc = load_net(path)
                kind = "net"
                assert len(doc.message.layer) > 0
                assert not doc.message.layers
                assert all(doc.locs.find(("layer", i)) for i in range(len(doc.message.layer)))
                dialects[resolve_dialect(doc.message).name] += 1
            assert doc.unknown == []
            counts[kind] += 1
            assert parse(dumps(doc.message), doc.message.DESCRIPTOR.name).message == doc.message, path
    assert counts == {"net": 209, "solver": 147, "labels": 5}
    assert set(dialects) == {"bvlc", "nvcaffe", "jacinto", "jacinto-0.16", "ssd", "adaption", "ristretto"} & set(
        dialects
    )
    assert dialects["bvlc"] > 0
    assert dialects["nvcaffe"] > 0
