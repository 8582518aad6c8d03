from __future__ import annotations

import pytest
import torch

from dist_graft.config import DataConfig
from dist_graft.errors import ConfigError
from dist_graft.training.data.order import check_steps, choose_subsets, epoch_order


def subsets(seed=0, train_total=50, test_total=20, **options):
    return choose_subsets(
        DataConfig(**options), seed=seed, train_total=train_total, test_total=test_total
    )


def test_order_is_a_permutation_of_its_own_for_each_seed_network_and_epoch():
    places = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    orders = [epoch_order(100, seed=s, network=n, epoch=e).tolist() for s, n, e in places]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert len({tuple(order) for order in orders}) == len(places)
    assert epoch_order(100, seed=0, network=0, epoch=0).tolist() == orders[0]


def test_everything_is_used_by_default():
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
def test_split_with_an_empty_side_is_refused(fraction):
    with pytest.raises(ConfigError, match=rf"data\.val_fraction.*{fraction} of 50"):
        subsets(val_fraction=fraction)


@pytest.mark.parametrize(("first", "last"), [(-1, 2), (2, 1), (0, 5)])
def test_steps_outside_an_epoch(first, last):
    with pytest.raises(ValueError, match=r"\[0, 4\]"):
        check_steps(first, last, 4)
