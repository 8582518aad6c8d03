"""Each network's learning rate, and how it changes over a run. Plain numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

from dist_graft.config import OptimConfig
from dist_graft.errors import ConfigError


def learning_rates(config: OptimConfig, networks: int) -> list[float]:
    """Largest learning rate of each network of a population.

    With diversity "cosine", lr_k = lr (1 + cos(pi (K - 1 - k) / K)) / 2, k = 0 ... K - 1 (the
    authors' "dlr"): for two networks 0.5 lr and lr.

    Raises: ConfigError when `lrs` does not name one for each network.
    """
    if config.lrs is not None:
        if len(config.lrs) != networks:
            raise ConfigError(
                f"optim.lrs names {len(config.lrs)} learning rates for {networks} networks: give "
                "one for each process"
            )
        return list(config.lrs)
    if config.lr_diversity == "none":
        return [config.lr] * networks
    return [
        config.lr * (1 + math.cos(math.pi * (networks - 1 - k) / networks)) / 2
        for k in range(networks)
    ]


def schedule(config: OptimConfig, *, epochs: int, steps_per_epoch: int) -> Callable[[int], float]:
    """What the learning rate is multiplied with at an optimizer step, counted from 0.

    The schedules fall at the start of an epoch e: cosine (1 + cos(pi e / epochs)) / 2, step
    factor^floor(e / step_epochs). During warm-up the result is also multiplied with
    (step + 1) / (steps of warm-up).
    """
    warmup = round(config.warmup_epochs * steps_per_epoch)

    def factor(step: int) -> float:
        epoch = step // steps_per_epoch
        value = 1.0
        if config.schedule == "cosine":
            value = (1 + math.cos(math.pi * min(epoch, epochs) / epochs)) / 2
        elif config.schedule == "step":
            value = config.step_factor ** (epoch // config.step_epochs)
        return value * min(1.0, (step + 1) / warmup) if warmup else value

    return factor
