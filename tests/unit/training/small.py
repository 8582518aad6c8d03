"""A dataset, a network and a checkpoint, small enough for exact comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from dist_graft import Callback, Trainer
from dist_graft.config import DataConfig, OptimConfig, TrainConfig
from dist_graft.population.runtime.process_group import Runtime
from dist_graft.population.runtime.process_info import ProcessInfo
from dist_graft.population.runtime.timeouts import Timeouts
from dist_graft.training.callbacks import CallbackList
from dist_graft.training.checkpoint.files import checkpoint_path, mark_complete, save_network
from dist_graft.training.data.images import ResidentImages
from dist_graft.training.data.sources import DatasetInfo, ImageSet
from dist_graft.training.learning_rates import lr_factor
from dist_graft.training.optimizers import build_optimizer
from dist_graft.training.schedule import Segment
from dist_graft.training.state import TrainState, moving_average
from dist_graft.training.step import TrainResult

CPU = torch.device("cpu")


def images(count: int, classes: int = 4, side: int = 8) -> ImageSet:
    random = np.random.default_rng(count)
    pixels = random.integers(0, 256, (count, 1, side, side), dtype=np.uint8)
    return ImageSet(pixels, np.arange(count) % classes)


def small_model(*, batch_norm: bool = False, dropout: float = 0.0) -> nn.Module:
    """One convolution and one linear layer, the same weights every time."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3),
        nn.BatchNorm2d(6) if batch_norm else nn.Identity(),
        nn.Tanh(),
        nn.Dropout(dropout),
        nn.Flatten(),
        nn.Linear(6 * 6 * 6, 4),
    )


def make_data(*, network: int = 0, **options: object) -> ResidentImages:
    """29 training images (in four classes, of 8 pixels) in batches of 8, and 10 test images."""
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


def make_state(
    config: OptimConfig,
    *,
    model: nn.Module | None = None,
    network: int = 0,
    precision: str = "fp32",
    epochs: int = 10,
    steps_per_epoch: int = 4,
) -> TrainState:
    """A small network in training, on batches of make_data."""
    model = model or small_model()
    optimizer = build_optimizer(config, model, lr=config.lr)
    factor = lr_factor(config, epochs=epochs, steps_per_epoch=steps_per_epoch)
    return TrainState(
        model=model,
        forward=model,
        train_forward=model,
        optimizer=optimizer,
        scheduler=LambdaLR(optimizer, factor),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        precision=precision,  # type: ignore[arg-type]
        device=CPU,
        seed=0,
        network=network,
        ema=None if config.ema_decay is None else moving_average(model, config.ema_decay),
    )


def make_runtime(network: int = 0, networks: int = 1) -> Runtime:
    """The runtime of one of several networks; it sends nothing."""
    process = ProcessInfo(network, networks, network, networks)
    return Runtime(process, CPU, "none", Timeouts(60.0, epochs=5.0), None)


def make_trainer(
    state: TrainState, data: Any, config: OptimConfig, callbacks: Sequence[Callback] = ()
) -> Trainer:
    """A trainer of one process that has started and takes no requests to stop."""
    trainer = Trainer(TrainConfig(seed=state.seed, optim=config))
    trainer.state, trainer.data = state, data
    trainer.runtime = make_runtime(state.network, state.network + 1)
    trainer.process, trainer.replicas = trainer.runtime.process, trainer.runtime.replicas
    trainer.callbacks = CallbackList([], callbacks)
    trainer.stop_requests = cast(Any, SimpleNamespace(requested=lambda: False))
    return trainer


def train_steps(
    state: TrainState,
    data: Any,
    config: OptimConfig,
    *,
    epoch: int,
    first: int,
    last: int,
    callbacks: Sequence[Callback] = (),
) -> TrainResult:
    """Take some steps of an epoch as a trainer does."""
    trainer = make_trainer(state, data, config, callbacks)
    with closing(data.train_batches(epoch, first, last)) as batches:
        trainer.train_segment(Segment(epoch, first, last), batches)
    assert trainer.progress.trained
    return trainer.progress.trained


def write_checkpoint(
    folder: Path, epoch: int, *, networks: int = 2, round_: int | None = None
) -> Path:
    """A complete checkpoint with small files."""
    path = checkpoint_path(folder, epoch)
    digests = []
    for k in range(networks):
        state = {"network": k, "epoch": epoch, "w": torch.ones(3)}
        digests.append(save_network(path / f"network{k:02d}.pt", state))
    mark_complete(path, epoch=epoch, round_=epoch if round_ is None else round_, sha256=digests)
    return path
