"""Write the nets and solvers of the other examples: make_nets.py FOLDER"""

import json
import os
import sys

import caffe
from caffe import layers as L
from caffe import params as P
from caffe.proto import caffe_pb2

LEARN = [dict(lr_mult=1, decay_mult=1), dict(lr_mult=2, decay_mult=0)]
FAST = [dict(lr_mult=10, decay_mult=1), dict(lr_mult=20, decay_mult=0)]


def trunk(n):
    """Convolutions and a hidden layer over n.data."""
    fill = dict(type="xavier")
    n.conv1 = L.Convolution(n.data, kernel_size=5, num_output=8, param=LEARN, weight_filler=fill)
    n.relu1 = L.ReLU(n.conv1, in_place=True)
    n.pool1 = L.Pooling(n.relu1, pool=P.Pooling.MAX, kernel_size=2, stride=2)
    n.hidden = L.InnerProduct(n.pool1, num_output=16, param=LEARN, weight_filler=fill)
    n.relu2 = L.ReLU(n.hidden, in_place=True)
    return n.relu2


def bars(**options):
    return L.Python(module="bars", layer="BarsData", param_str=json.dumps(options), ntop=2)


def training(batch_size):
    """Four classes, hinge loss of our own."""
    n = caffe.NetSpec()
    n.data, n.label = bars(batch_size=batch_size, seed=1)
    n.score = L.InnerProduct(trunk(n), num_output=4, param=LEARN, weight_filler=dict(type="xavier"))
    n.loss = L.Python(n.score, n.label, module="bars", layer="MultiHingeLoss", loss_weight=1)
    n.accuracy = L.Accuracy(n.score, n.label, include=dict(phase=caffe_pb2.TEST))
    return n.to_proto()


def finetuning(batch_size):
    """Two of the classes, a last layer of another name, Caffe's own loss."""
    n = caffe.NetSpec()
    n.data, n.label = bars(batch_size=batch_size, seed=2, classes=[2, 3])
    n["score_two"] = L.InnerProduct(trunk(n), num_output=2, param=FAST, weight_filler=dict(type="xavier"))
    n.loss = L.SoftmaxWithLoss(n["score_two"], n.label)
    return n.to_proto()


def deploy():
    """One image at a time from outside."""
    n = caffe.NetSpec()
    n.data = L.Input(shape=dict(dim=[1, 1, 16, 16]))
    n.score = L.InnerProduct(trunk(n), num_output=4)
    n.prob = L.Softmax(n.score)
    return n.to_proto()


def solver(net, folder, **fields):
    """A solver for a net, tested on itself."""
    s = caffe_pb2.SolverParameter(net=net, base_lr=0.02, lr_policy="step", gamma=0.3, stepsize=150, momentum=0.9)
    s.weight_decay, s.max_iter, s.random_seed = 1e-4, 300, 3
    s.test_iter.append(5)
    s.test_interval = 1000
    s.snapshot_prefix = os.path.join(folder, "bars")
    for name, value in fields.items():
        setattr(s, name, value)
    return s


def main(folder):
    os.makedirs(folder, exist_ok=True)
    files = {"train": training(32), "finetune": finetuning(16), "deploy": deploy()}
    for name in ("train", "finetune"):
        path = os.path.join(folder, name + ".prototxt")
        rate = 0.02 if name == "train" else 0.002
        files["solver_" + name] = solver(path, folder, base_lr=rate)
    for name, message in files.items():
        with open(os.path.join(folder, name + ".prototxt"), "w") as f:
            f.write(str(message))
    caffe.draw.draw_net_to_file(files["train"], os.path.join(folder, "train.dot"), phase=caffe.TRAIN)


if __name__ == "__main__":
    main(sys.argv[1])
