"""One optimizer step of one network, and its evaluation.

The only communication is between the replicas of a network, in the forward and backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from dist_graft.config import OptimConfig
from dist_graft.population.runtime.replicas import Replicas
from dist_graft.seeding import stream_seed
from dist_graft.training.data import Data
from dist_graft.training.data.batches import batch_size, split_batch
from dist_graft.training.data.order import Part
from dist_graft.training.probabilities import Probabilities
from dist_graft.training.state import Predictor, TrainState
from dist_graft.training.task import Task, classification, correct

ENSEMBLE_CHUNK = 2**22
"""Number of probabilities that the networks sum at once for their ensemble (16 MiB)."""


@dataclass(frozen=True)
class Result:
    """Means over some samples."""

    loss: float
    samples: int
    metrics: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    """What each metric is a mean over."""

    def row(self) -> list[float]:
        """Loss, number of samples, and value and count of each metric, to be gathered."""
        pairs = [(value, self.counts[name]) for name, value in self.metrics.items()]
        return [self.loss, float(self.samples), *(number for pair in pairs for number in pair)]

    def from_row(self, row: Sequence[float]) -> Result:
        """Result of another process from its `row`, with the metrics of this one."""
        loss, samples, *pairs = row
        return Result(
            loss,
            int(samples),
            metrics=dict(zip(self.metrics, pairs[::2], strict=True)),
            counts=dict(zip(self.metrics, pairs[1::2], strict=True)),
        )


@dataclass(frozen=True)
class TrainResult(Result):
    """Means over the samples of some steps."""

    steps: int = 0
    seconds: float = 0.0
    data_seconds: float = 0.0
    """Time spent waiting for batches, included in `seconds`."""

    def __add__(self, other: TrainResult) -> TrainResult:
        """Means over the steps of both."""
        return TrainResult(
            **_means([self, other]),
            steps=self.steps + other.steps,
            seconds=self.seconds + other.seconds,
            data_seconds=self.data_seconds + other.data_seconds,
        )


@dataclass(frozen=True)
class EvalResult(Result):
    """Means over the samples of a split."""

    probabilities: Tensor | None = None
    """[samples, classes], float32 on the CPU, in the order of the split; classification only. Of
    this process's samples, where replicas share the split; None if there are too many. More than
    ENSEMBLE_CHUNK are a mapped temporary file, if `evaluate` was given a folder for it."""
    labels: Tensor | None = None
    """[samples], int64 on the CPU, of the same samples."""
    finite: bool = True
    """Whether all probabilities of the network are finite."""

    @property
    def accuracy(self) -> float:
        """Accuracy in percent; classification only."""
        return self.metrics["accuracy"]

    def row(self) -> list[float]:
        """As `Result.row`, and whether all probabilities are finite."""
        return [*super().row(), float(self.finite)]


class RunningSums:
    """Sums of the loss and of the metrics over training steps, kept on the device."""

    def __init__(self, task: Task, device: torch.device) -> None:
        self._names = list(task.metrics)
        self._sums = torch.zeros(1 + 2 * len(self._names), dtype=torch.float64, device=device)
        self._cells = self._sums.unbind()
        self._task = task
        self._samples = 0

    @torch.no_grad()
    def add(self, loss: Tensor, output: Any, targets: Any) -> None:
        """Add one batch: its mean loss, weighted by its size, and its metrics."""
        size = batch_size(targets)
        self._samples += size
        self._cells[0].add_(loss.detach() * size)
        for index, name in enumerate(self._names):
            total, count = self._task.metric_sums(name, output, targets)
            self._cells[1 + 2 * index].add_(total)
            self._cells[2 + 2 * index].add_(count)

    def result(self, *, steps: int, seconds: float, data_seconds: float) -> TrainResult:
        """Return the means. This is the only read from the device in a segment."""
        loss, *pairs = self._sums.tolist()
        sums = dict(zip(self._names, zip(pairs[::2], pairs[1::2], strict=True), strict=True))
        return TrainResult(
            loss=loss / max(self._samples, 1),
            samples=self._samples,
            steps=steps,
            seconds=seconds,
            data_seconds=data_seconds,
            metrics={name: total / (count or 1.0) for name, (total, count) in sums.items()},
            counts={name: count for name, (_, count) in sums.items()},
        )


def seed_step(seed: int, network: int, epoch: int, step: int, *, replica: int) -> None:
    """Seed dropout from seed, network, epoch, step and replica only."""
    replicas = (replica,) if replica else ()
    torch.manual_seed(stream_seed("step", seed, network, epoch, step, *replicas))


def train_step(
    state: TrainState,
    task: Task,
    inputs: Any,
    targets: Any,
    *,
    config: OptimConfig,
    part: Part,
    sums: RunningSums,
    replicas: Replicas | None = None,
) -> None:
    """Take one optimizer step on a batch, and add its loss and metrics to `sums`.

    The batch is split into `config.accumulation` chunks. Their gradients add up to the gradient of
    the mean loss over the batch. A collective of the processes that train the network.

    Args:
        state: changed in place.
        task: loss and metrics.
        inputs: this process's part of the batch.
        targets: this process's part of the batch.
        config: accumulation and clipping.
        part: position and weight of this process's part.
        sums: changed in place.
        replicas: the processes that train the network; None: this one alone.
    """
    replicas = replicas or Replicas()
    state.begin_step()
    length = batch_size(targets)
    # Equally many chunks on all replicas: synchronized batch norm communicates in every forward.
    size = -(-part.smallest // config.accumulation)
    chunks = min(-(-part.smallest // size), length)
    pairs = zip(split_batch(inputs, chunks), split_batch(targets, chunks), strict=True)
    for number, (chunk, target) in enumerate(pairs, start=1):
        with replicas.backward(last=number == chunks):
            with state.autocast():
                output = state.train_forward(chunk)
                task.check(output, target)
                loss = task.mean_loss(output, target)
            if state.teachers is not None:
                loss = loss + state.teachers.loss(chunk, output, state.autocast())
            share = part.weight * batch_size(target) / length
            state.scaler.scale(loss * share if share != 1 else loss).backward()
        if part.counts:
            sums.add(loss, output, target)
    if config.clip_norm is not None:
        state.scaler.unscale_(state.optimizer)
        torch.nn.utils.clip_grad_norm_(state.model.parameters(), config.clip_norm)
    if state.scaler_reads_gradients:
        replicas.wait_for_device(state.device)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    if state.ema is not None:
        state.ema.update_parameters(state.model)


@torch.no_grad()
def evaluate(
    predictor: Predictor,
    data: Data,
    split: Literal["test", "val"],
    task: Task | None = None,
    *,
    max_numbers: float = math.inf,
    spool: Path | None = None,
) -> EvalResult:
    """Evaluate the network on this process's part of a split.

    Args:
        predictor: the network; its module stays in evaluation mode.
        data: batches of the split.
        split: name of the split.
        task: loss and metrics. Default: classification.
        max_numbers: probabilities are not kept if there are more than this.
        spool: folder for probabilities beyond ENSEMBLE_CHUNK; None: keep them in memory.

    Raises: RunDirectoryError if the folder cannot hold them.
    """
    task = task or classification()
    predictor.model.eval()
    if task.classification:
        return _evaluate_classifier(predictor, data, split, task, max_numbers, spool)
    loss = torch.zeros((), dtype=torch.float64, device=predictor.device)
    zeros = torch.zeros(2, dtype=torch.float64, device=predictor.device)
    sums = {name: zeros.clone() for name in task.metrics}
    samples = 0
    for inputs, targets in data.eval_batches(split):
        predictor.begin_step()
        with predictor.autocast():
            output = predictor.forward(inputs)
            mean = task.mean_loss(output, targets)
        size = batch_size(targets)
        samples += size
        loss += mean.double() * size
        for name in task.metrics:
            total, count = task.metric_sums(name, output, targets)
            sums[name][0] += total
            sums[name][1] += count
    pairs = {name: pair.tolist() for name, pair in sums.items()}
    return EvalResult(
        loss=float(loss) / samples,
        samples=samples,
        metrics={name: total / (count or 1.0) for name, (total, count) in pairs.items()},
        counts={name: count for name, (_, count) in pairs.items()},
    )


def _evaluate_classifier(
    predictor: Predictor,
    data: Data,
    split: Literal["test", "val"],
    task: Task,
    max_numbers: float,
    spool: Path | None,
) -> EvalResult:
    loss = torch.zeros((), dtype=torch.float64, device=predictor.device)
    right = torch.zeros((), dtype=torch.int64, device=predictor.device)
    finite = torch.ones((), dtype=torch.bool, device=predictor.device)
    samples = numbers = 0
    probabilities = Probabilities(ENSEMBLE_CHUNK, spool)
    targets: list[Tensor] = []
    for inputs, labels in data.eval_batches(split):
        predictor.begin_step()
        with predictor.autocast():
            logits = predictor.forward(inputs)
        task.check(logits, labels)
        logits = logits.float()
        loss += F.cross_entropy(logits, labels, reduction="sum")
        batch = logits.softmax(1)
        right += correct(batch, labels)
        finite &= batch.isfinite().all()
        samples += len(labels)
        numbers += batch.numel()
        if numbers > max_numbers:
            probabilities.clear()
            targets.clear()
            continue
        probabilities.append(batch)
        targets.append(labels)
    kept = numbers <= max_numbers
    return EvalResult(
        loss=float(loss) / samples,
        samples=samples,
        metrics={"accuracy": 100 * (float(right) / samples)},
        counts={"accuracy": float(samples)},
        probabilities=probabilities.tensor() if kept else None,
        labels=torch.cat(targets).cpu() if kept else None,
        finite=bool(finite),
    )


def merge_train_results(local: TrainResult, rows: Sequence[Sequence[float]]) -> TrainResult:
    """Merge the results of the replicas of one network, given the `row` of each."""
    if len(rows) == 1:
        return local
    return replace(local, **_means([local.from_row(row) for row in rows]))


def merge_eval_results(
    local: EvalResult, rows: Sequence[Sequence[float]], *, classification: bool = False
) -> EvalResult:
    """Merge the results of the replicas of one network, each evaluated on a part of a split.

    Args:
        local: result of this process, which keeps its probabilities.
        rows: `row` of each replica.
        classification: whether accuracies are percentages of whole samples.
    """
    if len(rows) == 1:
        return local
    parts = [local.from_row(row[:-1]) for row in rows]
    means = _means(parts)
    if classification:  # exactly as one process counts
        right = sum(round(part.metrics["accuracy"] * part.samples / 100) for part in parts)
        means["metrics"] = {"accuracy": 100 * (right / means["samples"])}
    return replace(local, **means, finite=all(row[-1] for row in rows))


def _means(parts: Sequence[Result]) -> dict[str, Any]:
    """Fields of a `Result` over the samples of all parts."""
    names = parts[0].metrics
    return {
        "loss": _weighted_mean([(part.loss, part.samples) for part in parts]),
        "samples": sum(part.samples for part in parts),
        "metrics": {
            name: _weighted_mean([(part.metrics[name], part.counts[name]) for part in parts])
            for name in names
        },
        "counts": {name: sum(part.counts[name] for part in parts) for name in names},
    }


def _weighted_mean(pairs: Sequence[tuple[float, float]]) -> float:
    """Mean of (value, weight) pairs; 0 if all weights are 0. Values of weight 0 may be NaN."""
    total = sum(weight for _, weight in pairs)
    return sum(value * weight for value, weight in pairs if weight) / (total or 1.0)
