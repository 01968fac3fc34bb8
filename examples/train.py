"""Train in a loop of our own: train.py FOLDER [ITERATIONS]"""

import os
import sys

import caffe
import numpy as np


def main(folder, iterations=200):
    caffe.set_mode_cpu()
    caffe.set_random_seed(3)
    solver = caffe.get_solver(os.path.join(folder, "solver_train.prototxt"))
    losses = np.zeros(iterations)
    for i in range(iterations):
        solver.step(1)
        losses[i] = solver.net.blobs["loss"].data[0]
        if i % 50 == 0 or i == iterations - 1:
            largest = max(np.abs(p[0].diff).max() for p in solver.net.params.values())
            print(f"iteration {i:3d}: loss {losses[i]:.4f}, largest gradient {largest:.4f}")

    right = 0.0
    for _ in range(5):
        solver.test_nets[0].forward()
        right += float(solver.test_nets[0].blobs["accuracy"].data) / 5
    print(f"test accuracy {right:.3f}")

    np.save(os.path.join(folder, "losses.npy"), losses)
    solver.net.save(os.path.join(folder, "bars.caffemodel"))
    return right


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
