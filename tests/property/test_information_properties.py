"""Properties of the criteria and of the graft coefficient."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_graft import entropy, filter_entropy, graft_coefficient, l1
from dist_graft.grafting import information as information_module
from dist_graft.grafting.information import (
    CRITERIA,
    first_not_finite,
    information_of_all,
    is_finite,
)
from dist_graft.grafting.multi_tensor import forced_multi_tensor

finite = st.floats(allow_nan=False, allow_infinity=False, width=32)
weights = st.lists(finite, min_size=1, max_size=60).map(torch.tensor)
bins = st.integers(1, 40)
steps = st.lists(st.integers(-500, 500), min_size=1, max_size=60)
information = st.floats(-1e6, 1e6)
amplitudes = st.floats(0, 1)
sensitivities = st.floats(0, 1e6)


@given(weights, bins)
def test_entropy_lies_between_0_and_ln_b(weight, num_bins):
    value = entropy(weight, num_bins=num_bins).item()
    assert 0 <= value <= math.log(num_bins)
    assert value <= math.log(weight.numel()) + 1e-12


@given(weights.flatmap(lambda w: st.tuples(st.just(w), st.permutations(range(len(w))))), bins)
def test_entropy_is_invariant_to_order(case, num_bins):
    weight, order = case
    assert entropy(weight[list(order)], num_bins=num_bins) == entropy(weight, num_bins=num_bins)


@given(weights, st.integers(1, 6), bins)
def test_entropy_is_invariant_to_shape(weight, columns, num_bins):
    weight = weight.repeat(columns)
    matrix = weight.view(columns, -1)
    assert entropy(matrix, num_bins=num_bins) == entropy(weight, num_bins=num_bins)
    assert entropy(matrix.t(), num_bins=num_bins) == entropy(weight, num_bins=num_bins)


moderate = finite.filter(lambda value: value == 0 or 1e-20 < abs(value) < 1e20)


@given(st.lists(moderate, min_size=1, max_size=60), st.integers(-40, 40), bins)
def test_entropy_is_invariant_to_positive_scaling(values, power, num_bins):
    """By a power of two, for which the scaled weights are exact."""
    weight = torch.tensor(values)
    scaled = entropy(weight * 2.0**power, num_bins=num_bins)
    assert scaled == entropy(weight, num_bins=num_bins)


@given(steps, st.integers(-100_000, 100_000), bins)
def test_entropy_is_invariant_to_shifts(values, shift, num_bins):
    """By integers, for which the shifted weights are exact."""
    weight = torch.tensor(values, dtype=torch.float32)
    assert entropy(weight + shift, num_bins=num_bins) == entropy(weight, num_bins=num_bins)


@given(weights, st.integers(2, 5))
def test_entropy_is_invariant_to_repetition(weight, times):
    assert entropy(weight.repeat(times)).item() == pytest.approx(entropy(weight).item(), abs=1e-12)


@given(finite, st.integers(1, 50), bins)
def test_entropy_of_a_constant_is_0(value, size, num_bins):
    assert entropy(torch.full((size,), value), num_bins=num_bins).item() == 0


@given(steps, st.sampled_from([torch.bfloat16, torch.float16, torch.float64]), bins)
def test_entropy_is_invariant_to_dtype(values, dtype, num_bins):
    weight = torch.tensor(values).to(dtype)
    assert entropy(weight, num_bins=num_bins) == entropy(weight.float(), num_bins=num_bins)


@given(st.lists(weights, min_size=1, max_size=8), bins)
def test_filter_entropy_is_the_sum_over_filters(filters, num_bins):
    size = min(row.numel() for row in filters)
    rows = torch.stack([row[:size] for row in filters])
    alone = sum(entropy(row, num_bins=num_bins).item() for row in rows)
    assert filter_entropy(rows, num_bins=num_bins).item() == pytest.approx(alone, abs=1e-9)


@given(st.lists(moderate, min_size=1, max_size=60))
def test_l1_is_a_mean(values):
    sizes = [abs(value) for value in values]
    value = l1(torch.tensor(values)).item()
    assert min(sizes) * (1 - 1e-5) <= value <= max(sizes) * (1 + 1e-5)


@given(information, information, amplitudes, sensitivities)
def test_coefficient_stays_within_its_bounds(recipient, donor, amplitude, sensitivity):
    kept = graft_coefficient(recipient, donor, amplitude=amplitude, sensitivity=sensitivity)
    assert 0 <= kept <= 1
    assert 0.5 - amplitude / 2 - 1e-15 <= kept <= 0.5 + amplitude / 2 + 1e-15


@given(information, information, amplitudes, sensitivities)
def test_swapping_the_networks_gives_1_minus_the_coefficient(one, other, amplitude, sensitivity):
    options = {"amplitude": amplitude, "sensitivity": sensitivity}
    kept = graft_coefficient(one, other, **options)
    assert graft_coefficient(other, one, **options) == pytest.approx(1 - kept, abs=1e-15)


@given(information, information, information, amplitudes, sensitivities)
def test_coefficient_is_monotonic_in_the_recipients_information(
    one, other, donor, amplitude, sensitivity
):
    options = {"amplitude": amplitude, "sensitivity": sensitivity}
    less, more = sorted((one, other))
    assert graft_coefficient(less, donor, **options) <= graft_coefficient(more, donor, **options)
    if less < donor:
        assert graft_coefficient(less, donor, **options) <= 0.5


@given(information, information, amplitudes, st.floats(0, 1e3), st.floats(0, 1e3))
def test_coefficient_is_monotonic_in_the_sensitivity(recipient, donor, amplitude, low, high):
    low, high = sorted((low, high))
    options = {"amplitude": amplitude}
    near = graft_coefficient(recipient, donor, sensitivity=low, **options)
    far = graft_coefficient(recipient, donor, sensitivity=high, **options)
    assert abs(near - 0.5) <= abs(far - 0.5)


@given(st.floats(-8e307, 8e307), sensitivities)
def test_coefficient_of_finite_information_is_finite(size, sensitivity):
    kept = graft_coefficient(size, -size, amplitude=0.4, sensitivity=sensitivity)
    assert 0 <= kept <= 1


@given(st.lists(st.tuples(information, information), min_size=1), amplitudes, sensitivities)
def test_tensors_and_floats_give_the_same_coefficient(pairs, amplitude, sensitivity):
    options = {"amplitude": amplitude, "sensitivity": sensitivity}
    recipients, donors = (
        torch.tensor(side, dtype=torch.float64) for side in zip(*pairs, strict=True)
    )
    alone = [graft_coefficient(recipient, donor, **options) for recipient, donor in pairs]
    assert graft_coefficient(recipients, donors, **options).tolist() == pytest.approx(
        alone, abs=1e-14
    )


TYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
anything = st.one_of(st.floats(), st.floats(-1, 1), st.sampled_from([0.0, 1.7e308, -1.7e308, 3e38]))


@st.composite
def matrices(draw: st.DrawFn, values: st.SearchStrategy[float] = anything) -> torch.Tensor:
    """[filters, weights per filter] of any dtype."""
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    drawn = draw(st.lists(values, min_size=rows * columns, max_size=rows * columns))
    matrix = torch.tensor(drawn, dtype=torch.float64).view(rows, columns)
    return matrix.to(draw(st.sampled_from(TYPES)))


@given(
    st.lists(matrices(), min_size=1, max_size=5),
    st.sampled_from(sorted(CRITERIA)),
    bins,
    st.integers(1, 50),
)
def test_all_layers_together_give_the_bits_of_each_layer_alone(layers, criterion, num_bins, batch):
    def alone() -> torch.Tensor:
        return torch.stack([CRITERIA[criterion](layer, num_bins) for layer in layers])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(information_module, "_BATCH", batch)
        if all(map(is_finite, layers)):
            together = information_of_all(layers, criterion, num_bins=num_bins)
            assert together.tolist() == alone().tolist()
        else:
            for measure in (alone, lambda: information_of_all(layers, criterion)):
                with pytest.raises(ValueError, match="needs finite weights"):
                    measure()


@given(st.lists(st.one_of(matrices(), st.just(torch.empty(0))), max_size=6))
def test_first_tensor_that_is_not_finite(tensors):
    finite = [bool(tensor.isfinite().all()) for tensor in tensors]
    expected = None if all(finite) else finite.index(False)
    assert first_not_finite(tensors) == expected
    with forced_multi_tensor():
        assert first_not_finite(tensors) == expected
