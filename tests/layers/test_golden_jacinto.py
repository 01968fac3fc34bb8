"""Single layers in which the caffe-jacinto binary differs from BVLC: Accuracy, ELU lambda, label_weights."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from google.protobuf import text_format

import caffejacinto_py.layers  # noqa: F401  (registers the families)
from caffejacinto_py.layers import registry
from caffejacinto_py.layers.base import Context
from caffejacinto_py.schema import pb
from caffejacinto_py.schema.compat import Compat
from caffejacinto_py.schema.dialect import DIALECTS
from tests.conftest import SHARED
from tests.layers.harness import build
from tests.layers.test_golden_bvlc import close

FOLDER = SHARED / "golden/jacinto/layers"
CASES = sorted(p.stem for kind in ("accuracy", "elu", "softmaxloss") for p in FOLDER.glob(f"{kind}_*.npz"))


def _case(name: str) -> tuple[str, dict[str, np.ndarray]]:
    net = text_format.Parse((FOLDER / f"{name}.prototxt").read_text(), pb.NetParameter())
    proto = next(p for p in net.layer if p.name == "layer")
    with np.load(FOLDER / f"{name}.npz") as z:
        return text_format.MessageToString(proto), {k: z[k] for k in z.files}


@pytest.mark.parametrize("name", CASES)
def test_layer_agrees_with_caffe_jacinto(name: str) -> None:
    text, data = _case(name)
    bottoms = {k.split("/")[1]: v for k, v in data.items() if k.startswith("bottom/")}
    built = build(text, [b.shape for b in bottoms.values()], dialect="jacinto", dtype=torch.float32)
    first, *rest = (torch.from_numpy(v) for v in bottoms.values())
    out = built(first.requires_grad_(True), *rest)
    names = [k for k in data if k.startswith("top/")]
    for got, key in zip(out, sorted(names, key=lambda k: text.index(f'top: "{k[4:]}"')), strict=True):
        close(key, got, data[key])
    wanted = [v for k, v in data.items() if k.startswith("bottom_diff/x")]
    if not wanted:
        return
    seed = next(v for k, v in data.items() if k.startswith("top_diff/"))
    out[0].backward(torch.from_numpy(seed))
    if "label_weights" in text:  # the binary leaves the weights out of the gradient; ours has them
        weights = np.array(list(built.layer.param.label_weights), np.float32)
        label = bottoms["label"].astype(int)
        close("gradient", first.grad, wanted[0] * np.where(label < 5, weights[label.clip(0, 4)], 0))
    elif name.startswith("elu") and built.layer.param.HasField("lambda") and getattr(built.layer.param, "lambda") != 1:
        positive = bottoms["x"] > 0  # the binary multiplies the negative branch's gradient by lambda; y it does not
        scale = np.where(positive, 1, getattr(built.layer.param, "lambda"))
        close("gradient", first.grad, wanted[0] / scale.astype(np.float32))
    else:
        close("gradient", first.grad, wanted[0])


@pytest.mark.parametrize("name", [c for c in CASES if c.startswith("elu")] + sorted(
    p.stem for p in FOLDER.glob("normalize_*.npz")))  # fmt: skip
def test_with_the_compat_switches_the_gradients_are_the_binarys(name: str) -> None:
    text, data = _case(name)
    proto = text_format.Parse(text, pb.LayerParameter())
    dialect = replace(DIALECTS["jacinto"], compat=Compat(elu="binary", normalize="binary"))
    layer = registry.make(proto, Context(dialect=dialect), 1)
    source = next(k for k in data if k.startswith("bottom/"))
    x = torch.from_numpy(data[source]).requires_grad_(True)
    blobs = [torch.nn.Parameter(torch.from_numpy(v)) for k, v in sorted(data.items()) if k.startswith("param/")]
    module = layer.module([tuple(x.shape)], blobs)
    (top,) = (k[4:] for k in data if k.startswith("top/"))
    y = module(x)
    close("top", y, data[f"top/{top}"])
    y.backward(torch.from_numpy(data[f"top_diff/{top}"]))
    (wanted,) = (v for k, v in data.items() if k.startswith("bottom_diff/"))
    assert x.grad is not None
    # in Normalize terms cancel within a pixel: float32 noise is relative to its largest value
    noise = 1e-6 * np.abs(wanted).max(1, keepdims=True)
    assert (np.abs(x.grad.numpy() - wanted) <= 1e-5 + 1e-4 * np.abs(wanted) + noise).all()
    for i, p in enumerate(blobs):
        close(f"param {i}", p.grad, data[f"param_diff/{i}"])
