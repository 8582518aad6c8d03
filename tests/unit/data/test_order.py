from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_graft.config import DataConfig
from dist_graft.errors import ConfigError
from dist_graft.training.data.order import Share, Subsets, choose_subsets, epoch_order


def subsets(seed=0, train_total=50, test_total=20, **options):
    return choose_subsets(
        DataConfig(**options), seed=seed, train_total=train_total, test_total=test_total
    )


def test_each_seed_network_and_epoch_has_its_own_permutation():
    streams = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    orders = [epoch_order(100, seed=s, network=n, epoch=e).tolist() for s, n, e in streams]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert len({tuple(order) for order in orders}) == len(streams)
    assert epoch_order(100, seed=0, network=0, epoch=0).tolist() == orders[0]


def test_all_samples_are_used_by_default():
    whole = subsets()
    assert whole.train.tolist() == list(range(50))
    assert whole.test.tolist() == list(range(20))
    assert len(whole.val) == 0


def test_first_n():
    few = subsets(train_samples=7, test_samples=3)
    assert few.train.tolist() == list(range(7))
    assert few.test.tolist() == [0, 1, 2]
    assert len(subsets(train_samples=1000).train) == 50


def test_validation_is_taken_from_the_first_n_training_images():
    split = subsets(train_samples=40, val_fraction=0.25)
    assert len(split.val) == 10
    assert sorted(split.train.tolist() + split.val.tolist()) == list(range(40))
    assert split.test.tolist() == list(range(20))
    again = subsets(train_samples=40, val_fraction=0.25)
    assert torch.equal(split.val, again.val)
    assert not torch.equal(split.val, subsets(seed=1, train_samples=40, val_fraction=0.25).val)


@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_a_split_with_an_empty_side_is_rejected(fraction):
    with pytest.raises(ConfigError, match=rf"data\.val_fraction.*{fraction} of 50"):
        subsets(val_fraction=fraction)


@given(st.integers(1, 300), st.integers(1, 9))
def test_parts_cover_a_batch_and_their_weights_give_its_mean(size: int, replicas: int) -> None:
    parts = [Share(replica, replicas).of_batch(size) for replica in range(replicas)]
    seen = [p for part in parts if part.counts for p in range(size)[part.positions]]
    assert seen == list(range(size))
    smallest = min(len(range(size)[part.positions]) for part in parts)
    assert all(part.smallest == smallest for part in parts)
    # a process's gradient is a mean over its part; the processes' mean is that of the batch
    weights = [Fraction(0)] * size
    for part in parts:
        positions = range(size)[part.positions]
        assert positions
        for position in positions:
            share = Fraction(part.weight).limit_denominator(10**4) / len(positions)
            weights[position] += share / replicas
    assert weights == [Fraction(1, size)] * size


def test_replicas_evaluate_contiguous_ranges() -> None:
    images = torch.arange(7)
    subsets = Subsets(train=images, val=images[:0], test=images)
    parts = [subsets.evaluated("test", Share(replica, 3)).tolist() for replica in range(3)]
    assert parts == [[0, 1], [2, 3], [4, 5, 6]]
    with pytest.raises(ConfigError, match="7 samples for 8 processes"):
        subsets.evaluated("test", Share(0, 8))
