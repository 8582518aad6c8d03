from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from small import make_data, make_runtime, make_state, small_model, train_steps
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from dist_graft.config import (
    DataConfig,
    DistillConfig,
    GraftConfig,
    ModelConfig,
    MonitorConfig,
    OptimConfig,
    RuntimeConfig,
    TrainConfig,
)
from dist_graft.config.members import member_configs
from dist_graft.errors import ConfigError, FunctionError
from dist_graft.grafting.rules import RULES
from dist_graft.grafting.rules.average import Average
from dist_graft.grafting.rules.base import Rule
from dist_graft.grafting.rules.diloco import Diloco, DilocoConfig
from dist_graft.grafting.rules.filter_graft import FilterGraft
from dist_graft.grafting.rules.graft import Graft
from dist_graft.grafting.rules.papa import Papa, PapaConfig
from dist_graft.grafting.rules.wash import Wash, WashConfig
from dist_graft.population.runtime.process_info import ProcessInfo
from dist_graft.training.builders import (
    build_cadence,
    build_rate,
    build_rounds,
    build_rule,
    build_state,
    build_task,
    build_units,
    built_in_callbacks,
    dropout_layers,
)
from dist_graft.training.data import Data
from dist_graft.training.layer_stats import non_finite_part
from dist_graft.training.opening import check_names
from dist_graft.training.optimizers import build_optimizer
from dist_graft.training.schedule import Cadence
from dist_graft.training.state import TrainState
from dist_graft.training.task import Task


def first_weights(network: int, config: TrainConfig) -> torch.Tensor:
    state = build_state(config, make_data(network=network), make_runtime(network, 2), lr=0.1)
    return torch.cat([parameter.detach().flatten() for parameter in state.model.parameters()])


def test_each_network_starts_from_its_own_weights() -> None:
    first, again, second, other_seed = (
        first_weights(network, TrainConfig(seed=seed))
        for network, seed in ((0, 0), (0, 0), (1, 0), (0, 1))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert not torch.equal(first, other_seed)


def test_shared_init_starts_all_from_the_weights_of_the_first() -> None:
    shared = TrainConfig(model=ModelConfig(shared_init=True))
    own = first_weights(0, TrainConfig())
    for network in (0, 1):
        assert torch.equal(own, first_weights(network, shared))


def test_the_state_follows_the_configuration() -> None:
    config = TrainConfig(
        seed=7,
        model=ModelConfig(name="resnet20", activation="leaky_relu"),
        runtime=RuntimeConfig(precision="bf16", channels_last=False),
    )
    state = build_state(config, make_data(network=1), make_runtime(1, 2), lr=0.1)
    assert (state.seed, state.network, state.precision) == (7, 1, "bf16")
    assert state.optimizer.param_groups[0]["lr"] == 0.1
    assert state.forward is state.model
    assert not state.scaler.is_enabled()
    convolutions = [part for part in state.model.modules() if isinstance(part, nn.Conv2d)]
    assert convolutions[0].in_channels == 1
    assert convolutions[1].weight.is_contiguous()
    assert any(isinstance(part, nn.LeakyReLU) for part in state.model.modules())


def test_channels_last() -> None:
    state = build_state(TrainConfig(), make_data(), make_runtime(), lr=0.1)
    weight = state.model.get_parameter("layer1.0.conv1.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last)


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
        (
            TrainConfig(
                method="diloco",
                model=ModelConfig(shared_init=True),
                diloco=DilocoConfig(every_steps=7, outer_lr=0.4, outer_momentum=0.1),
            ),
            Diloco(every_steps=7, outer_lr=0.4, outer_momentum=0.1),
        ),
    ],
    ids=["graft", "average", "papa", "wash", "diloco"],
)
def test_the_rule_has_all_options(config: TrainConfig, expected: Rule) -> None:
    state = make_state(OptimConfig(), model=CHAIN)
    assert build_rule(config, state, build_units(config, state)) == expected


