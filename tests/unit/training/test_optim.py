from __future__ import annotations

import torch
from torch import nn

from dist_graft.config import OptimConfig
from dist_graft.training.optim import build_optimizer, build_scheduler


def test_sgd_as_asked_for() -> None:
    config = OptimConfig(momentum=0.8, nesterov=True, weight_decay=0.01)
    optimizer = build_optimizer(config, nn.Linear(2, 2), lr=0.3)
    assert isinstance(optimizer, torch.optim.SGD)
    group = optimizer.param_groups[0]
    asked = {"lr": 0.3, "momentum": 0.8, "nesterov": True, "weight_decay": 0.01}
    assert {name: group[name] for name in asked} == asked


def test_adamw_as_asked_for() -> None:
    config = OptimConfig(name="adamw", betas=(0.7, 0.8), weight_decay=0.01)
    optimizer = build_optimizer(config, nn.Linear(2, 2), lr=0.3)
    assert isinstance(optimizer, torch.optim.AdamW)
    group = optimizer.param_groups[0]
    asked = {"lr": 0.3, "betas": (0.7, 0.8), "weight_decay": 0.01}
    assert {name: group[name] for name in asked} == asked


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    held = build_optimizer(OptimConfig(), model, lr=0.1).param_groups[0]["params"]
    assert [parameter is model.weight for parameter in held] == [True]


def test_the_scheduler_sets_the_rate_of_the_first_step_too() -> None:
    config = OptimConfig(schedule="constant", warmup_epochs=1.0)
    optimizer = build_optimizer(config, nn.Linear(2, 2), lr=0.4)
    scheduler = build_scheduler(config, optimizer, epochs=3, steps_per_epoch=4)
    rates = []
    for _ in range(5):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == [0.1, 0.2, 0.4 * 3 / 4, 0.4, 0.4]
