from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Callable
from typing import Any

import pytest

from dist_graft.config import (
    CheckpointConfig,
    DataConfig,
    DistillConfig,
    GraftConfig,
    ModelConfig,
    OptimConfig,
    PopulationConfig,
    RuntimeConfig,
    TrainConfig,
)
from dist_graft.config.data import rand_augment_parameters
from dist_graft.config.parsing import append_repeated, option_names
from dist_graft.config.validation import from_nested
from dist_graft.errors import ConfigError
from dist_graft.grafting.rules import RULES

NAN, INF = float("nan"), float("inf")

OUT_OF_RANGE = [
    (DataConfig, "data", "batch_size", 0, "at least 1"),
    (DataConfig, "data", "train_samples", 0, "at least 1"),
    (DataConfig, "data", "test_samples", -1, "at least 1"),
    (DataConfig, "data", "val_fraction", 1.0, "in [0, 1)"),
    (DataConfig, "data", "val_fraction", -0.1, "in [0, 1)"),
    (DataConfig, "data", "val_fraction", NAN, "in [0, 1)"),
    (DataConfig, "data", "image_size", 0, "at least 1"),
    (DataConfig, "data", "channels", 2, "1 or 3"),
    (DataConfig, "data", "workers", -1, "at least 0"),
    (DataConfig, "data", "mixup", -0.1, "at least 0"),
    (DataConfig, "data", "cutmix", INF, "at least 0"),
    (DataConfig, "data", "random_erasing", 1.1, "in [0, 1]"),
    (DataConfig, "data", "random_erasing", NAN, "in [0, 1]"),
    (DataConfig, "data", "rand_augment", 31, "M in 0 to 30"),
    (DataConfig, "data", "rand_augment", -1, "M in 0 to 30"),
    (DataConfig, "data", "rand_augment", "0,9", "N at least 1"),
    (DataConfig, "data", "rand_augment", "2,9,1", "M or N,M"),
    (DataConfig, "data", "rand_augment", "strong", "M or N,M"),
    (ModelConfig, "model", "dropout", 1.0, "in [0, 1)"),
    (OptimConfig, "optim", "lr", 0.0, "above 0"),
    (OptimConfig, "optim", "lr", NAN, "above 0"),
    (OptimConfig, "optim", "lr", INF, "above 0"),
    (OptimConfig, "optim", "momentum", 1.0, "in [0, 1)"),
    (OptimConfig, "optim", "betas", (0.9, 1.0), "in [0, 1)"),
    (OptimConfig, "optim", "weight_decay", -1e-9, "at least 0"),
    (OptimConfig, "optim", "weight_decay", INF, "at least 0"),
    (OptimConfig, "optim", "step_epochs", 0, "at least 1"),
    (OptimConfig, "optim", "schedule_epochs", 0, "at least 1"),
    (OptimConfig, "optim", "cycles", 0, "at least 1"),
    (OptimConfig, "optim", "step_factor", 0.0, "in (0, 1]"),
    (OptimConfig, "optim", "step_factor", 1.1, "in (0, 1]"),
    (OptimConfig, "optim", "warmup_epochs", -0.5, "at least 0"),
    (OptimConfig, "optim", "clip_norm", 0.0, "above 0"),
    (OptimConfig, "optim", "accumulation", 0, "at least 1"),
    (OptimConfig, "optim", "label_smoothing", 1.0, "in [0, 1)"),
    (OptimConfig, "optim", "ema_decay", 0.0, "in (0, 1)"),
    (OptimConfig, "optim", "ema_decay", 1.0, "in (0, 1)"),
    (OptimConfig, "optim", "ema_decay", NAN, "in (0, 1)"),
    (GraftConfig, "graft", "every", -1, "at least 0"),
    (GraftConfig, "graft", "num_bins", 0, "in [1, "),
    (GraftConfig, "graft", "amplitude", -0.01, "in [0, 1]"),
    (GraftConfig, "graft", "amplitude", 1.01, "in [0, 1]"),
    (GraftConfig, "graft", "amplitude", NAN, "in [0, 1]"),
    (GraftConfig, "graft", "sensitivity", -0.01, "at least 0"),
    (GraftConfig, "graft", "sensitivity", INF, "at least 0"),
    (GraftConfig, "graft", "bucket_mb", 0.0, "above 0"),
    (GraftConfig, "graft", "every_steps", -1, "at least 0"),
    (GraftConfig, "graft", "start", -1, "at least 0"),
    (GraftConfig, "graft", "stop", -1, "at least 0"),
    (GraftConfig, "graft", "qsr_alpha", 0.0, "above 0"),
    (GraftConfig, "graft", "threshold", 0.0, "above 0"),
    (GraftConfig, "graft", "noise_annealing", 0.0, "in (0, 1]"),
    (GraftConfig, "graft", "noise_annealing", 1.1, "in (0, 1]"),
    (DistillConfig, "distill", "temperature", 0.0, "above 0"),
    (DistillConfig, "distill", "weight", -1.0, "at least 0"),
    (RuntimeConfig, "runtime", "threads", -1, "at least 0"),
    (RuntimeConfig, "runtime", "timeout_seconds", 0.0, "above 0"),
    (RuntimeConfig, "runtime", "timeout_epochs", 0.9, "at least 1"),
    (RuntimeConfig, "runtime", "timeout_epochs", INF, "at least 1"),
    (CheckpointConfig, "checkpoint", "every", -1, "at least 0"),
    (CheckpointConfig, "checkpoint", "every_minutes", 0.0, "above 0"),
    (CheckpointConfig, "checkpoint", "every_minutes", NAN, "above 0"),
    (CheckpointConfig, "checkpoint", "max_failures", -1, "at least 0"),
    (CheckpointConfig, "checkpoint", "keep", 0, "at least 1"),
    (TrainConfig, "", "epochs", 0, "at least 1"),
    (TrainConfig, "", "seed", -1, "in [0, 2^63)"),
    (TrainConfig, "", "seed", 2**63, "in [0, 2^63)"),
    (TrainConfig, "", "run_dir", "", "a folder"),
]

