"""Options of the optimizer and the learning rate schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dist_graft.config.validation import above_zero, at_least, require
from dist_graft.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer, learning rate schedule and loss."""

    name: Literal["sgd", "adamw"] = "sgd"
    """Optimizer."""
    lr: float = 0.1
    """Initial learning rate; with lr_diversity, the largest of all networks."""
    lr_diversity: Literal["none", "cosine"] = "none"
    """none: the same learning rate for all; cosine: network k of K uses
    lr (1 + cos(pi (K - 1 - k) / K)) / 2."""
    lrs: list[float] | None = None
    """Learning rate of each network; replaces lr and lr_diversity."""
    momentum: float = 0.9
    """Momentum of SGD, in [0, 1)."""
    nesterov: bool = False
    """Nesterov momentum (SGD only)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Betas of AdamW, each in [0, 1)."""
    weight_decay: float = 5e-4
    """Weight decay of all parameters; decoupled with AdamW."""
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    """Learning rate schedule."""
    schedule_unit: Literal["epoch", "step"] = "epoch"
    """When the cosine schedule changes the learning rate: at the start of each epoch, or after
    every step, as in the published scripts of filter grafting."""
    step_epochs: int = 60
    """Epochs between decays of the step schedule."""
    step_factor: float = 0.1
    """Decay factor of the step schedule, in (0, 1]."""
    schedule_epochs: int | None = None
    """Epochs that the cosine schedule spans, at least `epochs`; unset: `epochs`. A run that ends
    earlier can be resumed with more epochs."""
    cycles: int = 1
    """Equal cycles of the cosine schedule, which starts again from the initial rate in each
    (arXiv 1608.03983); must divide the epochs that it spans."""
    warmup_epochs: float = 0.0
    """Epochs of linear warmup, updated every step."""
    clip_norm: float | None = None
    """Maximum gradient norm over all parameters; unset: no clipping."""
    accumulation: int = 1
    """Microbatches per batch; their gradients are accumulated before the optimizer step."""
    label_smoothing: float = 0.0
    """Label smoothing of the cross entropy, in [0, 1)."""
    ema_decay: float | None = None
    """Exponential moving average of the weights, evaluated beside the network; decay per optimizer
    step in (0, 1); unset: none."""

    def __post_init__(self) -> None:
        above_zero("optim.lr", self.lr)
        for value in self.lrs or ():
            above_zero("optim.lrs", value)
        if self.lrs is not None and self.lr_diversity != "none":
            raise ConfigError("optim.lrs and optim.lr_diversity are mutually exclusive")
        require(0 <= self.momentum < 1, "optim.momentum", self.momentum, "in [0, 1)")
        require(all(0 <= b < 1 for b in self.betas), "optim.betas", self.betas, "in [0, 1)")
        if self.nesterov and (self.name != "sgd" or self.momentum == 0):
            raise ConfigError("optim.nesterov requires optim.name sgd and optim.momentum above 0")
        at_least("optim.weight_decay", self.weight_decay, 0)
        if self.schedule_unit == "step" and self.schedule != "cosine":
            raise ConfigError("optim.schedule_unit step requires optim.schedule cosine")
        for name, given in (("schedule_epochs", self.schedule_epochs), ("cycles", self.cycles > 1)):
            if given and self.schedule != "cosine":
                raise ConfigError(f"optim.{name} requires optim.schedule cosine")
        at_least("optim.schedule_epochs", self.schedule_epochs, 1)
        at_least("optim.cycles", self.cycles, 1)
        at_least("optim.step_epochs", self.step_epochs, 1)
        require(0 < self.step_factor <= 1, "optim.step_factor", self.step_factor, "in (0, 1]")
        at_least("optim.warmup_epochs", self.warmup_epochs, 0)
        above_zero("optim.clip_norm", self.clip_norm)
        at_least("optim.accumulation", self.accumulation, 1)
        require(
            0 <= self.label_smoothing < 1,
            "optim.label_smoothing",
            self.label_smoothing,
            "in [0, 1)",
        )
        if self.ema_decay is not None:
            require(0 < self.ema_decay < 1, "optim.ema_decay", self.ema_decay, "in (0, 1)")
