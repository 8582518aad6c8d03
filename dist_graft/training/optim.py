"""Optimizer and learning rate scheduler from the configuration."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from dist_graft.config import OptimConfig
from dist_graft.training.learning_rates import schedule


def build_optimizer(
    config: OptimConfig, model: nn.Module, *, lr: float
) -> torch.optim.SGD | torch.optim.AdamW:
    """SGD or AdamW over all parameters that require a gradient."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if config.name == "adamw":
        return torch.optim.AdamW(
            parameters, lr=lr, betas=config.betas, weight_decay=config.weight_decay
        )
    return torch.optim.SGD(
        parameters,
        lr=lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
    )


def build_scheduler(
    config: OptimConfig, optimizer: torch.optim.Optimizer, *, epochs: int, steps_per_epoch: int
) -> LambdaLR:
    """Learning rate scheduler; call step() after every optimizer step."""
    return LambdaLR(optimizer, schedule(config, epochs=epochs, steps_per_epoch=steps_per_epoch))
