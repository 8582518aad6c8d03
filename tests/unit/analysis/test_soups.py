from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dist_graft.analysis.soups import greedy_soup, uniform_soup


def small(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 4))
    model[1].num_batches_tracked.fill_(seed)
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


class TestUniformSoup:
    @pytest.mark.parametrize("count", [1, 2, 3, 7])
    def test_equals_the_mean_of_numpy(self, count: int) -> None:
        states = [small(seed) for seed in range(count)]
        soup = uniform_soup(states)
        assert list(soup) == list(states[0])
        for key, tensor in soup.items():
            assert tensor.dtype == states[0][key].dtype
            if tensor.is_floating_point():
                values = np.stack([state[key].numpy().astype(np.float64) for state in states])
                np.testing.assert_array_equal(tensor.numpy(), values.mean(0).astype(np.float32))

    def test_integers_are_those_of_the_first_network(self) -> None:
        soup = uniform_soup([small(5), small(9)])
        assert soup["1.num_batches_tracked"].item() == 5

    def test_networks_are_not_modified(self) -> None:
        states = [small(0), small(1)]
        for tensor in uniform_soup(states).values():
            tensor.zero_()
        for seed, state in enumerate(states):
            for key, tensor in small(seed).items():
                assert torch.equal(state[key], tensor)

    def test_types_are_kept(self) -> None:
        states = [
            {"half": torch.tensor([x], dtype=torch.bfloat16), "double": torch.tensor([x]).double()}
            for x in (1.0, 2.0)
        ]
        soup = uniform_soup(states)
        assert soup["half"].dtype == torch.bfloat16
        assert soup["double"].dtype == torch.float64
        assert soup["half"].item() == soup["double"].item() == 1.5


def plain_accuracy(
    weight: NDArray[np.float64], inputs: NDArray[np.float64], labels: NDArray[np.int64]
) -> float:
    return 100 * float(((inputs @ weight.T).argmax(1) == labels).mean())


def plain_greedy(
    weights: list[NDArray[np.float64]], inputs: NDArray[np.float64], labels: NDArray[np.int64]
) -> list[int]:
    """Recipe 1 of arXiv 2203.05482 on linear classifiers."""
    alone = [plain_accuracy(weight, inputs, labels) for weight in weights]
    ingredients: list[int] = []
    reached = -1.0
    for candidate in sorted(range(len(weights)), key=lambda k: (-alone[k], k)):
        tried = [*ingredients, candidate]
        value = plain_accuracy(np.mean([weights[k] for k in tried], axis=0), inputs, labels)
        if value >= reached:
            ingredients, reached = tried, value
    return ingredients


def linear_classifiers(
    seed: int,
) -> tuple[list[NDArray[np.float64]], NDArray[np.float64], NDArray[np.int64]]:
    """Weights of five classifiers, and inputs with the labels of a sixth."""
    random = np.random.default_rng(seed)
    truth = random.normal(size=(4, 6))
    inputs = random.normal(size=(60, 6))
    weights = [truth + random.normal(size=truth.shape) * spread for spread in (0.5, 1, 2, 3, 1)]
    return weights, inputs, (inputs @ truth.T).argmax(1)


class TestGreedySoup:
    @pytest.mark.parametrize("seed", range(12))
    def test_equals_recipe_1_on_linear_classifiers(self, seed: int) -> None:
        weights, inputs, labels = linear_classifiers(seed)
        states = [{"weight": torch.from_numpy(weight)} for weight in weights]

        def accuracy_of(state: dict[str, Tensor]) -> float:
            return plain_accuracy(state["weight"].numpy(), inputs, labels)

        members = greedy_soup(states, [accuracy_of(state) for state in states], accuracy_of)
        assert members == plain_greedy(weights, inputs, labels)

    def test_seeds_above_give_soups_of_several_sizes(self) -> None:
        assert len({len(plain_greedy(*linear_classifiers(seed))) for seed in range(12)}) >= 3

    def test_worse_network_is_skipped_and_later_ones_are_tried(self) -> None:
        states = [{"w": torch.tensor([float(value)])} for value in (1, 2, 4)]
        tried = []

        def accuracy_of(state: dict[str, Tensor]) -> float:
            tried.append(state["w"].item())
            return {3.0: 40.0, 2.5: 60.0}[tried[-1]]  # 2 + 4, 1 + 4

        assert greedy_soup(states, [10.0, 30.0, 50.0], accuracy_of) == [2, 0]
        assert tried == [3.0, 2.5]

    def test_network_that_changes_nothing_joins(self) -> None:
        states = [{"w": torch.tensor([1.0])}] * 3
        assert greedy_soup(states, [50.0, 50.0, 50.0], lambda _: 50.0) == [0, 1, 2]

    def test_one_network(self) -> None:
        assert greedy_soup([small(0)], [10.0], lambda _: 0.0) == [0]
