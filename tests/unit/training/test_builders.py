from __future__ import annotations

import pytest
import torch
from small import MakeData, MakeRuntime, MakeTrainee
from torch import nn

from dist_graft.config import (
    GraftConfig,
    ModelConfig,
    OptimConfig,
    RuntimeConfig,
    TrainConfig,
)
from dist_graft.errors import ConfigError
from dist_graft.grafting.rules import RULES
from dist_graft.grafting.rules.average import Average
from dist_graft.grafting.rules.base import Rule
from dist_graft.grafting.rules.filter_graft import FilterGraft
from dist_graft.grafting.rules.graft import Graft
from dist_graft.grafting.rules.papa import Papa, PapaConfig
from dist_graft.grafting.rules.wash import Wash, WashConfig
from dist_graft.training.builders import (
    build_cadence,
    build_rate,
    build_rule,
    build_train_state,
    build_units,
    lr_of,
)
from dist_graft.training.layer_stats import what_is_lost
from dist_graft.training.schedule import Cadence


def first_weights(
    make_data: MakeData, make_runtime: MakeRuntime, network: int, config: TrainConfig
) -> torch.Tensor:
    trainee = build_train_state(config, make_data(network=network), make_runtime(network, 2))
    return torch.cat([parameter.detach().flatten() for parameter in trainee.model.parameters()])


def test_every_network_starts_from_its_own_weights(
    make_data: MakeData, make_runtime: MakeRuntime
) -> None:
    first, again, second, other_seed = (
        first_weights(make_data, make_runtime, network, TrainConfig(seed=seed))
        for network, seed in ((0, 0), (0, 0), (1, 0), (0, 1))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert not torch.equal(first, other_seed)


def test_shared_init_starts_all_from_those_of_the_first(
    make_data: MakeData, make_runtime: MakeRuntime
) -> None:
    shared = TrainConfig(model=ModelConfig(shared_init=True))
    own = first_weights(make_data, make_runtime, 0, TrainConfig())
    for network in (0, 1):
        assert torch.equal(own, first_weights(make_data, make_runtime, network, shared))


def test_a_trainee_is_as_the_configuration_says(
    make_data: MakeData, make_runtime: MakeRuntime
) -> None:
    config = TrainConfig(
        seed=7,
        model=ModelConfig(name="resnet20", activation="leaky_relu"),
        optim=OptimConfig(lrs=[0.3, 0.1]),
        runtime=RuntimeConfig(precision="bf16", channels_last=False),
    )
    trainee = build_train_state(config, make_data(network=1), make_runtime(1, 2))
    assert (trainee.seed, trainee.network, trainee.precision) == (7, 1, "bf16")
    assert trainee.optimizer.param_groups[0]["lr"] == 0.1
    assert trainee.forward is trainee.model
    assert not trainee.scaler.is_enabled()
    convolutions = [part for part in trainee.model.modules() if isinstance(part, nn.Conv2d)]
    assert convolutions[0].in_channels == 1
    assert convolutions[1].weight.is_contiguous()
    assert any(isinstance(part, nn.LeakyReLU) for part in trainee.model.modules())


def test_channels_last(make_data: MakeData, make_runtime: MakeRuntime) -> None:
    trainee = build_train_state(TrainConfig(), make_data(), make_runtime())
    weight = trainee.model.get_parameter("layer1.0.conv1.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_the_learning_rate_of_each_network(make_runtime: MakeRuntime) -> None:
    config = TrainConfig(optim=OptimConfig(lr=0.4, lr_diversity="cosine"))
    assert [lr_of(config, make_runtime(k, 2)) for k in range(2)] == pytest.approx([0.2, 0.4])


CHAIN = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            TrainConfig(
                seed=3,
                graft=GraftConfig(
                    amplitude=0.3, sensitivity=2.0, num_bins=7, criterion="l1", topology="random"
                ),
            ),
            Graft(
                amplitude=0.3,
                sensitivity=2.0,
                num_bins=7,
                criterion="l1",
                topology="random",
                seed=3,
            ),
        ),
        (TrainConfig(method="average"), Average()),
        (
            TrainConfig(method="papa", seed=5, papa=PapaConfig(beta=0.9, variant="pairs")),
            Papa(beta=0.9, variant="pairs", seed=5),
        ),
        (
            TrainConfig(method="wash", seed=5, wash=WashConfig(probability=0.2)),
            Wash(probability=0.2, seed=5),
        ),
    ],
    ids=["graft", "average", "papa", "wash"],
)
def test_rule_has_the_configured_options(
    make_trainee: MakeTrainee, config: TrainConfig, expected: Rule
) -> None:
    trainee = make_trainee(OptimConfig(), model=CHAIN)
    assert build_rule(config, trainee, build_units(config, trainee)) == expected