RELIED_ON = {
    "run_dir": "runs/run",
    "epochs": 20,
    "seed": 0,
    "resume": "auto",
    "method": "graft",
    "on_divergence": "heal",
    "callbacks": [],
    "data.name": "fashion-mini",
    "data.root": "data",
    "data.batch_size": 128,
    "data.train_samples": None,
    "data.test_samples": None,
    "data.image_size": None,
    "data.channels": None,
    "data.val_fraction": 0.0,
    "model.name": "resnet20",
    "optim.lr": 0.1,
    "optim.lr_diversity": "none",
    "optim.lrs": None,
    "optim.schedule": "cosine",
    "optim.ema_decay": None,
    "graft.amplitude": 0.4,
    "graft.sensitivity": 5.0,
    "graft.num_bins": 10,
    "graft.criterion": "entropy",
    "graft.every": 1,
    "graft.exchange": "all_gather",
    "graft.lead": "conv",
    "runtime.device": "auto",
    "runtime.backend": "auto",
    "runtime.precision": "fp32",
    "runtime.threads": 0,
    "runtime.timeout_seconds": 600.0,
    "runtime.timeout_epochs": 5.0,
    "checkpoint.every": 1,
    "checkpoint.every_minutes": None,
    "checkpoint.keep": 2,
    "checkpoint.max_failures": 3,
    "checkpoint.grace_seconds": 25.0,
}


def sections() -> list[type]:
    kinds = [kind for kind in typing.get_type_hints(TrainConfig).values() if isinstance(kind, type)]
    return [TrainConfig, *filter(dataclasses.is_dataclass, kinds)]


