"""Write the nets of this folder: `python models/generate.py [FOLDER]`.

A test holds the committed files equal to it. Layer names are those of the published nets, so that their caffemodels
load by name. Sources are in models/README.md.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

if __package__:
    from .text import FROZEN, NO_BIAS_DECAY, PLAIN, Net, filler
else:
    from text import FROZEN, NO_BIAS_DECAY, PLAIN, Net, filler

XAVIER, MSRA = filler("xavier"), filler("msra")
IMAGENET = ("data/ilsvrc12_train_lmdb", "data/ilsvrc12_val_lmdb")
CIFAR = ("data/cifar10_train_lmdb", "data/cifar10_test_lmdb")
DIGITS = ("demo/digits_train_lmdb", "demo/digits_test_lmdb")
MNIST = ("data/mnist_train_lmdb", "data/mnist_test_lmdb")
BGR_MEAN = [104, 117, 123]


def lenet(net: Net, *, sources: tuple[str, str] = MNIST, batch: tuple[int, int] = (64, 100)) -> None:
    x = net.data("mnist", (1, 28, 28), sources=sources, batch=batch, deploy_batch=64, scale=0.00390625)
    fill: dict[str, Any] = {"weight": XAVIER, "specs": PLAIN}
    for i, out in ((1, 20), (2, 50)):
        x = net.conv(f"conv{i}", x, out, 5, **fill)
        x = net.pool(f"pool{i}", x, "MAX", 2, 2)
    x = net.fc("ip1", x, 500, **fill)
    net.relu("relu1", x)
    net.classify(net.fc("ip2", x, 10, **fill))


def lenet_digits(net: Net) -> None:
    lenet(net, sources=("demo/digits_train_lmdb", "demo/digits_test_lmdb"), batch=(64, 60))


def vgg_digits(net: Net) -> None:
    """VGG's pattern in small: three stages of two 3x3 convolutions, each with a pooling layer behind it."""
    options: dict[str, Any] = {"scale": 0.00390625, "crop_size": 24}  # 24 can be halved by each of the pooling layers
    x = net.data("data", (1, 24, 24), sources=DIGITS, batch=(64, 60), deploy_batch=64, **options)
    for stage, out in enumerate((16, 32, 64), 1):
        for i in (1, 2):
            x = net.conv(f"conv{stage}_{i}", x, out, 3, pad=1, weight=MSRA, specs=NO_BIAS_DECAY)
            net.relu(f"relu{stage}_{i}", x)
        x = net.pool(f"pool{stage}", x, "MAX", 2, 2)
    x = net.fc("fc4", x, 128, weight=MSRA, specs=NO_BIAS_DECAY)
    net.dropout("drop4", net.relu("relu4", x), 0.5)
    net.classify(net.fc("fc5", x, 10, weight=XAVIER, specs=NO_BIAS_DECAY))


def _cifar10(net: Net, *, quick: bool) -> str:
    """The three convolution stages of cifar10_quick and cifar10_full; full adds LRN within channels."""
    mean = {"mean_file": "data/cifar10_mean.binaryproto"}
    x = net.data("cifar", (3, 32, 32), sources=CIFAR, batch=(100, 100), deploy_batch=1, **mean)
    for i, (out, std) in enumerate(((32, 0.0001), (32, 0.01), (64, 0.01)), 1):
        specs = PLAIN if quick or i < 3 else ()
        x = net.conv(f"conv{i}", x, out, 5, pad=2, weight=filler("gaussian", std=std), specs=specs)
        if i == 1:  # max pooling and ReLU commute; the order is the published one
            x = net.relu("relu1", net.pool("pool1", x, "MAX", 3, 2))
        else:
            x = net.pool(f"pool{i}", net.relu(f"relu{i}", x), "AVE", 3, 2)
        if not quick and i < 3:
            x = net.lrn(f"norm{i}", x, 3, 5e-5, within=True)
    return x


def cifar10_quick(net: Net) -> None:
    fill: dict[str, Any] = {"weight": filler("gaussian", std=0.1), "specs": PLAIN}
    x = net.fc("ip1", _cifar10(net, quick=True), 64, **fill)
    net.classify(net.fc("ip2", x, 10, **fill))


def cifar10_full(net: Net) -> None:
    x = _cifar10(net, quick=False)
    net.classify(net.fc("ip1", x, 10, weight=filler("gaussian", std=0.01), specs=((1, 250), (2, 0))))


