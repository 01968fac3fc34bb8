#!/bin/sh
# `make demo`: scikit-learn's handwritten digits to LMDB, train LeNet on them, score it on the 360 it has not seen.
set -eu
cd "$(dirname "$0")/../.."
caffejacinto digits demo
caffejacinto train --solver=models/lenet/digits_solver.prototxt
caffejacinto test --model=models/lenet/digits_train_val.prototxt --weights=demo/lenet_iter_400.caffemodel \
    --iterations=6 --log-level=warning | tee demo/score.txt
awk '$1 == "accuracy" { found = 1; if ($3 < 0.97) { print "demo: accuracy below 0.97"; exit 1 } }
     END { if (!found) exit 1 }' demo/score.txt