@pytest.mark.parametrize(("kind", "section", "name", "value", "legal"), OUT_OF_RANGE)
def test_an_error_names_field_value_and_legal_range(
    kind: type, section: str, name: str, value: object, legal: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        kind(**{name: value})
    text = str(caught.value)
    assert text.startswith(f"{section}.{name} must be" if section else f"{name} must be")
    assert legal in text
    assert text.endswith(f"got {value!r}")


@pytest.mark.parametrize(
    ("section", "name", "value", "legal"),
    [
        ("papa", "every_steps", 0, "at least 1"),
        ("papa", "beta", 1.1, "in [0, 1]"),
        ("papa", "every", 0, "at least 1"),
        ("wash", "probability", -0.1, "in [0, 1]"),
        ("wash", "every_steps", 0, "at least 1"),
        ("diloco", "every_steps", 0, "at least 1"),
        ("diloco", "outer_lr", 0.0, "above 0 and below 1e6"),
        ("diloco", "outer_momentum", 1.0, "in [0, 1)"),
    ],
)
def test_an_error_in_the_options_of_a_method_names_its_section(
    section: str, name: str, value: float, legal: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        from_nested(TrainConfig, {section: {name: value}})
    assert str(caught.value) == f"{section}.{name} must be {legal}, got {value!r}"


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: GraftConfig(start=2, stop=2), "graft.stop must be above graft.start, got 2 and 2"),
        (lambda: GraftConfig(qsr_alpha=0.1), "graft.qsr_alpha requires graft.every_steps"),
        (lambda: GraftConfig(filter_rule="authors"), "requires graft.level filter"),
        (lambda: GraftConfig(internal="add"), "graft.internal requires graft.source internal"),
        (
            lambda: OptimConfig(schedule="step", schedule_unit="step"),
            "optim.schedule_unit step requires optim.schedule cosine",
        ),
        (lambda: TrainConfig(method="diloco"), "diloco requires model.shared_init true"),
        (lambda: diloco(on_divergence="exclude"), "none can be excluded: set on_divergence"),
        (
            lambda: diloco(
                graft=GraftConfig(exchange="files"), population=PopulationConfig(size=2)
            ),
            "method diloco needs all networks at the same step",
        ),
    ],
)
def test_options_that_do_not_go_together(make: Callable[[], object], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def diloco(**options: Any) -> TrainConfig:
    return TrainConfig(method="diloco", model=ModelConfig(shared_init=True), **options)


def test_an_unknown_method_is_an_error_that_lists_the_methods() -> None:
    with pytest.raises(ConfigError, match=f"method must be one of {', '.join(RULES)}, none"):
        TrainConfig(method="papo")


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (DataConfig, "val_fraction", 0.99),
        (OptimConfig, "step_factor", 1.0),
        (OptimConfig, "momentum", 0.0),
        (GraftConfig, "amplitude", 0.0),
        (GraftConfig, "amplitude", 1.0),
        (GraftConfig, "sensitivity", 0.0),
        (GraftConfig, "every", 0),
        (CheckpointConfig, "every", 0),
        (CheckpointConfig, "max_failures", 0),
        (RuntimeConfig, "timeout_epochs", 1.0),
        (TrainConfig, "seed", 2**63 - 1),
    ],
)
def test_bounds_that_are_legal(kind: type, name: str, value: object) -> None:
    assert getattr(kind(**{name: value}), name) == value


def test_an_error_names_the_element_of_a_list() -> None:
    with pytest.raises(ConfigError, match=r"optim\.lrs must be above 0, got -0\.2"):
        OptimConfig(lrs=[0.1, -0.2])
    with pytest.raises(ConfigError, match=r"callbacks must be a reference .*:name, got 'Mine'"):
        TrainConfig(callbacks=["package:Yours", "Mine"])


