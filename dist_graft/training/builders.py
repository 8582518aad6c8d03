"""Builds the components of a run: task, data, model, optimizer, graft units, rule, callbacks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.optim.lr_scheduler import LambdaLR

from dist_graft.config import TrainConfig
from dist_graft.config.graft import refuse_intervals
from dist_graft.config.validation import own
from dist_graft.errors import ConfigError, user_code
from dist_graft.grafting.rules import RULES, Graft
from dist_graft.grafting.rules.base import RoundSchedule, Rule
from dist_graft.grafting.units import GraftUnit, graft_tensors, graft_units
from dist_graft.monitoring.callback import Callback
from dist_graft.monitoring.console import EpochLog, ProgressBar
from dist_graft.monitoring.jsonl import MetricsJsonl
from dist_graft.monitoring.profiler import Profiler
from dist_graft.monitoring.run_events import RunEvents
from dist_graft.monitoring.run_loggers import RunLoggers
from dist_graft.monitoring.status_file import StatusFile
from dist_graft.monitoring.tensorboard import TensorBoard
from dist_graft.population.grafter import Grafter
from dist_graft.population.runtime.process_group import Runtime
from dist_graft.population.runtime.process_info import ProcessInfo
from dist_graft.references import is_reference
from dist_graft.seeding import stream_seed
from dist_graft.training.checkpoint.last_round import WeightsBeforeLastRound
from dist_graft.training.data import Data, ImageData, load_data
from dist_graft.training.data.datasets import DatasetData, Datasets
from dist_graft.training.data.order import Share
from dist_graft.training.learning_rates import initial_rates, lr_factor, warmup_steps
from dist_graft.training.models import build_model, to_channels_last
from dist_graft.training.optimizers import build_optimizer, checked_optimizer
from dist_graft.training.schedule import Cadence, quadratic_steps
from dist_graft.training.state import TrainState, compiled, moving_average, uses_cuda_graphs
from dist_graft.training.task import (
    LossFunction,
    MetricFunction,
    Task,
    build_loss,
    classification,
)
from dist_graft.training.teachers import load_teachers


class Rounds(NamedTuple):
    """When and how a network takes part in rounds."""

    units: list[GraftUnit]
    criterion: str
    """Name of the reported criterion."""
    cadence: Cadence
    rate: Callable[[int], float]
    """Strength of a round, by the number of finished steps of the run."""
    grafter: Grafter | None
    """None without rounds, or if each network grafts itself."""


def build_task(
    config: TrainConfig,
    loss: LossFunction | None,
    metrics: Mapping[str, MetricFunction] | None,
) -> Task:
    """Build the task from the trainer's arguments. The default is image classification.

    Raises: ConfigError if they do not fit the options.
    """
    if loss is not None and config.optim.loss is not None:
        raise ConfigError("optim.loss and Trainer(loss=) are mutually exclusive: leave out one")
    own_loss = None if config.optim.loss is None else build_loss(config.optim)
    default = classification(config.optim.label_smoothing, own_loss)
    if loss is None and metrics is None:
        return default
    if loss is not None and config.optim.label_smoothing:
        raise ConfigError(
            "optim.label_smoothing applies to the cross entropy, which Trainer(loss=) replaces: "
            "leave out one"
        )
    if config.data.mixes:
        raise ConfigError(
            "data.mixup and data.cutmix turn targets into class probabilities: leave out loss "
            "and metrics, or set both options to 0"
        )
    if config.distill.teachers:
        raise ConfigError("distill.teachers needs image classification: leave out loss and metrics")
    if "loss" in (metrics or {}):
        raise ConfigError("metrics= must not contain the name 'loss', which is always reported")
    return Task(loss or default.loss, metrics or {})


def build_data(config: TrainConfig, datasets: Datasets | None, runtime: Runtime) -> Data:
    """Load the data: the batches of this process."""
    process = runtime.process
    if datasets is not None:
        if config.distill.teachers:
            raise ConfigError(
                "distill.teachers needs a dataset that data.name names: leave out Trainer(data=)"
            )
        return DatasetData(
            datasets,
            config.data,
            seed=config.seed,
            network=process.network,
            device=runtime.device,
            share=Share(process.replica, process.replicas),
        )
    return load_data(
        config.data,
        seed=config.seed,
        network=process.network,
        device=runtime.device,
        channels_last=config.runtime.channels_last,
        replica=process.replica,
        replicas=process.replicas,
    )


def build_state(
    config: TrainConfig,
    data: Data,
    runtime: Runtime,
    make_model: Callable[[], nn.Module] | None = None,
    make_optimizer: Callable[[nn.Module, float], torch.optim.Optimizer] | None = None,
    *,
    lr: float,
) -> TrainState:
    """Build this process's network with its optimizer, before the first step.

    Args:
        config: all options, with those of the network (`member_config`).
        data: determines classes, channels and steps per epoch.
        runtime: determines network, device and replicas.
        make_model: () -> module; None: `config.model`.
        make_optimizer: (module, lr) -> optimizer; None: `config.optim`.
        lr: initial learning rate of the network.
    """
    network = runtime.process.network
    torch.manual_seed(stream_seed("init", config.seed, 0 if config.model.shared_init else network))
    if make_model is not None:
        with user_code("model="):
            model = make_model()
        if not isinstance(model, nn.Module):
            raise ConfigError(f"model= must return an nn.Module, got {model!r}")
    elif isinstance(data, ImageData):
        model = build_model(config.model, num_classes=data.num_classes, channels=data.channels)
    else:
        raise ConfigError("Trainer(data=...) needs model=, a function that returns the module")
    if config.model.dropout is not None:
        for layer in dropout_layers(model):
            layer.p = config.model.dropout
    model.to(runtime.device)
    if config.runtime.channels_last:
        to_channels_last(model)
    decay = config.optim.ema_decay
    ema = None if decay is None else moving_average(model, decay)  # SyncBatchNorm is not copyable
    if config.runtime.sync_bn:
        model = runtime.replicas.convert_sync_batchnorm(model)
    if make_optimizer is None:
        fused = runtime.device.type == "cuda"
        optimizer = build_optimizer(config.optim, model, lr=lr, fused=fused)
    else:
        with user_code("optimizer="):
            optimizer = checked_optimizer("optimizer=", make_optimizer(model, lr))
    if config.runtime.precision == "fp16":  # loss scaling may skip the very first step
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
    factor = lr_factor(config.optim, epochs=config.epochs, steps_per_epoch=data.steps_per_epoch)
    forward = compiled(model, config.runtime.compile)
    return TrainState(
        model=model,
        forward=forward,
        train_forward=forward,
        optimizer=optimizer,
        scheduler=LambdaLR(optimizer, factor),
        scaler=torch.amp.GradScaler(
            runtime.device.type, enabled=config.runtime.precision == "fp16"
        ),
        precision=config.runtime.precision,
        device=runtime.device,
        cuda_graphs=uses_cuda_graphs(config.runtime.compile, runtime.device),
        seed=config.seed,
        network=network,
        teachers=(
            load_teachers(config, data, runtime.device) if isinstance(data, ImageData) else None
        ),
        ema=ema,
    )


def dropout_layers(model: nn.Module) -> list[_DropoutNd]:
    """Dropout layers of a model, for `model.dropout`.

    Raises: ConfigError if it has none.
    """
    layers = [module for module in model.modules() if isinstance(module, _DropoutNd)]
    if not layers:
        raise ConfigError(
            f"model.dropout requires a model with dropout layers: {type(model).__name__} has none"
        )
    return layers


def built_in_callbacks(
    config: TrainConfig, process: ProcessInfo
) -> tuple[RunEvents, list[Callback]]:
    """Return the callback that records events, and all built-in callbacks in order."""
    events, status = RunEvents(), StatusFile()
    callbacks: list[Callback] = [status, ProgressBar(config.monitor.progress, status), events]
    if config.monitor.profile_steps is not None:
        callbacks.append(Profiler(config.monitor.profile_steps))
    if config.checkpoint.before_last_round:
        callbacks.append(WeightsBeforeLastRound())
    if process.is_leader:
        callbacks.append(MetricsJsonl())
        names = list(config.monitor.loggers)
        if "tensorboard" in names:
            names.remove("tensorboard")
            callbacks.append(TensorBoard(events))
        if names:
            callbacks.append(RunLoggers(names))
    return events, [*callbacks, EpochLog()]


def criterion_name(config: TrainConfig) -> str:
    """Name of the criterion that measures the information of a layer."""
    return Graft(criterion=config.graft.criterion).measured


def describe_data(config: TrainConfig, data: Data) -> str:
    """Size and shape of the data in one line, for the log."""
    if not isinstance(data, ImageData):
        return f"{data.train_size:,} training samples"
    return (
        f"{config.data.name}: {data.train_size:,} images of {data.channels} x "
        f"{data.image_size} x {data.image_size}, {data.num_classes} classes"
    )


def build_units(config: TrainConfig, state: TrainState) -> list[GraftUnit]:
    """Return the network's graft units; raises ConfigError if the model cannot be grafted."""
    try:
        return graft_units(state.model, lead=config.graft.lead)
    except ValueError as error:
        name = type(state.model).__name__
        raise ConfigError(f"model {name} cannot be grafted: {error}") from error


