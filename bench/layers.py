"""One layer at a time on a CPU: forward and backward of our modules against plain torch calls, in both layouts.

    python -m bench.layers [--threads 2]

Prints the least of several runs in milliseconds; the ratio is torch / ours, above 1 is a gain.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from google.protobuf import text_format

import caffejacinto_py.layers  # noqa: F401  (registers the families)
from caffejacinto_py.layers import registry
from caffejacinto_py.layers.base import Context
from caffejacinto_py.schema import pb

Run = Callable[[torch.Tensor], torch.Tensor]


def ours(text: str, shape: tuple[int, ...]) -> tuple[torch.nn.Module, list[torch.nn.Parameter]]:
    proto = text_format.Parse(f'name: "layer" bottom: "x" top: "y" {text}', pb.LayerParameter())
    layer = registry.make(proto, Context(), 1)
    layer.shapes([shape])
    declared = layer.blobs([shape])
    params = [torch.nn.Parameter(torch.rand(b.shape) + 0.5, b.lr_mult != 0) for b in declared]
    return layer.module([shape], params).train(), params


def milliseconds(run: Run, x: torch.Tensor, repeats: int) -> float:
    seed = torch.ones_like(run(x))
    best = float("inf")
    for _ in range(repeats):
        leaf = x.detach().requires_grad_()
        start = time.perf_counter()
        run(leaf).backward(seed)
        best = min(best, time.perf_counter() - start)
    return best * 1e3


def cases() -> list[tuple[str, tuple[int, ...], Callable[[list[torch.nn.Parameter]], Run]]]:
    """(prototxt of the layer, bottom shape, the same in plain torch from its blobs)."""
    conv = "convolution_param { num_output: 64 kernel_size: 3 pad: 1 }"
    lrn = "lrn_param { local_size: 5 alpha: 0.0001 beta: 0.75 }"
    return [
        (f'type: "Convolution" {conv}', (16, 64, 56, 56), lambda p: lambda x: F.conv2d(x, p[0], p[1], padding=1)),
        (f'type: "Convolution" {conv}', (1, 8, 4, 4), lambda p: lambda x: F.conv2d(x, p[0], p[1], padding=1)),
        (
            'type: "Pooling" pooling_param { kernel_size: 3 stride: 2 }',
            (32, 96, 55, 55),
            lambda p: lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True),
        ),
        (
            'type: "Pooling" pooling_param { pool: AVE kernel_size: 3 stride: 2 }',
            (32, 96, 55, 55),
            lambda p: lambda x: F.avg_pool2d(x, 3, 2, ceil_mode=True),
        ),
        (
            'type: "Pooling" pooling_param { pool: AVE global_pooling: true }',
            (16, 1024, 7, 7),
            lambda p: lambda x: x.mean((2, 3), keepdim=True),
        ),
        (f'type: "LRN" {lrn}', (32, 96, 55, 55), lambda p: lambda x: F.local_response_norm(x, 5, 1e-4)),
        (f'type: "LRN" {lrn}', (32, 256, 27, 27), lambda p: lambda x: F.local_response_norm(x, 5, 1e-4)),
        ('type: "BatchNorm"', (16, 64, 56, 56), lambda p: plain_batch_norm(64)),
        (
            'type: "Scale" scale_param { bias_term: true }',
            (16, 64, 56, 56),
            lambda p: lambda x: x * p[0].view(-1, 1, 1) + p[1].view(-1, 1, 1),
        ),
        ('type: "Dropout"', (64, 4096), lambda p: lambda x: F.dropout(x, 0.5)),
        (
            'type: "InnerProduct" inner_product_param { num_output: 1024 }',
            (64, 256, 6, 6),
            lambda p: lambda x: F.linear(x.flatten(1), p[0], p[1]),
        ),
    ]


def plain_batch_norm(channels: int) -> Run:
    mean, variance = torch.zeros(channels), torch.ones(channels)
    return lambda x: F.batch_norm(x, mean, variance, None, None, True, 0.1, 1e-5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(f"{'layer':75s} {'bottom':18s} {'layout':6s} {'torch':>9s} {'ours':>9s} {'ratio':>6s}")
    for text, shape, plain in cases():
        module, params = ours(text, shape)
        reference = plain(params)
        for layout in ("NCHW", "NHWC") if len(shape) == 4 else ("NC",):
            x = torch.randn(shape)
            x = x.contiguous(memory_format=torch.channels_last) if layout == "NHWC" else x
            theirs, mine = (milliseconds(run, x, args.repeats) for run in (reference, module))
            print(
                f"{text:75s} {'x'.join(map(str, shape)):18s} {layout:6s} {theirs:9.3f} {mine:9.3f} {theirs / mine:6.2f}"
            )


if __name__ == "__main__":
    main()
