"""Puts one network's parts together: model, optimizer, graft units, the rule of the rounds."""

from __future__ import annotations

import warnings
from collections.abc import Callable
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
from dist_graft.population.grafter import Grafter
from dist_graft.population.runtime.process_group import Runtime
from dist_graft.references import is_reference
from dist_graft.seeding import stream_seed
from dist_graft.training.data import ImageData
from dist_graft.training.learning_rates import learning_rates, schedule
from dist_graft.training.loop import TrainState
from dist_graft.training.models import build_model
from dist_graft.training.optim import build_optimizer, build_scheduler
from dist_graft.training.schedule import Cadence
from dist_graft.training.teachers import load_teachers


def build_train_state(config: TrainConfig, data: ImageData, runtime: Runtime) -> TrainState:
    """This process's network with its optimizer, as it is before the first step.

    A collective of the processes that train one network.
    """
    network = runtime.process.network
    torch.manual_seed(stream_seed("init", config.seed, 0 if config.model.shared_init else network))
    model = build_model(config.model, num_classes=data.num_classes, channels=data.channels)
    model.to(runtime.device)
    if config.runtime.sync_bn:
        model = runtime.replicas.with_common_statistics(model)
    if config.runtime.channels_last:
        model.to(memory_format=torch.channels_last)
    optimizer = build_optimizer(config.optim, model, lr=lr_of(config, runtime))
    if config.runtime.precision == "fp16":  # loss scaling may skip the very first step
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
    forward = cast(nn.Module, torch.compile(model)) if config.runtime.compile else model
    return TrainState(
        model=model,
        forward=forward,
        replicas=runtime.replicas,
        learn=runtime.replicas.wrap(forward),
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
        teachers=load_teachers(config, data, runtime.device),
    )


def lr_of(config: TrainConfig, runtime: Runtime) -> float:
    """Largest learning rate of this process's network."""
    return learning_rates(config.optim, runtime.process.networks)[runtime.process.network]


def build_units(config: TrainConfig, trainee: TrainState) -> list[GraftUnit]:
    """The graft units of the network; ConfigError when it has none that can be grafted."""
    try:
        return graft_units(trainee.model, lead=config.graft.lead)
    except ValueError as error:
        raise ConfigError(f"model {config.model.name} cannot be grafted: {error}") from error


def build_rule(config: TrainConfig, trainee: TrainState, units: list[GraftUnit]) -> Rule:
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
            links = filter_links(units, graft_tensors(trainee.model))
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


def build_grafter(
    config: TrainConfig, trainee: TrainState, rule: Rule, runtime: Runtime
) -> Grafter:
    """What runs the rounds of this network."""
    return Grafter(
        trainee.model,
        lead=config.graft.lead,
        exchange=config.graft.exchange,
        bucket_mb=config.graft.bucket_mb,
        rule=rule,
        group=runtime.across,
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
