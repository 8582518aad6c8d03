"""A batch of a network is shared out among its processes."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_graft.errors import ConfigError
from dist_graft.training.data.order import Share, Subsets


@given(st.integers(1, 300), st.integers(1, 9))
def test_every_position_once_and_the_mean_of_the_batch(size: int, replicas: int) -> None:
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


def test_a_split_is_shared_out_in_order() -> None:
    images = torch.arange(7)
    subsets = Subsets(train=images, val=images[:0], test=images)
    parts = [subsets.evaluated("test", Share(replica, 3)).tolist() for replica in range(3)]
    assert parts == [[0, 1], [2, 3], [4, 5, 6]]
    with pytest.raises(ConfigError, match="7 images for 8 processes"):
        subsets.evaluated("test", Share(0, 8))
