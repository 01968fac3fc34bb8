"""Speed of the LSTM and RNN layers against torch.nn.LSTM and torch.nn.RNN (`python bench/recurrent.py`).

Forward and backward of T steps of N sequences with H inputs and H units, from the same kind of random numbers. The two
take turns; shown are the medians and the median ratio, smaller is better (goal: 1.2). Processor time counts, so that
other programs on the machine disturb little; on a GPU it is wall time. Caffe's RNN has an output layer, torch's has
not: the rival gets a Linear and a tanh. `starts`: a new sequence begins at every step of one of the sequences, the case
that torch.nn cannot do at all (its rival runs without).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from google.protobuf import text_format

import caffejacinto_py.layers  # noqa: F401  (registers the families)
from caffejacinto_py.layers import registry
from caffejacinto_py.layers.base import Context
from caffejacinto_py.schema import pb

Step = Callable[[], None]


def ours(kind: str, cont: torch.Tensor, x: torch.Tensor, hidden: int) -> Step:
    """One training step of our layer."""
    text = f'name: "l" type: "{kind}" bottom: "x" bottom: "c" top: "h" recurrent_param {{ num_output: {hidden} }}'
    layer = registry.make(text_format.Parse(text, pb.LayerParameter()), Context(), 1)
    ins = [tuple(x.shape), tuple(cont.shape)]
    blobs = [torch.nn.Parameter(torch.randn(b.shape) * 0.05) for b in layer.blobs(ins)]
    module = layer.module(ins, blobs).to(x.device)

    def step() -> None:
        module(x, cont).sum().backward()
        for p in module.parameters():
            p.grad = None

    return step


class Rival(torch.nn.Module):
    """torch's layer; behind an RNN the output layer that Caffe's has."""

    def __init__(self, kind: str, inputs: int, hidden: int) -> None:
        super().__init__()
        self.rnn = getattr(torch.nn, kind)(inputs, hidden)
        self.out = torch.nn.Linear(hidden, hidden) if kind == "RNN" else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.rnn(x)[0]
        return torch.tanh(self.out(y)) if self.out else y


def theirs(kind: str, x: torch.Tensor, hidden: int) -> Step:
    """One training step of torch's layer."""
    module = Rival(kind, x.shape[2], hidden).to(x.device)

    def step() -> None:
        module(x).sum().backward()
        for p in module.parameters():
            p.grad = None

    return step


def clock(step: Step, count: int, device: str) -> float:
    """Milliseconds a step."""
    now = time.process_time if device == "cpu" else time.perf_counter
    if device != "cpu":
        torch.cuda.synchronize()
    start = now()
    for _ in range(count):
        step()
    if device != "cpu":
        torch.cuda.synchronize()
    return (now() - start) / count * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("steps", 32), ("batch", 16), ("hidden", 256), ("rounds", 21), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    t, n, h, device = options.steps, options.batch, options.hidden, options.device
    print(f"T={t} N={n} H={h}, {device}, {options.threads} threads")
    print(f"{'layer':<14}{'ours ms':>9}{'torch ms':>10}{'ratio':>7}")
    x = torch.randn(t, n, h, device=device, requires_grad=True)
    once = torch.ones(t, n, device=device)
    once[0] = 0
    often = once.clone()
    often[torch.arange(t), torch.arange(t) % n] = 0
    for kind in ("LSTM", "RNN"):
        for label, cont in ((kind, once), (f"{kind} starts", often)):
            pair = ours(kind, cont, x, h), theirs(kind, x, h)
            rounds = [[clock(step, 3, device) for step in pair] for _ in range(options.rounds + 2)][2:]
            a, b = (statistics.median(column) for column in zip(*rounds))
            ratio = statistics.median(p / q for p, q in rounds)
            print(f"{label:<14}{a:>9.2f}{b:>10.2f}{ratio:>7.2f}", flush=True)


if __name__ == "__main__":
    main()