def test_a_rule_of_the_user_may_need_the_same_start(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = SimpleNamespace(same_start=True)
    monkeypatch.setattr("dist_graft.training.builders.build_user_rule", lambda config: rule)
    config = TrainConfig(graft=GraftConfig(rule="a:b"))
    with pytest.raises(ConfigError, match=r"rule a:b requires model\.shared_init true"):
        build_rounds(config, make_state(OptimConfig(), model=CHAIN), make_runtime(), 4)


def test_the_rule_of_the_filter_level() -> None:
    config = TrainConfig(graft=GraftConfig(level="filter", filter_rule="authors"))
    state = make_state(OptimConfig(), model=CHAIN)
    rule = build_rule(config, state, build_units(config, state))
    assert isinstance(rule, FilterGraft)
    assert rule.filter_rule == "authors"
    assert [link.filters for link in rule.links] == [8, 4]


def test_a_model_without_batch_norm_has_no_filter_level() -> None:
    config = TrainConfig(graft=GraftConfig(level="filter"))
    state = make_state(OptimConfig(), model=nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU()))
    with pytest.raises(ConfigError, match="layer 0 has no batch norm"):
        build_rule(config, state, build_units(config, state))


def test_units_of_the_configured_lead() -> None:
    model = nn.Sequential(nn.Conv2d(1, 8, 5), nn.Flatten(), nn.Linear(8, 4))
    state = make_state(OptimConfig(), model=model)
    names = [unit.name for unit in build_units(TrainConfig(), state)]
    both = TrainConfig(graft=GraftConfig(lead="conv+linear"))
    assert names == ["0"]
    assert [unit.name for unit in build_units(both, state)] == ["0", "2"]


def test_a_model_that_cannot_be_grafted_is_an_error() -> None:
    state = make_state(OptimConfig(), model=nn.Linear(8, 4))
    with pytest.raises(ConfigError) as caught:
        build_units(TrainConfig(), state)
    assert "Linear" in str(caught.value)
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
def test_the_interval_between_rounds(
    method: str, every: int, networks: int, expected: Cadence
) -> None:
    config = TrainConfig(method=method, graft=GraftConfig(every=every))
    assert build_cadence(config, networks, 10) == expected


def test_every_steps_replaces_every() -> None:
    config = TrainConfig(graft=GraftConfig(every_steps=7, start=2, stop=9))
    assert build_cadence(config, 2, 10) == Cadence(every_steps=7, start_epoch=2, stop_epoch=9)


@pytest.mark.parametrize("source", ["internal", "noise"])
def test_single_network_can_graft_itself(source: str) -> None:
    config = TrainConfig(graft=GraftConfig(source=source))
    assert build_cadence(config, 1, 10) == Cadence(every_epochs=1)


def test_the_interval_of_papa_variants_is_in_epochs() -> None:
    config = TrainConfig(method="papa", papa=PapaConfig(variant="all", every=4))
    assert build_cadence(config, 2, 10) == Cadence(every_epochs=4)


def test_start_and_stop_apply_to_methods_with_an_interval_of_their_own() -> None:
    config = TrainConfig(method="papa", graft=GraftConfig(start=1, stop=3))
    assert build_cadence(config, 2, 4) == Cadence(every_steps=10, start_epoch=1, stop_epoch=3)


