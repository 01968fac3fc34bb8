"""Single layers of the caffe-jacinto binary whose numbers every fork shares: Axpy, L1Loss, Normalize, Permute, and
SmoothL1Loss of SSD."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from google.protobuf import text_format

from caffejacinto_py.schema import pb
from tests.conftest import SHARED
from tests.layers.test_golden_bvlc import Chain, close

GOLDEN = SHARED / "golden"
KINDS = ("axpy", "l1loss", "normalize", "permute")
CASES = sorted(p for kind in KINDS for p in GOLDEN.glob(f"jacinto/layers/{kind}_*.npz"))
CASES += sorted(GOLDEN.glob("jacinto/layers/l1loss.npz")) + sorted(GOLDEN.glob("ssd/smoothl1loss/*.npz"))


def _theirs(data: dict[str, np.ndarray], eps: float, axes: tuple[int, ...]) -> np.ndarray:
    """The bottom gradient of Normalize as the binary computes it: its second half lacks the scales."""
    x, dy, scale = data["bottom/x"], data["top_diff/y_out"], data["param/0"].reshape(-1, 1, 1)
    n = np.sqrt((x * x).sum(axes, keepdims=True) + eps)
    return scale * (dy - x * (x * dy).sum(axes, keepdims=True) / n**2) / n


@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
def test_layer_agrees_with_caffe_jacinto(path: Path) -> None:
    net = text_format.Parse(path.with_suffix(".prototxt").read_text(), pb.NetParameter())
    with np.load(path) as z:
        data = {k: z[k] for k in z.files}
    chain = Chain(net, data)
    first, last = chain.forward({k.split("/", 1)[1]: v for k, v in data.items() if k.startswith("bottom/")})
    (top,) = (k.split("/", 1)[1] for k in data if k.startswith("top/"))
    close(f"top {top}", last[top], data[f"top/{top}"])
    assert data[f"top/{top}"].shape == chain.shapes[top]
    last[top].backward(torch.tensor(data[f"top_diff/{top}"]))
    step = next(s for s in chain.steps if s.proto.name == "layer")
    for key, want in data.items():
        kind, _, name = key.partition("/")
        if kind == "param_diff":
            close(key, step.blobs[int(name)].grad, want)
        if kind != "bottom_diff":
            continue
        norm = step.proto.norm_param
        if step.proto.HasField("norm_param") and not norm.channel_shared and np.ptp(data["param/0"]):
            axes = (1, 2, 3) if norm.across_spatial else (1,)
            close("what the binary computes", torch.tensor(_theirs(data, norm.eps, axes)), want)
            continue  # ours is the derivative (checked by finite differences), theirs is not
        if step.proto.HasField("norm_param"):  # cancels within a pixel: float32 noise is relative to its largest value
            noise = 1e-6 * np.abs(want).max(1, keepdims=True)
            got = first[name].grad.numpy()
            assert (np.abs(got - want) <= 1e-5 + 1e-4 * np.abs(want) + noise).all(), key
            continue
        close(key, first[name].grad, want)


def test_there_are_cases() -> None:
    assert len(CASES) == 17 or not GOLDEN.exists()
