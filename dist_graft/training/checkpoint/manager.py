"""Where a network stands, saved and taken up again, together with the other networks."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from dist_graft.config import TrainConfig
from dist_graft.errors import ConfigError, RunDirectoryError, StoppedEarlyError
from dist_graft.population.runtime.process_group import Runtime
from dist_graft.training.checkpoint.files import (
    Checkpoint,
    clear_after,
    load_network,
    path_after,
    set_path,
    write_atomically,
)
from dist_graft.training.checkpoint.writer import CheckpointWriter
from dist_graft.training.loop import TrainResult, TrainState
from dist_graft.training.run_directory import RunDirectory
from dist_graft.training.schedule import Position


@dataclass
class Progress:
    """What a checkpoint holds beside the weights and the optimizer's state."""

    position: Position = field(default_factory=Position)
    seconds: float = 0.0
    """Spent on the run so far."""
    lr: float | None = None
    """At the start of the epoch that is under way; None between two epochs."""
    trained: TrainResult | None = None
    """Of the epoch that is under way."""
    rounds: dict[str, Any] | None = None
    """Those inside the epoch that is under way, as metrics.jsonl tells of them."""
    diverged: bool = False
    """Whether training has failed since the last round: a loss, or fp16 gradients, not finite."""
    buffers: Tensor | None = None
    """What each of several processes of the network has in its floating buffers."""


