"""Which records a batch takes: wrap-around, shuffle, ranks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from caffejacinto_py.data.order import Order


def test_sequential_wraps_around_inside_a_batch() -> None:
    order = Order([5], batch=3)
    assert [order.records(k).tolist() for k in range(4)] == [[0, 1, 2], [3, 4, 0], [1, 2, 3], [4, 0, 1]]


def test_a_batch_larger_than_the_source_repeats_it() -> None:
    assert Order([2], batch=5).records(1).tolist() == [1, 0, 1, 0, 1]


@given(st.integers(1, 20), st.integers(1, 9), st.integers(0, 2**63), st.integers(1, 6))
def test_each_shuffled_epoch_is_a_permutation(count: int, batch: int, seed: int, epochs: int) -> None:
    order = Order([count], batch=batch, seed=seed, shuffle=True)
    batches = -(-count * epochs // batch)
    read = np.concatenate([order.records(k) for k in range(batches)])[: count * epochs].reshape(epochs, count)
    assert all(sorted(epoch) == list(range(count)) for epoch in read.tolist())
    again = Order([count], batch=batch, seed=seed, shuffle=True)  # any batch alone, in any order
    for k in reversed(range(batches)):
        assert again.records(k).tolist() == order.records(k).tolist()


def test_epochs_and_seeds_and_names_differ() -> None:
    def first(**options: object) -> list[int]:
        return Order([50], batch=50, shuffle=True, **options).records(0).tolist()  # type: ignore[arg-type]

    order = Order([50], batch=50, shuffle=True, seed=1)
    assert order.records(0).tolist() != order.records(1).tolist()
    assert first(seed=1) != first(seed=2)
    assert first(name="a") != first(name="b")
    assert first(seed=-1) == first(seed=-1)


def test_groups_stay_together() -> None:
    order = Order([3, 4, 5], batch=12, shuffle=True, seed=3)
    group = np.repeat([0, 1, 2], [3, 4, 5])
    seen = set()
    for k in range(20):
        files = group[order.records(k)]
        assert np.count_nonzero(np.diff(files)) == 2  # each file in one piece
        seen.add(tuple(files[np.r_[True, np.diff(files) != 0]]))
    assert len(seen) > 2  # in changing order


@pytest.mark.parametrize("shuffle", [False, True])
def test_ranks_take_disjoint_batches_that_add_up(shuffle: bool) -> None:
    whole = Order([24], batch=2, shuffle=shuffle, seed=5)
    parts = [Order([24], batch=2, shuffle=shuffle, seed=5, rank=r, world=3) for r in range(3)]
    for k in range(8):
        assert [p.records(k).tolist() for p in parts] == [whole.records(3 * k + r).tolist() for r in range(3)]
    epoch = np.concatenate([p.records(k) for p in parts for k in range(4)])
    assert sorted(epoch) == list(range(24))
    draws = {float(p.draws(0, lambda n, rng: rng.random(n))[0]) for p in parts}
    assert len(draws) == 3


def test_rand_skip_shifts_the_start_once() -> None:
    starts = {int(Order([100], batch=1, seed=s, rand_skip=10).records(0)[0]) for s in range(60)}
    assert starts == set(range(10))


@pytest.mark.parametrize("bad", [{"rank": 2, "world": 2}, {"batch": 0}, {"groups": [0]}])
def test_nonsense_is_refused(bad: dict) -> None:  # type: ignore[type-arg]
    with pytest.raises(ValueError):
        Order(**{"groups": [3], "batch": 1, **bad})


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_parts_of_a_batch_have_its_random_numbers(world: int) -> None:
    """However many ranks share a batch, each record gets the same numbers."""
    ranks = [Order([50], batch=12 // world, seed=3, rank=r, world=world, parts=world) for r in range(world)]
    for k in range(3):
        whole = Order([50], batch=12, seed=3)
        rows = np.concatenate([r.draws(k, lambda n, rng: rng.random((n, 2))) for r in ranks])
        np.testing.assert_array_equal(rows, whole.draws(k, lambda n, rng: rng.random((n, 2))))
        np.testing.assert_array_equal(np.concatenate([r.records(k) for r in ranks]), whole.records(k))
