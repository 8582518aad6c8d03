"""Options of the optimizer and the learning rate schedule."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from dist_graft.config.validation import (
    above_zero,
    at_least,
    check_kwargs,
    known_or_own,
    require,
)
from dist_graft.errors import ConfigError
from dist_graft.references import is_reference

_SCHEDULES = ("cosine", "step", "constant")
OWN_OPTIONS = {"momentum": "sgd", "nesterov": "sgd", "betas": "adamw"}
"""Options of a single optimizer, and its name. Others get such options from optim.kwargs."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer, learning rate schedule and loss."""

    name: str = "sgd"
    """Optimizer: sgd, adamw, another name from torch.optim, such as rmsprop, or package.module:name
    of a class or function (parameters, lr, weight_decay) -> optimizer; weight_decay is passed if it
    has that argument, or **kwargs."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Additional arguments of the optimizer, as a YAML mapping, e.g. {alpha: 0.9, momentum: 0.9}
    for rmsprop."""
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
    schedule: str = "cosine"
    """Learning rate schedule: cosine, step, constant, or package.module:name of a function
    (progress) -> factor of the learning rate in [0, 1]; progress is the finished fraction of the
    run, in [0, 1]."""
    schedule_kwargs: dict[str, Any] = field(default_factory=dict)
    """Additional arguments of the function of optim.schedule, as a YAML mapping."""
    schedule_unit: Literal["epoch", "step"] = "epoch"
    """When cosine, or your own function, changes the learning rate: at the start of each epoch, or
    after every step, as in the published scripts of filter grafting."""
    step_epochs: int = 60
    """Epochs between decays of the step schedule."""
    step_factor: float = 0.1
    """Decay factor of the step schedule, in (0, 1]."""
    schedule_epochs: int | None = None
    """Epochs that cosine, or your own schedule, spans: at least `epochs`, the default. A run that
    ends earlier can be resumed with more epochs."""
    cycles: int = 1
    """Number of equal cycles of the cosine schedule, each starting at the initial rate
    (arXiv 1608.03983); must divide the epochs that it spans."""
    warmup_epochs: float = 0.0
    """Epochs of linear warmup, updated every step."""
    clip_norm: float | None = None
    """Maximum gradient norm over all parameters; unset: no clipping."""
    accumulation: int = 1
    """Microbatches per batch; their gradients are accumulated before the optimizer step."""
    label_smoothing: float = 0.0
    """Label smoothing of the cross entropy, in [0, 1)."""
    loss: str | None = None
    """package.module:name of a function (scores, labels) -> mean loss that replaces the cross
    entropy in training, or of a class of such functions, e.g. torch.nn:MultiMarginLoss. The test
    loss is still the cross entropy."""
    loss_kwargs: dict[str, Any] = field(default_factory=dict)
    """Additional arguments of the function or class of optim.loss, as a YAML mapping."""
    ema_decay: float | None = None
    """Exponential moving average of the weights, evaluated beside the network; decay per optimizer
    step in (0, 1); unset: none."""

    def __post_init__(self) -> None:
        require(bool(self.name), "optim.name", self.name, "a name")
        if not is_reference(self.name):
            object.__setattr__(self, "name", self.name.lower())
        options = [option for option, name in OWN_OPTIONS.items() if name == self.name]
        reserved = {option: f"optim.{option}" for option in ("lr", "weight_decay", *options)}
        check_kwargs("optim.kwargs", self.kwargs, reserved)
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
        known_or_own("optim.schedule", self.schedule, _SCHEDULES)
        if self.schedule_unit == "step" and self.schedule in ("step", "constant"):
            raise ConfigError(
                "optim.schedule_unit step requires optim.schedule cosine or your own function"
            )
        if self.schedule_kwargs and not is_reference(self.schedule):
            raise ConfigError("optim.schedule_kwargs requires optim.schedule package.module:name")
        check_kwargs("optim.schedule_kwargs", self.schedule_kwargs, {})
        if self.schedule_epochs and self.schedule in ("step", "constant"):
            raise ConfigError(
                "optim.schedule_epochs requires optim.schedule cosine or your own function"
            )
        if self.cycles > 1 and self.schedule != "cosine":
            raise ConfigError("optim.cycles requires optim.schedule cosine")
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
        if self.loss is not None:
            known_or_own("optim.loss", self.loss, ())
            if self.label_smoothing:
                raise ConfigError(
                    "optim.label_smoothing applies to the cross entropy, which optim.loss replaces"
                )
        elif self.loss_kwargs:
            raise ConfigError("optim.loss_kwargs requires optim.loss")
        check_kwargs("optim.loss_kwargs", self.loss_kwargs, {})
        if self.ema_decay is not None:
            require(0 < self.ema_decay < 1, "optim.ema_decay", self.ema_decay, "in (0, 1)")
