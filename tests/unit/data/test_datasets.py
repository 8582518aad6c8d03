"""User-defined datasets: determinism, structure of the batches, and errors, with real workers."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sample_data import Noisy, same, targets
from torch.utils.data import Dataset, IterableDataset, TensorDataset

import dist_graft
from dist_graft.config import DataConfig
from dist_graft.errors import ConfigError, DataError, StoppedError
from dist_graft.training.data import Data
from dist_graft.training.data.datasets import DatasetData, Datasets

CPU = torch.device("cpu")


class Failing(Noisy):
    """Fails at index 3."""

    def __init__(self, size: int, failure: Callable[[], Any]) -> None:
        super().__init__(size)
        self.failure = failure

    def __getitem__(self, index: int) -> Any:
        return self.failure() if index == 3 else super().__getitem__(index)


def make(
    train: Any = None,
    test: Any = None,
    val: Any = None,
    *,
    seed: int = 0,
    network: int = 0,
    **options: Any,
) -> DatasetData:
    datasets = Datasets(train=train or Noisy(11), test=test or Noisy(6, first=100), val=val)
    config = DataConfig(**{"batch_size": 4, "workers": 0, **options})
    return DatasetData(datasets, config, seed=seed, network=network, device=CPU)


def epoch(data: Data, number: int = 0) -> list[Any]:
    return list(data.train_batches(number, 0, data.steps_per_epoch))


def test_is_public() -> None:
    assert dist_graft.Datasets is Datasets
    with pytest.raises(TypeError, match="positional"):
        Datasets(Noisy(1), Noisy(1))  # type: ignore[misc]


def test_samples_do_not_depend_on_workers() -> None:
    random.seed(1)  # has no effect
    none, two = make(), make(workers=2)
    assert same(epoch(two), epoch(none))
    assert same(list(two.eval_batches("test")), list(none.eval_batches("test")))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_failure_leaves_the_global_generators_unchanged(workers: int) -> None:
    before = torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())
    with pytest.raises(DataError):
        epoch(make(train=Failing(11, lambda: 1 / 0), workers=workers))
    after = torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())
    assert after == before


def test_samples_depend_on_seed_network_epoch_and_position() -> None:
    def noise(batches: list[Any]) -> dict[int, list[float]]:
        return {
            target: (sample - target).tolist()
            for samples, labels in batches
            for sample, target in zip(samples, labels.tolist(), strict=True)
        }

    base = noise(epoch(make()))
    for part in range(3):
        assert len({round(values[part], 4) for values in base.values()}) == 11
    for other in (epoch(make(seed=1)), epoch(make(network=1)), epoch(make(), 1)):
        assert not any(np.isclose(noise(other)[target], base[target]).any() for target in base)


def test_validation_dataset() -> None:
    data = make(val=Noisy(3, first=50))
    assert (data.train_size, data.has_validation) == (11, True)
    assert targets(data.eval_batches("val")) == [50, 51, 52]


def test_nested_samples_are_collated_and_moved() -> None:
    samples = [
        ({"image": np.full((2, 2), i), "name": f"n{i}"}, (torch.tensor(i), [float(i)]))
        for i in range(4)
    ]
    data = DatasetData(
        Datasets(train=samples, test=samples),
        DataConfig(batch_size=4, workers=0),
        seed=0,
        network=0,
        device=torch.device("meta"),
    )
    ((inputs, target),) = data.eval_batches("test")
    assert inputs["name"] == ["n0", "n1", "n2", "n3"]
    assert inputs["image"].shape == (4, 2, 2)
    assert {t.device.type for t in (inputs["image"], target[0], target[1][0])} == {"meta"}


def test_tensor_dataset() -> None:
    content = TensorDataset(torch.arange(12.0).view(6, 2), torch.arange(6))
    data = make(train=content, test=content)
    ((inputs, target), *_) = data.eval_batches("test")
    assert torch.equal(inputs, torch.arange(8.0).view(4, 2))
    assert torch.equal(target, torch.arange(4))


class Stream(IterableDataset[Any]):
    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Any:
        return iter(range(3))


class Unsized(Dataset[Any]):
    def __getitem__(self, index: int) -> Any:
        return index


@pytest.mark.parametrize("split", ["train", "test", "val"])
@pytest.mark.parametrize(
    ("dataset", "says"),
    [
        ([], "must not be empty, got a list of length 0"),
        (Noisy(0), "must not be empty, got a Noisy of length 0"),
        (Unsized(), "must be a map-style dataset: Unsized has no __len__"),
        (Stream(), "must be a map-style dataset: Stream has no __getitem__"),
        (iter([1]), "must be a map-style dataset: list_iterator has no __len__ and no __getitem__"),
    ],
)
def test_what_is_not_a_map_style_dataset(split: str, dataset: Any, says: str) -> None:
    others = {name: Noisy(2) for name in ("train", "test", "val")}
    with pytest.raises(DataError) as caught:
        Datasets(**{**others, split: dataset})
    assert str(caught.value) == f"Datasets({split}=...) {says}"


def user_error() -> Any:
    raise ValueError("a file\nis missing")


class TestASampleThatCannotBeLoaded:
    @pytest.mark.parametrize("workers", [0, 1, 2])
    @pytest.mark.parametrize("split", ["train", "test", "val"])
    def test_names_split_and_index_with_the_users_traceback(self, split: Any, workers: int) -> None:
        data = make(**{split: Failing(6, user_error)}, workers=workers)
        batches = data.train_batches(0, 0, 2) if split == "train" else data.eval_batches(split)
        with pytest.raises(DataError) as caught:
            list(batches)
        text = f"{split} dataset, index 3: ValueError: a file is missing"
        assert str(caught.value) == text
        cause = caught.value.__cause__
        if workers:
            assert "in user_error" in str(cause)
            assert "ValueError: a file" in str(cause)
        else:
            assert isinstance(cause, ValueError)
            assert cause.__traceback__ is not None

    @pytest.mark.parametrize("workers", [0, 1])
    @pytest.mark.parametrize(
        ("failure", "says"),
        [
            (lambda: torch.zeros(2), "must be an (input, target) pair, got a Tensor"),
            (lambda: (1, 2, 3), "must be an (input, target) pair, got a tuple of length 3"),
        ],
        ids=["tensor", "triple"],
    )
    def test_is_not_a_pair(self, failure: Callable[[], Any], says: str, workers: int) -> None:
        with pytest.raises(DataError) as caught:
            epoch(make(train=Failing(11, failure), workers=workers))
        assert str(caught.value) == f"train dataset, index 3: TypeError: a sample {says}"

    @pytest.mark.parametrize("workers", [0, 1])
    def test_does_not_fit_the_others_of_its_batch(self, workers: int) -> None:
        data = make(train=Failing(4, lambda: (torch.zeros(5), 3)), workers=workers)
        with pytest.raises(DataError, match=r"^train dataset, collating a batch: RuntimeError: "):
            epoch(data)

    def test_a_signal_is_not_an_error_of_the_dataset(self) -> None:
        def stop() -> Any:
            raise StoppedError("stopped by SIGTERM")

        with pytest.raises(StoppedError):
            epoch(make(train=Failing(11, stop)))

    def test_batches_before_it_are_delivered(self) -> None:
        data = make(test=Failing(6, user_error), batch_size=1, workers=2)
        batches = data.eval_batches("test")
        assert [next(batches)[1].item() for _ in range(3)] == [0, 1, 2]
        with pytest.raises(DataError, match="index 3"):
            next(batches)


@pytest.mark.parametrize(
    "option", [{"image_size": 8}, {"channels": 1}, {"augment": False}, {"skip_broken": True}]
)
def test_options_of_images_are_rejected(option: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"data\.{next(iter(option))} applies to built-in image"):
        make(**option)


def test_two_validation_splits_are_rejected() -> None:
    with pytest.raises(ConfigError, match=r"data\.val_fraction and Datasets\(val=\.\.\.\) are"):
        make(val=Noisy(2), val_fraction=0.5)
