"""Puts one network's parts together: model, optimizer, graft units, the rule of the rounds."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import nn

from dist_graft.config import TrainConfig
from dist_graft.config.validation import own
from dist_graft.errors import ConfigError
from dist_graft.grafting.rules.average import Average
from dist_graft.grafting.rules.base import Rule
from dist_graft.grafting.rules.filter_graft import FilterGraft, filter_links
from dist_graft.grafting.rules.graft import Graft
from dist_graft.grafting.rules.papa import Papa
from dist_graft.grafting.rules.wash import Wash
from dist_graft.grafting.units import GraftUnit, graft_tensors, graft_units
from dist_graft.monitoring.callback import Callback
from dist_graft.monitoring.console import EpochLog, ProgressBar
from dist_graft.monitoring.jsonl import MetricsJsonl
from dist_graft.monitoring.profiler import Profiler
from dist_graft.monitoring.run_events import RunEvents
from dist_graft.monitoring.status_file import StatusFile
from dist_graft.monitoring.tensorboard import TensorBoard
from dist_graft.population.grafter import Grafter
from dist_graft.population.runtime.process_group import Runtime
from dist_graft.population.runtime.process_info import ProcessInfo
from dist_graft.references import is_reference
from dist_graft.seeding import stream_seed
from dist_graft.training.data import Data, ImageData, load_data
from dist_graft.training.data.datasets import DatasetData, Datasets
from dist_graft.training.data.order import Share
from dist_graft.training.learning_rates import schedule
from dist_graft.training.models import build_model
from dist_graft.training.optim import build_optimizer, build_scheduler
from dist_graft.training.schedule import Cadence
from dist_graft.training.state import TrainState, moving_average
from dist_graft.training.task import LossFunction, MetricFunction, Task, classification
from dist_graft.training.teachers import load_teachers


def build_task(
    config: TrainConfig,
    loss: LossFunction | None,
    metrics: Mapping[str, MetricFunction] | None,
) -> Task:
    """The task of a trainer's arguments: image classification when none is given."""
    default = classification(config.optim.label_smoothing)
    if loss is None and metrics is None:
        return default
    if config.distill.teachers:
        raise ConfigError("distill.teachers needs image classification: leave out loss and metrics")
    return Task(loss or default.loss, metrics or {})


def build_data(config: TrainConfig, datasets: Datasets | None, runtime: Runtime) -> Data:
    """This process's view of the data."""
    process = runtime.process
    if datasets is not None:
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
    """This process's network with its optimizer, before the first step.

    Args:
        config: of the run.
        data: of this process.
        runtime: of this process.
        make_model: () -> module; None: `config.model`.
        make_optimizer: (module, lr) -> optimizer; None: `config.optim`.
        lr: the network's largest learning rate.
    """
    network = runtime.process.network
    torch.manual_seed(stream_seed("init", config.seed, 0 if config.model.shared_init else network))
    if make_model is not None:
        model = make_model()
    elif isinstance(data, ImageData):
        model = build_model(config.model, num_classes=data.num_classes, channels=data.channels)
    else:
        raise ConfigError("Trainer(data=...) needs model=, a function that returns the module")
    model.to(runtime.device)
    if config.runtime.sync_bn:
        model = runtime.replicas.convert_sync_batchnorm(model)
    if config.runtime.channels_last:
        model.to(memory_format=torch.channels_last)
    if make_optimizer is None:
        optimizer: torch.optim.Optimizer = build_optimizer(config.optim, model, lr=lr)
    else:
        optimizer = make_optimizer(model, lr)
    if config.runtime.precision == "fp16":  # loss scaling may skip the very first step
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
    forward = cast(nn.Module, torch.compile(model)) if config.runtime.compile else model
    decay = config.optim.ema_decay
    return TrainState(
        model=model,
        forward=forward,
        train_forward=forward,
        optimizer=optimizer,
        scheduler=build_scheduler(
            config.optim,
            optimizer,
            epochs=config.epochs,
            steps_per_epoch=data.steps_per_epoch,
        ),
        scaler=torch.amp.GradScaler(
            runtime.device.type, enabled=config.runtime.precision == "fp16"
        ),
        precision=config.runtime.precision,
        device=runtime.device,
        seed=config.seed,
        network=network,
        teachers=(
            load_teachers(config, data, runtime.device) if isinstance(data, ImageData) else None
        ),
        ema=None if decay is None else moving_average(model, decay),
    )