def build_user_rule(config: TrainConfig) -> Rule | None:
    """Create the rule that the configuration names as package.module:name, if any.

    Raises: ConfigError if there is no such rule, or it has no `measure` or `decide` method.
    """
    option, reference = "graft.rule", config.graft.rule
    if is_reference(config.method):
        option, reference = "method", config.method
    if reference is None:
        return None
    function = own(option, reference)
    with user_code(f"{option} {reference}"):
        rule: Rule = function()
    if not all(callable(getattr(rule, name, None)) for name in ("measure", "decide")):
        raise ConfigError(
            f"{option} {reference!r} returned {rule!r}, which has no measure or decide method"
        )
    return rule


def build_rule(config: TrainConfig, state: TrainState, units: list[GraftUnit]) -> Rule:
    """Create the rule of a built-in method.

    Raises: ConfigError if the rule does not support the model or its options.
    """
    kind = RULES[config.method]
    options = getattr(config, config.method) if kind.options else config.graft
    tensors = graft_tensors(state.model)
    try:
        return kind.build(options, seed=config.seed, units=units, tensors=tensors)
    except ValueError as error:
        name = type(state.model).__name__
        raise ConfigError(f"method {config.method} with model {name}: {error}") from error


def build_grafter(config: TrainConfig, state: TrainState, rule: Rule, runtime: Runtime) -> Grafter:
    """Create the Grafter that runs this network's rounds.

    Raises: ConfigError if the rule cannot be used with these options.
    """
    try:
        return Grafter(
            state.model,
            lead=config.graft.lead,
            exchange=config.graft.exchange,
            bucket_mb=config.graft.bucket_mb,
            rule=rule,
            group=runtime.group_across_networks,
            replica_group=runtime.replicas.group,
            on_divergence="raise" if config.on_divergence == "abort" else config.on_divergence,
            peers=runtime.peers,
            timeouts=runtime.timeouts,
            **_files_options(config, runtime.process),
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _files_options(config: TrainConfig, process: ProcessInfo) -> dict[str, Any]:
    """Arguments of a Grafter whose network is an independent job."""
    if config.graft.exchange != "files":
        return {}
    return {
        "directory": config.run_dir,
        "network": process.network,
        "networks": process.networks,
        "max_lag": config.graft.max_lag,
        "wait_seconds": float(config.graft.wait_seconds),
    }


def build_rounds(
    config: TrainConfig, state: TrainState, runtime: Runtime, steps_per_epoch: int
) -> Rounds:
    """Build cadence, rate and grafter of a network, without communication."""
    units = build_units(config, state)
    criterion = criterion_name(config)
    user_rule = build_user_rule(config)
    if getattr(user_rule, "same_start", False):  # a rule may be any class
        config.check_same_start(f"rule {config.graft.rule}")
    cadence = build_cadence(config, runtime.process.networks, steps_per_epoch, user_rule)
    rate = build_rate(config, steps_per_epoch, user_rule)
    grafter = None
    if not cadence.never and not config.is_self_grafting:
        rule = user_rule or build_rule(config, state, units)
        grafter = build_grafter(config, state, rule, runtime)
    return Rounds(units, criterion, cadence, rate, grafter)


def build_cadence(
    config: TrainConfig, networks: int, steps_per_epoch: int, user_rule: Rule | None = None
) -> Cadence:
    """Return when rounds take place, the same for all networks.

    A single network has rounds only if it grafts itself. Methods that define no interval follow
    graft.every, graft.every_steps and graft.qsr_alpha. graft.start and graft.stop apply to all.

    Raises: ConfigError if a user's rule has its own interval, and another one is given.
    """
    graft = config.graft
    if config.method == "none" or (networks == 1 and not config.is_self_grafting):
        return Cadence()
    limits: dict[str, Any] = {"start_epoch": graft.start, "stop_epoch": graft.stop}
    if interval := _method_schedule(config, user_rule).interval:
        refuse_intervals(graft, f"rule {graft.rule}")
        return Cadence(every_epochs=interval.epochs, every_steps=interval.steps, **limits)
    if graft.qsr_alpha is None:
        return Cadence(
            every_epochs=0 if graft.every_steps else graft.every,
            every_steps=graft.every_steps,
            **limits,
        )
    largest = max(initial_rates(config, networks))
    factor = lr_factor(config.optim, epochs=config.epochs, steps_per_epoch=steps_per_epoch)
    warmup = warmup_steps(config.optim, steps_per_epoch)
    end = min(graft.stop or config.epochs, config.epochs)
    return Cadence(
        after_steps=quadratic_steps(
            lambda steps: largest * factor(max(steps, warmup)),  # in warm-up: the rate after it
            alpha=graft.qsr_alpha,
            base=graft.every_steps,
            first=graft.start * steps_per_epoch,
            last=end * steps_per_epoch,
        ),
        **limits,
    )


def build_rate(
    config: TrainConfig, steps_per_epoch: int, user_rule: Rule | None = None
) -> Callable[[int], float]:
    """Return the factor for all donors' shares as a function of the steps finished in the run."""
    method = _method_schedule(config, user_rule)
    factor = lr_factor(config.optim, epochs=config.epochs, steps_per_epoch=steps_per_epoch)
    return lambda steps: method.rate(factor(steps - 1))


def _method_schedule(config: TrainConfig, user_rule: Rule | None) -> RoundSchedule:
    """The schedule of the method's rounds: the user's rule or the options of the method."""
    method = user_rule or getattr(config, config.method, None)
    return method if isinstance(method, RoundSchedule) else RoundSchedule()
