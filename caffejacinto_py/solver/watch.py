"""Looking into a net while it trains: Caffe's debug_info lines, and where a NaN comes from."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from caffejacinto_py.engine.net import Net, Result

log = logging.getLogger(__name__)
NOTHING_BAD = "no blob is bad when the same batch runs again: a random layer or a gradient is the cause"


def first_bad(net: Net, batch: Mapping[str, Tensor]) -> str:
    """A sentence about the first blob, in order of execution, that is not finite when this batch runs through the net.

    Parameters count as blobs of their layer. Runs the net layer by layer, so BatchNorm statistics move: for a training
    that has failed.
    """
    blobs = {top: net.feed(top, batch) for source in net.sources for top in source.tops}
    for top, value in blobs.items():
        if not _finite(value):
            return f"the first bad blob is the input '{top}': {_count(value)}"
    net.hook = None  # the bad values are there without it
    with torch.no_grad():
        for node, outs in net.run(blobs):
            whose = f"of layer '{node.name}' ({node.type})"
            for k, p in enumerate(net.params.get(node.name, [])):
                if not _finite(p):
                    return f"the first bad blob is parameter {k} {whose}: {_count(p)}"
            for made, out in zip(node.outputs, outs):
                if not _finite(out):
                    return f"the first bad blob is '{made.name}', a top {whose}: {_count(out)}"
    return NOTHING_BAD


def _finite(value: Tensor) -> bool:
    return not value.is_floating_point() or bool(torch.isfinite(value).all())


def _count(value: Tensor) -> str:
    bad = int((~torch.isfinite(value)).sum())
    return f"{bad} of its {value.numel()} values are NaN or infinite"


def debug_pass(net: Net, batch: Mapping[str, Tensor]) -> Result:
    """A forward and backward pass that logs the mean absolute value of blobs and gradients, as Caffe's debug_info.

    Gradients are added to the parameters' `.grad`, as in an ordinary pass. A blob with several readers shows one
    gradient, their sum (Caffe shows the parts, at its split layers).
    """
    blobs = {top: net.feed(top, batch) for source in net.sources for top in source.tops}
    diffs: dict[tuple[str, int], float] = {}
    loss = torch.zeros((), dtype=net.dtype, device=net.device)
    lines: list[tuple[str, str, str]] = []
    for node, outs in net.run(blobs):
        weights = node.loss_weights or (0.0,) * len(outs)
        for value, top, weight in zip(node.outputs, outs, weights):
            log.info("    [Forward] Layer %s, top blob %s data: %g", node.name, value.name, _mean(top))
            if weight:
                loss = loss + weight * top.sum()
            if top.requires_grad:
                top.register_hook(_recorder(diffs, (value.name, value.version)))
        for k, p in enumerate(net.params.get(node.name, [])):
            log.info("    [Forward] Layer %s, param blob %d data: %g", node.name, k, _mean(p))
    if loss.requires_grad:
        loss.backward()
    for node in reversed(net.graph.nodes):
        if not node.backward:
            continue
        for value, need in zip(node.inputs, node.needs):
            if need and (value.name, value.version) in diffs:
                lines.append((node.name, f"bottom blob {value.name}", f"{diffs[value.name, value.version]:g}"))
        for k, p in enumerate(net.params.get(node.name, [])):
            if p.grad is not None:
                lines.append((node.name, f"param blob {k}", f"{_mean(p.grad):g}"))
    for name, blob, mean in lines:
        log.info("    [Backward] Layer %s, %s diff: %s", name, blob, mean)
    _totals(net)
    outputs = {v.name: blobs[v.name].detach() for v in net.graph.outputs}
    return Result(loss, outputs)


def _recorder(diffs: dict[tuple[str, int], float], key: tuple[str, int]):  # type: ignore[no-untyped-def]
    def record(grad: Tensor) -> None:
        diffs[key] = _mean(grad)

    return record


def _totals(net: Net) -> None:
    params = [b.param.detach() for b in net.learnable]
    grads = [b.param.grad for b in net.learnable if b.param.grad is not None]
    one = [float(sum(t.abs().sum() for t in ts)) for ts in (params, grads)]
    two = [float(sum(t.square().sum() for t in ts)) ** 0.5 for ts in (params, grads)]
    text = "    [Backward] All net params (data, diff): L1 norm = (%g, %g); L2 norm = (%g, %g)"
    log.info(text, one[0], one[1], two[0], two[1])


def debug_update(net: Net) -> None:
    """Caffe's `[Update]` lines: mean absolute weights and gradients before the update."""
    for blob in net.learnable:
        diff = _mean(blob.param.grad) if blob.param.grad is not None else 0.0
        text = "    [Update] Layer %s, param %s data: %g; diff: %g"
        log.info(text, blob.node, blob.name, _mean(blob.param), diff)


def _mean(value: Tensor) -> float:
    return float(value.detach().abs().mean()) if value.numel() else 0.0
