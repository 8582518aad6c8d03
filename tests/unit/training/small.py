"""A data set, a network and a checkpoint set, small enough for exact comparisons."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from dist_graft.training.loop import TrainState
from torch import nn

from dist_graft.population.runtime.process_group import Runtime
from dist_graft.training.checkpoint.files import checkpoint_path, mark_complete, save_network
from dist_graft.training.data.images import ResidentImages
from dist_graft.training.data.sources import ImageSet

CPU = torch.device("cpu")

MakeData = Callable[..., ResidentImages]
MakeTrainee = Callable[..., TrainState]
MakeRuntime = Callable[..., Runtime]


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


def write_set(folder: Path, epoch: int, *, networks: int = 2, round_: int | None = None) -> Path:
    """A complete set with small files."""
    path = checkpoint_path(folder, epoch)
    digests = []
    for k in range(networks):
        state = {"network": k, "epoch": epoch, "w": torch.ones(3)}
        digests.append(save_network(path / f"network{k:02d}.pt", state))
    mark_complete(path, epoch=epoch, round_=epoch if round_ is None else round_, sha256=digests)
    return path
