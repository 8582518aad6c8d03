"""Optimizers of torch.optim by name and of the user's: creation, reset, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import own_components
import pytest
import torch
from small import make_data, make_state, train_steps
from torch import nn

from dist_graft.config import OptimConfig
from dist_graft.errors import ConfigError, FunctionError
from dist_graft.training.optimizers import (
    _BY_NAME,
    _UNSUITABLE,
    build_optimizer,
    check_optimizer_state,
    checked_optimizer,
)
from dist_graft.training.state import TrainState

NAMES = [*sorted(set(_BY_NAME) - set(_UNSUITABLE)), "own_components:SignMomentum"]


def matrix() -> nn.Module:
    """Only weights of two dimensions, which Muon requires."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 4, bias=False))


def tensors(state: TrainState) -> list[torch.Tensor]:
    """Weights and optimizer state."""
    found = list(state.model.parameters())
    for values in state.optimizer.state_dict()["state"].values():
        found += [value for value in values.values() if isinstance(value, torch.Tensor)]
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_reset_and_a_checkpoint_of_every_optimizer(name: str) -> None:
    config, data = OptimConfig(name=name, lr=0.01), make_data()
    start = copy.deepcopy(matrix().state_dict())

    def steps(state: TrainState, first: int, last: int) -> list[torch.Tensor]:
        train_steps(state, data, config, epoch=0, first=first, last=last)
        return copy.deepcopy(tensors(state))

    fresh, used = (make_state(config, model=matrix()) for _ in range(2))
    expected = steps(fresh, 0, 2)
    for _ in range(2):  # the first reset must not share its tensors with the second one
        steps(used, 2, 4)
        used.model.load_state_dict(start)
        used.reset_optimizer()
        used.skip_to(0)
        found = steps(used, 0, 2)
        assert len(found) == len(expected)
        assert all(map(torch.equal, found, expected))

    resumed = make_state(config, model=matrix())
    resumed.load_state_dict(copy.deepcopy(fresh.state_dict()))
    assert all(map(torch.equal, steps(resumed, 2, 4), steps(fresh, 2, 4)))


def test_a_reset_keeps_the_options_that_a_callback_has_set() -> None:
    """But not the number of steps, which is no argument of the optimizer."""
    config = OptimConfig(name="own_components:CountingSGD", kwargs={"momentum": 0.5})
    state = make_state(config, model=matrix())
    train_steps(state, make_data(), config, epoch=0, first=0, last=2)
    (group,) = state.optimizer.param_groups
    assert group["count"] == 2
    group |= {"weight_decay": 0.125, "momentum": 0.25, "lr": 0.0625}
    state.clear_optimizer()
    (group,) = state.optimizer.param_groups
    assert not state.optimizer.state
    assert (group["weight_decay"], group["momentum"], group["lr"]) == (0.125, 0.25, 0.0625)
    assert group["count"] == 0
    assert all(map(torch.equal, group["params"], state.model.parameters()))


@pytest.mark.parametrize(
    "name", ["sgd", "own_components:decayed_sgd", "own_components:forwarded_sgd"]
)
def test_weight_decay_is_passed_where_it_is_an_argument(name: str) -> None:
    config = OptimConfig(name=name, weight_decay=0.25)
    (group,) = build_optimizer(config, matrix(), lr=0.1).param_groups
    assert group["weight_decay"] == 0.25
    own = OptimConfig(name="own_components:SignMomentum")
    (group,) = build_optimizer(own, matrix(), lr=0.1).param_groups
    assert "weight_decay" not in group


def test_arguments_by_option() -> None:
    config = OptimConfig(name="RMSprop", kwargs={"alpha": 0.5, "momentum": 0.25})
    optimizer = build_optimizer(config, matrix(), lr=0.3)
    assert type(optimizer) is torch.optim.RMSprop
    (group,) = optimizer.param_groups
    assert (group["lr"], group["alpha"], group["momentum"]) == (0.3, 0.5, 0.25)
    sgd = build_optimizer(OptimConfig(nesterov=False, kwargs={"dampening": 0.5}), matrix(), lr=0.3)
    assert sgd.param_groups[0]["dampening"] == 0.5


@pytest.mark.parametrize(
    ("name", "kwargs", "fused"),
    [
        ("adam", {}, True),
        ("adam", {"foreach": True}, None),
        ("adam", {"fused": False}, False),
        ("adagrad", {}, None),
    ],
)
def test_fused_kernels_unless_others_are_chosen(
    name: str, kwargs: dict[str, Any], fused: bool | None
) -> None:
    config = OptimConfig(name=name, kwargs=kwargs)
    (group,) = build_optimizer(config, matrix(), lr=0.1, fused=True).param_groups
    assert group.get("fused") is fused


def test_a_user_error_in_a_constructor_keeps_its_traceback() -> None:
    config = OptimConfig(name="own_components:SignMomentum", kwargs={"beta": "x"})
    optimizer = build_optimizer(config, matrix(), lr=0.1)
    assert isinstance(optimizer, own_components.SignMomentum)
    with pytest.raises(ConfigError, match=r"optim\.name sgd: Invalid learning rate"):
        build_optimizer(OptimConfig(), matrix(), lr=-1.0)
    with pytest.raises(FunctionError, match="decayed_sgd failed: ValueError: Invalid learning"):
        build_optimizer(OptimConfig(name="own_components:decayed_sgd"), matrix(), lr=-1.0)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (torch.optim.LBFGS(matrix().parameters()), "optimizer= is not supported: LBFGS.*closure"),
        (own_components.NeedsClosure(matrix().parameters(), lr=0.1), "requires .* closure"),
        (matrix(), r"optimizer= must return a torch\.optim\.Optimizer, got Sequential"),
    ],
)
def test_optimizers_that_cannot_train_a_network(optimizer: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        checked_optimizer("optimizer=", optimizer)


def test_a_state_that_no_checkpoint_can_hold() -> None:
    parameters = list(matrix().parameters())
    check_optimizer_state(own_components.SignMomentum(parameters, lr=0.1))
    with pytest.raises(ConfigError, match="optimizer Unsaved keeps a PosixPath in its state"):
        check_optimizer_state(own_components.Unsaved(parameters, lr=0.1))
    nested = own_components.SignMomentum(parameters, lr=0.1)
    nested.state[parameters[0]]["history"] = [{"sum": 1.0}, {"sum": {1}}]
    with pytest.raises(ConfigError, match="keeps a set"):
        check_optimizer_state(nested)
