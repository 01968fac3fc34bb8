"""The bench's nets as a PyTorch user writes them by hand: plain eager modules, nothing of this project.

Each takes (data, label) and returns the loss. `blobs()` says which parameter is which blob of the prototxt,
(layer name, blob index), so that both sides start from the same weights.
"""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

Blobs = dict[tuple[str, int], nn.Parameter]


def pair(name: str, module: nn.Module, first: int = 0) -> Blobs:
    """The weight and bias of a module as the blobs `first`, `first + 1` of a layer."""
    return {(name, first + i): p for i, p in enumerate((module.weight, module.bias)) if p is not None}


class Plain(nn.Module):
    """A net whose modules have the names of the layers."""

    def blobs(self) -> Blobs:
        owners = [(n, m) for n, m in self.named_children() if hasattr(m, "weight")]
        return {k: v for name, module in owners for k, v in pair(name, module).items()}


class LeNet(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.ip1 = nn.Linear(800, 500)
        self.ip2 = nn.Linear(500, 10)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv1(x), 2, 2)
        x = F.max_pool2d(self.conv2(x), 2, 2)
        x = F.relu(self.ip1(x.flatten(1)), inplace=True)
        return F.cross_entropy(self.ip2(x), label)


class Cifar10Quick(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 5, padding=2)
        self.conv2 = nn.Conv2d(32, 32, 5, padding=2)
        self.conv3 = nn.Conv2d(32, 64, 5, padding=2)
        self.ip1 = nn.Linear(1024, 64)
        self.ip2 = nn.Linear(64, 10)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        x = F.relu(F.max_pool2d(self.conv1(x), 3, 2, ceil_mode=True), inplace=True)
        x = F.avg_pool2d(F.relu(self.conv2(x), inplace=True), 3, 2, ceil_mode=True)
        x = F.avg_pool2d(F.relu(self.conv3(x), inplace=True), 3, 2, ceil_mode=True)
        return F.cross_entropy(self.ip2(self.ip1(x.flatten(1))), label)


class AlexNet(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 96, 11, stride=4)
        self.norm1 = nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75)
        self.conv2 = nn.Conv2d(96, 256, 5, padding=2, groups=2)
        self.norm2 = nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75)
        self.conv3 = nn.Conv2d(256, 384, 3, padding=1)
        self.conv4 = nn.Conv2d(384, 384, 3, padding=1, groups=2)
        self.conv5 = nn.Conv2d(384, 256, 3, padding=1, groups=2)
        self.fc6 = nn.Linear(9216, 4096)
        self.drop6 = nn.Dropout(0.5)
        self.fc7 = nn.Linear(4096, 4096)
        self.drop7 = nn.Dropout(0.5)
        self.fc8 = nn.Linear(4096, 1000)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        x = F.max_pool2d(self.norm1(F.relu(self.conv1(x), inplace=True)), 3, 2, ceil_mode=True)
        x = F.max_pool2d(self.norm2(F.relu(self.conv2(x), inplace=True)), 3, 2, ceil_mode=True)
        x = F.relu(self.conv3(x), inplace=True)
        x = F.relu(self.conv4(x), inplace=True)
        x = F.max_pool2d(F.relu(self.conv5(x), inplace=True), 3, 2, ceil_mode=True)
        x = self.drop6(F.relu(self.fc6(x.flatten(1)), inplace=True))
        x = self.drop7(F.relu(self.fc7(x), inplace=True))
        return F.cross_entropy(self.fc8(x), label)


class ConvNorm(nn.Module):
    """Convolution, BatchNorm, ReLU in place."""

    def __init__(
        self,
        ins: int,
        outs: int,
        kernel: int,
        *,
        stride: int = 1,
        groups: int = 1,
        bias: bool = False,
        relu: bool = True,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(ins, outs, kernel, stride, kernel // 2, groups=groups, bias=bias)
        self.bn = nn.BatchNorm2d(outs, eps=1e-5)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        return F.relu(x, inplace=True) if self.relu else x

    def blobs(self, conv: str, norm: str, first: int) -> Blobs:
        return {**pair(conv, self.conv), **pair(norm, self.bn, first)}


class JacintoNet11(nn.Module):
    """The CIFAR-10 variant: strides 1, 1, 2, 1, 2."""

    def __init__(self) -> None:
        super().__init__()
        self.strides = (1, 1, 2, 1, 2)
        width, blocks = 3, []
        for i in range(5):
            out = 32 << i
            blocks.append(ConvNorm(width, out, 3 if i else 5, bias=True))
            blocks.append(ConvNorm(out, out, 3, groups=4, bias=True))
            width = out
        self.blocks = nn.ModuleList(blocks)
        for block in blocks:
            block.bn.eps, block.bn.momentum = 1e-4, 0.01
        self.fc10 = nn.Linear(512, 10)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        x = x - 128
        for i, stride in enumerate(self.strides):
            if stride > 1:
                x = F.max_pool2d(x, stride, stride)
            x = self.blocks[2 * i + 1](self.blocks[2 * i](x))
        x = F.adaptive_avg_pool2d(x, 1)
        return F.cross_entropy(self.fc10(x.flatten(1)), label)

    def blobs(self) -> Blobs:
        names = ["conv1a", "conv1b"] + [f"res{i}a_branch2{x}" for i in range(2, 6) for x in "ab"]
        found = pair("fc10", self.fc10)
        for name, block in zip(names, self.blocks, strict=True):
            found |= block.blobs(name, f"{name}/bn", 3)  # NVCaffe's BatchNorm: mean, variance, factor, scale, bias
        return found


class Bottleneck(nn.Module):
    def __init__(self, ins: int, width: int, stride: int, project: bool) -> None:
        super().__init__()
        self.a = ConvNorm(ins, width, 1, stride=stride)
        self.b = ConvNorm(width, width, 3)
        self.c = ConvNorm(width, 4 * width, 1, relu=False)
        self.shortcut = ConvNorm(ins, 4 * width, 1, stride=stride, relu=False) if project else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.c(self.b(self.a(x)))
        y += x if self.shortcut is None else self.shortcut(x)
        return F.relu(y, inplace=True)


class ResNet50(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = ConvNorm(3, 64, 7, stride=2, bias=True)
        blocks: OrderedDict[str, nn.Module] = OrderedDict()
        ins = 64
        for stage, count in enumerate((3, 4, 6, 3), 2):
            width = 32 << (stage - 1)
            for i in range(count):
                stride = 2 if i == 0 and stage > 2 else 1
                blocks[f"{stage}{'abcdef'[i]}"] = Bottleneck(ins, width, stride, i == 0)
                ins = 4 * width
        self.blocks = nn.Sequential(blocks)
        self.fc = nn.Linear(2048, 1000)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv1(x), 3, 2, ceil_mode=True)
        x = F.avg_pool2d(self.blocks(x), 7)
        return F.cross_entropy(self.fc(x.flatten(1)), label)

    def blobs(self) -> Blobs:
        found = {**self.conv1.blobs("conv1", "scale_conv1", 0), **pair("fc1000", self.fc)}
        for name, block in self.blocks.named_children():
            parts = {"branch1": block.shortcut, "branch2a": block.a, "branch2b": block.b, "branch2c": block.c}
            for branch, part in parts.items():
                if part is not None:
                    found |= part.blobs(f"res{name}_{branch}", f"scale{name}_{branch}", 0)
        return found
