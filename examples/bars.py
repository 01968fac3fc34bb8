"""A data layer that draws bars in four directions, and a multi-class hinge loss, as Python layers."""

import json

import caffe
import numpy as np

SIZE = 16


def draw(kind, rng):
    """A picture of one bar: 0 horizontal, 1 vertical, 2 and 3 diagonal; noise around it."""
    y, x = np.mgrid[:SIZE, :SIZE]
    where = (y, x, (y + x) / 2, (y - x + SIZE) / 2)[kind]
    image = (np.abs(where - rng.uniform(5, SIZE - 6)) < 1.5).astype(np.float32)
    return image + rng.normal(0, 0.4, image.shape)


class BarsData(caffe.Layer):
    """tops: data (N, 1, 16, 16), label (N). param_str: JSON with batch_size, seed, and classes (which kinds)."""

    def setup(self, bottom, top):
        if len(bottom) or len(top) != 2:
            raise Exception("BarsData makes two tops, data and label, from nothing")
        options = json.loads(self.param_str)
        self.batch_size = options["batch_size"]
        self.classes = options.get("classes", [0, 1, 2, 3])
        self.rng = np.random.RandomState(options.get("seed", 0) + 1000 * self.phase)

    def reshape(self, bottom, top):
        top[0].reshape(self.batch_size, 1, SIZE, SIZE)
        top[1].reshape(self.batch_size)

    def forward(self, bottom, top):
        for i in range(self.batch_size):
            label = self.rng.randint(len(self.classes))
            top[0].data[i, 0] = draw(self.classes[label], self.rng)
            top[1].data[i] = label

    def backward(self, top, propagate_down, bottom):
        pass


class MultiHingeLoss(caffe.Layer):
    """Mean over items of the sum over wrong classes of max(0, 1 + score - score of the right class)."""

    def setup(self, bottom, top):
        if len(bottom) != 2:
            raise Exception("MultiHingeLoss needs scores and labels")

    def reshape(self, bottom, top):
        if bottom[0].num != bottom[1].num:
            raise Exception("as many labels as scores, please")
        top[0].reshape(1)

    def forward(self, bottom, top):
        scores = bottom[0].data.reshape(bottom[0].num, -1)
        labels = bottom[1].data.astype(int).ravel()
        rows = np.arange(len(labels))
        margins = np.maximum(0, 1 + scores - scores[rows, labels][:, None])
        margins[rows, labels] = 0
        self.slopes = (margins > 0).astype(np.float32)
        self.slopes[rows, labels] = -self.slopes.sum(axis=1)
        top[0].data[0] = margins.sum() / len(labels)

    def backward(self, top, propagate_down, bottom):
        if propagate_down[1]:
            raise Exception("labels have no gradient")
        if propagate_down[0]:
            bottom[0].diff[...] = (top[0].diff[0] * self.slopes / bottom[0].num).reshape(bottom[0].shape)
