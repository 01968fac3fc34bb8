"""Real nets on a GPU that is not there: a pass and its gradient, without a wait for the device."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from caffejacinto_py.engine.net import Net
from tests.conftest import SHARED
from tests.gpu.fake import CUDA, fake_cuda
from tests.test_real_nets import nets, small

pytestmark = pytest.mark.slow
LOOKERS = {"ROIPooling", "LSTM", "RNN", "Filter", "Python"}  # types that look at their data


def selection() -> list[str]:
    """Few files that have all layer types between them, those with most new types first."""
    root = SHARED / "prototxt"
    if not root.exists():
        return []
    with open(root / "index.csv", newline="") as f:
        types = {row["file"]: set(row["layer_types"].split()) for row in csv.DictReader(f)}
    left, files, found = {t for f in nets() for t in types[f]}, nets(), []
    while left and files:
        best = max(files, key=lambda f: (len(types[f] & left), -len(types[f]), f))
        if not types[best] & left:
            break
        found.append(best)
        left -= types[best]
    return sorted(found)


@pytest.mark.parametrize("phase", ["TRAIN", "TEST"])
@pytest.mark.parametrize("file", selection() or [pytest.param("", marks=pytest.mark.skip(reason="no reference data"))])
def test_runs(file: str, phase: str) -> None:
    torch.set_num_threads(1)
    graph = small(Path(SHARED / "prototxt" / file), phase)
    if graph is None:
        pytest.skip(f"not a net for phase {phase}")
    with fake_cuda() as seen:
        net = Net(graph, seed=0, device=CUDA)
        inputs = {
            top: (torch.zeros(shape) if len(shape) == 1 or set(shape[1:]) == {1} else torch.rand(shape)).to(CUDA)
            for source in net.sources
            for top, shape in zip(source.tops, source.shapes, strict=True)
        }
        seen.forget()
        with torch.set_grad_enabled(phase == "TRAIN"):
            result = net(inputs)
            if result.loss.requires_grad:
                result.loss.backward()
        for v in graph.outputs:
            if v.name in result.outputs:
                assert result.outputs[v.name].device == CUDA
        if not LOOKERS & {n.type for n in graph.nodes}:
            assert not seen.waits
