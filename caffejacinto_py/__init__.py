"""Train, test and convert Caffe networks (prototxt, solver, caffemodel) on PyTorch."""

__version__ = "0.1.0"
