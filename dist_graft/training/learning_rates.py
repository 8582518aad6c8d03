"""Learning rate of each network and its schedule."""

from __future__ import annotations

import math
from collections.abc import Callable

from dist_graft.config import OptimConfig, TrainConfig
from dist_graft.config.members import member_options
from dist_graft.config.validation import own_function
from dist_graft.errors import ConfigError, user_code
from dist_graft.references import is_reference


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


def lr_factor(config: OptimConfig, *, epochs: int, steps_per_epoch: int) -> Callable[[int], float]:
    """Factor of the learning rate as a function of the optimizer step, counted from 0.

    In epoch e it is (1 + cos(pi e / epochs)) / 2 (cosine), step_factor^floor(e / step_epochs)
    (step), 1 (constant), or f(e / epochs) for a user's function f. With schedule_unit "step", e is
    step / steps_per_epoch, not rounded down. schedule_epochs replaces epochs. With M cycles of the
    cosine schedule, (M e mod epochs) / epochs replaces e / epochs (eq. 2 of arXiv 1704.00109).
    During warmup, the factor is also multiplied by (step + 1) / warmup_steps.

    Raises: ConfigError if f does not exist, or returns a value outside [0, 1]; FunctionError if it
        fails. The returned function raises the same errors.
    """
    own_factor = own_schedule(config) if is_reference(config.schedule) else None
    warmup = warmup_steps(config, steps_per_epoch)
    epochs = config.schedule_epochs or epochs

    def factor(step: int) -> float:
        epoch = step // steps_per_epoch
        e = min(step / steps_per_epoch if config.schedule_unit == "step" else epoch, epochs)
        value = 1.0
        if own_factor is not None:
            value = own_factor(e / epochs)
        elif config.schedule == "cosine":
            e = config.cycles * e % epochs if e < epochs else epochs
            value = (1 + math.cos(math.pi * e / epochs)) / 2
        elif config.schedule == "step":
            value = config.step_factor ** (epoch // config.step_epochs)
        return value * min(1.0, (step + 1) / warmup) if warmup else value

    return factor


def own_schedule(config: OptimConfig) -> Callable[[float], float]:
    """Return the user's function, from progress in [0, 1] to the factor of the learning rate.

    Raises: as `lr_factor`.
    """
    what = f"optim.schedule {config.schedule}"
    kwargs = config.schedule_kwargs
    function = own_function("optim.schedule", config.schedule, kwargs, arguments=1)

    def factor(progress: float) -> float:
        with user_code(what):
            value = float(function(progress, **kwargs))
        if not 0 <= value <= 1:
            raise ConfigError(f"{what} must return a factor in [0, 1], got {value} at {progress}")
        return value

    for progress in (0.0, 0.5, 1.0):
        factor(progress)
    return factor


def warmup_steps(config: OptimConfig, steps_per_epoch: int) -> int:
    """Number of steps of the linear warmup."""
    return round(config.warmup_epochs * steps_per_epoch)
