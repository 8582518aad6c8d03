"""DiLoCo's outer optimizer against torch.optim.SGD, and the mean that it starts from."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dist_graft import Average, Diloco, graft_units, mix
from dist_graft.grafting.divergence import without_diverged
from dist_graft.grafting.mixing import EqualMean
from dist_graft.grafting.units import graft_tensors
from dist_graft.integrations.rounds import refuse_rule_state


def network(seed: int, kind: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 3)).to(kind)
    with torch.no_grad():
        for tensor in graft_tensors(model).values():
            tensor.copy_(torch.randn(tensor.shape))
    return model


UNITS = graft_units(network(0))


def mean_of(networks: int, *, lost: frozenset[int] = frozenset()) -> EqualMean:
    mixing = Diloco().decide(torch.zeros(networks, len(UNITS), dtype=torch.float64), 0)
    mixing = without_diverged(mixing, lost, heal=True) if lost else mixing
    assert isinstance(mixing, EqualMean)
    return mixing


@pytest.mark.parametrize(("lr", "momentum"), [(0.7, 0.9), (1.0, 0.0), (0.3, 0.5)])
def test_the_outer_step_is_nesterov_sgd_of_torch_bit_for_bit(lr: float, momentum: float) -> None:
    rule, tensors = Diloco(outer_lr=lr, outer_momentum=momentum), graft_tensors(network(0))
    state = rule.init_state(UNITS, tensors)
    keys = [key for unit in UNITS for key in unit.tensors if key not in unit.buffers]
    assert set(state) == {f"{what}.{key}" for what in ("outer", "momentum") for key in keys}
    expected = [nn.Parameter(tensors[key].detach().clone()) for key in keys]
    optimizer = torch.optim.SGD(expected, lr=lr, momentum=momentum, nesterov=momentum > 0)
    for number in range(1, 5):
        mean = {key: value.detach() for key, value in graft_tensors(network(number)).items()}
        after = {key: value.clone() for key, value in mean.items()}
        for parameter, key in zip(expected, keys, strict=True):
            parameter.grad = parameter.detach() - mean[key]
        optimizer.step()
        rule.after_exchange(UNITS, after, state)
        for parameter, key in zip(expected, keys, strict=True):
            assert torch.equal(after[key], parameter)
            assert torch.equal(state[f"outer.{key}"], parameter)
        assert all(torch.equal(after[key], mean[key]) for key in after if key not in keys)


def test_outer_weights_of_small_dtypes_are_float32() -> None:
    rule, tensors = Diloco(), graft_tensors(network(0, torch.bfloat16))
    state = rule.init_state(UNITS, tensors)
    assert {value.dtype for value in state.values()} == {torch.float32}
    rule.after_exchange(UNITS, tensors, state)
    weight = tensors["0.weight"].detach()
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight, state["outer.0.weight"].bfloat16())


def test_weights_that_no_network_changed_stay() -> None:
    """Frozen weights: the mean of equal values is exact, and so the outer gradient is zero."""
    rule, states = Diloco(), [dict(graft_tensors(network(0))) for _ in range(3)]
    state = rule.init_state(UNITS, states[0])
    for _ in range(3):
        states = mix(states, UNITS, mean_of(3))
        rule.after_exchange(UNITS, states[0], state)
        assert all(torch.equal(states[0][k], v) for k, v in graft_tensors(network(0)).items())


@given(st.integers(1, 5), st.data())
def test_all_networks_get_the_same_bits(networks: int, data: st.DataObject) -> None:
    lost = frozenset(data.draw(st.sets(st.integers(0, networks - 1), max_size=networks - 1)))
    states = [dict(graft_tensors(network(seed))) for seed in range(networks)]
    for each in lost:
        states[each]["0.weight"] = torch.full_like(states[each]["0.weight"], float("nan"))
    mixing = mean_of(networks, lost=lost)
    after = mix(states, UNITS, mixing)
    finite = [state for k, state in enumerate(states) if k not in lost]
    for key, value in after[0].items():
        assert all(torch.equal(value, other[key]) for other in after)
        mean = torch.stack([state[key].double() for state in finite]).mean(dim=0)
        torch.testing.assert_close(value.double(), mean, rtol=1e-5, atol=1e-6)
    assert (mixing.mean_fractions() is None) == (bool(lost) or networks == 1)


def test_the_mean_cannot_be_scaled() -> None:
    assert mean_of(2).scaled(1.0).donors == mean_of(2).donors
    with pytest.raises(ValueError, match=r"rate must be 1 for this method, got 0\.5"):
        mean_of(2).scaled(0.5)


def test_other_rules_keep_no_state() -> None:
    assert Average().init_state(UNITS, graft_tensors(network(0))) == {}


def test_callbacks_of_frameworks_refuse_a_rule_with_a_state() -> None:
    with pytest.raises(ValueError, match=r"Diloco keeps state .* use dist_graft\.Trainer"):
        refuse_rule_state(Diloco())
    refuse_rule_state(Average())
    refuse_rule_state(None)
