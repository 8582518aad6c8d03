"""One optimizer step of one network, and its evaluation. Nothing here communicates by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from dist_graft.config import OptimConfig
from dist_graft.training.data import Data
from dist_graft.training.data.batches import batch_size, split_batch
from dist_graft.training.data.order import Part
from dist_graft.training.state import Predictor, TrainState
from dist_graft.training.task import (
    Task,
    accuracy,
    as_float,
    classification,
)

Backward = Callable[..., AbstractContextManager[object]]
"""(last=) -> context of a forward and backward pass; last: whether it is the step's last one."""


@dataclass(frozen=True)
class TrainResult:
    """Means over the samples of some steps."""

    loss: float
    images: int
    """Samples."""
    steps: int
    seconds: float
    data_seconds: float = 0.0
    """Of `seconds`, spent waiting for batches."""
    metrics: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    """What each metric is a mean over."""

    def __add__(self, other: TrainResult) -> TrainResult:
        """Means over the steps of both."""
        images = self.images + other.images
        if not images:
            return self
        metrics, counts = _merge_metrics([self, other])
        return TrainResult(
            loss=(self.loss * self.images + other.loss * other.images) / images,
            images=images,
            steps=self.steps + other.steps,
            seconds=self.seconds + other.seconds,
            data_seconds=self.data_seconds + other.data_seconds,
            metrics=metrics,
            counts=counts,
        )


@dataclass(frozen=True)
class EvalResult:
    """Means over the samples of a split."""

    loss: float
    samples: int
    metrics: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    """What each metric is a mean over."""
    probabilities: Tensor | None = None
    """[samples, classes], float32 on the CPU, in the order of the split; classification only."""
    labels: Tensor | None = None
    """[samples], int64 on the CPU; classification only."""

    @property
    def accuracy(self) -> float:
        """Percent; classification only."""
        return self.metrics["accuracy"]


class RunningSums:
    """Sums of the loss and of the metrics over training steps, kept on the device."""

    def __init__(self, task: Task, device: torch.device) -> None:
        self._names = list(task.metrics)
        self._sums = torch.zeros(1 + 2 * len(self._names), dtype=torch.float64, device=device)
        self._task = task
        self._images = 0

    @torch.no_grad()
    def add(self, loss: Tensor, output: Any, targets: Any) -> None:
        """Add one batch: its mean loss, weighted by its size, and its metrics."""
        size = batch_size(targets)
        self._images += size
        self._sums[0] += loss.detach() * size
        for index, name in enumerate(self._names):
            total, count = self._task.metrics[name](output, targets)
            self._sums[1 + 2 * index] += total
            self._sums[2 + 2 * index] += count

    def result(self, *, steps: int, seconds: float, data_seconds: float) -> TrainResult:
        """The means. This is the only read from the device in a segment."""
        loss, *pairs = self._sums.tolist()
        sums = dict(zip(self._names, zip(pairs[::2], pairs[1::2], strict=True), strict=True))
        return TrainResult(
            loss=loss / max(self._images, 1),
            images=self._images,
            steps=steps,
            seconds=seconds,
            data_seconds=data_seconds,
            metrics={name: total / (count or 1.0) for name, (total, count) in sums.items()},
            counts={name: count for name, (_, count) in sums.items()},
        )


