"""Make the net fully convolutional, so that it sees images of any size: surgery.py FOLDER"""

import os
import sys

import caffe
import numpy as np
from bars import draw
from caffe.proto import caffe_pb2
from google.protobuf import text_format

CASTS = {"hidden": ("hidden_conv", 6), "score": ("score_conv", 1)}  # layer -> (new name, kernel size)


def convolutional(path, size):
    """The deploy net with inner products as convolutions, for images of another size."""
    net = caffe_pb2.NetParameter()
    with open(path) as f:
        text_format.Merge(f.read(), net)
    for layer in net.layer:
        if layer.type == "Input":
            layer.input_param.shape[0].dim[2:] = [size, size]
        if layer.type == "InnerProduct":
            outputs = layer.inner_product_param.num_output
            layer.ClearField("inner_product_param")
            layer.name, kernel = CASTS[layer.name]
            layer.type = "Convolution"
            layer.convolution_param.num_output = outputs
            layer.convolution_param.kernel_size.append(kernel)
    return net


def main(folder, size=40):
    deploy, weights = os.path.join(folder, "deploy.prototxt"), os.path.join(folder, "bars.caffemodel")
    path = os.path.join(folder, "full_conv.prototxt")
    with open(path, "w") as f:
        f.write(str(convolutional(deploy, size)))
    net = caffe.Net(deploy, weights, caffe.TEST)
    full = caffe.Net(path, weights, caffe.TEST)  # the convolutions that kept their names
    for old, (new, _) in CASTS.items():
        full.params[new][0].data.flat = net.params[old][0].data.flat
        full.params[new][1].data[...] = net.params[old][1].data
    full.save(os.path.join(folder, "full_conv.caffemodel"))

    rng = np.random.RandomState(4)
    small = draw(1, rng)
    large = rng.normal(0, 0.4, (size, size))
    large[:16, :16] = small
    one = net.forward(data=small[None, None])["prob"].copy()
    many = full.forward(data=large[None, None])["prob"]
    print("scores of the small image", one.ravel().round(3))
    height, width = many.shape[2:]
    print(f"the first of {height} x {width} places in the large one", many[0, :, 0, 0].round(3))
    return one, many


if __name__ == "__main__":
    main(sys.argv[1])
