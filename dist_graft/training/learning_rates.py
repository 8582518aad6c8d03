"""Learning rate of each network and its schedule."""

from __future__ import annotations

import math
from collections.abc import Callable

from dist_graft.config import OptimConfig, TrainConfig
from dist_graft.config.members import member_options
from dist_graft.errors import ConfigError


def initial_rates(config: TrainConfig, networks: int) -> list[float]:
    """Initial learning rate of each network: its own optim.lr, or as `learning_rates` says."""
    rates = learning_rates(config.optim, networks)
    return [
        member_options(config, network).get("optim.lr", rate) for network, rate in enumerate(rates)
    ]


def learning_rates(config: OptimConfig, networks: int) -> list[float]:
    """Initial learning rate of each network.

    With lr_diversity "cosine", lr_k = lr (1 + cos(pi (K - 1 - k) / K)) / 2 for k = 0 ... K - 1 (the
    "dlr" of arXiv 2001.05868): 0.5 lr and lr for two networks.

    Raises: ConfigError if the length of `lrs` is not the number of networks.
    """
    if config.lrs is not None:
        if len(config.lrs) != networks:
            raise ConfigError(
                f"optim.lrs has {len(config.lrs)} learning rates for {networks} networks: give one "
                "per network"
            )
        return list(config.lrs)
    if config.lr_diversity == "none":
        return [config.lr] * networks
    return [
        config.lr * (1 + math.cos(math.pi * (networks - 1 - k) / networks)) / 2
        for k in range(networks)
    ]


def schedule(config: OptimConfig, *, epochs: int, steps_per_epoch: int) -> Callable[[int], float]:
    """Factor of the learning rate as a function of the optimizer step, counted from 0.

    In epoch e it is (1 + cos(pi e / epochs)) / 2 (cosine), step_factor^floor(e / step_epochs)
    (step) or 1 (constant). With schedule_unit "step", e is step / steps_per_epoch, not rounded
    down. schedule_epochs replaces epochs. In each of M cycles, e / epochs goes from 0 to 1:
    it is (M e mod epochs) / epochs (eq. 2 of arXiv 1704.00109). During warmup the factor is also
    multiplied by (step + 1) / warmup_steps.
    """
    warmup = warmup_steps(config, steps_per_epoch)
    epochs = config.schedule_epochs or epochs

    def factor(step: int) -> float:
        epoch = step // steps_per_epoch
        value = 1.0
        if config.schedule == "cosine":
            e = step / steps_per_epoch if config.schedule_unit == "step" else epoch
            e = config.cycles * e % epochs if e < epochs else epochs
            value = (1 + math.cos(math.pi * e / epochs)) / 2
        elif config.schedule == "step":
            value = config.step_factor ** (epoch // config.step_epochs)
        return value * min(1.0, (step + 1) / warmup) if warmup else value

    return factor


def warmup_steps(config: OptimConfig, steps_per_epoch: int) -> int:
    """Number of steps of the linear warmup."""
    return round(config.warmup_epochs * steps_per_epoch)
