"""ResNets of any published depth as messages, for the table of `plan --table`: their memory is the usual yardstick.

He et al. 2015 with ImageNet's head, BVLC BatchNorm + Scale. The stride of a bottleneck sits in its 3x3 convolution, as
in later code; the published Caffe nets (models/resnet50) have it in the first 1x1, which makes some blobs smaller.
"""

from __future__ import annotations

from typing import Any

from caffejacinto_py.schema import pb

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


def resnet(depth: int, *, batch: int, size: int) -> Any:
    """The net of this depth (a key of BLOCKS) for `batch` images of size x size, with a loss."""
    net = pb.NetParameter(name=f"ResNet-{depth}")
    source = net.layer.add(name="data", type="Input", top=["data", "label"])
    source.input_param.shape.add(dim=[batch, 3, size, size])
    source.input_param.shape.add(dim=[batch])
    x = _relu(net, _conv(net, "conv1", "data", 64, 7, 2))
    pool = net.layer.add(name="pool1", type="Pooling", bottom=[x], top=["pool1"])
    pool.pooling_param.kernel_size, pool.pooling_param.stride = 3, 2
    pool.pooling_param.pad, pool.pooling_param.ceil_mode = 1, False
    x, channels = "pool1", 64
    deep = depth >= 50
    for stage, count in enumerate(BLOCKS[depth]):
        width = 64 << stage
        for i in range(count):
            name, stride = f"res{stage + 2}_{i + 1}", 2 if i == 0 and stage else 1
            out = 4 * width if deep else width
            shortcut = x if (stride, channels) == (1, out) else _conv(net, f"{name}_branch1", x, out, 1, stride)
            sizes = [(width, 1, 1), (width, 3, stride), (out, 1, 1)] if deep else [(width, 3, stride), (out, 3, 1)]
            y = x
            for k, (wide, kernel, step) in enumerate(sizes):
                y = _conv(net, f"{name}_branch2{'abc'[k]}", y, wide, kernel, step)
                y = _relu(net, y) if k + 1 < len(sizes) else y
            net.layer.add(name=name, type="Eltwise", bottom=[shortcut, y], top=[name])
            x, channels = _relu(net, name), out
    last = net.layer.add(name="pool5", type="Pooling", bottom=[x], top=["pool5"])
    last.pooling_param.pool, last.pooling_param.global_pooling = 1, True
    net.layer.add(name="fc", type="InnerProduct", bottom=["pool5"], top=["fc"]).inner_product_param.num_output = 1000
    net.layer.add(name="loss", type="SoftmaxWithLoss", bottom=["fc", "label"], top=["loss"])
    return net


def _conv(net: Any, name: str, bottom: str, out: int, kernel: int, stride: int) -> str:
    """A convolution without bias, BatchNorm and Scale in place."""
    param = net.layer.add(name=name, type="Convolution", bottom=[bottom], top=[name]).convolution_param
    param.num_output, param.bias_term = out, False
    param.kernel_size.append(kernel)
    param.stride.append(stride)
    param.pad.append(kernel // 2)
    net.layer.add(name=f"{name}_bn", type="BatchNorm", bottom=[name], top=[name])
    net.layer.add(name=f"{name}_scale", type="Scale", bottom=[name], top=[name]).scale_param.bias_term = True
    return name


def _relu(net: Any, blob: str) -> str:
    net.layer.add(name=f"{blob}_relu", type="ReLU", bottom=[blob], top=[blob])
    return blob
