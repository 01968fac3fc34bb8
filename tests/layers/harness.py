"""One way to test every layer: `check_layer(Case(...))` builds it from prototxt text and checks its whole contract.

Checked: inferred = real shapes; declared = real blobs; forward against a float64 numpy oracle; float32 keeps its type;
gradients against finite differences; another batch size with the same module; TRAIN and TEST; in-place = out-of-place;
channels_last = contiguous; torch.compile where asked; on a GPU that is not there (tests/gpu/fake.py), where no
layer may mix devices or make the host wait.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from google.protobuf import text_format

from caffejacinto_py.layers import registry
from caffejacinto_py.layers.base import Blob, Context, Layer, Shape
from caffejacinto_py.schema import pb
from caffejacinto_py.schema.dialect import DIALECTS
from tests.gpu.fake import CUDA, fake_cuda

torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other
Arrays = list[np.ndarray]


@dataclass(frozen=True)
class Case:
    """A layer in prototxt text and what to feed it.

    ins: bottom shapes. oracle: (bottoms, blobs) in float64 -> tops. kinks: inputs and blobs stay `band` away from these
    values. labels: bottom index -> number of classes (random integers). low, high: range of the other bottoms.
    waits: on a GPU the host must look at the data.
    blobs: values of the learnable blobs, default random in [0.5, 1.5]. bottoms: exact values instead of random ones.
    """

    text: str
    ins: Sequence[Shape]
    oracle: Callable[[Arrays, Arrays], Sequence[np.ndarray]] | None = None
    tops: int = 1
    phase: str = "TRAIN"
    dialect: str = "bvlc"
    kinks: Sequence[float] = ()
    band: float = 0.01
    low: float = -1.5
    high: float = 1.5
    labels: dict[int, int] = field(default_factory=dict)
    blobs: Arrays | None = None
    bottoms: Arrays | None = None
    gradient: bool = True
    rebatch: bool = True
    phases_agree: bool = True
    compiled: bool = False
    waits: bool = False


@dataclass
class Built:
    """A layer object with its module and parameters; call it with tensors, get a tuple of tensors."""

    layer: Layer
    module: torch.nn.Module
    blobs: list[torch.nn.Parameter]
    declared: list[Blob]
    shapes: list[Shape]

    def __call__(self, *bottoms: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = self.module(*bottoms)
        return out if isinstance(out, tuple) else (out,)


def layer_of(
    text: str, *, bottoms: int = 1, tops: int = 1, phase: str = "TRAIN", dialect: str = "bvlc", probe=None, **context
) -> Layer:
    """A Layer object from the text of a LayerParameter; bottom and top names are made up where the text has none."""
    proto = text_format.Parse(text, pb.LayerParameter())
    if not proto.name:
        proto.name = "layer"
    if not proto.bottom:
        proto.bottom.extend(f"b{i}" for i in range(bottoms))
    if not proto.top:
        proto.top.extend(f"t{i}" for i in range(tops))
    return registry.make(proto, Context(phase=phase, dialect=DIALECTS[dialect], probe=probe, **context), len(proto.top))


def build(
    text: str,
    ins: Sequence[Shape],
    *,
    tops: int = 1,
    phase: str = "TRAIN",
    dialect: str = "bvlc",
    blobs: Arrays | None = None,
    dtype: torch.dtype = torch.float64,
) -> Built:
    """Layer, parameters and module from text, as the engine does it (but blobs random where not given)."""
    layer = layer_of(text, bottoms=len(ins), tops=tops, phase=phase, dialect=dialect)
    shapes = layer.shapes(ins)
    declared = layer.blobs(ins)
    if blobs is None:
        rng = np.random.default_rng(1)
        blobs = [rng.uniform(0.5, 1.5, b.shape) for b in declared]
    assert [tuple(b.shape) for b in blobs] == [tuple(b.shape) for b in declared]
    params = [
        torch.nn.Parameter(torch.as_tensor(np.array(v)).to(dtype), requires_grad=b.lr_mult != 0)
        for v, b in zip(blobs, declared)
    ]
    module = layer.module(ins, params)
    module.train(phase == "TRAIN")
    return Built(layer, module, params, declared, shapes)


def check_layer(case: Case) -> None:
    """Run every check that applies to the case; AssertionError names the one that failed."""
    built = _build(case, case.ins)
    bottoms = _bottoms(case, case.ins)
    _declared(built)
    tops = built(*_tensors(bottoms))
    _shapes(built, tops, case.ins)
    if case.oracle:
        _oracle(case, built, bottoms)
    _float32(case, bottoms)
    if case.gradient:
        _gradient(case, bottoms)
    if case.rebatch:
        _rebatch(case)
    if case.phases_agree:
        _phases(case, bottoms)
    _memory(case, bottoms)
    for i in built.layer.inplace_inputs():
        _inplace(case, bottoms, i)
    if any(len(s) == 4 for s in case.ins):
        _channels_last(case, bottoms)
    if case.compiled:
        _compiled(case, bottoms)
    _on_a_gpu(case, bottoms)


def _build(case: Case, ins: Sequence[Shape], *, dtype: torch.dtype = torch.float64, phase: str | None = None) -> Built:
    return build(
        case.text, ins, tops=case.tops, phase=phase or case.phase, dialect=case.dialect, blobs=case.blobs, dtype=dtype
    )


def _bottoms(case: Case, ins: Sequence[Shape]) -> Arrays:
    """Random bottoms, the same for the same case; kept out of the band around each kink."""
    if case.bottoms is not None and tuple(ins) == tuple(case.ins):
        return [np.asarray(b, np.float64) for b in case.bottoms]
    rng = np.random.default_rng(zlib.crc32(case.text.encode()))
    out = []
    for i, shape in enumerate(ins):
        if i in case.labels:
            out.append(rng.integers(0, case.labels[i], shape).astype(np.float64))
            continue
        x = rng.uniform(case.low, case.high, shape)
        for k in case.kinks:
            near = np.abs(x - k) < case.band
            x = np.where(near, k + np.where(x < k, -2, 2) * case.band, x)
        out.append(x)
    return out


def _tensors(arrays: Arrays, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    return [torch.from_numpy(np.array(a)).to(dtype) for a in arrays]


def _declared(built: Built) -> None:
    owned = list(built.module.parameters())
    assert len(owned) == len(built.blobs), "the module registers other parameters than the declared blobs"
    assert all(any(p is q for q in owned) for p in built.blobs), "the module does not hold the parameters it was given"


def _shapes(built: Built, tops: Sequence[torch.Tensor], ins: Sequence[Shape]) -> None:
    assert [tuple(t.shape) for t in tops] == [tuple(s) for s in built.shapes], "inferred shapes are not the real ones"
    assert built.layer.shapes(ins) == built.shapes, "shapes() is not pure"
    assert isinstance(built.layer.macs(ins, built.shapes), int)


def _oracle(case: Case, built: Built, bottoms: Arrays) -> None:
    assert case.oracle
    fresh = _build(case, case.ins)
    expected = case.oracle([b.copy() for b in bottoms], [p.detach().numpy().copy() for p in fresh.blobs])
    for got, want in zip(fresh(*_tensors(bottoms)), expected, strict=True):
        np.testing.assert_allclose(got.detach().numpy(), want, rtol=1e-9, atol=1e-11)


def _float32(case: Case, bottoms: Arrays) -> None:
    wide = _build(case, case.ins)(*_tensors(bottoms))
    for a, b in zip(_build(case, case.ins, dtype=torch.float32)(*_tensors(bottoms, torch.float32)), wide):
        assert a.dtype == torch.float32, "float32 in, something else out"
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-5)


def _gradient(case: Case, bottoms: Arrays) -> None:
    built = _build(case, case.ins)
    inputs = _tensors(bottoms)
    for i, x in enumerate(inputs):
        x.requires_grad_(built.layer.differentiable(i))
    wanted = [*inputs, *(p for p in built.blobs if p.requires_grad)]
    assert any(x.requires_grad for x in wanted), "nothing to differentiate: set gradient=False"

    def forward(*args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(t for t in built(*args[: len(inputs)]) if t.requires_grad)

    assert torch.autograd.gradcheck(forward, tuple(wanted), eps=1e-6, atol=1e-6, rtol=1e-5)


def _rebatch(case: Case) -> None:
    ins = [(s[0] + 2, *s[1:]) for s in case.ins]
    built = _build(case, case.ins)
    built(*_tensors(_bottoms(case, case.ins)))
    tops = built(*_tensors(_bottoms(case, ins)))
    assert [tuple(t.shape) for t in tops] == [tuple(s) for s in built.layer.shapes(ins)], "another batch size"


def _phases(case: Case, bottoms: Arrays) -> None:
    train, test = (_build(case, case.ins, phase=p)(*_tensors(bottoms)) for p in ("TRAIN", "TEST"))
    for a, b in zip(train, test):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def _memory(case: Case, bottoms: Arrays) -> None:
    """What passes/inplace.py relies on: tops with memory of their own, which backward does not need to be intact."""
    for phase in ("TRAIN", "TEST"):
        built = _build(case, case.ins, phase=phase)
        inputs = [x * 1.0 for x in _tensors(bottoms)]
        for i, x in enumerate(inputs):
            x.requires_grad_(built.layer.differentiable(i))
        tops = built(*[x * 1.0 for x in inputs] if phase == "TRAIN" else inputs)
        if built.layer.is_view:
            continue
        other = {t.untyped_storage().data_ptr() for t in (*inputs, *built.module.parameters(), *built.module.buffers())}
        for top in tops:
            assert top.untyped_storage().data_ptr() not in other, "a top shares memory, but is_view is False"
            other.add(top.untyped_storage().data_ptr())
        live = [t for t in tops if t.requires_grad and t.numel()]
        if live and not built.layer.saves_output:
            seeds = [torch.ones_like(t) for t in live]
            for t in live:
                t.mul_(1.0)  # counts as overwriting
            torch.autograd.backward(live, seeds)


def _run(
    case: Case, inputs: list[torch.Tensor], *, into: int | None = None, compiled: bool = False
) -> list[torch.Tensor]:
    """Tops, bottom gradients and blob gradients; the inputs go through a multiplication, so that they are no leaves."""
    built = _build(case, case.ins)
    if into is not None:
        built.module.inplace, built.module.into = True, into  # type: ignore[assignment]
    if compiled:
        built.module = torch.compile(built.module, backend="aot_eager", fullgraph=True)  # type: ignore[assignment]
    diff = [i for i in range(len(inputs)) if built.layer.differentiable(i)]
    for i in diff:
        inputs[i].requires_grad_(True)
    tops = built(*[x * 1.0 for x in inputs])
    seeds = [torch.linspace(0.5, 1.5, t.numel(), dtype=t.dtype).reshape(t.shape) for t in tops]
    live = [(t, s) for t, s in zip(tops, seeds) if t.requires_grad]
    if live:
        torch.autograd.backward([t for t, _ in live], [s for _, s in live])
    grads = [inputs[i].grad for i in diff] + [p.grad for p in built.blobs]
    return [*(t.detach() for t in tops), *(g for g in grads if g is not None)]


def _inplace(case: Case, bottoms: Arrays, into: int) -> None:
    for a, b in zip(_run(case, _tensors(bottoms)), _run(case, _tensors(bottoms), into=into), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def _channels_last(case: Case, bottoms: Arrays) -> None:
    last = [t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in _tensors(bottoms)]
    for a, b in zip(_run(case, _tensors(bottoms)), _run(case, last), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def _compiled(case: Case, bottoms: Arrays) -> None:
    for a, b in zip(_run(case, _tensors(bottoms)), _run(case, _tensors(bottoms), compiled=True), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def _on_a_gpu(case: Case, bottoms: Arrays) -> None:
    kept = torch.get_rng_state()
    want = _passes(case, _tensors(bottoms, torch.float32), "cpu")
    torch.set_rng_state(kept)
    with fake_cuda() as seen:
        inputs = [t.to(CUDA) for t in map(torch.from_numpy, (np.array(b, np.float32) for b in bottoms))]
        seen.forget()
        found = _passes(case, inputs, CUDA)
        waits = [w for w in seen.waits if w[1]]
        for got in found:
            assert got.device == CUDA
    assert case.waits or not waits, "the host waits for the device"
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5, equal_nan=True)


def _passes(
    case: Case, inputs: list[torch.Tensor], device: torch.device | str, *, dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    """Tops and gradients on a device."""
    built = _build(case, case.ins, dtype=dtype)
    built.module.to(device)
    diff = [x.requires_grad_(True) for i, x in enumerate(inputs) if built.layer.differentiable(i)]
    tops = built(*[x * 1.0 for x in inputs])
    live = [t for t in tops if t.requires_grad]
    if live:
        torch.autograd.backward(live, [torch.ones_like(t) for t in live])
    grads = [x.grad for x in (*diff, *built.blobs)]
    return [*(t.detach() for t in tops), *(g for g in grads if g is not None)]