def built_in_callbacks(
    config: TrainConfig, process: ProcessInfo
) -> tuple[RunEvents, list[Callback]]:
    """The callbacks of every run in the order of their calls, and the one with the events."""
    events = RunEvents()
    callbacks: list[Callback] = [StatusFile(), ProgressBar(config.monitor.progress), events]
    if config.monitor.profile_steps is not None:
        callbacks.append(Profiler(config.monitor.profile_steps))
    if process.is_leader:
        callbacks.append(MetricsJsonl())
        if config.monitor.tensorboard:
            callbacks.append(TensorBoard(events))
    return events, [*callbacks, EpochLog()]


def criterion_name(config: TrainConfig) -> str:
    """Name of the information that layers are compared by."""
    return Graft(criterion=config.graft.criterion).measured


def describe_data(config: TrainConfig, data: Data) -> str:
    """The data in a few words, for the log."""
    if not isinstance(data, ImageData):
        return f"{data.train_size:,} training samples"
    return (
        f"{config.data.name}: {data.train_size:,} images of {data.channels} x "
        f"{data.image_size} x {data.image_size}, {data.num_classes} classes"
    )


def build_units(config: TrainConfig, state: TrainState) -> list[GraftUnit]:
    """The graft units of the network; ConfigError when it has none that can be grafted."""
    try:
        return graft_units(state.model, lead=config.graft.lead)
    except ValueError as error:
        raise ConfigError(f"model {config.model.name} cannot be grafted: {error}") from error


def build_rule(config: TrainConfig, state: TrainState, units: list[GraftUnit]) -> Rule:
    """What flows where in a round, as the configuration asks for it."""
    graft = config.graft
    for option, name in (("graft.criterion", graft.criterion), ("graft.topology", graft.topology)):
        if is_reference(name):
            own(option, name)
    if graft.rule:
        return _build_own_rule(graft.rule)
    if config.method == "average":
        return Average()
    if config.method == "papa":
        return Papa(beta=config.papa.beta, variant=config.papa.variant, seed=config.seed)
    if config.method == "wash":
        return Wash(probability=config.wash.probability, seed=config.seed)
    if graft.level == "filter":
        try:
            links = filter_links(units, graft_tensors(state.model))
        except ValueError as error:
            raise ConfigError(
                f"model {config.model.name} cannot be grafted filter by filter: {error}"
            ) from error
        return FilterGraft(links=links, topology=graft.topology, seed=config.seed)
    return Graft(
        amplitude=graft.amplitude,
        sensitivity=graft.sensitivity,
        num_bins=graft.num_bins,
        criterion=graft.criterion,
        topology=graft.topology,
        seed=config.seed,
    )


def _build_own_rule(reference: str) -> Rule:
    rule: Rule = own("graft.rule", reference)()
    if not all(callable(getattr(rule, name, None)) for name in ("measure", "decide")):
        raise ConfigError(
            f"graft.rule {reference!r} gives {rule!r}, which has no measure or decide"
        )
    return rule


def build_grafter(config: TrainConfig, state: TrainState, rule: Rule, runtime: Runtime) -> Grafter:
    """What runs the rounds of this network."""
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
    )


def build_cadence(config: TrainConfig, networks: int) -> Cadence:
    """When rounds happen; never for independent networks, or a network alone (but with itself)."""
    alone = networks == 1 and not grafts_itself(config)
    if config.method == "none" or alone:
        return Cadence()
    if config.method == "papa" and config.papa.variant == "pull":
        return Cadence(every_steps=config.papa.every_steps)
    if config.method == "papa":
        return Cadence(every_epochs=config.papa.every)
    if config.method == "wash":
        return Cadence(every_steps=config.wash.every_steps)
    return Cadence(
        every_epochs=0 if config.graft.every_steps else config.graft.every,
        every_steps=config.graft.every_steps,
        start_epoch=config.graft.start,
    )


def grafts_itself(config: TrainConfig) -> bool:
    """Whether a round happens inside each network, without an exchange."""
    return config.method == "graft" and config.graft.source != "external"


def build_rate(config: TrainConfig, steps_per_epoch: int) -> Callable[[int], float]:
    """What donors' shares are multiplied with after a number of steps of the run.

    The pull of PAPA falls with the learning rate; all else is constant.
    """
    if config.method == "papa" and config.papa.variant == "pull":
        factor = schedule(config.optim, epochs=config.epochs, steps_per_epoch=steps_per_epoch)
        return lambda steps: factor(steps - 1)
    return lambda steps: 1.0