def _alexnet(net: Net, *, pool_first: bool, bias: float) -> None:
    """Five convolutions, three fully connected layers; CaffeNet pools before it normalizes, AlexNet after."""
    mean: dict[str, Any] = {"crop_size": 227, "mean_file": "data/ilsvrc12_mean.binaryproto"}
    x = net.data("data", (3, 227, 227), sources=IMAGENET, batch=(256, 50), deploy_batch=10, mirror=True, **mean)
    fill: dict[str, Any] = {"weight": filler("gaussian", std=0.01), "specs": NO_BIAS_DECAY}
    one = filler("constant", value=bias)
    shapes = (
        (96, 11, {"stride": 4}),
        (256, 5, {"pad": 2, "group": 2, "bias": one}),
        (384, 3, {"pad": 1}),
        (384, 3, {"pad": 1, "group": 2, "bias": one}),
        (256, 3, {"pad": 1, "group": 2, "bias": one}),
    )
    for i, (out, kernel, options) in enumerate(shapes, 1):
        x = net.relu(f"relu{i}", net.conv(f"conv{i}", x, out, kernel, **fill, **options))
        if i in (1, 2):
            for what in ("pool", "norm") if pool_first else ("norm", "pool"):
                x = net.pool(f"pool{i}", x, "MAX", 3, 2) if what == "pool" else net.lrn(f"norm{i}", x, 5, 1e-4)
    x = net.pool("pool5", x, "MAX", 3, 2)
    for i in (6, 7):
        x = net.fc(f"fc{i}", x, 4096, weight=filler("gaussian", std=0.005), bias=one, specs=NO_BIAS_DECAY)
        net.dropout(f"drop{i}", net.relu(f"relu{i}", x), 0.5)
    net.classify(net.fc("fc8", x, 1000, **fill))


def caffenet(net: Net) -> None:
    _alexnet(net, pool_first=True, bias=1)


def alexnet(net: Net) -> None:
    _alexnet(net, pool_first=False, bias=0.1)


GOOGLE: dict[str, Any] = {"weight": XAVIER, "bias": filler("constant", value=0.2), "specs": NO_BIAS_DECAY}
INCEPTION = {  # 1x1, 3x3 reduce, 3x3, 5x5 reduce, 5x5, pool projection
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}


def _conv_relu(net: Net, block: str, name: str, bottom: str, out: int, kernel: int, **options: Any) -> str:
    x = net.conv(f"{block}/{name}", bottom, out, kernel, **GOOGLE, **options)
    return net.relu(f"{block}/relu_{name.removesuffix('_s2')}", x)


def _inception(net: Net, name: str, x: str) -> str:
    one, reduce3, three, reduce5, five, project = INCEPTION[name]
    block = f"inception_{name}"
    a = _conv_relu(net, block, "1x1", x, one, 1)
    b = _conv_relu(net, block, "3x3", _conv_relu(net, block, "3x3_reduce", x, reduce3, 1), three, 3, pad=1)
    c = _conv_relu(net, block, "5x5", _conv_relu(net, block, "5x5_reduce", x, reduce5, 1), five, 5, pad=2)
    d = _conv_relu(net, block, "pool_proj", net.pool(f"{block}/pool", x, "MAX", 3, 1, 1), project, 1)
    return net.add(f"{block}/output", "Concat", [a, b, c, d])


def _google_loss(net: Net, block: str, scores: str, weight: float) -> None:
    net.add(f"{block}/loss", "SoftmaxWithLoss", [scores, "label"], f"{block}/{block}", loss_weight=weight)
    net.accuracy(f"{block}/top-1", scores)
    net.accuracy(f"{block}/top-5", scores, 5)


def _google_side(net: Net, block: str, x: str) -> None:
    """An auxiliary classifier, weight 0.3; in the training net only."""
    if net.deploy:
        return
    x = net.pool(f"{block}/ave_pool", x, "AVE", 5, 3)
    x = net.relu(f"{block}/relu_conv", net.conv(f"{block}/conv", x, 128, 1, **GOOGLE))
    x = net.relu(f"{block}/relu_fc", net.fc(f"{block}/fc", x, 1024, **GOOGLE))
    x = net.dropout(f"{block}/drop_fc", x, 0.7)
    scores = net.fc(f"{block}/classifier", x, 1000, weight=XAVIER, specs=NO_BIAS_DECAY)
    _google_loss(net, block, scores, 0.3)


