"""Filters of the first layer and what they make of an image: plot_filters.py FOLDER PICTURE.png"""

import os
import sys

import matplotlib

matplotlib.use("Agg")
import caffe
import matplotlib.pyplot as plt
import numpy as np
from bars import draw


def tiles(data):
    """(n, height, width) as one square picture."""
    data = (data - data.min()) / (data.max() - data.min())
    n = int(np.ceil(np.sqrt(data.shape[0])))
    data = np.pad(data, ((0, n**2 - data.shape[0]), (0, 1), (0, 1)), mode="constant", constant_values=1)
    data = data.reshape((n, n) + data.shape[1:]).transpose(0, 2, 1, 3)
    return data.reshape(n * data.shape[1], n * data.shape[3])


def main(folder, picture):
    deploy, weights = os.path.join(folder, "deploy.prototxt"), os.path.join(folder, "bars.caffemodel")
    net = caffe.Net(deploy, caffe.TEST, weights=weights)
    net.blobs["data"].data[...] = draw(2, np.random.RandomState(0))
    net.forward()
    shown = {
        "image": net.blobs["data"].data[0, 0],
        "filters": tiles(net.params["conv1"][0].data[:, 0]),
        "activations": tiles(net.blobs["conv1"].data[0]),
    }
    _, axes = plt.subplots(1, len(shown), figsize=(9, 3))
    for ax, (title, image) in zip(axes, shown.items()):
        ax.imshow(image, cmap="gray")
        ax.set_title(title)
        ax.axis("off")
    plt.savefig(picture)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
