"""The training task: loss and metrics as functions of output and target."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from dist_graft.config import OptimConfig
from dist_graft.config.validation import check_call, own
from dist_graft.errors import ConfigError, caught, user_code

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


def build_loss(config: OptimConfig) -> LossFunction:
    """Return the function that optim.loss names, or an instance of the class.

    Raises: ConfigError if it does not exist, or optim.loss_kwargs do not fit. The returned function
        raises FunctionError if the user's fails, and ConfigError if that returns no scalar.
    """
    assert config.loss is not None
    what = f"optim.loss {config.loss}"
    function, kwargs = own("optim.loss", config.loss), config.loss_kwargs
    is_class = inspect.isclass(function)
    check_call(what, function, () if is_class else (None, None), kwargs)
    with user_code(what):
        function = function(**kwargs) if is_class else partial(function, **kwargs)

    def loss(scores: Tensor, labels: Tensor) -> Tensor:
        with user_code(what):
            if isinstance(function, nn.Module):
                function.to(scores.device)
            value: Any = function(scores.float(), labels)
        if not isinstance(value, Tensor) or value.dim():
            shape = list(value.shape) if isinstance(value, Tensor) else value
            raise ConfigError(f"{what} must return a scalar tensor, got {shape}")
        return value

    return loss


def refuse_loss_of_classes(config: OptimConfig) -> None:
    """Raise ConfigError if optim.loss takes classes as targets, but not their probabilities.

    The loss is called on two samples of ten classes. One that fails with both kinds of targets, as
    it may if it expects another number of classes, is reported by the first step.
    """
    scores, labels = torch.zeros(2, 10), torch.tensor([0, 1])
    with caught() as found:
        build_loss(config)(scores, torch.full((2, 10), 0.1))
    if found.error is None:
        return
    with caught() as other:
        build_loss(config)(scores, labels)
    if other.error is None:
        text = " ".join(str(found.error).split())[:200]
        raise ConfigError(
            f"data.mixup and data.cutmix turn targets into class probabilities, but {text}: "
            "set both options to 0, or use another loss"
        ) from found.error


def classification(label_smoothing: float = 0.0, loss: LossFunction | None = None) -> Task:
    """Cross entropy, or another loss, and accuracy in percent.

    Targets are classes, int64 [batch], or the probabilities of mixed images [batch, classes], whose
    accuracy is that of the most probable class.
    """

    def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)

    return Task(loss or cross_entropy, {"accuracy": percent_correct}, classification=True)


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
