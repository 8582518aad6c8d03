"""Steps of one network, and its evaluation. Nothing here knows of other networks."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from dist_graft.config import OptimConfig
from dist_graft.errors import ConfigError
from dist_graft.phase_timer import profiler_label
from dist_graft.population.runtime.replicas import Replicas
from dist_graft.seeding import stream_seed
from dist_graft.training.data import Data
from dist_graft.training.data.order import Part
from dist_graft.training.teachers import Teachers

Precision = Literal["fp32", "bf16", "fp16"]
LEAST_LOSS_SCALE = 1e-4
"""Below it scaled gradients underflow in fp16; it begins at 65,536."""


@dataclass
class Predictor:
    """A network that answers: its module, and how it is run."""

    model: nn.Module
    """The plain module, whose weights are grafted and saved."""
    forward: Callable[[Tensor], Tensor]
    """Runs the module: itself, or its compiled form."""
    precision: Precision
    device: torch.device

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """The run's precision for a forward pass."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        kind = torch.bfloat16 if self.precision == "bf16" else torch.float16
        return torch.autocast(self.device.type, kind)


@dataclass
class TrainState(Predictor):
    """A network in training: with the rest of what a checkpoint holds."""

    optimizer: torch.optim.Optimizer
    scheduler: LambdaLR
    scaler: torch.amp.GradScaler
    """Scales the loss in fp16; disabled otherwise."""
    seed: int
    network: int
    teachers: Teachers | None = None
    """Frozen networks to learn from, beside the labels."""
    replicas: Replicas = field(default_factory=Replicas)
    """The processes that train the network together."""
    learn: Callable[[Tensor], Tensor] | None = None
    """Runs the module in training, where gradients are averaged over processes; None: forward."""

    @property
    def scale_collapsed(self) -> bool:
        """Whether so many steps in a row were skipped that fp16 gradients come to nothing."""
        return self.scaler.is_enabled() and self.scaler.get_scale() < LEAST_LOSS_SCALE

    def begin_anew(self) -> None:
        """Forget what the optimizer and the loss scale know of weights that were replaced."""
        self.optimizer.state.clear()
        fresh = torch.amp.GradScaler(self.device.type, enabled=self.scaler.is_enabled())
        self.scaler.load_state_dict(fresh.state_dict())


@dataclass(frozen=True)
class TrainResult:
    """Means over the images of a stretch of steps."""

    loss: float
    accuracy: float
    """Percent."""
    images: int
    steps: int
    seconds: float
    data_seconds: float = 0.0
    """Of them, waiting for batches."""

    def __add__(self, other: TrainResult) -> TrainResult:
        """Both stretches together."""
        images = self.images + other.images
        if not images:
            return self
        return TrainResult(
            loss=(self.loss * self.images + other.loss * other.images) / images,
            accuracy=(self.accuracy * self.images + other.accuracy * other.images) / images,
            images=images,
            steps=self.steps + other.steps,
            seconds=self.seconds + other.seconds,
            data_seconds=self.data_seconds + other.data_seconds,
        )


@dataclass(frozen=True)
class EvalResult:
    """Means over the images of a split."""

    loss: float
    accuracy: float
    """Percent."""
    probabilities: Tensor
    """[images, classes], float32 on the CPU, in the order of the split."""
    labels: Tensor
    """[images], int64 on the CPU."""


