"""Puts one network's parts together: model, optimizer, graft units, the rule of the rounds."""

from __future__ import annotations

import torch

from dist_graft.config import TrainConfig
from dist_graft.draws import stream_seed
from dist_graft.errors import ConfigError
from dist_graft.grafting.rules import Ring
from dist_graft.grafting.units import GraftUnit, graft_units
from dist_graft.population.grafter import Grafter
from dist_graft.population.runtime import Runtime
from dist_graft.training.data import Data
from dist_graft.training.learning_rates import learning_rates
from dist_graft.training.loop import Trainee
from dist_graft.training.models import build_model
from dist_graft.training.optim import build_optimizer, build_scheduler


def build_trainee(config: TrainConfig, data: Data, runtime: Runtime) -> Trainee:
    """This process's network with its optimizer, as it is before the first step."""
    network = runtime.place.network
    torch.manual_seed(stream_seed("init", config.seed, 0 if config.model.shared_init else network))
    model = build_model(config.model, num_classes=data.num_classes, channels=data.channels)
    model.to(runtime.device)
    if config.runtime.channels_last:
        model.to(memory_format=torch.channels_last)
    optimizer = build_optimizer(config.optim, model, lr=lr_of(config, runtime))
    return Trainee(
        model=model,
        forward=torch.compile(model) if config.runtime.compile else model,
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
    )


def lr_of(config: TrainConfig, runtime: Runtime) -> float:
    """Largest learning rate of this process's network."""
    return learning_rates(config.optim, runtime.place.networks)[runtime.place.network]


def build_units(config: TrainConfig, trainee: Trainee) -> list[GraftUnit]:
    """The graft units of the network; ConfigError when it has none that can be grafted."""
    try:
        return graft_units(trainee.model, lead=config.graft.lead)
    except ValueError as error:
        raise ConfigError(f"model {config.model.name} cannot be grafted: {error}") from error


def build_rule(config: TrainConfig) -> Ring:
    """What flows where in a round, as the configuration asks for it."""
    return Ring(
        amplitude=config.graft.amplitude,
        sensitivity=config.graft.sensitivity,
        num_bins=config.graft.num_bins,
        criterion=config.graft.criterion,
    )


def build_grafter(config: TrainConfig, trainee: Trainee, rule: Ring, runtime: Runtime) -> Grafter:
    """What runs the rounds of this network."""
    return Grafter(
        trainee.model,
        lead=config.graft.lead,
        exchange=config.graft.exchange,
        bucket_mb=config.graft.bucket_mb,
        rule=rule,
        roll_call=runtime.roll_call,
    )


def epochs_between_rounds(config: TrainConfig, networks: int) -> int:
    """0 when there are no rounds: a network alone, or networks that are independent."""
    return config.graft.every if config.method == "graft" and networks > 1 else 0
