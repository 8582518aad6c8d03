"""Runs of one process that take a second: tasks, configuration and callbacks."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from dist_graft import Callback, Datasets, Trainer
from dist_graft.config import (
    CheckpointConfig,
    DataConfig,
    GraftConfig,
    MonitorConfig,
    OptimConfig,
    RuntimeConfig,
    TrainConfig,
)

EPOCHS, STEPS = 3, 4
HOOKS = [name for name in vars(Callback) if not name.startswith("__")]


def config_of(
    run_dir: Path,
    *,
    optim: OptimConfig | None = None,
    checkpoint: CheckpointConfig | None = None,
    monitor: MonitorConfig | None = None,
    callbacks: list[str] | None = None,
) -> TrainConfig:
    """Three epochs of four steps, with a round (noise) after every third step."""
    return TrainConfig(
        run_dir=str(run_dir),
        epochs=EPOCHS,
        data=DataConfig(batch_size=6, workers=0),
        optim=optim or OptimConfig(),
        graft=GraftConfig(source="noise", threshold=1.0, every_steps=3),
        runtime=RuntimeConfig(device="cpu", threads=1),
        checkpoint=checkpoint or CheckpointConfig(),
        monitor=monitor or MonitorConfig(tensorboard=False, progress="lines"),
        callbacks=callbacks or [],
    )


class Body(nn.Sequential):
    """Most weights are in convolutions; batch norm and dropout depend on more than the weights."""

    def __init__(self, outputs: int) -> None:
        super().__init__(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.Tanh(),
            nn.Dropout(0.2),
            nn.Conv2d(4, outputs, 3, padding=1),
        )


class Regressor(nn.Module):
    """[N, 1, 5, 5] -> [N]."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Body(4)

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images).mean(dim=(1, 2, 3))


class Segmenter(nn.Module):
    """{"image": [N, 1, 5, 5]} -> {"mask": logits [N, 1, 5, 5], "count": [N]}."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Body(4)
        self.head = nn.Conv2d(4, 1, 1)

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        mask = self.head(self.body(inputs["image"]))
        return {"mask": mask, "count": mask.sigmoid().sum(dim=(1, 2, 3))}


@dataclass(frozen=True)
class Example:
    """A task with everything that a trainer takes."""

    model: Callable[[], nn.Module]
    data: Datasets
    loss: Callable[[Any, Any], Tensor]
    metrics: dict[str, Callable[[Any, Any], tuple[Any, Any]]]
    optimizer: Callable[[nn.Module, float], torch.optim.Optimizer]

    def trainer(self, config: TrainConfig, *callbacks: Callback) -> Trainer:
        return Trainer(
            config,
            model=self.model,
            data=self.data,
            loss=self.loss,
            metrics=self.metrics,
            optimizer=self.optimizer,
            callbacks=callbacks,
        )


def _samples(structure: Callable[[Tensor], tuple[Any, Any]]) -> Datasets:
    images = torch.randn(32, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    pairs: list[Any] = [structure(image) for image in images]
    return Datasets(train=pairs[:22], test=pairs[22:])


def _iou(output: dict[str, Tensor], target: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    found, wanted = output["mask"] > 0, target["mask"] > 0.5
    return (found & wanted).sum(), (found | wanted).sum()


def _count_error(output: dict[str, Tensor], target: dict[str, Tensor]) -> tuple[Tensor, int]:
    return (output["count"] - target["count"]).abs().sum(), len(target["count"])


REGRESSION = Example(
    model=Regressor,
    data=_samples(lambda image: (image, image.square().mean())),
    loss=F.mse_loss,
    metrics={"error": lambda output, target: ((output - target).abs().sum(), len(target))},
    optimizer=lambda module, lr: torch.optim.RMSprop(module.parameters(), lr=lr / 10),
)
SEGMENTATION = Example(
    model=Segmenter,
    data=_samples(
        lambda image: (
            {"image": image},
            {"mask": (image > 0).float(), "count": (image > 0).float().sum()},
        )
    ),
    loss=lambda output, target: (
        F.binary_cross_entropy_with_logits(output["mask"], target["mask"])
        + 0.01 * F.l1_loss(output["count"], target["count"])
    ),
    metrics={"iou": _iou, "count_error": _count_error},
    optimizer=lambda module, lr: torch.optim.AdamW(module.parameters(), lr=lr / 10),
)


class Recorder(Callback):
    """Records the calls of all hooks: name, epoch and step, arguments."""

    created: ClassVar[list[Recorder]] = []

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int, tuple[Any, ...]]] = []
        for hook in HOOKS:
            setattr(self, hook, partial(self._record, hook))
        self.created.append(self)

    def _record(self, hook: str, trainer: Trainer, *arguments: Any) -> None:
        self.calls.append((hook, trainer.epoch, trainer.step, arguments))

    def hooks(self) -> list[tuple[str, int, int]]:
        """Hooks with epoch and step; on_checkpoint depends on the speed of the disk."""
        return [call[:3] for call in self.calls if call[0] != "on_checkpoint"]

    def arguments(self, hook: str) -> list[tuple[Any, ...]]:
        """Arguments of each call of a hook."""
        return [call[3] for call in self.calls if call[0] == hook]


def make_recorder() -> Recorder:
    return Recorder()


class RecordToFile(Recorder):
    """Writes the calls, with rounds finished and types of arguments, to the network's folder."""

    def _record(self, hook: str, trainer: Trainer, *arguments: Any) -> None:
        kinds = tuple(type(argument).__name__ for argument in arguments)
        self.calls.append((hook, trainer.epoch, trainer.step, (trainer.round, kinds)))
        if hook == "teardown":
            rows = [(*call[:3], *call[3]) for call in self.calls]
            path = trainer.directory.network(trainer.process.network) / "hooks.json"
            path.write_text(json.dumps(rows))


class StopAfter(Callback):
    """Creates the file STOP after some steps of the run."""

    def __init__(self, *steps: int) -> None:
        self._steps = steps

    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.global_step in self._steps:
            trainer.directory.stop.touch()


class Failing(Callback):
    """Raises an error in some hooks."""

    def __init__(self, error: Exception, *hooks: str) -> None:
        self._error = error
        for hook in hooks:
            setattr(self, hook, self._fail)

    def _fail(self, *_: Any) -> None:
        raise self._error
