"""Entropy and L1 against numpy in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from dist_graft import entropy, filter_entropy, graft_units, l1
from dist_graft.grafting.information import CRITERIA, entropies, filter_norms, invalid_filters

INFORMATION = [entropy, filter_entropy, l1]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def reference(weight: torch.Tensor, num_bins: int = 10) -> float:
    """Eq. 6 bin by bin; only the last bin includes its upper edge."""
    values = weight.double().numpy().ravel()
    low, high = values.min(), values.max()
    if low == high:
        return 0.0
    edges = [low + (high - low) * k / num_bins for k in range(num_bins)]
    total = 0.0
    for k in range(num_bins):
        below = values < edges[k + 1] if k + 1 < num_bins else np.full(values.shape, True)
        share = ((values >= edges[k]) & below).sum() / values.size
        total -= share * math.log(share) if share else 0.0
    return total


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("num_bins", [1, 2, 7, 10, 100])
@pytest.mark.parametrize("shape", [(1,), (2,), (16, 3, 3, 3), (64, 128), (5, 4, 3, 2, 1)])
def test_entropy_is_eq_6(shape, num_bins):
    weight = normal(*shape)
    value = entropy(weight, num_bins=num_bins)
    assert value.dtype == torch.float64
    assert value.shape == ()
    assert value.item() == pytest.approx(reference(weight, num_bins), abs=1e-12)


@pytest.mark.parametrize("dtype", FLOATS)
def test_entropy_of_every_floating_point_dtype(dtype):
    weight = normal(32, 16, 3, 3, dtype=dtype)
    assert entropy(weight).item() == pytest.approx(reference(weight), abs=1e-12)
    assert entropy(weight).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_the_entropy_of_float32(dtype):
    weight = normal(3000, dtype=dtype)
    assert entropy(weight) == entropy(weight.float())


def test_bin_edges_of_doubles_are_float32():
    weight = normal(3000, dtype=torch.float64)
    assert entropy(weight) == entropy(weight.float())
    assert entropy(1 + weight * 1e-12) == 0  # one number in float32


def test_last_bin_includes_its_upper_edge():
    """Half-open bins would drop the largest weights."""
    assert entropy(torch.tensor([0.0, 0, 1, 1])).item() == pytest.approx(math.log(2))
    assert entropy(torch.arange(11.0)).item() == pytest.approx(
        -(9 * math.log(1 / 11) + 2 * math.log(2 / 11)) / 11
    )


@pytest.mark.parametrize("value", [0.0, -3.5, 1e-42, 3e38])
@pytest.mark.parametrize("size", [1, 2, 1000])
def test_constant_layer_has_no_information(value, size):
    assert entropy(torch.full((size,), value)).item() == 0
    assert filter_entropy(torch.full((3, size), value)).item() == 0


def test_scalar_weight_has_entropy_0():
    assert entropy(torch.tensor(2.0)).item() == 0


def test_bin_with_more_than_2_to_the_24_weights():
    """float32 counts would stop at 16,777,216."""
    weight = torch.zeros(40_000_000)
    weight[:10] = 1
    share = 10 / weight.numel()
    expected = -share * math.log(share) - (1 - share) * math.log1p(-share)
    assert entropy(weight).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("information", INFORMATION)
def test_nonfinite_weight_is_an_error(information, dtype, value):
    weight = normal(4, 5, dtype=dtype)
    weight[3, 4] = value
    with pytest.raises(ValueError, match="NaN or infinity"):
        information(weight)


@pytest.mark.parametrize("information", INFORMATION)
@pytest.mark.parametrize(
    "weight",
    [torch.empty(0, 3), torch.ones(2, 2, dtype=torch.int64), torch.ones(2, dtype=torch.complex64)],
    ids=["empty", "integer", "complex"],
)
def test_empty_or_non_floating_point_weight_is_an_error(information, weight):
    with pytest.raises(ValueError, match=str(weight.dtype)):
        information(weight)


@pytest.mark.parametrize("information", [entropy, filter_entropy])
@pytest.mark.parametrize("num_bins", [0, -1])
def test_num_bins_below_1_is_an_error(information, num_bins):
    with pytest.raises(ValueError, match=f"num_bins must be at least 1, got {num_bins}"):
        information(normal(4, 5), num_bins=num_bins)


@pytest.mark.parametrize("information", INFORMATION)
def test_parameters_are_measured_without_autograd(information):
    weight = nn.Parameter(normal(4, 5))
    before = weight.detach().clone()
    assert not information(weight).requires_grad
    assert torch.equal(weight, before)


NON_CONTIGUOUS = {
    "channels_last": normal(6, 5, 4, 3).to(memory_format=torch.channels_last),
    "transposed": normal(5, 7).t(),
    "permuted": normal(3, 4, 5).permute(2, 0, 1),
    "with_gaps": normal(8, 9)[:, ::2],
    "cut_out": normal(8, 9)[2:5, 3:7],
    "expanded": normal(4, 1).expand(4, 3),
}


@pytest.mark.parametrize("weight", NON_CONTIGUOUS.values(), ids=NON_CONTIGUOUS.keys())
@pytest.mark.parametrize("information", INFORMATION)
def test_memory_format_does_not_matter(information, weight):
    expected = information(weight.clone(memory_format=torch.contiguous_format))
    assert information(weight).item() == pytest.approx(expected.item(), rel=1e-6)


def test_range_that_overflows_float32():
    weight = torch.linspace(-1, 1, 101, dtype=torch.float64).mul(3.4e38).float()
    assert (weight.max() - weight.min()).isinf()
    assert entropy(weight).item() == pytest.approx(reference(weight), abs=1e-12)
    both = torch.stack([weight, weight.flip(0) / 2])
    assert filter_entropy(both).item() == pytest.approx(2 * reference(weight), abs=1e-12)


def test_range_of_denormal_numbers():
    weight = torch.arange(0, 1001, dtype=torch.float64).mul(1e-42).float()
    assert 0 < weight[1] < torch.finfo(torch.float32).tiny
    assert entropy(weight).item() == pytest.approx(reference(weight), abs=5e-3)


@pytest.mark.parametrize("largest", [1e39, 1e300])
def test_doubles_that_overflow_float32(largest):
    """They are finite, so they must not raise: an error on one rank would block its peers."""
    weight = normal(500, dtype=torch.float64).clamp(-3, 3) / 3 * largest
    assert entropy(weight).item() == pytest.approx(reference(weight), abs=0.02)


@pytest.mark.parametrize(
    "shape",
    [(1, 20), (16, 3, 3, 3), (700, 1000), (3, 200_000), (2, 1)],
    ids=["one", "convolution", "many", "long", "single_weights"],
)
def test_filter_entropy_is_the_sum_of_eq_4(shape):
    filters = normal(*shape)
    rows = [reference(row, 10) for row in filters]
    # Of 200,000 weights one or two lie so near an edge that float32 puts them into the next bin.
    assert entropies(filters).tolist() == pytest.approx(rows, abs=2e-5)
    assert filter_entropy(filters).item() == pytest.approx(sum(rows), abs=2e-5)


def test_every_filter_has_its_own_bins():
    filters = torch.stack([torch.tensor([0.0, 0, 1, 1]), torch.tensor([1000.0, 1000, 5000, 5000])])
    assert filter_entropy(filters).item() == pytest.approx(2 * math.log(2))
    assert filter_entropy(filters, num_bins=1).item() == 0


@pytest.mark.parametrize("criterion", sorted(CRITERIA))
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 1),
        nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last),
        nn.Conv2d(4, 6, 1, groups=2).to(memory_format=torch.channels_last),
        nn.ConvTranspose1d(4, 6, 1),
        nn.ConvTranspose2d(4, 6, 1),
        nn.ConvTranspose2d(4, 6, 3),
        nn.ConvTranspose2d(4, 6, 3, groups=2),
        nn.ConvTranspose2d(4, 6, 3).to(memory_format=torch.channels_last),
        nn.Linear(4, 6),
    ],
    ids=str,
)
def test_every_criterion_measures_every_lead_type(criterion, layer):
    (unit,) = graft_units(layer, lead="conv+linear")
    filters = unit.filters(layer.weight.detach())
    rows = filters.clone(memory_format=torch.contiguous_format)
    expected = {
        "entropy": reference(rows),
        "filter_entropy": sum(reference(row) for row in rows),
        "l1": rows.double().abs().mean().item(),
    }
    assert CRITERIA[criterion](filters, 10).item() == pytest.approx(expected[criterion], rel=1e-6)


@pytest.mark.parametrize("dtype", FLOATS)
def test_l1_is_the_mean_absolute_weight(dtype):
    weight = normal(64, 32, 3, 3, dtype=dtype)
    expected = np.abs(weight.double().numpy()).mean()
    assert l1(weight).dtype == torch.float64
    assert l1(weight).item() == pytest.approx(expected, rel=1e-6)


def test_l1_of_large_weights_is_finite():
    """The sum of these weights overflows float32, their mean does not."""
    weight = torch.tensor([3e38, -3e38, 3e38, 3e38])
    assert l1(weight).item() == pytest.approx(3e38, rel=1e-6)


@pytest.mark.parametrize("dtype", FLOATS)
def test_filter_norms_are_sums_of_absolute_weights(dtype):
    filters = normal(6, 3, 3, 3, dtype=dtype)
    expected = np.abs(filters.double().numpy()).sum(axis=(1, 2, 3))
    assert filter_norms(filters).tolist() == pytest.approx(expected.tolist(), rel=1e-6)


def test_invalid_filters_are_below_the_threshold():
    filters = torch.tensor([[0.0, 0.0], [0.05, -0.04], [-0.125, 0.125], [3.0, -3.0]])
    counted = [int(invalid_filters(filters, t)) for t in (0.0, 0.01, 0.1, 0.25, 0.26, 100.0)]
    assert counted == [0, 1, 2, 2, 3, 4]
    assert invalid_filters(filters, 0.1).dtype == torch.int64


def test_invalid_filters_of_a_grouped_transposed_convolution():
    """A zero output channel is one invalid filter."""
    layer = nn.ConvTranspose2d(4, 6, 3, groups=2)
    (unit,) = graft_units(layer)
    weight = layer.weight.detach().clone()
    assert invalid_filters(unit.filters(weight), 0.1) == 0
    weight[2:, 1] = 0  # second channel of the second group
    assert invalid_filters(unit.filters(weight), 0.1) == 1
