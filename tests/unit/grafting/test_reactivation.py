"""Noise and internal scions against loops in numpy, for every layer type and memory format."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dist_graft import graft_units
from dist_graft.grafting.reactivation import graft_internal, graft_noise, noise_deviation

LAYERS = {
    "plain": nn.Conv2d(3, 5, 3),
    "grouped": nn.Conv2d(6, 4, 3, groups=2),
    "depthwise": nn.Conv2d(6, 6, 3, groups=6),
    "pointwise": nn.Conv2d(4, 5, 1),
    "transposed": nn.ConvTranspose2d(3, 5, 2),
    "transposed pointwise": nn.ConvTranspose2d(3, 5, 1),
    "grouped transposed": nn.ConvTranspose2d(6, 4, 2, groups=2),
    "one dimension": nn.Conv1d(3, 5, 3),
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def layer(count: int, weights: int, *, seed: int = 0) -> torch.Tensor:
    """Filters, every other one with an L1 norm below 0.1."""
    values = np.random.default_rng(seed).standard_normal((count, weights)) / weights
    values[::2] *= 1e-3
    return torch.tensor(values, dtype=torch.float32)


def internal(filters: np.ndarray, threshold: float) -> np.ndarray:
    """Reference for `graft_internal`."""
    norms = [float(np.abs(row).sum()) for row in filters]
    smallest = sorted(range(len(norms)), key=lambda index: norms[index])
    after = filters.copy()
    left, right = 0, len(norms) - 1
    while left < right and norms[smallest[left]] < threshold:
        after[smallest[left]] = filters[smallest[right]]
        left, right = left + 1, right - 1
    return after


def filters_of(kind: str, weight: np.ndarray) -> list[list[tuple[int, ...]]]:
    """Positions in the weight of each output channel's weights, by output channel."""
    module = LAYERS[kind]
    positions: list[list[tuple[int, ...]]] = [[] for _ in range(module.out_channels)]
    for position in np.ndindex(weight.shape):
        out = position[0]
        if "transposed" in kind:
            group = position[0] // (module.in_channels // module.groups)
            out = group * (module.out_channels // module.groups) + position[1]
        positions[out].append(position)
    return positions


def weight_of(kind: str, memory: torch.memory_format) -> torch.Tensor:
    """Weight with a different norm for each filter; even filters are invalid."""
    random = np.random.default_rng(1)
    weight = random.standard_normal(tuple(LAYERS[kind].weight.shape)).astype(np.float32)
    for number, positions in enumerate(filters_of(kind, weight)):
        for position in positions:
            weight[position] *= (1 + number) * (1e-4 if number % 2 == 0 else 1.0)
    tensor = torch.tensor(weight)
    return tensor.contiguous(memory_format=memory) if tensor.dim() == 4 else tensor


MEMORY = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize(("round_", "annealing"), [(0, 0.975), (1, 0.975), (40, 0.9), (7, 1.0)])
def test_noise_deviation_anneals(round_, annealing):
    expected = 1.0
    for _ in range(round_):
        expected *= annealing
    assert noise_deviation(round_, annealing=annealing) == pytest.approx(expected)
    assert noise_deviation(2) == pytest.approx(0.975 * 0.975)


@pytest.mark.parametrize(
    ("given_", "text"),
    [
        ((0, 0.0), "annealing must be in (0, 1], got 0.0"),
        ((0, 1.01), "annealing must be in (0, 1], got 1.01"),
        ((0, float("nan")), "annealing must be in (0, 1], got nan"),
        ((-1, 0.9), "round must be at least 0, got -1"),
    ],
)
def test_invalid_annealing_is_an_error(given_, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        noise_deviation(given_[0], annealing=given_[1])


def test_only_invalid_filters_get_noise():
    filters = layer(9, 50)
    before = filters.clone()
    after = graft_noise(filters, deviation=0.5, generator=generator())
    assert torch.equal(filters, before)
    drawn = torch.randn(9, 50, generator=generator()).numpy()
    for number, row in enumerate(before.numpy()):
        expected = row + 0.5 * drawn[number] if np.abs(row).sum() < 0.1 else row
        np.testing.assert_allclose(after[number].numpy(), expected, rtol=0, atol=1e-7)
    assert torch.equal(after[1::2], before[1::2])
    assert not (after[::2] == before[::2]).any()


def test_noise_has_the_given_deviation():
    filters = torch.zeros(100, 200)
    after = graft_noise(filters, deviation=0.3, generator=generator())
    assert float(after.std()) == pytest.approx(0.3, rel=0.02)
    assert abs(float(after.mean())) < 0.3 * 4 / 20_000**0.5


@pytest.mark.parametrize("threshold", [1e-9, 0.1, 1e9])
def test_generator_advances_independently_of_the_threshold(threshold):
    draw, reference = generator(), generator()
    graft_noise(layer(6, 7), deviation=1.0, threshold=threshold, generator=draw)
    torch.randn(6, 7, generator=reference)
    assert torch.equal(draw.get_state(), reference.get_state())


def test_filter_at_the_threshold_is_valid():
    filters = torch.tensor([[0.25, -0.25], [0.25, -0.125]])
    after = graft_noise(filters, deviation=1.0, threshold=0.5, generator=generator())
    assert torch.equal(after[0], filters[0])
    assert not torch.equal(after[1], filters[1])
    assert torch.equal(graft_internal(filters, threshold=0.375), filters)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64])
