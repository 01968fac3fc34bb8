"""Every single-layer vector of the C++ binary whose layer is registered, through the pycaffe interface.

Tolerance of the vectors: |a - b| <= 1e-5 + 1e-4 |b|.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import caffejacinto_py.layers  # noqa: F401  (registers the families)
from caffejacinto_py import pycaffe as caffe
from caffejacinto_py.layers import registry
from tests.conftest import SHARED, shared

FOLDER = SHARED / "golden/bvlc_layers"


def missing_types(path: Path) -> list[str]:
    return sorted({t for t in re.findall(r'\btype: "([A-Z]\w*)"', path.read_text()) if not registry.known(t)})


CASES = sorted(FOLDER.glob("*.prototxt"))
RUN = [p.stem for p in CASES if not missing_types(p)]


def part(data: dict[str, np.ndarray], kind: str) -> dict[str, np.ndarray]:
    return {k.split("/", 1)[1]: v for k, v in data.items() if k.startswith(kind + "/")}


def close(what: str, got: np.ndarray, want: np.ndarray) -> None:
    assert got.shape == want.shape, f"{what}: shape {got.shape}, Caffe has {want.shape}"
    bad = ~(np.abs(got - want) <= 1e-5 + 1e-4 * np.abs(want)) & ~(np.isnan(got) & np.isnan(want))
    assert not bad.any(), f"{what}: {bad.sum()} of {bad.size} differ, largest {np.abs(got - want)[bad].max()}"


@pytest.mark.parametrize("case", RUN)
def test_layer(case: str) -> None:
    path = FOLDER / f"{case}.prototxt"
    with np.load(FOLDER / f"{case}.npz") as z:
        data = {k: z[k] for k in z.files}
    phase = caffe.TEST if re.search(r"phase:\s*TEST", path.read_text()) else caffe.TRAIN
    net = caffe.Net(str(path), phase)
    params = net.params.get("layer", [])
    for i, value in part(data, "param").items():
        params[int(i)].data[...] = value
    step = 0
    while fed := part(data, f"step{step}"):
        net.forward(**fed)
        step += 1
    net.forward(**part(data, "bottom"))
    for name, want in part(data, "top").items():
        close(f"top {name}", net.blobs[name].data, want)
    for i, want in part(data, "param_after").items():
        close(f"param_after {i}", params[int(i)].data, want)
    seeds = part(data, "top_diff")
    for name, value in seeds.items():
        net.blobs[name].diff[...] = value
    net.clear_param_diffs()
    net.backward()
    for name, want in part(data, "bottom_diff").items():
        close(f"bottom_diff {name}", net.blobs[name].diff, want)
    for i, want in part(data, "param_diff").items():
        close(f"param_diff {i}", params[int(i)].diff, want)


@pytest.mark.parametrize("case", [c for c in RUN if c in ("euclidean", "softmaxloss_full", "hinge_l2", "contrastive")])
def test_losses_are_seeded_with_their_weight(case: str) -> None:
    """Backward without touching the top's gradient, as a user does it."""
    with np.load(FOLDER / f"{case}.npz") as z:
        data = {k: z[k] for k in z.files}
    net = caffe.Net(str(FOLDER / f"{case}.prototxt"), caffe.TRAIN)
    for i, value in part(data, "param").items():
        net.params["layer"][int(i)].data[...] = value
    net.forward(**part(data, "bottom"))
    close("seed", net.blobs["y_out"].diff, data["top_diff/y_out"])
    net.backward()
    for name, want in part(data, "bottom_diff").items():
        close(f"bottom_diff {name}", net.blobs[name].diff, want)


def test_cases_that_cannot_run_yet() -> None:
    shared("golden/bvlc_layers")
    assert RUN, "no case can run"
    left = {p.stem: missing_types(p) for p in CASES if missing_types(p)}
    if left:
        pytest.skip(f"{len(RUN)} of {len(CASES)} cases run; not registered: {left}")
