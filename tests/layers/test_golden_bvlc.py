"""Every single-layer vector of the C++ binary whose layer is registered: forward, gradients, changed blobs.

The nets are chained by hand here: Input layers are fed, every other layer is built and called in order.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from google.protobuf import text_format

import caffejacinto_py.layers  # noqa: F401  (registers the families)
from caffejacinto_py.layers import registry
from caffejacinto_py.layers.base import Context
from caffejacinto_py.schema import pb
from tests.conftest import SHARED, shared

FOLDER = SHARED / "golden/bvlc_layers"

BY_DATA = ("Filter",)  # how many items a top has is known at run time only


def _types(path: Path) -> set[str]:
    return {str(p.type) for p in text_format.Parse(path.read_text(), pb.NetParameter()).layer}


def _cases() -> tuple[list[str], dict[str, set[str]]]:
    """Case names that can run, and those that cannot with the types they miss."""
    missing = {p.stem: {t for t in _types(p) if not registry.known(t)} for p in sorted(FOLDER.glob("*.prototxt"))}
    return [n for n, m in missing.items() if not m], {n: m for n, m in missing.items() if m}


RUN, SKIP = _cases()


@dataclass
class Step:
    proto: Any
    module: torch.nn.Module
    blobs: list[torch.nn.Parameter]


class Chain:
    """A net of one case: modules in order, blobs by name and version."""

    def __init__(self, net: Any, data: Any, device: str = "cpu") -> None:
        self.device = device
        self.phase = "TEST" if net.state.phase == pb.TEST and net.HasField("state") else "TRAIN"
        shapes: dict[str, tuple[int, ...]] = {}
        self.steps: list[Step] = []
        for proto in net.layer:
            layer = registry.make(proto, Context(phase=self.phase), len(proto.top))
            ins = [shapes[b] for b in proto.bottom]
            shapes.update(zip(proto.top, layer.shapes(ins), strict=True))
            if layer.source:
                continue
            blobs = layer.blobs(ins)
            given = [data.get(f"param/{i}") if proto.name == "layer" else np.ones(b.shape) for i, b in enumerate(blobs)]
            assert all(g is not None and g.shape == b.shape for g, b in zip(given, blobs)), "declared blobs differ"
            params = [
                torch.nn.Parameter(torch.tensor(g, dtype=torch.float32), b.lr_mult != 0) for g, b in zip(given, blobs)
            ]
            module = layer.module(ins, params)
            self.steps.append(Step(proto, module.train(self.phase == "TRAIN").to(device), params))
        self.shapes = shapes

    def forward(self, inputs: dict[str, np.ndarray]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """(first version of each blob, last version of each blob); inputs are leaves that want gradients."""
        leaf: Any = {"dtype": torch.float32, "device": self.device, "requires_grad": True}
        last = {k: torch.tensor(v, **leaf) for k, v in inputs.items()}
        first = dict(last)
        for step in self.steps:
            out = step.module(*[last[b] for b in step.proto.bottom])
            for name, value in zip(step.proto.top, out if isinstance(out, tuple) else (out,), strict=True):
                if value.requires_grad and not value.is_leaf:
                    value.retain_grad()
                first.setdefault(name, value)
                last[name] = value
        return first, last


def close(name: str, got: Any, want: np.ndarray) -> None:
    a = np.zeros_like(want) if got is None else got.detach().cpu().numpy()
    assert a.shape == want.shape, f"{name}: shape {a.shape}, Caffe has {want.shape}"
    bad = ~(np.abs(a - want) <= 1e-5 + 1e-4 * np.abs(want)) & ~(np.isnan(a) & np.isnan(want))
    assert not bad.any(), f"{name}: {bad.sum()} of {bad.size} differ, largest {np.abs(a - want)[bad].max()}"


@pytest.mark.parametrize("case", RUN)
def test_layer_agrees_with_caffe(case: str) -> None:
    agrees(case)


def agrees(case: str, device: str = "cpu") -> None:
    """One vector, on a device."""
    net = text_format.Parse((FOLDER / f"{case}.prototxt").read_text(), pb.NetParameter())
    with np.load(FOLDER / f"{case}.npz") as z:
        data = {k: z[k] for k in z.files}
    chain = Chain(net, data, device)
    under_test = next(s for s in chain.steps if s.proto.name == "layer")
    for k in range(100):
        fed = {n.split("/", 1)[1]: v for n, v in data.items() if n.startswith(f"step{k}/")}
        if not fed:
            break
        chain.forward(fed)
    first, last = chain.forward({n.split("/", 1)[1]: v for n, v in data.items() if n.startswith("bottom/")})
    tops = {n.split("/", 1)[1]: v for n, v in data.items() if n.startswith("top/")}
    seeds = {n.split("/", 1)[1]: v for n, v in data.items() if n.startswith("top_diff/")}
    for name, want in tops.items():
        close(f"top {name}", last[name], want)
        first_axis = int(under_test.proto.type in BY_DATA)
        assert want.shape[first_axis:] == chain.shapes[name][first_axis:], f"top {name}: inferred shape"
    # a net without a loss runs backward only when forced: the recorded gradients of the others are zeros
    ran = net.force_backward or registry.find(under_test.proto.type).loss_top
    live = [n for n in seeds if ran and last[n].requires_grad]
    if live:
        torch.autograd.backward([last[n] for n in live], [torch.tensor(seeds[n], device=device) for n in live])
    for key, want in data.items():
        kind, _, name = key.partition("/")
        if kind == "bottom_diff":
            close(key, first[name].grad, want)
        elif kind == "param_diff":
            close(key, under_test.blobs[int(name)].grad, want)
        elif kind == "param_after":
            close(key, under_test.blobs[int(name)], want)


def test_cases_that_cannot_run_yet() -> None:
    shared("golden/bvlc_layers")
    assert RUN, "no case can run"
    if SKIP:
        missing = "; ".join(f"{name} ({', '.join(sorted(types))})" for name, types in SKIP.items())
        pytest.skip(f"{len(RUN)} cases run, not registered: {missing}")
