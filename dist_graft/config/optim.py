"""Options of the optimizer and its schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dist_graft.config.validation import above_zero, at_least, require
from dist_graft.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """How every network is trained."""

    name: Literal["sgd", "adamw"] = "sgd"
    """The optimizer."""
    lr: float = 0.1
    """Learning rate of the network that has the largest one."""
    lr_diversity: Literal["none", "cosine"] = "none"
    """cosine: network k of K gets lr (1 + cos(pi (K - 1 - k) / K)) / 2."""
    lrs: list[float] | None = None
    """The networks' learning rates one by one, instead of lr and lr_diversity."""
    momentum: float = 0.9
    """Of SGD, in [0, 1)."""
    nesterov: bool = False
    """Nesterov's momentum (SGD)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Of AdamW, each in [0, 1)."""
    weight_decay: float = 5e-4
    """Of all weights; decoupled from the gradient with AdamW."""
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    """How the learning rate falls; it changes at the start of an epoch."""
    step_epochs: int = 60
    """Epochs between two falls of the step schedule."""
    step_factor: float = 0.1
    """What the step schedule multiplies with, in (0, 1]."""
    warmup_epochs: float = 0.0
    """Epochs over which the learning rate first rises linearly, step by step."""
    clip_norm: float | None = None
    """Largest norm of the whole gradient; unset: no clipping."""
    accumulation: int = 1
    """Parts that a batch is cut into, whose gradients add up before the step."""
    label_smoothing: float = 0.0
    """In [0, 1)."""

    def __post_init__(self) -> None:
        above_zero("optim.lr", self.lr)
        for value in self.lrs or ():
            above_zero("optim.lrs", value)
        if self.lrs is not None and self.lr_diversity != "none":
            raise ConfigError("optim.lrs and optim.lr_diversity exclude each other: give one")
        require(0 <= self.momentum < 1, "optim.momentum", self.momentum, "in [0, 1)")
        require(all(0 <= b < 1 for b in self.betas), "optim.betas", self.betas, "in [0, 1)")
        if self.nesterov and (self.name != "sgd" or self.momentum == 0):
            raise ConfigError("optim.nesterov needs optim.name sgd and optim.momentum above 0")
        at_least("optim.weight_decay", self.weight_decay, 0)
        at_least("optim.step_epochs", self.step_epochs, 1)
        require(0 < self.step_factor <= 1, "optim.step_factor", self.step_factor, "in (0, 1]")
        at_least("optim.warmup_epochs", self.warmup_epochs, 0)
        if self.clip_norm is not None:
            above_zero("optim.clip_norm", self.clip_norm)
        at_least("optim.accumulation", self.accumulation, 1)
        require(
            0 <= self.label_smoothing < 1,
            "optim.label_smoothing",
            self.label_smoothing,
            "in [0, 1)",
        )