@pytest.mark.parametrize(
    ("argv", "rewritten"),
    [
        ("--callbacks a:B --epochs 3", "--callbacks+=a:B --epochs 3"),
        ("--callbacks a:B --callbacks=c.d:E", "--callbacks+=a:B --callbacks+=c.d:E"),
        ("--callbacks [a:B]", "--callbacks=[a:B]"),
        ("--callbacks {a:B:1}", "--callbacks+={a:B:1}"),
        ("--distill.teachers=x.pt --optim.lrs [1]", "--distill.teachers+=x.pt --optim.lrs [1]"),
        ("--epochs 3 --callbacks", "--epochs 3 --callbacks="),
    ],
)
def test_options_with_a_list_of_strings_are_repeatable(argv: str, rewritten: str) -> None:
    assert append_repeated(argv.split()) == rewritten.split()


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"lrs": [0.1], "lr_diversity": "cosine"}, ("optim.lrs", "optim.lr_diversity")),
        ({"nesterov": True, "momentum": 0.0}, ("optim.nesterov", "optim.momentum")),
        ({"nesterov": True, "name": "adamw"}, ("optim.nesterov", "sgd")),
    ],
)
def test_mutually_exclusive_options(options: dict[str, object], names: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        OptimConfig(**options)  # type: ignore[arg-type]
    assert all(name in str(caught.value) for name in names)


@pytest.mark.parametrize(
    ("value", "parameters"), [(9, (2, 9)), ("9", (2, 9)), ("1,30", (1, 30)), ("3, 0", (3, 0))]
)
def test_the_parameters_of_rand_augment(value: int | str, parameters: tuple[int, int]) -> None:
    assert rand_augment_parameters(value) == parameters


@pytest.mark.parametrize("kind", sections())
def test_sections_are_frozen_and_take_keywords_only(kind: type) -> None:
    first = dataclasses.fields(kind)[0]
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(kind(), first.name, getattr(kind(), first.name))
    with pytest.raises(TypeError, match="positional"):
        kind(getattr(kind(), first.name))


def test_public_options_keep_their_names_and_defaults() -> None:
    assert set(RELIED_ON) <= set(option_names())
    config = TrainConfig()
    for option, default in RELIED_ON.items():
        value: object = config
        for part in option.split("."):
            value = getattr(value, part)
        assert value == default, option


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"model": {"kwargs": {"num_classes": 3}}}, r"without num_classes \(set by data\)"),
        ({"model": {"kwargs": {"widths": {1, 2}}}}, "model.kwargs must hold plain values"),
        ({"init_from": ""}, "init_from must be a path or a name"),
        ({"optim": {"kwargs": {"lr": 3}}}, r"without lr \(set by optim\.lr\)"),
        ({"optim": {"kwargs": {"nesterov": 1}}}, r"without nesterov \(set by optim\.nesterov\)"),
        ({"optim": {"name": ""}}, r"optim\.name must be a name"),
        (
            {"optim": {"schedule_kwargs": {"a": 1}}},
            r"requires optim\.schedule package\.module:name",
        ),
        ({"optim": {"loss_kwargs": {"a": 1}}}, r"optim\.loss_kwargs requires optim\.loss"),
        ({"optim": {"loss": "a:b", "label_smoothing": 0.1}}, r"which optim\.loss replaces"),
        ({"optim": {"loss": "mse"}}, r"optim\.loss must be a reference"),
        ({"data": {"transform": "blur"}}, r"data\.transform must be a reference"),
        ({"data": {"transform_kwargs": {"a": 1}}}, r"requires data\.transform"),
        ({"callbacks": [{"a:B": 1}]}, r"callbacks must be package\.module:Name or \{"),
        ({"callbacks": [{"a:B": {}, "c:D": {}}]}, r"callbacks must be package\.module:Name or \{"),
        ({"callbacks": [{"a:B": {"x": {1}}}]}, "callbacks a:B must hold plain values"),
    ],
)
def test_arguments_of_the_users_functions_and_initial_weights(
    options: dict[str, object], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        from_nested(TrainConfig, options)


def test_names_of_optimizers_ignore_case() -> None:
    assert OptimConfig(name="SGD") == OptimConfig()
    assert OptimConfig(name="RMSprop", kwargs={"momentum": 0.5}).name == "rmsprop"
    assert OptimConfig(name="my.Module:Adam").name == "my.Module:Adam"


@pytest.mark.parametrize(
    ("epochs", "optim", "says"),
    [
        (6, {"schedule_epochs": 5}, "optim.schedule_epochs must be at least 6, got 5"),
        (6, {"cycles": 4}, "optim.cycles must divide the 6 epochs of the schedule, got 4"),
        (6, {"cycles": 4, "schedule_epochs": 7}, "must divide the 7 epochs of the schedule"),
        (6, {"cycles": 2, "schedule": "step"}, "optim.cycles requires optim.schedule cosine"),
        (6, {"schedule_epochs": 6, "schedule": "constant"}, "optim.schedule_epochs requires optim"),
    ],
)
def test_the_span_of_the_schedule(epochs: int, optim: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        TrainConfig(epochs=epochs, optim=OptimConfig(**optim))
    TrainConfig(epochs=6, optim=OptimConfig(cycles=4, schedule_epochs=8))
