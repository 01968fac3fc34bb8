"""Python layers as people write them. Loaded by name from prototxts of the tests."""

from __future__ import annotations

import json

import caffe
import numpy as np


class TenTimes(caffe.Layer):
    def setup(self, bottom, top):
        if len(bottom) != 1:
            raise Exception("one bottom, please")
        self.calls = []

    def reshape(self, bottom, top):
        self.calls.append(bottom[0].data.shape)
        top[0].reshape(*bottom[0].data.shape)

    def forward(self, bottom, top):
        top[0].data[...] = 10 * bottom[0].data

    def backward(self, top, propagate_down, bottom):
        assert propagate_down == [True]
        bottom[0].diff[...] = 10 * top[0].diff


class Shift(caffe.Layer):
    """A learnable offset, set by param_str; in setup an array of it is kept."""

    def setup(self, bottom, top):
        self.blobs.add_blob(*json.loads(self.param_str)["shape"])
        self.shift = self.blobs[0].data
        self.shift[...] = json.loads(self.param_str_)["value"]

    def reshape(self, bottom, top):
        top[0].reshape(*bottom[0].shape)

    def forward(self, bottom, top):
        top[0].data[...] = bottom[0].data + self.shift

    def backward(self, top, propagate_down, bottom):
        self.blobs[0].diff[...] += top[0].diff.sum(axis=0)
        if propagate_down[0]:
            bottom[0].diff[...] = top[0].diff


class Parameter(caffe.Layer):
    def setup(self, bottom, top):
        self.blobs.add_blob(1)
        self.blobs[0].data[0] = 0

    def reshape(self, bottom, top):
        top[0].reshape(1)

    def forward(self, bottom, top):
        top[0].data[0] = self.blobs[0].data[0]

    def backward(self, top, propagate_down, bottom):
        self.blobs[0].diff[0] = 1


class Phase(caffe.Layer):
    def setup(self, bottom, top):
        pass

    def reshape(self, bottom, top):
        top[0].reshape()

    def forward(self, bottom, top):
        top[0].data[()] = self.phase


class Counter(caffe.Layer):
    """A data layer: batch k is filled with k; the label with k too."""

    def setup(self, bottom, top):
        self.k = 0
        self.shape = [int(d) for d in self.param_str.split(",")]

    def reshape(self, bottom, top):
        top[0].reshape(*self.shape)
        top[1].reshape(self.shape[0])

    def forward(self, bottom, top):
        top[0].data[...] = top[1].data[...] = self.k
        self.k += 1

    def backward(self, top, propagate_down, bottom):
        pass


class HalfSquare(caffe.Layer):
    """EuclideanLoss, as Caffe's examples have it."""

    def setup(self, bottom, top):
        pass

    def reshape(self, bottom, top):
        self.difference = np.zeros_like(bottom[0].data, dtype=np.float32)
        top[0].reshape(1)

    def forward(self, bottom, top):
        self.difference[...] = bottom[0].data - bottom[1].data
        top[0].data[...] = np.sum(self.difference**2) / bottom[0].num / 2.0

    def backward(self, top, propagate_down, bottom):
        for i, sign in enumerate((1, -1)):
            if propagate_down[i]:
                bottom[i].diff[...] = sign * top[0].diff[0] * self.difference / bottom[i].num


class InPlace(caffe.Layer):
    """Works on top and bottom being one blob."""

    def setup(self, bottom, top):
        self.same = bottom[0] is top[0]

    def reshape(self, bottom, top):
        top[0].reshape(*bottom[0].shape)

    def forward(self, bottom, top):
        bottom[0].data[...] *= -1

    def backward(self, top, propagate_down, bottom):
        bottom[0].diff[...] *= -1


class Growing(caffe.Layer):
    """Its top has one item more with every forward."""

    def setup(self, bottom, top):
        self.n = 0

    def reshape(self, bottom, top):
        self.n += 1
        top[0].reshape(self.n, 2)

    def forward(self, bottom, top):
        top[0].data[...] = 1


class FailsInSetup(caffe.Layer):
    def setup(self, bottom, top):
        raise ValueError("no thanks")


class FailsInForward(caffe.Layer):
    def setup(self, bottom, top):
        pass

    def reshape(self, bottom, top):
        top[0].reshape(1)

    def forward(self, bottom, top):
        raise StopIteration("the epoch is over")


class NotALayer:
    pass
