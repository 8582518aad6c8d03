"""One network's way from meeting to meeting, and the sets that are saved on it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NoReturn

import torch

from dist_graft.config import TrainConfig
from dist_graft.errors import RoundPostponedError, RoundStoppedError
from dist_graft.monitoring.chart_layout import PHASES
from dist_graft.monitoring.profiler import StepProfile
from dist_graft.monitoring.status_file import StatusFile
from dist_graft.phase_timer import PhaseTimer
from dist_graft.population.grafter import Grafter
from dist_graft.population.round.record import GraftRecord
from dist_graft.population.runtime.checkpoint_requests import SaveRequests
from dist_graft.population.runtime.process_group import Runtime
from dist_graft.population.runtime.stop_requests import StopRequests
from dist_graft.training.checkpoint.manager import CheckpointManager, Progress
from dist_graft.training.data import Data
from dist_graft.training.layer_stats import naming_epoch
from dist_graft.training.loop import (
    EvalResult,
    TrainResult,
    TrainState,
    accuracy,
    current_lr,
    evaluate,
    train_steps,
)
from dist_graft.training.reporting import with_round
from dist_graft.training.schedule import Position, Segment


@dataclass
class Course:
    """Trains one network between the points at which all networks meet.

    A request to stop is honoured after a step, and leaves from the next meeting; a request for a
    checkpoint set is met after a step, or at a meeting that others reached first.
    """

    config: TrainConfig
    runtime: Runtime
    trainee: TrainState
    data: Data
    grafter: Grafter | None
    rate: Callable[[int], float]
    """What donors' shares are multiplied with after a number of steps of the run."""
    checkpoints: CheckpointManager
    stops: StopRequests
    saves: SaveRequests
    live: StatusFile
    progress: Progress
    profile: StepProfile | None
    began: float
    """When the run would have begun without interruption, on the monotonic clock."""
    round: int = 0
    """Rounds finished."""
    times: PhaseTimer = field(default_factory=lambda: PhaseTimer(PHASES), init=False)
    """Of this process, since the last report."""
    busy: float = field(default=0.0, init=False)
    """Seconds of training and evaluating in this epoch, in this process's life."""
    _epoch_began: float | None = field(default=None, init=False)
    _due: bool = field(default=False, init=False)
    _stop: bool = field(default=False, init=False)

    @property
    def seconds(self) -> float:
        """Spent on the run so far, by all its processes' lives."""
        return time.monotonic() - self.began

    @property
    def whole(self) -> float:
        """Seconds since the epoch began; 0 when this process did not live through all of it."""
        return time.monotonic() - self._epoch_began if self._epoch_began else 0.0

    @property
    def trained(self) -> TrainResult:
        """Of the epoch's steps."""
        assert self.progress.trained is not None
        return self.progress.trained

    @property
    def lr(self) -> float:
        """At the start of the epoch."""
        assert self.progress.lr is not None
        return self.progress.lr

    def begin_epoch(self) -> None:
        """From here on the progress is that of a new epoch."""
        self.busy, self._epoch_began = 0.0, time.monotonic()
        self.progress = Progress(
            lr=current_lr(self.trainee),
            position=Position(0, 0, self.round),
            diverged=self.progress.diverged,
        )

    def train(self, segment: Segment) -> None:
        """Take the steps of a segment, or as many as there are before a request to stop."""
        first = segment.first
        if self.profile:
            before = segment.epoch * self.data.steps_per_epoch
            self.profile.go_on(before + first, before + segment.last)
        while True:
            stretch = train_steps(
                self.trainee,
                self.data,
                self.config.optim,
                epoch=segment.epoch,
                first=first,
                last=segment.last,
                on_step=self._after_step,
                stop=self._interrupted,
            )
            stretch = self._of_all_replicas(stretch)
            first += stretch.steps
            self.busy += stretch.seconds
            self.times.add("data", stretch.data_seconds)
            self.times.add("step", stretch.seconds - stretch.data_seconds)
            progress = self.progress
            progress.trained = progress.trained + stretch if progress.trained else stretch
            progress.position = Position(segment.epoch, first, self.round)
            progress.diverged |= self._lost(stretch.loss)
            if self._due:
                self._save()
            if first == segment.last or self.stopping():
                return

    def stopping(self) -> bool:
        """Whether the network stops here: a collective of its processes."""
        if not self._stop:
            (self._stop,) = self.trainee.replicas.agree([self.stops.requested()])
        return self._stop

    def evaluate(self) -> tuple[EvalResult, EvalResult | None]:
        """The network as it is on the test images, and on the validation images where there are.

        A collective of the network's processes, whose batch-norm statistics become their mean.
        """
        began = time.monotonic()
        self.live.evaluating()
        with self.times.phase("evaluation"):
            self.trainee.replicas.average_buffers(self.trainee.model)
            tested = self.test()
            validated = None
            if self.data.has_validation:
                validated = self._whole(evaluate(self.trainee, self.data, "val"))
        self.busy += time.monotonic() - began
        return tested, validated

    def test(self) -> EvalResult:
        """The network on the test images: a collective of its processes."""
        return self._whole(evaluate(self.trainee, self.data, "test"))

    def meet(self, segment: Segment) -> GraftRecord | None:
        """Meet the other networks at the end of a segment: all go on or all stop, a collective.

        Returns: what a round did; None when none was due.

        Raises: RoundStoppedError when a network wants to stop.
        """
        self.live.meeting()
        while True:
            stop = self.stopping()
            try:
                if segment.round and self.grafter:
                    return self._graft(segment, stop)
                if segment.evaluate or stop:
                    self._vote(segment.epoch, stop)
                return None
            except RoundPostponedError as postponed:
                if self.saves.count < postponed.saves:
                    self._save()

    def leave(self) -> NoReturn:
        """Save where the run stands and end it early, together with all others."""
        self.progress.seconds = self.seconds
        self.progress.buffers = self.trainee.replicas.gather_buffers(self.trainee.model)
        self.checkpoints.leave(self.progress, self.stops.reason or self.stops.peer_reason())

    def finish_epoch(self, epoch: int) -> None:
        """Save a set after an epoch and its round."""
        progress = Progress(
            Position(epoch + 1, 0, self.round), self.seconds, diverged=self.progress.diverged
        )
        with self.times.phase("checkpoint"):
            self.checkpoints.save(progress)
        self.saves.saved()

    def _graft(self, segment: Segment, stop: bool) -> GraftRecord:
        assert self.grafter is not None
        steps = segment.epoch * self.data.steps_per_epoch + segment.last
        with naming_epoch(segment.epoch), self.times.phase("round"):
            record = self.grafter.graft(
                rate=self.rate(steps),
                stop=stop,
                saves=self.saves.count,
                diverged=self.progress.diverged,
            )
        if self.runtime.process.network in record.healed:
            self.trainee.begin_anew()
        self.progress.diverged = False
        self.progress.rounds = with_round(self.progress.rounds, record)
        self.round = self.grafter.round
        return record

    def _vote(self, epoch: int, stop: bool) -> None:
        votes = self.runtime.gather(
            [float(stop), float(self.saves.count)], f"the end of epoch {epoch}"
        )
        if any(stops for stops, _ in votes):
            raise RoundStoppedError(f"a network stops at the end of epoch {epoch}")
        saves = [int(count) for _, count in votes]
        if min(saves) < max(saves):
            raise RoundPostponedError(max(saves))

    def _save(self) -> None:
        self._due = False
        self.progress.seconds = self.seconds
        self.progress.buffers = self.trainee.replicas.gather_buffers(self.trainee.model)
        own = self.checkpoints.path(self.progress).name
        name = self.saves.agreed(own, self.runtime.timeouts.seconds)
        with self.times.phase("checkpoint"):
            self.checkpoints.save(self.progress, name)
        self.saves.done()

    def _after_step(self) -> None:
        self.live.step()
        if self.profile:
            self.profile.step()

    def _interrupted(self) -> bool:
        asked = self.stops.requested()
        due = not asked and self.saves.due(busy=self.checkpoints.busy)
        self._stop, due = self.trainee.replicas.agree([asked, due])
        self._due = due and not self._stop
        return self._stop or self._due

    def _whole(self, part: EvalResult) -> EvalResult:
        """The results of the network's processes, each on a stretch of a split, together."""
        losses = self.trainee.replicas.gather([part.loss, float(len(part.labels))], "an evaluation")
        if len(losses) == 1:
            return part
        answers = torch.cat([part.probabilities, part.labels[:, None]], dim=1)
        rows = self.trainee.replicas.gather_rows(answers, [int(count) for _, count in losses])
        probabilities, labels = rows[:, :-1], rows[:, -1].long()
        return EvalResult(
            loss=sum(loss * count for loss, count in losses) / len(labels),
            accuracy=accuracy(probabilities, labels),
            probabilities=probabilities,
            labels=labels,
        )

    def _of_all_replicas(self, stretch: TrainResult) -> TrainResult:
        """The results of the network's processes together: a collective of these."""
        parts = self.trainee.replicas.gather(
            [stretch.loss, stretch.accuracy, float(stretch.images)], "the results of some steps"
        )
        if len(parts) == 1:
            return stretch
        images = sum(count for _, _, count in parts)
        loss, accuracy = (
            sum(part[column] * part[2] for part in parts if part[2]) / max(images, 1)
            for column in (0, 1)
        )
        return replace(stretch, loss=loss, accuracy=accuracy, images=int(images))

    def _lost(self, loss: float) -> bool:
        """Whether a network is lost; loss scaling skips single steps that are not finite."""
        if self.trainee.scaler.is_enabled():
            return self.trainee.scale_collapsed
        return not math.isfinite(loss)
