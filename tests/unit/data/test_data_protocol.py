"""What every implementation of `Data` guarantees, with and without loader workers."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sample_data import Noisy, numbered, same, targets

from dist_graft.config import DataConfig
from dist_graft.errors import ConfigError
from dist_graft.training.data import Data
from dist_graft.training.data.datasets import DatasetData, Datasets
from dist_graft.training.data.folder import FolderImages
from dist_graft.training.data.images import ResidentImages
from dist_graft.training.data.order import Share
from dist_graft.training.data.sources import DatasetInfo

Make = Callable[..., Data]
AUGMENTED = {"mixup": 0.4, "cutmix": 1.0, "random_erasing": 0.5, "rand_augment": "1,9"}
images_only = pytest.mark.parametrize("make", ["resident", "folder-0", "folder-2"], indirect=True)


@pytest.fixture(params=["resident", "folder-0", "folder-2", "datasets-0", "datasets-2"])
def make(request: pytest.FixtureRequest, image_root: Path) -> Make:
    """12 training and 6 test samples in batches of 5."""
    kind, _, workers = request.param.partition("-")

    def build(
        *, seed: int = 0, network: int = 0, replica: int = 0, replicas: int = 1, **options: Any
    ) -> Data:
        options |= {"batch_size": 5, "workers": int(workers or 0), "root": str(image_root)}
        common: dict[str, Any] = {
            "seed": seed,
            "network": network,
            "device": torch.device("cpu"),
            "share": Share(replica, replicas),
        }
        if kind == "datasets":
            content = Datasets(train=Noisy(12), test=Noisy(6, first=100))
            return DatasetData(content, DataConfig(**options), **common)
        if kind == "folder":
            config = DataConfig(name="imagefolder", image_size=16, **options)
            return FolderImages(config, channels_last=False, **common)
        images = numbered(12, 3, 12), numbered(6, 3, 12, first=100)
        info = DatasetInfo(num_classes=200, mean=(0.5,) * 3, std=(0.25,) * 3)
        return ResidentImages(*images, info, DataConfig(**options), channels_last=False, **common)

    return build


def epoch(data: Data, number: int = 0) -> list[Any]:
    return list(data.train_batches(number, 0, data.steps_per_epoch))


def global_states() -> list[Any]:
    return [torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())]


def test_sizes(make: Make) -> None:
    data = make()
    assert (data.train_size, data.steps_per_epoch, data.has_validation) == (12, 3, False)
    assert [len(target) for _, target in epoch(data)] == [5, 5, 2]
    assert [len(target) for _, target in data.eval_batches("test")] == [5, 1]
    few = make(train_samples=6, test_samples=4)
    assert [len(target) for _, target in epoch(few)] == [5, 1]
    assert [len(target) for _, target in few.eval_batches("test")] == [4]


def test_batches_are_reproducible_also_from_within_an_epoch(make: Make) -> None:
    whole, evaluated = epoch(make(), 2), list(make().eval_batches("test"))
    data = make()
    assert same(list(data.train_batches(2, 1, 3)), whole[1:])
    assert list(data.train_batches(2, 1, 1)) == []
    assert same(list(data.eval_batches("test")), evaluated)
    assert same(list(data.train_batches(2, 0, 1)), whole[:1])


def test_batches_depend_on_network_epoch_and_seed(make: Make) -> None:
    base = epoch(make())
    for other in (epoch(make(network=1)), epoch(make(seed=1)), epoch(make(), 1)):
        assert not same(other, base)
        assert sorted(targets(other)) == sorted(targets(base))


def test_the_global_generators_are_left_unchanged(make: Make) -> None:
    torch.manual_seed(0)
    before = global_states()
    data = make(val_fraction=0.25)
    for _ in data.train_batches(0, 0, data.steps_per_epoch):
        assert global_states() == before
    list(data.eval_batches("val"))
    assert global_states() == before


@images_only
def test_augmented_batches_are_functions_of_seed_network_and_position(make: Make) -> None:
    before = global_states()
    whole = epoch(make(**AUGMENTED), 2)
    assert global_states() == before
    assert same(list(make(**AUGMENTED).train_batches(2, 1, 3)), whole[1:])
    for other in (make(network=1, **AUGMENTED), make(seed=1, **AUGMENTED)):
        assert not same(epoch(other, 2), whole)
    classes = next(make().train_batches(2, 0, 1))[1]
    assert whole[0][1].shape == (5, make().num_classes)  # type: ignore[attr-defined]
    assert torch.all(whole[0][1].gather(1, classes[:, None]) >= 0)
    assert same(list(make(**AUGMENTED).eval_batches("test")), list(make().eval_batches("test")))


@images_only
@pytest.mark.parametrize("option", ["random_erasing", "rand_augment"])
def test_single_images_are_augmented_in_place(make: Make, option: str) -> None:
    """Order, crops, and labels are those of a run without it."""
    plain, changed = epoch(make()), epoch(make(**{option: AUGMENTED[option]}))
    different = 0
    for (images, classes), (others, same_classes) in zip(plain, changed, strict=True):
        assert torch.equal(classes, same_classes)
        different += sum(not torch.equal(*pair) for pair in zip(images, others, strict=True))
    assert 0 < different <= 12


@images_only
@pytest.mark.parametrize("replicas", [2, 3, 4])
def test_replicas_mix_the_same_pairs(make: Make, replicas: int) -> None:
    test_replicas_load_their_parts_of_the_same_batches(partial(make, **AUGMENTED), replicas)


@pytest.mark.parametrize("replicas", [2, 4])
def test_replicas_load_their_parts_of_the_same_batches(make: Make, replicas: int) -> None:
    parts = [make(replica=replica, replicas=replicas) for replica in range(replicas)]
    epochs = [epoch(part) for part in parts]
    for step, (inputs, target) in enumerate(epoch(make())):
        pieces = [
            batches[step]
            for part, batches in zip(parts, epochs, strict=True)
            if part.part(step).counts
        ]
        assert torch.equal(torch.cat([piece for piece, _ in pieces]), inputs)
        assert torch.equal(torch.cat([piece for _, piece in pieces]), target)
    evaluated = [batch for part in parts for batch in part.eval_batches("test")]
    inputs = torch.cat([inputs for inputs, _ in make().eval_batches("test")])
    assert torch.equal(torch.cat([piece for piece, _ in evaluated]), inputs)


def test_validation_is_disjoint_and_the_same_for_every_network(make: Make) -> None:
    data = make(val_fraction=0.25)
    assert data.has_validation
    assert data.train_size == 9
    held_out = list(data.eval_batches("val"))
    assert sorted(targets(held_out) + targets(epoch(data))) == sorted(targets(epoch(make())))
    assert same(list(make(val_fraction=0.25, network=1).eval_batches("val")), held_out)
    with pytest.raises(ConfigError, match=r"data\.val_fraction is 0"):
        make().eval_batches("val")


@pytest.mark.parametrize(("first", "last"), [(-1, 2), (2, 1), (0, 4)])
def test_steps_are_checked_at_the_call(make: Make, first: int, last: int) -> None:
    with pytest.raises(ValueError, match=r"within \[0, 3\]"):
        make().train_batches(0, first, last)
