from __future__ import annotations

import pytest
import torch
from torch import nn

from dist_graft.config import OptimConfig
from dist_graft.training.optim import build_optimizer, build_scheduler


@pytest.mark.parametrize(
    ("kind", "name", "options"),
    [
        (torch.optim.SGD, "sgd", {"momentum": 0.8, "nesterov": True, "weight_decay": 0.01}),
        (torch.optim.AdamW, "adamw", {"betas": (0.7, 0.8), "weight_decay": 0.01}),
    ],
)
def test_the_configured_optimizer(kind: type, name: str, options: dict[str, object]) -> None:
    config = OptimConfig(name=name, **options)  # type: ignore[arg-type]
    optimizer = build_optimizer(config, nn.Linear(2, 2), lr=0.3)
    assert type(optimizer) is kind
    group = optimizer.param_groups[0]
    assert group["lr"] == 0.3
    assert {key: group[key] for key in options} == options


def test_frozen_parameters_are_excluded() -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    parameters = build_optimizer(OptimConfig(), model, lr=0.1).param_groups[0]["params"]
    assert [parameter is model.weight for parameter in parameters] == [True]


def test_warmup_applies_to_the_first_step() -> None:
    config = OptimConfig(schedule="constant", warmup_epochs=1.0)
    optimizer = build_optimizer(config, nn.Linear(2, 2), lr=0.4)
    scheduler = build_scheduler(config, optimizer, epochs=3, steps_per_epoch=4)
    rates = []
    for _ in range(5):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == [0.1, 0.2, 0.4 * 3 / 4, 0.4, 0.4]
