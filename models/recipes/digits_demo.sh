#!/bin/sh
# `make demo`: scikit-learn's handwritten digits to LMDB, then the recipe: train, make sparse, quantize; prints its table.
set -eu
cd "$(dirname "$0")/../.."
if [ ! -d demo/digits_train_lmdb ]; then caffejacinto digits demo; fi
caffejacinto run models/recipes/digits.yaml --threads=1
awk -F '|' '$2 ~ /^ test_quantize / { found = 1; if ($4 < 0.97) { print "demo: accuracy below 0.97"; exit 1 } }
            END { if (!found) exit 1 }' runs/digits/table.md
