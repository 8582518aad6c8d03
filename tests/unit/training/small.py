"""A dataset, a network and a checkpoint, small enough for exact comparisons."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from dist_graft import Callback, Trainer
from dist_graft.config import OptimConfig, TrainConfig
from dist_graft.population.runtime.process_group import Runtime
from dist_graft.population.runtime.process_info import ProcessInfo
from dist_graft.population.runtime.timeouts import Timeouts
from dist_graft.training.callbacks import CallbackList
from dist_graft.training.checkpoint.files import checkpoint_path, mark_complete, save_network
from dist_graft.training.data.images import ResidentImages
from dist_graft.training.data.sources import ImageSet
from dist_graft.training.schedule import Segment
from dist_graft.training.state import TrainState
from dist_graft.training.step import TrainResult

CPU = torch.device("cpu")

MakeData = Callable[..., ResidentImages]
MakeState = Callable[..., TrainState]


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