def googlenet(net: Net) -> None:
    mean: dict[str, Any] = {"crop_size": 224, "mean_value": BGR_MEAN}
    x = net.data("data", (3, 224, 224), sources=IMAGENET, batch=(32, 50), deploy_batch=10, mirror=True, **mean)
    x = _conv_relu(net, "conv1", "7x7_s2", x, 64, 7, pad=3, stride=2)
    x = net.lrn("pool1/norm1", net.pool("pool1/3x3_s2", x, "MAX", 3, 2), 5, 1e-4)
    x = _conv_relu(net, "conv2", "3x3_reduce", x, 64, 1)
    x = net.lrn("conv2/norm2", _conv_relu(net, "conv2", "3x3", x, 192, 3, pad=1), 5, 1e-4)
    x = net.pool("pool2/3x3_s2", x, "MAX", 3, 2)
    after = {"3b": "pool3/3x3_s2", "4e": "pool4/3x3_s2"}
    sides = {"4a": "loss1", "4d": "loss2"}
    for name in INCEPTION:
        x = _inception(net, name, x)
        if name in sides:
            _google_side(net, sides[name], x)
        if name in after:
            x = net.pool(after[name], x, "MAX", 3, 2)
    x = net.dropout("pool5/drop_7x7_s1", net.pool("pool5/7x7_s1", x, "AVE", 7), 0.4)
    scores = net.fc("loss3/classifier", x, 1000, weight=XAVIER, specs=NO_BIAS_DECAY)
    if net.deploy:
        net.classify(scores)
    else:
        net.add("loss3/loss3", "SoftmaxWithLoss", [scores, "label"], loss_weight=1)
        net.accuracy("loss3/top-1", scores)
        net.accuracy("loss3/top-5", scores, 5)


def _norm(net: Net, blob: str, batch_norm: str, scale: str) -> str:
    """BatchNorm (BVLC: statistics only) and the Scale that goes with it, both in place."""
    net.add(batch_norm, "BatchNorm", blob, blob)
    return net.add(scale, "Scale", blob, blob, scale_param={"bias_term": True})


