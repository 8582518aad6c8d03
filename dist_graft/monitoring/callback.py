"""The hooks of a training run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dist_graft.monitoring.metrics import EpochReport
    from dist_graft.population.round.record import GraftRecord
    from dist_graft.training.trainer import Trainer


class Callback:
    """Base class of callbacks: override the hooks you need.

    Every process of the run calls its own callbacks, each time with its trainer. A callback that
    should act once per network checks `trainer.process.is_leader`; one that should act once per
    run checks `trainer.process.is_main`.

    A callback must not communicate with other processes: no collective, no barrier. Processes
    reach a hook at different times, and one that fails there would hang its peers.

    An exception in a user's callback ends the run, with the name of the callback and the hook. An
    exception in a built-in callback is logged as a warning.
    """

    def setup(self, trainer: Trainer) -> None:
        """Called first. `trainer.config`, `.process` and `.log` are set; model and data are not."""

    def on_fit_start(self, trainer: Trainer) -> None:
        """Called before the first step, after a checkpoint has been restored."""

    def on_epoch_start(self, trainer: Trainer) -> None:
        """Called before the first step of an epoch, or where a resumed epoch continues."""

    def on_step_end(self, trainer: Trainer) -> None:
        """Called after each optimizer step; `trainer.step` includes it."""

    def on_evaluate_start(self, trainer: Trainer) -> None:
        """Called at the end of an epoch's steps, before the evaluation."""

    def on_evaluate_end(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        """Called after the evaluation, before the round, with test_loss and all other metrics."""

    def on_round_start(self, trainer: Trainer) -> None:
        """Called before the networks synchronize, in a round or at the end of an epoch."""

    def on_round_end(self, trainer: Trainer, record: GraftRecord) -> None:
        """Called after each round."""

    def on_epoch_end(self, trainer: Trainer, report: EpochReport) -> None:
        """Called after an epoch and its round, with the results of all networks."""

    def on_checkpoint(self, trainer: Trainer, path: Path) -> None:
        """Called once a checkpoint is complete on disk.

        Checkpoints are written in the background: this is called at the start of the next epoch at
        the earliest, and before the next checkpoint or the end of the run at the latest.
        """

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        """Called when the run fails or stops early; StoppedEarlyError means a requested stop."""

    def on_fit_end(self, trainer: Trainer) -> None:
        """Called after the last epoch. `trainer.summary` holds the final results."""

    def teardown(self, trainer: Trainer) -> None:
        """Called last, however the run ended."""
