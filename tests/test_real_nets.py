"""Every real net made of known layer types runs: one forward, and one backward where it has a loss, on random data."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from caffejacinto_py.checking import fit
from caffejacinto_py.engine.net import Net
from caffejacinto_py.errors import CaffeError
from caffejacinto_py.ir.graph import Graph
from caffejacinto_py.layers.registry import known
from caffejacinto_py.schema.upgrade import load_net
from tests.conftest import SHARED

pytestmark = pytest.mark.slow
BATCHES = ("data_param", "image_data_param", "hdf5_data_param", "memory_data_param", "window_data_param")


def nets() -> list[str]:
    """Files of shared/prototxt whose layer types are all known, each content once; empty where the folder is absent."""
    root = SHARED / "prototxt"
    if not root.exists():
        return []
    found: dict[bytes, str] = {}
    with open(root / "index.csv", newline="") as f:
        for row in csv.DictReader(f):
            if row["kind"] in ("train_val", "deploy") and all(known(t) for t in row["layer_types"].split()):
                found.setdefault((root / row["file"]).read_bytes(), row["file"])
    return sorted(found.values())


def small(path: Path, phase: str) -> Graph | None:
    """The net with batches of 2; None where it is not made for this phase."""
    doc = load_net(path)
    for layer in doc.message.layer:
        for field in BATCHES:
            if layer.HasField(field) and getattr(layer, field).batch_size > 2:
                getattr(layer, field).batch_size = 2
        for shape in layer.input_param.shape:
            if len(shape.dim) == 4 and shape.dim[0] > 2:
                shape.dim[0] = 2
    try:
        return fit(doc, phase=phase)[0]
    except CaffeError as e:
        other_phase = "leave out" in str(e) or "is left in phase" in str(e)
        if other_phase or "--allow-python-layers" in str(e):  # the second: user code that is not here
            return None
        raise


@pytest.mark.parametrize("phase", ["TRAIN", "TEST"])
@pytest.mark.parametrize("file", nets() or [pytest.param("", marks=pytest.mark.skip(reason="no reference data here"))])
def test_runs(file: str, phase: str) -> None:
    torch.set_num_threads(1)
    graph = small(SHARED / "prototxt" / file, phase)
    if graph is None:
        pytest.skip(f"not a net for phase {phase}")
    net = Net(graph, seed=0)
    inputs = {
        top: torch.zeros(shape) if len(shape) == 1 or set(shape[1:]) == {1} else torch.rand(shape)
        for source in net.sources
        for top, shape in zip(source.tops, source.shapes, strict=True)
    }
    with torch.set_grad_enabled(phase == "TRAIN"):
        result = net(inputs)
        if result.loss.requires_grad:
            result.loss.backward()
    for v in graph.outputs:
        if v.name in result.outputs and v.name != "(automatic)":
            assert tuple(result.outputs[v.name].shape) == graph.shapes[v]
    # in TEST the untrained statistics of BatchNorm (variance 0) may blow a deep net up
    assert phase == "TEST" or torch.isfinite(result.loss)
