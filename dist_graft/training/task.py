"""The training task: loss and metrics as functions of output and target."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from dist_graft.errors import ConfigError, user_code

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

    def mean_loss(self, output: Any, targets: Any) -> Tensor:
        """The loss of a batch.

        Raises: FunctionError when a user's function raises.
        """
        with nullcontext() if self.classification else user_code("loss="):
            return self.loss(output, targets)

    def metric_sums(
        self, name: str, output: Any, targets: Any
    ) -> tuple[Tensor | float, Tensor | float]:
        """Sum and count of a metric over a batch.

        Raises: FunctionError when a user's function raises.
        """
        with nullcontext() if self.classification else user_code(f"metrics= {name}"):
            total, count = self.metrics[name](output, targets)
            return total, count

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
    """Cross entropy and accuracy in percent.

    Targets are classes, int64 [batch], or the probabilities of mixed images [batch, classes], whose
    accuracy is that of the most probable class.
    """

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)

    return Task(loss, {"accuracy": percent_correct}, classification=True)


def percent_correct(logits: Tensor, labels: Tensor) -> tuple[Tensor, float]:
    """100 for each sample whose label has the largest score, and the number of samples."""
    if labels.dim() == 2:
        labels = labels.argmax(1)
    return 100 * (logits.argmax(1) == labels).sum(), float(len(labels))


def correct(scores: Tensor, labels: Tensor) -> Tensor:
    """Number of labels [n] that have the largest score in their row of scores [n, classes]."""
    return (scores.argmax(1) == labels).sum()


def accuracy(scores: Tensor, labels: Tensor) -> float:
    """Percentage of labels [n] that have the largest score in their row of scores [n, classes]."""
    return 100 * (float(correct(scores, labels)) / len(labels))
