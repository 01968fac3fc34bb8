"""Features of images from a hidden layer, and what is near to what: features.py FOLDER"""

import os
import sys

import caffe
import numpy as np
from bars import draw


def main(folder, count=5):
    net = caffe.Net(os.path.join(folder, "deploy.prototxt"), os.path.join(folder, "bars.caffemodel"), caffe.TEST)
    transformer = caffe.io.Transformer({"data": net.blobs["data"].data.shape})
    transformer.set_transpose("data", (2, 0, 1))

    rng = np.random.RandomState(9)
    kinds = np.repeat(np.arange(4), count)
    images = [draw(kind, rng)[:, :, np.newaxis] for kind in kinds]

    net.blobs["data"].reshape(len(images), *net.blobs["data"].shape[1:])
    net.blobs["data"].data[...] = [transformer.preprocess("data", image) for image in images]
    net.forward(end="relu2")
    features = net.blobs["hidden"].data.copy()

    distances = ((features[:, None] - features[None]) ** 2).sum(axis=2)
    np.fill_diagonal(distances, np.inf)
    right = np.mean(kinds[distances.argmin(axis=1)] == kinds)
    print(f"{len(images)} images, features of {features.shape[1]} values")
    print(f"the nearest image is of the same kind for {100 * right:.0f}%")

    net.forward(start="score")  # on from there
    print("classified as", net.blobs["prob"].data.argmax(axis=1))
    return features, net.blobs["prob"].data.argmax(axis=1), kinds


if __name__ == "__main__":
    main(sys.argv[1])
