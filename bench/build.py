"""How long nets take to check and to build: `check` of 1,000 layers, and ResNet-152 from text to a net that can run.

python bench/build.py
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

from caffejacinto_py import check
from caffejacinto_py.engine.net import Net
from caffejacinto_py.passes import prepare
from caffejacinto_py.schema.text import parse

INPUT = (
    'layer {{ name: "data" type: "Input" top: "{}" input_param {{ shape {{ dim: 1 dim: {} dim: {} dim: {} }} }} }}\n'
)
CONV = """layer {{
  name: "{0}"
  type: "Convolution"
  bottom: "{1}"
  top: "{0}"
  convolution_param {{ num_output: {2} kernel_size: {3} stride: {4} pad: {5} weight_filler {{ type: "msra" }} }}
}}
"""
RELU = 'layer {{ name: "relu_{1}" type: "ReLU" bottom: "{0}" top: "{0}" }}\n'


def thousand() -> str:
    """500 convolutions, each with a ReLU."""
    text, before = INPUT.format("data", 8, 16, 16), "data"
    for i in range(500):
        text += CONV.format(f"c{i}", before, 8, 3, 1, 1) + RELU.format(f"c{i}", i)
        before = f"c{i}"
    return text


class ResNet:
    """The text of a deep residual net with bottleneck blocks (He et al. 2016)."""

    def __init__(self, blocks: tuple[int, ...]) -> None:
        self.lines = [INPUT.format("data", 3, 224, 224)]
        self.normed("conv1", "data", 64, 7, 2, 3)
        self.relu("conv1")
        self.lines.append(
            'layer { name: "pool1" type: "Pooling" bottom: "conv1" top: "pool1" '
            "pooling_param { kernel_size: 3 stride: 2 } }\n"
        )
        before = "pool1"
        for stage, count in enumerate(blocks):
            for block in range(count):
                before = self.bottleneck(f"s{stage}b{block}", before, 64 << stage, 1 + (stage > 0 and block == 0))

    def normed(self, name: str, bottom: str, outputs: int, kernel: int, stride: int, pad: int) -> None:
        self.lines.append(CONV.format(name, bottom, outputs, kernel, stride, pad))
        self.lines.append(f'layer {{ name: "bn_{name}" type: "BatchNorm" bottom: "{name}" top: "{name}" }}\n')
        scale = f'layer {{ name: "scale_{name}" type: "Scale" bottom: "{name}" top: "{name}" '
        self.lines.append(scale + "scale_param { bias_term: true } }\n")

    def relu(self, name: str) -> None:
        self.lines.append(RELU.format(name, name))

    def bottleneck(self, name: str, bottom: str, width: int, stride: int) -> str:
        shortcut = bottom
        if name.endswith("b0"):
            shortcut = f"{name}_1"
            self.normed(shortcut, bottom, 4 * width, 1, stride, 0)
        for part, (source, outputs, kernel, step) in enumerate(
            [(bottom, width, 1, stride), (f"{name}_2a", width, 3, 1), (f"{name}_2b", 4 * width, 1, 1)]
        ):
            top = f"{name}_2{'abc'[part]}"
            self.normed(top, source, outputs, kernel, step, kernel // 2)
            if part < 2:
                self.relu(top)
        total = f'layer {{ name: "{name}" type: "Eltwise" bottom: "{shortcut}" bottom: "{name}_2c" top: "{name}" }}\n'
        self.lines.append(total)
        self.relu(name)
        return name


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "thousand.prototxt"
        file.write_text(thousand())
        times = []
        for _ in range(5):
            began = time.perf_counter()
            report = check(file)
            times.append(time.perf_counter() - began)
            assert report.status == "ok", report.errors
    print(f"check of 1,001 layers         {statistics.median(times):.2f} s (median of 5)")
    text = "".join(ResNet((3, 8, 36, 3)).lines)
    times = []
    for _ in range(3):
        began = time.perf_counter()
        net = Net(prepare(parse(text, "NetParameter"), phase="TRAIN"), seed=1)
        times.append(time.perf_counter() - began)
    numbers = sum(p.param.numel() for p in net.learnable)
    print(f"ResNet-152 from text to net   {statistics.median(times):.2f} s (median of 3), {numbers:,} numbers")


if __name__ == "__main__":
    main()
