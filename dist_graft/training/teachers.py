"""Distillation from teachers: frozen networks of finished runs."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
import yaml
from torch import Tensor, nn

from dist_graft.config import ModelConfig, TrainConfig
from dist_graft.config.distill import DistillConfig
from dist_graft.errors import ConfigError
from dist_graft.training.checkpoint.files import run_of_checkpoint
from dist_graft.training.data import ImageData
from dist_graft.training.models import build_model, to_channels_last

_UNREADABLE = (
    *(OSError, EOFError, RuntimeError, pickle.UnpicklingError),
    *(yaml.YAMLError, IndexError, KeyError, TypeError, UnicodeDecodeError),
)


class Teachers:
    """Ensemble of frozen networks for distillation.

    Args:
        models: in evaluation mode, on the run's device.
        config: temperature, and weight of the loss.
    """

    def __init__(self, models: Sequence[nn.Module], config: DistillConfig) -> None:
        self._models = models
        self._temperature = config.temperature
        self._weight = config.weight

    def loss(
        self, images: Tensor, logits: Tensor, autocast: AbstractContextManager[object]
    ) -> Tensor:
        """Weighted distillation loss (a scalar) of a student's logits [batch, classes]."""
        teaching = self.probabilities(images, autocast)
        return self._weight * distillation_loss(logits, teaching, temperature=self._temperature)

    @torch.no_grad()
    def probabilities(self, images: Tensor, autocast: AbstractContextManager[object]) -> Tensor:
        """Mean of the teachers' softened probabilities, float32 [batch, classes].

        Args:
            images: [batch, channels, height, width].
            autocast: context manager of the run's precision.
        """
        with autocast:
            outputs = [model(images) for model in self._models]
        softened = [(logits.float() / self._temperature).softmax(dim=1) for logits in outputs]
        return torch.stack(softened).mean(dim=0)


def distillation_loss(logits: Tensor, teaching: Tensor, *, temperature: float) -> Tensor:
    """Distillation loss -tau^2 sum_k p_k ln q_k (arXiv 2004.12311).

    Args:
        logits: the student's, [batch, classes].
        teaching: p, the mean of the teachers' probabilities at the same temperature,
            [batch, classes]; receives no gradient.
        temperature: tau; q is the softmax of logits / tau.

    Returns: the mean over the batch in float32, a scalar.
    """
    student = F.log_softmax(logits.float() / temperature, dim=1)
    return -(temperature**2) * (teaching * student).sum(dim=1).mean()


def load_teachers(config: TrainConfig, data: ImageData, device: torch.device) -> Teachers | None:
    """Load the teachers in distill.teachers; None if there are none.

    Raises: ConfigError naming a file that is not a checkpoint of a network, or has other classes or
    channels.
    """
    if not config.distill.teachers:
        return None
    models = [_load(Path(path), data, device) for path in config.distill.teachers]
    if config.runtime.channels_last:
        for model in models:
            to_channels_last(model)
    return Teachers(models, config.distill)


def _load(path: Path, data: ImageData, device: torch.device) -> nn.Module:
    try:
        options = yaml.safe_load((run_of_checkpoint(path.parent) / "config.yaml").read_text())[
            "model"
        ]
        architecture = ModelConfig(**options)
        state = torch.load(path, map_location=device, weights_only=True)["model"]
    except _UNREADABLE as error:
        raise ConfigError(
            f"distill.teachers: {path} is not a checkpoint of a network ({type(error).__name__}): "
            "give files such as RUN/checkpoints/epoch_0200/network00.pt"
        ) from error
    model = build_model(architecture, num_classes=data.num_classes, channels=data.channels)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ConfigError(
            f"distill.teachers: {path} was trained on another dataset: it does not fit "
            f"{data.num_classes} classes and {data.channels} channels"
        ) from error
    return model.to(device).eval().requires_grad_(False)