def train_step(
    state: TrainState,
    task: Task,
    inputs: Any,
    targets: Any,
    *,
    config: OptimConfig,
    part: Part,
    sums: RunningSums,
    backward: Backward | None = None,
) -> None:
    """Take one optimizer step on a batch, and add its loss and metrics to `sums`.

    The batch is cut into `config.accumulation` chunks whose gradients add up to the gradient of
    the mean loss over the batch. A collective where several processes train the network.

    Args:
        state: of the network; changed.
        task: loss and metrics.
        inputs: of this process's part of the batch.
        targets: likewise.
        config: accumulation and clipping.
        part: of the batch that this process trains on.
        sums: of the segment; changed.
        backward: context of each forward and backward pass; None: a process alone.
    """
    length = batch_size(targets)
    # Equally many chunks on all replicas: synchronized batch norm communicates in every forward.
    size = -(-part.smallest // config.accumulation)
    chunks = min(-(-part.smallest // size), length)
    pairs = zip(split_batch(inputs, chunks), split_batch(targets, chunks), strict=True)
    for number, (chunk, target) in enumerate(pairs, start=1):
        with backward(last=number == chunks) if backward else nullcontext():
            with state.autocast():
                output = state.train_forward(chunk)
                task.check(output, target)
                loss = task.loss(output, target)
            if state.teachers is not None:
                loss = loss + state.teachers.loss(chunk, output, state.autocast())
            share = part.weight * batch_size(target) / length
            state.scaler.scale(loss * share if share != 1 else loss).backward()
        if part.counts:
            sums.add(loss, output, target)
    if config.clip_norm is not None:
        state.scaler.unscale_(state.optimizer)
        torch.nn.utils.clip_grad_norm_(state.model.parameters(), config.clip_norm)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    if state.ema is not None:
        state.ema.update_parameters(state.model)


@torch.no_grad()
def evaluate(
    predictor: Predictor, data: Data, split: Literal["test", "val"], task: Task | None = None
) -> EvalResult:
    """Evaluate the network on this process's part of a split.

    Args:
        predictor: the network; its module is left in evaluation mode.
        data: whose split is evaluated.
        split: "test" or "val".
        task: loss and metrics; None: classification.
    """
    task = task or classification()
    predictor.model.eval()
    if task.classification:
        return _evaluate_classifier(predictor, data, split, task)
    loss = torch.zeros((), dtype=torch.float64, device=predictor.device)
    zeros = torch.zeros(2, dtype=torch.float64, device=predictor.device)
    sums = {name: zeros.clone() for name in task.metrics}
    samples = 0
    for inputs, targets in data.eval_batches(split):
        with predictor.autocast():
            output = predictor.forward(inputs)
            mean = task.loss(output, targets)
        size = batch_size(targets)
        samples += size
        loss += mean.double() * size
        for name, metric in task.metrics.items():
            total, count = metric(output, targets)
            sums[name][0] += as_float(total, predictor.device)
            sums[name][1] += as_float(count, predictor.device)
    pairs = {name: pair.tolist() for name, pair in sums.items()}
    return EvalResult(
        loss=float(loss) / samples,
        samples=samples,
        metrics={name: total / (count or 1.0) for name, (total, count) in pairs.items()},
        counts={name: count for name, (_, count) in pairs.items()},
    )


def _evaluate_classifier(
    predictor: Predictor, data: Data, split: Literal["test", "val"], task: Task
) -> EvalResult:
    loss = torch.zeros((), dtype=torch.float64, device=predictor.device)
    probabilities, targets = [], []
    for inputs, labels in data.eval_batches(split):
        with predictor.autocast():
            logits = predictor.forward(inputs)
        task.check(logits, labels)
        logits = logits.float()
        loss += F.cross_entropy(logits, labels, reduction="sum")
        probabilities.append(logits.softmax(1))
        targets.append(labels)
    gathered, labels = torch.cat(probabilities).cpu(), torch.cat(targets).cpu()
    return EvalResult(
        loss=float(loss) / len(labels),
        samples=len(labels),
        metrics={"accuracy": accuracy(gathered, labels)},
        counts={"accuracy": float(len(labels))},
        probabilities=gathered,
        labels=labels,
    )


def merge_train_results(local: TrainResult, rows: Sequence[Sequence[float]]) -> TrainResult:
    """Merge the results of the replicas of one network, given each one's `result_row`."""
    if len(rows) == 1:
        return local
    parts = [
        replace(
            local,
            loss=loss,
            images=int(images),
            metrics=dict(zip(local.metrics, pairs[::2], strict=True)),
            counts=dict(zip(local.metrics, pairs[1::2], strict=True)),
        )
        for loss, images, *pairs in rows
    ]
    images = sum(part.images for part in parts)
    metrics, counts = _merge_metrics(parts)
    return replace(
        local,
        loss=sum(part.loss * part.images for part in parts if part.images) / max(images, 1),
        images=images,
        metrics=metrics,
        counts=counts,
    )


def merge_eval_results(
    local: EvalResult, rows: Sequence[Sequence[float]], answers: Tensor | None
) -> EvalResult:
    """Merge the results of the replicas of one network, each evaluated on a part of a split.

    Args:
        local: of this process.
        rows: `result_row` of each replica.
        answers: probabilities and labels of all replicas, [samples, classes + 1]; None unless the
            task is classification.
    """
    if len(rows) == 1:
        return local
    parts = [
        EvalResult(
            loss=loss,
            samples=int(samples),
            metrics=dict(zip(local.metrics, pairs[::2], strict=True)),
            counts=dict(zip(local.metrics, pairs[1::2], strict=True)),
        )
        for loss, samples, *pairs in rows
    ]
    samples = sum(part.samples for part in parts)
    loss = sum(part.loss * part.samples for part in parts) / samples
    metrics, counts = _merge_metrics(parts)
    if answers is None:
        return EvalResult(loss, samples, metrics, counts)
    probabilities, labels = answers[:, :-1], answers[:, -1].long()
    metrics = {"accuracy": accuracy(probabilities, labels)}
    return EvalResult(loss, samples, metrics, counts, probabilities, labels)


def result_row(result: TrainResult | EvalResult) -> list[float]:
    """Loss, number of samples, and value and count of each metric, as numbers to be gathered."""
    samples = result.images if isinstance(result, TrainResult) else result.samples
    pairs = [(value, result.counts[name]) for name, value in result.metrics.items()]
    return [result.loss, float(samples), *(number for pair in pairs for number in pair)]


def _merge_metrics(
    parts: Sequence[TrainResult | EvalResult],
) -> tuple[dict[str, float], dict[str, float]]:
    """Means over the samples of all parts, and their counts."""
    counts = {name: sum(part.counts[name] for part in parts) for name in parts[0].metrics}
    metrics = {
        name: sum(part.metrics[name] * part.counts[name] for part in parts if part.counts[name])
        / (count or 1.0)
        for name, count in counts.items()
    }
    return metrics, counts