def test_rule_of_the_filter_level(make_trainee: MakeTrainee) -> None:
    config = TrainConfig(graft=GraftConfig(level="filter"))
    trainee = make_trainee(OptimConfig(), model=CHAIN)
    rule = build_rule(config, trainee, build_units(config, trainee))
    assert isinstance(rule, FilterGraft)
    assert [link.filters for link in rule.links] == [8, 4]


def test_filter_level_without_batch_norm_is_an_error(make_trainee: MakeTrainee) -> None:
    config = TrainConfig(graft=GraftConfig(level="filter"))
    trainee = make_trainee(OptimConfig(), model=nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU()))
    with pytest.raises(
        ConfigError, match="method graft with model resnet20: layer 0 has no batch norm"
    ):
        build_rule(config, trainee, build_units(config, trainee))


def test_units_follow_graft_lead(make_trainee: MakeTrainee) -> None:
    model = nn.Sequential(nn.Conv2d(1, 8, 5), nn.Flatten(), nn.Linear(8, 4))
    trainee = make_trainee(OptimConfig(), model=model)
    names = [unit.name for unit in build_units(TrainConfig(), trainee)]
    both = TrainConfig(graft=GraftConfig(lead="conv+linear"))
    assert names == ["0"]
    assert [unit.name for unit in build_units(both, trainee)] == ["0", "2"]


def test_error_for_a_model_that_cannot_be_grafted_says_what_to_pass(
    make_trainee: MakeTrainee,
) -> None:
    trainee = make_trainee(OptimConfig(), model=nn.Linear(8, 4))
    with pytest.raises(ConfigError) as caught:
        build_units(TrainConfig(model=ModelConfig(name="some_name")), trainee)
    assert "some_name" in str(caught.value)
    assert "--graft.lead conv+linear" in str(caught.value)


@pytest.mark.parametrize(
    ("method", "every", "networks", "expected"),
    [
        ("graft", 3, 2, Cadence(every_epochs=3)),
        ("graft", 0, 2, Cadence()),
        ("graft", 3, 1, Cadence()),
        ("none", 3, 2, Cadence()),
        ("average", 2, 2, Cadence(every_epochs=2)),
        ("papa", 3, 2, Cadence(every_steps=10)),
        ("average", 0, 2, Cadence()),
        ("wash", 3, 2, Cadence(every_steps=1)),
        ("wash", 3, 1, Cadence()),
    ],
)
def test_cadence_of_each_method(method: str, every: int, networks: int, expected: Cadence) -> None:
    config = TrainConfig(method=method, graft=GraftConfig(every=every))
    assert build_cadence(config, networks) == expected


def test_every_steps_replaces_every() -> None:
    config = TrainConfig(graft=GraftConfig(every_steps=7, start=2))
    assert build_cadence(config, 2) == Cadence(every_steps=7, start_epoch=2)


@pytest.mark.parametrize("source", ["internal", "noise"])
def test_single_network_can_graft_itself(source: str) -> None:
    config = TrainConfig(graft=GraftConfig(source=source))
    assert build_cadence(config, 1) == Cadence(every_epochs=1)


def test_cadence_of_papa_variants_counts_epochs() -> None:
    config = TrainConfig(method="papa", papa=PapaConfig(variant="all", every=4))
    assert build_cadence(config, 2) == Cadence(every_epochs=4)


def test_rate_of_papa_follows_the_learning_rate() -> None:
    config = TrainConfig(epochs=4, method="papa")
    rate = build_rate(config, 10)
    assert [rate(10), rate(20), rate(40)] == pytest.approx([1.0, 0.8535533905932737, 0.1464466094])
    averaging = TrainConfig(epochs=4, method="papa", papa=PapaConfig(variant="all"))
    assert build_rate(averaging, 10)(40) == 1.0
    assert build_rate(TrainConfig(epochs=4), 10)(40) == 1.0


def test_model_that_each_method_delivers() -> None:
    delivered = {name: rule.delivers for name, rule in RULES.items()}
    assert delivered == {"graft": "member", "average": "member", "papa": "soup", "wash": "soup"}


def test_a_built_network_is_finite(make_data: MakeData, make_runtime: MakeRuntime) -> None:
    trainee = build_train_state(TrainConfig(), make_data(), make_runtime())
    assert not what_is_lost(trainee, loss=False)
