from __future__ import annotations

import math

import pytest
import torch

from dist_graft import graft_coefficient


@pytest.mark.parametrize(
    ("recipient", "donor", "amplitude", "sensitivity"),
    [(2.0, 1.5, 0.4, 5.0), (1.5, 2.0, 0.4, 5.0), (0.0, 3.0, 1.0, 500.0), (0.1, 0.0, 0.7, 0.01)],
)
def test_coefficient_is_eq_7(recipient, donor, amplitude, sensitivity):
    expected = amplitude / math.pi * math.atan(sensitivity * (recipient - donor)) + 0.5
    options = {"amplitude": amplitude, "sensitivity": sensitivity}
    value = graft_coefficient(recipient, donor, **options)
    assert isinstance(value, float)
    assert value == pytest.approx(expected, abs=1e-15)
    tensors = graft_coefficient(
        torch.tensor([recipient, donor]).double(),
        torch.tensor([donor, recipient]).double(),
        **options,
    )
    assert tensors.tolist() == pytest.approx([expected, 1 - expected], abs=1e-7)


@pytest.mark.parametrize("value", [0.0, 1.3, -7.0])
def test_equal_information_gives_one_half(value):
    assert graft_coefficient(value, value, amplitude=0.4, sensitivity=5.0) == 0.5


def test_zero_amplitude_or_sensitivity_gives_one_half():
    assert graft_coefficient(3.0, 0.0, amplitude=0, sensitivity=500.0) == 0.5
    assert graft_coefficient(3.0, 0.0, amplitude=1, sensitivity=0) == 0.5


def test_coefficient_stays_within_its_bounds():
    options = {"amplitude": 0.4, "sensitivity": 1e12}
    assert graft_coefficient(1e6, 0.0, **options) == pytest.approx(0.7, abs=1e-12)
    assert graft_coefficient(0.0, 1e6, **options) == pytest.approx(0.3, abs=1e-12)
    assert 0 <= graft_coefficient(0.0, 1e6, amplitude=1, sensitivity=1e12) <= 1e-12
    assert 1 - 1e-12 <= graft_coefficient(1e6, 0.0, amplitude=1, sensitivity=1e12) <= 1


def test_tensors_are_broadcast_and_keep_their_dtype():
    recipient = torch.rand(3, 4, dtype=torch.float64)
    both = graft_coefficient(recipient, torch.rand(4), amplitude=0.4, sensitivity=5.0)
    assert both.shape == (3, 4)
    assert both.dtype == torch.float64
    assert graft_coefficient(torch.rand(2), 0.5, amplitude=0.4, sensitivity=5.0).shape == (2,)
    mixed = graft_coefficient(0.5, torch.rand(()), amplitude=0.4, sensitivity=5.0)
    assert isinstance(mixed, torch.Tensor)
    assert mixed.shape == ()


@pytest.mark.parametrize("amplitude", [-0.1, 1.1, float("nan"), float("inf")])
def test_amplitude_out_of_range_is_an_error(amplitude):
    with pytest.raises(ValueError, match=rf"amplitude must be in \[0, 1\], got {amplitude}"):
        graft_coefficient(1.0, 1.0, amplitude=amplitude, sensitivity=5.0)


@pytest.mark.parametrize("sensitivity", [-1.0, float("nan"), float("inf")])
def test_sensitivity_out_of_range_is_an_error(sensitivity):
    with pytest.raises(ValueError, match=rf"sensitivity must be .*, got {sensitivity}"):
        graft_coefficient(1.0, 1.0, amplitude=0.4, sensitivity=sensitivity)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("tensor", [False, True])
def test_nonfinite_information_is_an_error(value, tensor):
    bad = torch.tensor([1.0, value]) if tensor else value
    for name, arguments in (("recipient", (bad, 1.0)), ("donor", (1.0, bad))):
        with pytest.raises(ValueError, match=f"{name} must be finite, got"):
            graft_coefficient(*arguments, amplitude=0.4, sensitivity=5.0)