def train_steps(
    trainee: TrainState,
    data: Data,
    config: OptimConfig,
    *,
    epoch: int,
    first: int,
    last: int,
    on_step: Callable[[], object] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> TrainResult:
    """Train the network on the batches first ... last - 1 of an epoch, or until `stop`.

    Every step's draws (dropout) follow from (seed, network, epoch, step), and the process where
    several train the network. A batch is cut into config.accumulation parts whose gradients add up
    to the gradient of its mean loss. A step whose batch is empty counts and changes no weight. The
    results are those of this process's part of the batches.
    """
    start = time.perf_counter()
    trainee.model.train()
    totals = torch.zeros(2, dtype=torch.float64, device=trainee.device)
    images = steps = 0
    batches = _Batches(data.train_batches(epoch, first, last))
    for step, (inputs, labels) in enumerate(batches, start=first):
        replica = (trainee.replicas.index,) if trainee.replicas.index else ()
        seed = stream_seed("step", trainee.seed, trainee.network, epoch, step, *replica)
        torch.manual_seed(seed)
        part = data.part(step)
        with profiler_label("step"):
            if len(labels):
                _learn(trainee, inputs, labels, config, part, totals)
            trainee.scheduler.step()
        images += len(labels) if part.counts else 0
        steps += 1
        if on_step:
            on_step()
        if stop():
            break
    loss_sum, correct = totals.tolist()  # the only read from the device
    return TrainResult(
        loss=loss_sum / max(images, 1),
        accuracy=100 * correct / max(images, 1),
        images=images,
        steps=steps,
        seconds=time.perf_counter() - start,
        data_seconds=batches.seconds,
    )


class _Batches:
    """Batches, and the seconds that were spent on waiting for them."""

    def __init__(self, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        self._batches = batches
        self.seconds = 0.0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        began = time.perf_counter()
        try:
            with profiler_label("data"):
                return next(self._batches)
        finally:
            self.seconds += time.perf_counter() - began


def _learn(
    trainee: TrainState,
    inputs: Tensor,
    labels: Tensor,
    config: OptimConfig,
    part: Part,
    totals: Tensor,
) -> None:
    """One optimizer step; adds the sum of the losses and the number of hits to totals [2]."""
    # As many in each process, since synchronised batch norm is a collective of each forward pass.
    size = -(-part.smallest // config.accumulation)
    count = min(-(-part.smallest // size), len(labels))
    chunks = zip(inputs.tensor_split(count), labels.tensor_split(count), strict=True)
    for number, (some, target) in enumerate(chunks, start=1):
        with trainee.replicas.backward(last=number == count):
            loss, logits = _loss(trainee, some, target, config)
            share = part.weight * len(target) / len(labels)
            trainee.scaler.scale(loss * share if share != 1 else loss).backward()
        if part.counts:
            with torch.no_grad():
                totals[0] += loss.detach() * len(target)
                totals[1] += (logits.detach().argmax(1) == target).sum()
    if config.clip_norm is not None:
        trainee.scaler.unscale_(trainee.optimizer)
        torch.nn.utils.clip_grad_norm_(trainee.model.parameters(), config.clip_norm)
    trainee.scaler.step(trainee.optimizer)
    trainee.scaler.update()
    trainee.optimizer.zero_grad(set_to_none=True)


def _loss(
    trainee: TrainState, inputs: Tensor, labels: Tensor, config: OptimConfig
) -> tuple[Tensor, Tensor]:
    """Mean loss over the images, with the teachers', and the logits [images, classes]."""
    with trainee.autocast():
        logits = (trainee.learn or trainee.forward)(inputs)
        _check_logits(logits, labels)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=config.label_smoothing)
    if trainee.teachers is not None:
        loss = loss + trainee.teachers.loss(inputs, logits, trainee.autocast())
    return loss, logits


@torch.no_grad()
def evaluate(predictor: Predictor, data: Data, split: Literal["test", "val"]) -> EvalResult:
    """Loss, accuracy and probabilities of the network as it is on every image of a split."""
    predictor.model.eval()
    loss = torch.zeros((), dtype=torch.float64, device=predictor.device)
    probabilities, everyone = [], []
    for inputs, labels in data.eval_batches(split):
        with predictor.autocast():
            logits = predictor.forward(inputs)
        logits = logits.float()
        loss += F.cross_entropy(logits, labels, reduction="sum")
        probabilities.append(logits.softmax(1))
        everyone.append(labels)
    guess, labels = torch.cat(probabilities).cpu(), torch.cat(everyone).cpu()
    return EvalResult(
        loss=float(loss) / len(labels),
        accuracy=accuracy(guess, labels),
        probabilities=guess,
        labels=labels,
    )


def current_lr(trainee: TrainState) -> float:
    """Learning rate of the next step."""
    return float(trainee.optimizer.param_groups[0]["lr"])


def accuracy(scores: Tensor, labels: Tensor) -> float:
    """Percent of the labels [images] that the largest of the scores [images, classes] hits."""
    return 100 * float((scores.argmax(1) == labels).double().mean())


def _check_logits(logits: Tensor, labels: Tensor) -> None:
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(labels):
        raise ConfigError(
            "the model does not return one row of class scores an image: choose an image classifier"
        )