def test_dtype_is_preserved(kind):
    filters = layer(5, 8).to(kind)
    assert graft_noise(filters, deviation=1.0, generator=generator()).dtype == kind
    assert graft_internal(filters).dtype == kind


@given(
    count=st.integers(1, 15),
    weights=st.integers(1, 6),
    threshold=st.sampled_from([1e-3, 0.1, 0.5, 1e9]),
    seed=st.integers(0, 1000),
)
def test_strong_filters_reposition_invalid_ones(count, weights, threshold, seed):
    filters = layer(count, weights, seed=seed)
    before = filters.clone()
    after = graft_internal(filters, threshold=threshold)
    assert torch.equal(filters, before)
    np.testing.assert_array_equal(after.numpy(), internal(before.numpy(), threshold))


def test_middle_filter_of_an_odd_number_is_unchanged():
    filters = torch.tensor([[0.03], [0.01], [0.05], [0.02], [0.04]])
    after = graft_internal(filters, threshold=1.0)
    assert after.flatten().tolist() == filters[[0, 2, 2, 4, 4]].flatten().tolist()


@pytest.mark.parametrize("memory", MEMORY, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_store_filters_is_the_inverse_of_filters(kind, memory):
    (unit,) = graft_units(nn.Sequential(LAYERS[kind]))
    weight = weight_of(kind, memory)
    filters = unit.filters(weight).clone()
    rows = [sorted(row) for row in filters.tolist()]
    array = weight.numpy()
    assert rows == [
        sorted(float(array[position]) for position in positions)
        for positions in filters_of(kind, array)
    ]
    other = torch.zeros_like(weight)
    unit.store_filters(other, filters)
    assert torch.equal(other, weight)
    assert other.stride() == weight.stride()


@pytest.mark.parametrize("memory", MEMORY, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_internal_scions_in_every_memory_format(kind, memory):
    (unit,) = graft_units(nn.Sequential(LAYERS[kind]))
    weight = weight_of(kind, memory)
    array = weight.numpy().copy()
    positions = filters_of(kind, array)
    rows = np.array([[array[position] for position in few] for few in positions])
    expected = array.copy()
    for few, row in zip(positions, internal(rows, 0.1), strict=True):
        for position, value in zip(few, row, strict=True):
            expected[position] = value
    unit.store_filters(weight, graft_internal(unit.filters(weight)))
    np.testing.assert_array_equal(weight.numpy(), expected)
    assert not np.array_equal(expected, array)


@pytest.mark.parametrize("memory", MEMORY, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_noise_in_every_memory_format_changes_only_invalid_filters(kind, memory):
    (unit,) = graft_units(nn.Sequential(LAYERS[kind]))
    weight = weight_of(kind, memory)
    before = weight.numpy().copy()
    noisy = graft_noise(unit.filters(weight), deviation=1.0, generator=generator())
    unit.store_filters(weight, noisy)
    changed = weight.numpy() != before
    for positions in filters_of(kind, before):
        invalid = sum(abs(float(before[position])) for position in positions) < 0.1
        assert {bool(changed[position]) for position in positions} == {invalid}
