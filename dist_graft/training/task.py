"""What a network is trained to do: loss and metrics of an output and its target."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from dist_graft.errors import ConfigError

LossFunction = Callable[[Any, Any], Tensor]
"""(output, target) -> scalar: mean loss over the samples of a batch."""
MetricFunction = Callable[[Any, Any], tuple[Tensor | float, Tensor | float]]
"""(output, target) -> (sum, count). A metric's value is the total sum over the total count."""


@dataclass(frozen=True)
class Task:
    """Loss and metrics of any supervised task."""

    loss: LossFunction
    metrics: Mapping[str, MetricFunction] = field(default_factory=dict)
    """By name; they appear as train_NAME and test_NAME in metrics.jsonl."""
    classification: bool = False
    """Whether outputs are class scores [batch, classes], so that networks can be ensembled."""

    def check(self, output: Any, targets: Any) -> None:
        """Raise ConfigError when the task is classification and the output is not class scores."""
        if self.classification and not (
            isinstance(output, Tensor) and output.dim() == 2 and len(output) == len(targets)
        ):
            raise ConfigError(
                "the model must return one row of class scores per image; for another task, use "
                "dist_graft.Trainer with loss= and metrics="
            )


def classification(label_smoothing: float = 0.0) -> Task:
    """Cross entropy and accuracy in percent."""

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)

    return Task(loss, {"accuracy": percent_correct}, classification=True)


def percent_correct(logits: Tensor, labels: Tensor) -> tuple[Tensor, float]:
    """100 for each sample whose label has the largest score, and the number of samples."""
    return 100 * (logits.argmax(1) == labels).sum(), float(len(labels))


def accuracy(scores: Tensor, labels: Tensor) -> float:
    """Percentage of labels [n] that have the largest score in their row of scores [n, classes]."""
    return 100 * float((scores.argmax(1) == labels).double().mean())


def batch_length(batch: Any) -> int:
    """Number of samples in a nested structure of tensors."""
    if isinstance(batch, Tensor):
        return len(batch)
    parts = batch.values() if isinstance(batch, Mapping) else batch
    return batch_length(next(iter(parts)))


def split_batch(batch: Any, chunks: int) -> list[Any]:
    """Cut a nested structure of tensors into chunks along the first dimension."""
    if chunks == 1:
        return [batch]
    if isinstance(batch, Tensor):
        return list(batch.tensor_split(chunks))
    if isinstance(batch, Mapping):
        split = {key: split_batch(part, chunks) for key, part in batch.items()}
        return [{key: parts[i] for key, parts in split.items()} for i in range(chunks)]
    columns = [split_batch(part, chunks) for part in batch]
    if hasattr(batch, "_fields"):  # a named tuple
        return [type(batch)(*row) for row in zip(*columns, strict=True)]
    return [type(batch)(row) for row in zip(*columns, strict=True)]


def as_float(value: Tensor | float, device: torch.device) -> Tensor:
    """The value as a float64 scalar on the device."""
    return torch.as_tensor(value, dtype=torch.float64, device=device)