def _residual(net: Net, block: str, x: str, width: int, *, stride: int, project: bool) -> str:
    """A bottleneck: 1x1 (stride), 3x3, 1x1 to 4 * width, plus the input, projected where the shape changes."""

    def conv(branch: str, bottom: str, out: int, kernel: int, step: int = 1, relu: bool = False) -> str:
        name = f"res{block}_{branch}"
        y = net.conv(name, bottom, out, kernel, pad=kernel // 2, stride=step, bias_term=False, weight=MSRA)
        _norm(net, y, f"bn{block}_{branch}", f"scale{block}_{branch}")
        return net.relu(f"{name}_relu", y) if relu else y

    shortcut = conv("branch1", x, 4 * width, 1, stride) if project else x
    y = conv("branch2a", x, width, 1, stride, relu=True)
    y = conv("branch2b", y, width, 3, relu=True)
    y = conv("branch2c", y, 4 * width, 1)
    return net.relu(f"res{block}_relu", net.add(f"res{block}", "Eltwise", [shortcut, y]))


def resnet50(net: Net) -> None:
    mean: dict[str, Any] = {"crop_size": 224, "mean_value": BGR_MEAN}
    x = net.data("data", (3, 224, 224), sources=IMAGENET, batch=(32, 50), deploy_batch=1, mirror=True, **mean)
    x = net.conv("conv1", x, 64, 7, pad=3, stride=2, weight=MSRA)  # with a bias, as in the published weights
    _norm(net, x, "bn_conv1", "scale_conv1")
    x = net.pool("pool1", net.relu("conv1_relu", x), "MAX", 3, 2)
    for stage, blocks in enumerate((3, 4, 6, 3), 2):
        for i in range(blocks):
            stride = 2 if i == 0 and stage > 2 else 1
            x = _residual(net, f"{stage}{'abcdef'[i]}", x, 32 << (stage - 1), stride=stride, project=i == 0)
    x = net.pool("pool5", x, "AVE", 7)
    net.classify(net.fc("fc1000", x, 1000, weight=MSRA), top5=True)


def mobilenet(net: Net, *, width: float = 1.0) -> None:
    """MobileNet v1. width: the factor on all channels, rounded to a multiple of 8."""

    def wide(channels: int) -> int:
        return max(8, int(channels * width / 8 + 0.5) * 8)

    def conv(name: str, bottom: str, out: int, kernel: int, relu: str, **options: Any) -> str:
        x = net.conv(
            name, bottom, out, kernel, pad=kernel // 2, bias_term=False, weight=MSRA, specs=((1, 1),), **options
        )
        _norm(net, x, f"{name}/bn", f"{name}/scale")
        return net.relu(relu, x)

    mean: dict[str, Any] = {"crop_size": 224, "mean_value": [103.94, 116.78, 123.68], "scale": 0.017}
    x = net.data("data", (3, 224, 224), sources=IMAGENET, batch=(64, 50), deploy_batch=1, mirror=True, **mean)
    channels = wide(32)
    x = conv("conv1", x, channels, 3, "relu1", stride=2)
    blocks = [("2_1", 64, 1), ("2_2", 128, 2), ("3_1", 128, 1), ("3_2", 256, 2), ("4_1", 256, 1), ("4_2", 512, 2)]
    blocks += [(f"5_{i}", 512, 1) for i in range(1, 6)] + [("5_6", 1024, 2), ("6", 1024, 1)]
    for name, out, stride in blocks:
        x = conv(f"conv{name}/dw", x, channels, 3, f"relu{name}/dw", stride=stride, group=channels)
        channels = wide(out)
        x = conv(f"conv{name}/sep", x, channels, 1, f"relu{name}/sep")
    x = net.conv("fc7", net.global_pool("pool6", x), 1000, 1, weight=MSRA, specs=NO_BIAS_DECAY)
    net.classify(x, top5=True)


def _jacintonet(
    net: Net,
    *,
    size: int,
    classes: int,
    strides: tuple[int, ...],
    sources: tuple[str, str],
    batch: tuple[int, int],
    gray: bool = False,
) -> None:
    """JacintoNet v2: stages of a full and a grouped (4) convolution with max pooling between; one stage a stride.

    BatchNorm has its own scale and bias (NVCaffe's five blobs). gray: one channel, and no mirror: digits.
    """

    def conv(name: str, bottom: str, out: int, *, kernel: int = 3, stride: int = 1, group: int = 1) -> str:
        fill: dict[str, Any] = {"weight": MSRA, "specs": NO_BIAS_DECAY}
        x = net.conv(name, bottom, out, kernel, pad=kernel // 2, stride=stride, group=group, **fill)
        param = {"moving_average_fraction": 0.99, "eps": 0.0001, "scale_bias": True}
        net.add(f"{name}/bn", "BatchNorm", x, x, batch_norm_param=param)
        return net.relu(f"{name}/relu", x)

    shape = (1 if gray else 3, size, size)
    x = net.data("data", shape, sources=sources, batch=batch, deploy_batch=1, mirror=not gray, crop_size=size)
    x = net.add("data/bias", "Bias", x, specs=FROZEN, bias_param={"filler": filler("constant", value=-128)})
    x = conv("conv1b", conv("conv1a", x, 32, kernel=5, stride=strides[0]), 32, group=4)
    for i, stride in enumerate(strides[1:], 1):
        x = net.pool(f"pool{i}", x, "MAX", stride, stride)
        out = 32 << i
        x = conv(f"res{i + 1}a_branch2b", conv(f"res{i + 1}a_branch2a", x, out), out, group=4)
    x = net.global_pool(f"pool{len(strides)}", x)
    net.classify(net.fc(f"fc{classes}", x, classes, weight=MSRA, specs=NO_BIAS_DECAY), top5=True)


def jacintonet11v2_cifar10(net: Net) -> None:
    _jacintonet(net, size=32, classes=10, strides=(1, 1, 2, 1, 2), sources=CIFAR, batch=(64, 50))


def jacintonet11v2_imagenet(net: Net) -> None:
    _jacintonet(net, size=224, classes=1000, strides=(2, 2, 2, 2, 2), sources=IMAGENET, batch=(128, 50))


def jacintonet7_mnist(net: Net) -> None:
    _jacintonet(net, size=28, classes=10, strides=(2, 2, 2), sources=MNIST, batch=(100, 100), gray=True)


NETS = {  # folder: (name in the prototxt, builder)
    "lenet": ("LeNet", lenet),
    "vgg_digits": ("VGG_digits", vgg_digits),
    "cifar10_quick": ("CIFAR10_quick", cifar10_quick),
    "cifar10_full": ("CIFAR10_full", cifar10_full),
    "caffenet": ("CaffeNet", caffenet),
    "alexnet": ("AlexNet", alexnet),
    "googlenet": ("GoogleNet", googlenet),
    "resnet50": ("ResNet-50", resnet50),
    "mobilenet": ("MobileNet", mobilenet),
    "jacintonet11v2_cifar10": ("jacintonet11v2", jacintonet11v2_cifar10),
    "jacintonet11v2_imagenet": ("jacintonet11v2", jacintonet11v2_imagenet),
    "jacintonet7_mnist": ("jacintonet7", jacintonet7_mnist),
}


def texts() -> dict[str, str]:
    """Every file of this folder that is generated: path below models/ -> its text."""
    found = {}
    for folder, (name, build) in NETS.items():
        for deploy in (False, True):
            net = Net(name, deploy=deploy)
            build(net)
            found[f"{folder}/{'deploy' if deploy else 'train_val'}.prototxt"] = net.text()
    digits = Net("LeNet")
    lenet_digits(digits)
    found["lenet/digits_train_val.prototxt"] = digits.text()
    return found


def main(folder: Path) -> None:
    for path, text in texts().items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent)
