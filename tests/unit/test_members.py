"""Options in which networks differ: members and diversity."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_graft.config import DataConfig, ModelConfig, OptimConfig, TrainConfig
from dist_graft.config.members import (
    MEMBER_OPTIONS,
    differing_options,
    member_config,
    member_configs,
    member_options,
)
from dist_graft.errors import ConfigError
from dist_graft.training.learning_rates import initial_rates


def test_options_may_be_given_with_dots_or_as_sections() -> None:
    flat = [{"optim.lr": 0.05, "data.mixup": 0.2}, {"model.dropout": 0.5}]
    nested = [{"optim": {"lr": 0.05}, "data": {"mixup": 0.2}}, {"model": {"dropout": 0.5}}]
    one, other = TrainConfig(members=flat), TrainConfig(members=nested)
    assert one == other
    assert one.members == flat
    spec = {"uniform": [0.1, 0.2]}
    nested_spec = TrainConfig(diversity={"optim": {"lr": spec}})
    assert TrainConfig(diversity={"optim.lr": spec}) == nested_spec


def test_a_network_gets_its_own_options_and_the_common_ones() -> None:
    config = TrainConfig(
        optim=OptimConfig(momentum=0.8, weight_decay=1e-4),
        members=[{}, {"optim.lr": 1, "data.cutmix": 1, "model.dropout": 0.25}],
    )
    first, second = member_configs(config, 2)
    assert first == dataclasses.replace(config, members=[])
    assert second.optim == OptimConfig(lr=1.0, momentum=0.8, weight_decay=1e-4)
    assert second.data == DataConfig(cutmix=1.0)
    assert second.model == ModelConfig(dropout=0.25)
    assert differing_options(config) == ["optim.lr", "data.cutmix", "model.dropout"]


VALUES: dict[str, Any] = {
    "optim.name": "adamw",
    "optim.kwargs": {"dampening": 0.5},
    "optim.loss": "package.module:loss",
    "optim.loss_kwargs": {"margin": 0.5},
    "data.transform": "package.module:transform",
    "data.transform_kwargs": {"std": 0.5},
    "optim.nesterov": True,
    "optim.betas": [0.8, 0.9],
    "optim.clip_norm": 1.0,
    "optim.accumulation": 2,
    "optim.ema_decay": 0.9,
    "data.augment": False,
    "data.rand_augment": "1,5",
}


@pytest.mark.parametrize("option", MEMBER_OPTIONS)
def test_every_option_that_may_differ(option: str) -> None:
    needed = {"optim.loss_kwargs": "optim.loss", "data.transform_kwargs": "data.transform"}
    others = {needed[option]: VALUES[needed[option]]} if option in needed else {}
    config = TrainConfig(members=[others | {option: VALUES.get(option, 0.5)}])
    section, _, name = option.partition(".")
    found = getattr(getattr(member_config(config, 0), section), name)
    value = config.members[0][option]
    assert found == value != getattr(getattr(TrainConfig(), section), name)


SPECS = {
    "optim.lr": {"uniform": [0.05, 0.1]},
    "optim.weight_decay": {"log_uniform": [1e-5, 1e-3]},
    "data.rand_augment": {"choice": [None, 5, "3,9"]},
}


@given(st.integers(0, 2**63 - 1), st.integers(0, 1000))
def test_draws_are_in_their_range(seed: int, network: int) -> None:
    options = member_options(TrainConfig(seed=seed, diversity=SPECS), network)
    assert 0.05 <= options["optim.lr"] < 0.1
    assert 1e-5 <= options["optim.weight_decay"] <= 1e-3
    assert options["data.rand_augment"] in (None, 5, "3,9")


def test_draws_cover_their_range_and_depend_on_seed_network_and_name_only() -> None:
    config = TrainConfig(diversity=SPECS)
    drawn = [member_options(config, network) for network in range(400)]
    decays = [options["optim.weight_decay"] for options in drawn]
    assert sum(decay < 1e-4 for decay in decays) == pytest.approx(200, abs=40)
    rates = [options["optim.lr"] for options in drawn]
    assert sum(rates) / 400 == pytest.approx(0.075, abs=0.003)
    choices = [options["data.rand_augment"] for options in drawn]
    assert all(100 < choices.count(value) < 170 for value in (None, 5, "3,9"))

    fewer = TrainConfig(diversity={"optim.lr": SPECS["optim.lr"]}, epochs=7)
    assert [member_options(fewer, network)["optim.lr"] for network in range(400)] == rates
    other = dataclasses.replace(config, seed=1)
    assert member_options(other, 0) != drawn[0]
    pairs = {"data.mixup": {"uniform": [0, 1]}, "data.cutmix": {"uniform": [0, 1]}}
    both = member_options(TrainConfig(diversity=pairs), 0)
    assert both["data.mixup"] != both["data.cutmix"]


def test_draws_are_the_same_in_every_version() -> None:
    options = member_options(TrainConfig(seed=5, diversity=SPECS), 1)
    assert options == pytest.approx(
        {
            "optim.lr": 0.05417668400653363,
            "optim.weight_decay": 0.0007119902916039362,
            "data.rand_augment": None,
        }
    )


def test_members_override_diversity() -> None:
    config = TrainConfig(diversity=SPECS, members=[{"optim.lr": 0.7}, {}])
    assert member_options(config, 0)["optim.lr"] == 0.7
    drawn = TrainConfig(diversity=SPECS)
    assert member_options(config, 1) == member_options(drawn, 1)


def test_the_learning_rate_of_a_network_replaces_the_common_rule() -> None:
    optim = OptimConfig(lr=0.2, lr_diversity="cosine")
    assert initial_rates(TrainConfig(optim=optim), 2) == pytest.approx([0.1, 0.2])
    config = TrainConfig(optim=optim, members=[{"optim.lr": 0.7}, {}])
    assert initial_rates(config, 2) == [0.7, 0.2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"members": [{}, {"optim.lr": -1}]}, "members[1]: optim.lr must be above 0, got -1.0"),
        ({"members": [{"optim.lr": "x"}]}, "members[0]: optim.lr must be a number, got 'x'"),
        ({"members": [{"optim.lr": True}]}, "members[0]: optim.lr must be a number, got True"),
        ({"members": [{"data.augment": 1}]}, "data.augment must be true or false, got 1"),
        ({"members": [{"optim.accumulation": 1.5}]}, "must be a whole number, got 1.5"),
        ({"members": [{"optim.name": 3}]}, "optim.name must be a text, got 3"),
        ({"members": [{"optim.kwargs": 3}]}, "optim.kwargs must be a mapping, got 3"),
        ({"members": [{"optim.betas": ["a", 1]}]}, "must be a list of numbers"),
        ({"members": [{"data.rand_augment": 2.5}]}, "must be a whole number or a text or null"),
        (
            {"members": [{"data.batch_size": 4}]},
            "data.batch_size cannot differ between networks; only",
        ),
        ({"members": [{"optim.schedule": "step"}]}, "optim.schedule cannot differ"),
        ({"members": [{"graft": {"every": 2}}]}, "members[0]: graft cannot differ"),
        ({"members": [{"lr": 0.1}]}, "lr cannot differ between networks; did you mean optim.lr?"),
        ({"members": [{"data.mixupp": 1}]}, "did you mean data.mixup?"),
        ({"members": [5]}, "members[0]: must be a mapping of options to values, got 5"),
        ({"members": [{"optim.nesterov": True, "optim.momentum": 0}]}, "optim.nesterov requires"),
        ({"diversity": {"optim.lr": [1, 2]}}, "diversity: optim.lr must be {uniform: [LOW, HIGH]}"),
        ({"diversity": {"optim.lr": {"normal": [1, 2]}}}, "diversity: optim.lr must be {uniform"),
        ({"diversity": {"optim.lr": {"choice": []}}}, "diversity: optim.lr must be {uniform"),
        ({"diversity": {"optim.lr": {"choice": "ab"}}}, "diversity: optim.lr must be {uniform"),
        ({"diversity": {"optim.lr": {"uniform": [2, 1]}}}, "[LOW, HIGH] with LOW < HIGH"),
        ({"diversity": {"optim.lr": {"uniform": [1]}}}, "needs an option of two numbers"),
        ({"diversity": {"optim.accumulation": {"uniform": [1, 2]}}}, "use choice"),
        ({"diversity": {"data.mixup": {"log_uniform": [0, 1]}}}, "with LOW above 0 < HIGH"),
        ({"diversity": {"data.mixup": {"choice": [0.5, -1]}}}, "data.mixup must be at least 0"),
        ({"diversity": {"data.workers": {"choice": [1]}}}, "data.workers cannot differ"),
        ({"diversity": {"optim.lr": {"uniform": [1, 2], "choice": [1]}}}, "must be {uniform"),
    ],
)
def test_an_error_names_the_option(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("networks", [1, 3])
def test_a_wrong_number_of_members_is_rejected(networks: int) -> None:
    config = TrainConfig(members=[{}, {"optim.lr": 0.1}])
    with pytest.raises(ConfigError, match=f"members has length 2 for {networks} networks"):
        member_configs(config, networks)


def test_options_that_contradict_each_other_name_the_network() -> None:
    config = TrainConfig(
        members=[{}, {"optim.nesterov": True}], diversity={"optim.momentum": {"choice": [0]}}
    )
    with pytest.raises(ConfigError, match=r"options of network 1: optim\.nesterov requires"):
        member_configs(config, 2)


def test_options_of_one_network_do_not_concern_another() -> None:
    config = TrainConfig(members=[{"optim.momentum": 0}, {"optim.nesterov": True}])
    first, second = member_configs(config, 2)
    assert (first.optim.momentum, first.optim.nesterov) == (0.0, False)
    assert (second.optim.momentum, second.optim.nesterov) == (0.9, True)


def test_a_moving_average_is_for_all_networks_or_for_none() -> None:
    with pytest.raises(ConfigError, match=r"optim\.ema_decay is set for some networks only"):
        member_configs(TrainConfig(members=[{"optim.ema_decay": 0.9}, {}]), 2)
    configs = member_configs(
        TrainConfig(members=[{"optim.ema_decay": 0.9}, {"optim.ema_decay": 0.8}]), 2
    )
    assert [config.optim.ema_decay for config in configs] == [0.9, 0.8]


@pytest.mark.parametrize(
    ("option", "value", "name", "owner"),
    [
        ("momentum", 0.8, "adamw", "sgd"),
        ("momentum", 0.8, "package:Own", "sgd"),
        ("betas", (0.8, 0.9), "sgd", "adamw"),
        ("betas", (0.8, 0.9), "adam", "adamw"),
    ],
)
def test_an_option_of_an_optimizer_that_no_network_has(
    option: str, value: Any, name: str, owner: str
) -> None:
    optim = OptimConfig(name=name, **{option: value})
    message = rf"optim\.{option} applies to optim\.name {owner} only"
    with pytest.raises(ConfigError, match=message):
        member_configs(TrainConfig(optim=optim), 2)
    member_configs(TrainConfig(optim=optim, members=[{}, {"optim.name": owner}]), 2)
    entry = {"optim.name": name, f"optim.{option}": value}
    message = rf"members\[1\]: optim\.{option} applies to optim\.name {owner} only, and"
    with pytest.raises(ConfigError, match=message):
        member_configs(TrainConfig(members=[{"optim.name": owner}, entry]), 2)
    drawn = {"optim.name": {"choice": [name, owner]}}
    for seed in range(5):
        member_configs(TrainConfig(optim=optim, diversity=drawn, seed=seed), 1)