class TestQuadraticSynchronization:
    """graft.qsr_alpha: intervals of max(every_steps, floor((alpha / lr)^2)) steps."""

    def rounds(self, networks: int = 2, *, epochs: int = 4, **optim: Any) -> tuple[int, ...]:
        config = TrainConfig(
            epochs=epochs,
            optim=OptimConfig(**{"lr": 0.1, "schedule": "step", "step_epochs": 2} | optim),
            graft=GraftConfig(every_steps=4, qsr_alpha=0.051),
        )
        return build_cadence(config, networks, 20).after_steps

    def test_intervals_grow_after_the_decay(self) -> None:
        # (0.051 / 0.1)^2 < 4; after 40 steps (0.051 / 0.01)^2 = 26.01; then the end.
        assert self.rounds() == (*range(4, 41, 4), 66, 80)

    def test_the_largest_learning_rate_counts_for_all_networks(self) -> None:
        assert self.rounds(lr_diversity="cosine") == self.rounds()
        assert self.rounds(lrs=[0.1, 0.01], lr=1.0) == self.rounds()

    def test_warmup_has_the_interval_that_follows_it(self) -> None:
        assert self.rounds(warmup_epochs=1) == self.rounds()

    def test_rounds_end_with_graft_stop(self) -> None:
        config = TrainConfig(
            epochs=9,
            optim=OptimConfig(lr=0.01, schedule="constant"),
            graft=GraftConfig(every_steps=4, qsr_alpha=0.051, start=1, stop=3),
        )
        cadence = build_cadence(config, 2, 20)
        assert cadence.after_steps == (46, 60)
        assert [cadence.rounds_before(epoch, 0, 20) for epoch in (1, 2, 3, 9)] == [0, 0, 2, 2]

    def test_a_method_with_its_own_interval_is_an_error(self) -> None:
        graft = GraftConfig(every_steps=4, qsr_alpha=0.051)
        with pytest.raises(ConfigError, match=r"method papa has its own interval.*qsr_alpha"):
            member_configs(TrainConfig(method="papa", graft=graft), 2)
        with pytest.raises(ConfigError, match=r"rule a:b has its own interval.*qsr_alpha"):
            build_cadence(TrainConfig(graft=replace(graft, rule="a:b")), 2, 20, Papa())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            TrainConfig(method="papa", graft=GraftConfig(every_steps=4)),
            "method papa has its own interval between rounds: leave out graft.every_steps",
        ),
        (
            TrainConfig(method="wash", graft=GraftConfig(every=0)),
            "graft.every 0 does not change: choose method none",
        ),
        (
            TrainConfig(graft=GraftConfig(level="filter", source="noise")),
            "graft.level filter requires graft.source external",
        ),
        (
            TrainConfig(graft=GraftConfig(level="filter", criterion="constant")),
            "graft.criterion constant is a control for graft.level layer",
        ),
    ],
)
def test_options_without_effect_are_refused_before_a_run(config: TrainConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        member_configs(config, 2)


def test_delivered_model_of_each_method() -> None:
    expected = dict.fromkeys(("graft", "average", "diloco"), "member")
    expected |= {"papa": "soup", "wash": "soup"}
    assert {name: RULES[name].delivers for name in expected} == expected


def test_the_rate_of_papa_decays_with_the_learning_rate() -> None:
    config = TrainConfig(epochs=4, method="papa")
    rate = build_rate(config, 10)
    assert [rate(10), rate(20), rate(40)] == pytest.approx([1.0, 0.8535533905932737, 0.1464466094])
    averaging = TrainConfig(epochs=4, method="papa", papa=PapaConfig(variant="all"))
    assert build_rate(averaging, 10)(40) == 1.0
    assert build_rate(TrainConfig(epochs=4), 10)(40) == 1.0


def test_a_built_network_is_finite() -> None:
    state = build_state(TrainConfig(), make_data(), make_runtime(), lr=0.1)
    assert not non_finite_part(state, loss=False)


class TestCustomParts:
    """Arguments of the trainer that replace parts of the configuration."""

    def test_model_and_optimizer(self) -> None:
        class OwnData:
            steps_per_epoch = 4

        def make_model() -> nn.Module:
            return nn.Conv2d(1, 2, 3)

        def state_of(network: int, **options: Any) -> TrainState:
            config = TrainConfig(optim=OptimConfig(**options))
            return build_state(
                *(config, cast(Data, OwnData()), make_runtime(network, 2), make_model),
                lambda module, lr: torch.optim.RMSprop(module.parameters(), lr=lr / 2),
                lr=0.1,
            )

        first, again, second = state_of(0), state_of(0), state_of(1, ema_decay=0.9)
        assert torch.equal(first.model.get_parameter("weight"), again.model.get_parameter("weight"))
        assert not torch.equal(
            first.model.get_parameter("weight"), second.model.get_parameter("weight")
        )
        assert isinstance(first.optimizer, torch.optim.RMSprop)
        assert first.lr == 0.05
        assert first.ema is None
        assert first.averaged is None
        assert second.averaged is not None
        assert torch.equal(
            second.averaged.model.get_parameter("weight"), second.model.get_parameter("weight")
        )

    def test_own_data_need_an_own_model(self) -> None:
        with pytest.raises(ConfigError, match="needs model="):
            build_state(TrainConfig(), cast(Data, object()), make_runtime(), lr=0.1)

    def test_the_task(self) -> None:
        config = TrainConfig()
        output, target = torch.rand(3, 2), torch.tensor([0, 1, 1])
        default = build_task(config, None, None)
        assert default.classification
        assert list(default.metrics) == ["accuracy"]

        def loss(output: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
            return output.sum()

        assert build_task(config, loss, None) == Task(loss, {})
        metrics = {"count": lambda output, target: (1.0, 1.0)}
        own_metrics = build_task(config, None, metrics)
        assert own_metrics.metrics == metrics
        assert not own_metrics.classification
        assert torch.equal(own_metrics.loss(output, target), default.loss(output, target))
        named = TrainConfig(optim=OptimConfig(loss="own_components:margin_loss"))
        assert build_task(named, None, metrics).metrics == metrics
        with pytest.raises(ConfigError, match=r"optim\.loss and Trainer\(loss=\) are mutually"):
            build_task(named, loss, None)
        smooth = TrainConfig(optim=OptimConfig(label_smoothing=0.1))
        assert build_task(smooth, None, metrics).metrics == metrics
        with pytest.raises(ConfigError, match=r"label_smoothing applies to the cross entropy"):
            build_task(smooth, loss, None)
        mixed = TrainConfig(data=DataConfig(cutmix=1.0))
        assert build_task(mixed, None, None).classification
        for arguments in ((loss, None), (None, metrics)):
            with pytest.raises(ConfigError, match=r"data\.cutmix .*leave out loss and metrics"):
                build_task(mixed, *arguments)
        teachers = TrainConfig(distill=DistillConfig(teachers=["network00.pt"]))
        with pytest.raises(ConfigError, match=r"distill\.teachers needs image classification"):
            build_task(teachers, loss, None)

    def test_the_loss_of_the_configuration(self) -> None:
        scores, labels = torch.rand(3, 4), torch.tensor([0, 1, 3])

        def task(name: str, **kwargs: Any) -> Task:
            optim = OptimConfig(loss=name, loss_kwargs=kwargs)
            return build_task(TrainConfig(optim=optim), None, None)

        half = task("own_components:margin_loss", margin=0.5)
        assert half.classification
        assert list(half.metrics) == ["accuracy"]
        expected = nn.functional.multi_margin_loss(scores, labels, margin=0.5)
        assert torch.equal(half.loss(scores, labels), expected)
        same = task("torch.nn:MultiMarginLoss", margin=0.5)
        assert torch.equal(same.loss(scores, labels), expected)
        assert same.loss(scores.bfloat16(), labels).dtype == torch.float32
        weighted = task("own_components:WeightedLoss")
        expected = nn.functional.cross_entropy(scores, labels, weight=torch.arange(1.0, 5.0))
        assert torch.equal(weighted.loss(scores, labels), expected)
        assert weighted.loss(scores.to("meta"), labels.to("meta")).is_meta
        with pytest.raises(ConfigError, match=r"must return a scalar tensor, got \[3\]"):
            task("own_components:losses").loss(scores, labels)
        with pytest.raises(FunctionError, match=r"optim\.loss .*margin_loss failed: "):
            half.loss(scores[:2], labels)
        for name in ("own_components:margin_loss", "torch.nn:MultiMarginLoss"):
            with pytest.raises(ConfigError, match=rf"optim\.loss {name} cannot be called as "):
                task(name, size=1)

    @pytest.mark.parametrize(
        ("name", "refused"),
        [
            ("torch.nn:CrossEntropyLoss", False),
            ("own_components:margin_loss", True),
            ("own_components:WeightedLoss", False),  # of four classes
        ],
    )
    def test_a_loss_of_classes_with_mixed_images(self, name: str, *, refused: bool) -> None:
        optim = OptimConfig(loss=name)
        mixed = TrainConfig(optim=optim, data=DataConfig(mixup=0.2))
        check_names(TrainConfig(optim=optim), model=True, optimizer=True)
        with pytest.raises(ConfigError, match="margin_loss failed") if refused else nullcontext():
            check_names(mixed, model=True, optimizer=True)

    def test_a_function_that_raises_is_named_with_its_traceback(self) -> None:
        def fails(output: object, target: object) -> Any:
            raise LookupError("no such class")

        task = build_task(TrainConfig(), fails, {"iou": fails})
        with pytest.raises(
            FunctionError, match="loss= failed: LookupError: no such class"
        ) as error:
            task.mean_loss(0, 0)
        assert "in fails" in error.value.user_traceback()
        with pytest.raises(FunctionError, match="metrics= iou failed: LookupError"):
            task.metric_sums("iou", 0, 0)

    def test_a_lack_of_gpu_memory_is_not_the_functions_fault(self) -> None:
        def fails(output: object, target: object) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory")

        with pytest.raises(torch.OutOfMemoryError):
            build_task(TrainConfig(), fails, None).mean_loss(0, 0)


@pytest.mark.parametrize(
    ("process", "options", "expected"),
    [
        (ProcessInfo(), {}, ["MetricsJsonl", "TensorBoard"]),
        (ProcessInfo(), {"tensorboard": False}, ["MetricsJsonl"]),
        (ProcessInfo(), {"loggers": "mlflow,wandb"}, ["MetricsJsonl", "RunLoggers"]),
        (
            ProcessInfo(),
            {"loggers": ["tensorboard", "wandb"]},
            ["MetricsJsonl", "TensorBoard", "RunLoggers"],
        ),
        (
            ProcessInfo(),
            {"profile_steps": "1:2", "tensorboard": False},
            ["Profiler", "MetricsJsonl"],
        ),
        (ProcessInfo(1, 2, 1, 2).with_replicas(2), {"loggers": "tensorboard,wandb"}, []),
    ],
)
def test_the_built_in_callbacks(
    process: ProcessInfo, options: dict[str, Any], expected: list[str]
) -> None:
    """Only a network's leader writes its metrics."""
    config = TrainConfig(monitor=MonitorConfig(**options))
    events, callbacks = built_in_callbacks(config, process)
    names = [type(callback).__name__ for callback in callbacks]
    assert names == ["StatusFile", "ProgressBar", "RunEvents", *expected, "EpochLog"]
    assert events is callbacks[2]


@pytest.mark.parametrize(
    ("kind", "name", "options"),
    [
        (torch.optim.SGD, "sgd", {"momentum": 0.8, "nesterov": True, "weight_decay": 0.01}),
        (torch.optim.AdamW, "adamw", {"betas": (0.7, 0.8), "weight_decay": 0.01}),
    ],
)
def test_the_configured_optimizer(kind: type, name: str, options: dict[str, object]) -> None:
    config = OptimConfig(name=name, **options)  # type: ignore[arg-type]
    optimizer = build_optimizer(config, nn.Linear(2, 2), lr=0.3)
    assert type(optimizer) is kind
    group = optimizer.param_groups[0]
    assert group["lr"] == 0.3
    assert {key: group[key] for key in options} == options


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_fused_kernels(name: str) -> None:
    """They give other bits than the default on a CPU, which stays without."""
    config = OptimConfig(name=name)  # type: ignore[arg-type]
    assert build_optimizer(config, nn.Linear(2, 2), lr=0.3, fused=True).param_groups[0]["fused"]
    state = build_state(
        TrainConfig(model=ModelConfig(name="resnet20"), optim=config),
        make_data(),
        make_runtime(),
        lr=0.1,
    )
    assert not state.optimizer.param_groups[0]["fused"]


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_checkpoint_of_the_other_kernels(name: str, fused: bool) -> None:
    """A run with fused kernels resumes one without, and the other way round."""
    config, data = OptimConfig(name=name), make_data()  # type: ignore[arg-type]

    def state_with(fused: bool) -> TrainState:
        state = make_state(config)
        state.optimizer = build_optimizer(config, state.model, lr=config.lr, fused=fused)
        state.scheduler = LambdaLR(state.optimizer, lambda _: 1.0)
        state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        return state

    saved, state = state_with(not fused), state_with(fused)
    train_steps(saved, data, config, epoch=0, first=0, last=2)
    state.load_state_dict(copy.deepcopy(saved.state_dict()))
    assert bool(state.optimizer.param_groups[0]["fused"]) is fused
    for each in (saved, state):
        train_steps(each, data, config, epoch=0, first=2, last=4)
    for ours, theirs in zip(state.model.parameters(), saved.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_frozen_parameters_are_excluded() -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    parameters = build_optimizer(OptimConfig(), model, lr=0.1).param_groups[0]["params"]
    assert [parameter is model.weight for parameter in parameters] == [True]


class TestDropout:
    """model.dropout."""

    def build(self, dropout: float | None, layer: nn.Module) -> nn.Module:
        config = TrainConfig(model=ModelConfig(dropout=dropout))
        model = nn.Sequential(small_model(), layer)
        return build_state(config, make_data(), make_runtime(), lambda: model, lr=0.1).model

    @pytest.mark.parametrize(("dropout", "expected"), [(None, [0.0, 0.3]), (0.2, [0.2, 0.2])])
    def test_all_layers_get_the_probability(
        self, dropout: float | None, expected: list[float]
    ) -> None:
        model = self.build(dropout, nn.Dropout1d(0.3))
        assert [layer.p for layer in dropout_layers(model)] == expected

    def test_a_model_without_dropout_is_refused(self) -> None:
        config = TrainConfig(model=ModelConfig(name="resnet8", dropout=0.0))
        with pytest.raises(ConfigError, match=r"model\.dropout requires .*: ResNet has none"):
            build_state(config, make_data(), make_runtime(), lr=0.1)
