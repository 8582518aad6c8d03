from __future__ import annotations

import pytest
import torch
from small import CPU, MakeData, MakeState, images, small_model
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from dist_graft.config import DataConfig, OptimConfig
from dist_graft.population.runtime import stop_requests
from dist_graft.training.data.images import ResidentImages
from dist_graft.training.data.sources import DatasetInfo
from dist_graft.training.learning_rates import schedule
from dist_graft.training.optimizers import build_optimizer
from dist_graft.training.state import TrainState, moving_average


@pytest.fixture(autouse=True)
def _read_the_stop_file_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop_requests, "_POLL_SECONDS", 0.0)


@pytest.fixture
def make_data() -> MakeData:
    """29 training images (in four classes, of 8 pixels) in batches of 8, and 10 test images."""

    def make(*, network: int = 0, **options: object) -> ResidentImages:
        return ResidentImages(
            images(29),
            images(10),
            DatasetInfo(num_classes=4, mean=(0.5,), std=(0.29,)),
            DataConfig(**{"batch_size": 8, "augment": False, **options}),  # type: ignore[arg-type]
            seed=0,
            network=network,
            device=CPU,
            channels_last=True,
        )

    return make


@pytest.fixture
def make_state() -> MakeState:
    """A small network in training, on batches of make_data."""

    def make(
        config: OptimConfig,
        *,
        model: nn.Module | None = None,
        network: int = 0,
        precision: str = "fp32",
        epochs: int = 10,
        steps_per_epoch: int = 4,
    ) -> TrainState:
        model = model or small_model()
        optimizer = build_optimizer(config, model, lr=config.lr)
        lr_factor = schedule(config, epochs=epochs, steps_per_epoch=steps_per_epoch)
        return TrainState(
            model=model,
            forward=model,
            train_forward=model,
            optimizer=optimizer,
            scheduler=LambdaLR(optimizer, lr_factor),
            scaler=torch.amp.GradScaler("cpu", enabled=False),
            precision=precision,  # type: ignore[arg-type]
            device=CPU,
            seed=0,
            network=network,
            ema=None if config.ema_decay is None else moving_average(model, config.ema_decay),
        )

    return make