class CheckpointManager:
    """The checkpoint sets of a run, as one network's process sees them.

    Args:
        config: of the run.
        runtime: of this process.
        directory: of the run.
        trainee: whose state is saved.
        log: of this process.
    """

    def __init__(
        self,
        config: TrainConfig,
        runtime: Runtime,
        directory: RunDirectory,
        trainee: TrainState,
        log: logging.Logger,
    ) -> None:
        self._runtime = runtime
        self._directory = directory
        self._trainee = trainee
        self._log = log
        self.loaded: Path | None = None
        """The set that the run goes on from."""
        self._newest: str | None = None
        self._max_failures = config.checkpoint.max_failures
        self._failures = 0
        self._writer = CheckpointWriter(
            runtime.process.network,
            runtime.peers,
            leads=runtime.process.is_leader,
            seconds=lambda: runtime.timeouts.seconds,
            keep=config.checkpoint.keep,
        )
        self._file = f"network{runtime.process.network:02d}.pt"

    def resume(self) -> Progress:
        """Load the newest usable set, if there is one: a collective.

        Raises: ConfigError when this process does not see the set that rank 0 chose.
        """
        folder = self._directory.checkpoints
        chosen: Checkpoint | None = None
        if self._runtime.process.rank == 0:
            chosen, damaged = self._directory.newest_usable()
            for path in damaged:
                self._log.warning("%s is missing or damaged: going on from an older set", path)
            clear_after(folder, chosen)
        name = self._runtime.broadcast_text(
            "the choice of a checkpoint set", chosen.path.name if chosen else ""
        )
        if not name:
            return Progress()
        chosen, _ = self._directory.newest_usable()
        if chosen is None or chosen.path.name != name:
            raise ConfigError(
                f"this process does not see the checkpoint set {name} in {folder}: all processes "
                "need the same run_dir on a shared disk"
            )
        state = load_network(chosen.path / self._file, chosen.sha256[self._file])
        if state["network"] != self._runtime.process.network:
            raise RunDirectoryError(
                f"{chosen.path / self._file} holds network {state['network']}, not network "
                f"{self._runtime.process.network}: give the files of {chosen.path} their names back"
            )
        trainee = self._trainee
        trainee.model.load_state_dict(state["model"])
        trainee.replicas.restore_buffers(trainee.model, state.get("buffers"))
        trainee.optimizer.load_state_dict(state["optimizer"])
        trainee.scheduler.load_state_dict(state["scheduler"])
        trainee.scaler.load_state_dict(state["scaler"])
        self._log.info(
            "going on from %s: epoch %d, step %d, round %d",
            *(chosen.path, state["epoch"], state["step"], state["round"]),
        )
        self._newest, self.loaded = name, chosen.path
        trained = state["trained"]
        return Progress(
            position=Position(state["epoch"], state["step"], state["round"]),
            seconds=float(state["seconds"]),
            lr=state["lr"],
            trained=TrainResult(**trained) if trained else None,
            rounds=state["rounds"],
            diverged=bool(state["diverged"]),
        )

    @property
    def busy(self) -> bool:
        """Whether a set is still being written."""
        return self._writer.busy

    def save(self, progress: Progress, name: str | None = None) -> None:
        """Save where the run stands, in the background; every network must call this.

        All networks must have finished as many rounds. The set before is waited for first. Its
        name follows from where the run stands, when all networks stand alike.

        Raises: RunDirectoryError when too many sets in a row could not be written, in every network
            alike; PeerError when another network died or did not answer.
        """
        self._settle()
        self._newest = name = name or self.path(progress).name
        self._writer.start(
            name, self._directory.checkpoints / name, progress.position, self._state(progress)
        )

    def finish(self) -> None:
        """Wait for the last set; every network must call this.

        Raises: RunDirectoryError when it could not be written; PeerError as `save` does.
        """
        if failure := self._settle(last=True):
            raise RunDirectoryError(f"the last checkpoint set is not complete: {failure}")

    def leave(self, progress: Progress, reason: str) -> NoReturn:
        """Save where the run stands and end it early; every network must call this.

        Raises: StoppedEarlyError when the set is complete; RunDirectoryError when it could not be
            written; PeerError when another network did not save in time.
        """
        self._writer.give_up()
        self._settle(last=True)
        name = self._runtime.broadcast_text("the name of the last set", self.path(progress).name)
        path = self._directory.checkpoints / name
        self._writer.start(f"{name} at the stop", path, progress.position, self._state(progress))
        failure = self._settle(last=True)
        if failure:
            raise RunDirectoryError(f"stopped by {reason}, but the state was not saved: {failure}")
        if self._runtime.process.rank == 0:
            text = f"stopped early by {reason}: the same command goes on from {path}\n"
            write_atomically(self._directory.stopped, text.encode())
        # Together, since a launcher ends those that stay behind the first that leaves.
        self._runtime.broadcast_text("the end of the stop", reason)
        raise StoppedEarlyError(
            f"stopped early by {reason}; everything is in {path}, and the same command goes on "
            "from there"
        )

    def _settle(self, *, last: bool = False) -> str:
        """Wait for the set under way; returns why it is not complete, if so."""
        outcome = self._writer.result()
        if outcome is None or not outcome.failure:
            self._failures = 0
            return ""
        self._failures += 1
        endured = self._failures <= self._max_failures
        if not endured and not last:
            raise RunDirectoryError(
                f"{self._failures} checkpoint sets in a row could not be written "
                f"(--checkpoint.max_failures {self._max_failures}): {outcome.failure}"
            )
        self._log.warning(
            "checkpoint set %s is not complete: %s; %swhat was saved before stays",
            *(outcome.path, outcome.failure, "" if last else "training goes on, and "),
        )
        return outcome.failure

    def path(self, progress: Progress) -> Path:
        """Where the next set will lie."""
        position, folder = progress.position, self._directory.checkpoints
        if progress.lr is None:
            return set_path(folder, position.epoch)
        return path_after(folder, position.epoch, position.round, self._newest)

    def _state(self, progress: Progress) -> dict[str, Any]:
        position, trainee = progress.position, self._trainee
        return {
            "network": self._runtime.process.network,
            "epoch": position.epoch,
            "step": position.step,
            "round": position.round,
            "model": trainee.model.state_dict(),
            "optimizer": trainee.optimizer.state_dict(),
            "scheduler": trainee.scheduler.state_dict(),
            "scaler": trainee.scaler.state_dict(),
            "seconds": progress.seconds,
            "lr": progress.lr,
            "trained": asdict(progress.trained) if progress.trained else None,
            "rounds": progress.rounds,
            "diverged": progress.diverged,
            "buffers": progress.buffers,
        }
