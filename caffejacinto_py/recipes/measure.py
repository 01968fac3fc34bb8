"""What the table says of a stage: scores on the test data, sparsity of the weights, bits."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from caffejacinto_py.compress import quantize, sparsity
from caffejacinto_py.engine.evaluate import evaluate
from caffejacinto_py.engine.net import Net
from caffejacinto_py.layers import registry
from caffejacinto_py.layers.base import Context, Layer
from caffejacinto_py.passes import heads
from caffejacinto_py.recipes.resolve import Job
from caffejacinto_py.solver import build
from caffejacinto_py.solver.feed import Feed
from caffejacinto_py.solver.logs import output_lines
from caffejacinto_py.solver.signals import Signals

log = logging.getLogger(__name__)
FLOAT_BITS = 32


@dataclass(frozen=True)
class Scores:
    """iterations: test batches; images: in them. loss, top1, top5: None where the net has no such output. outputs: the
    mean of every single-valued output. zeros, count: convolution weights by Caffe's rule. bits: 32 for floats."""

    iterations: int = 0
    images: int = 0
    loss: float | None = None
    top1: float | None = None
    top5: float | None = None
    outputs: dict[str, float] = field(default_factory=dict)
    zeros: int = 0
    count: int = 0
    weight_bits: int = FLOAT_BITS
    activation_bits: int = FLOAT_BITS

    @property
    def sparsity(self) -> float | None:
        return self.zeros / self.count if self.count else None

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "sparsity": self.sparsity}


def score(
    job: Job, weights: Sequence[str], *, device: str | None = None, workers: int = 1, python_layers: bool = False
) -> Scores | None:
    """Test the job's first test net with these weights, from the first record on; None when Ctrl-C stopped it.

    Raises CaffeError of data, weights and layers.
    """
    source = job.nets["test"]
    options: dict[str, Any] = {"dialect": job.dialect, "device": device_of(job, device)}
    net = build.build_net(source, "TEST", seed=0, python_layers=python_layers, **options)
    graph, tops = heads.score(net.graph)
    if graph is not net.graph:
        net = Net(graph, device=net.device, dtype=net.dtype, share=net)
        quantize.attach(net)
    tolerant = job.solver is not None and job.solver.ignore_shape_mismatch
    build.load_weights([net], list(weights), tolerant=tolerant or job.dialect.ignore_shape_mismatch)
    feed = Feed(net, seed=0, workers=workers)
    log.info("Testing %s with %s for %d iterations.", source.label, ", ".join(weights), job.iterations)
    signals = Signals()
    try:
        with signals:
            found = evaluate(net, feed, job.iterations, proceed=lambda: signals.poll() != "stop")
    finally:
        feed.close()
    if signals.stopped:
        log.info("Test interrupted.")
        return None
    for line in output_lines("Test", found.outputs):
        log.info("%s", line)
    rows = sparsity.measure(net)
    for line in ["Sparsity of the test net:", *sparsity.lines(rows)] if rows else []:
        log.info("%s", line)
    names = [o.name for o in found.outputs]
    outputs = {o.name: o.value for o in found.outputs if names.count(o.name) == 1}
    whole = sparsity.total(rows)
    weight_bits, activation_bits = bits(source.doc.message)
    return Scores(
        iterations=found.iterations,
        images=found.iterations * feed.batch,
        loss=found.loss if any(o.loss_weight for o in found.outputs) else None,
        top1=_top(tops, outputs, 1),
        top5=_top(tops, outputs, 5),
        outputs=outputs,
        zeros=whole.zeros,
        count=whole.count,
        weight_bits=weight_bits,
        activation_bits=activation_bits,
    )


def device_of(job: Job, device: str | None) -> torch.device:
    """The device asked for, else what the stage's solver says, else the CPU."""
    if device is None and job.solver is None:
        return torch.device("cpu")
    return build.choose_device(job.solver, device)


def _top(tops: Sequence[heads.TopK], outputs: dict[str, float], k: int) -> float | None:
    """The accuracy of this k; of the last classifier, which is the main one where there are several."""
    return next((outputs[t.output] for t in reversed(tops) if t.k == k and t.output in outputs), None)


def bits(net: Any) -> tuple[int, int]:
    """Bits of weights and of activations in a NetParameter, by its own fields; the widest where layers differ.

    Layers of ADaPTION and Ristretto have theirs: activations are then those that such a layer rounds.
    """
    param = net.net_quantization_param
    if net.quantize and param.quantization_start and param.precision:
        weights = param.bitwidth_weights if param.quantize_weights else FLOAT_BITS
        return weights, param.bitwidth_activations if param.quantize_activations else FLOAT_BITS
    weights_, tops = list(_stored(net, "qparam_w")), list(_stored(net, "qparam_out"))
    for words in _words(net):
        weights_ += [words[0]] if words[0] else []
        tops += [words[1]] if words[1] else []
    return max(weights_, default=FLOAT_BITS), max(tops, default=FLOAT_BITS)


def _words(net: Any) -> Iterator[tuple[int | None, int | None]]:
    """Of layers that compute with short words by themselves."""
    for layer in net.layer:
        if registry.known(layer.type) and registry.find(layer.type).word_bits is not Layer.word_bits:
            words = registry.make(layer, Context(), len(layer.top)).word_bits()
            if words is not None:
                yield words


def _stored(net: Any, name: str) -> Iterator[int]:
    """Widths in the quantization_param of layers."""
    for layer in net.layer:
        if layer.HasField("quantization_param") and layer.quantization_param.precision:
            for one in list(getattr(layer.quantization_param, name))[:1]:
                if one.quantize:
                    yield one.bitwidth
