"""Single layers in which the caffe-jacinto binary differs from BVLC: Accuracy, ELU lambda, label_weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from google.protobuf import text_format

import caffejacinto_py.layers  # noqa: F401  (registers the families)
from caffejacinto_py.schema import pb
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
