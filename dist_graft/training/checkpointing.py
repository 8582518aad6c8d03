"""Where a network stands, saved and taken up again, together with the other networks."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from dist_graft.config import TrainConfig
from dist_graft.errors import ConfigError, StoppedEarlyError
from dist_graft.population.runtime import Runtime
from dist_graft.training.checkpoint import (
    CheckpointSet,
    clear_after,
    complete_set,
    load_network,
    path_after,
    prune,
    save_network,
    set_path,
    write_atomically,
)
from dist_graft.training.clock import Position
from dist_graft.training.loop import Trainee, TrainResult
from dist_graft.training.run_directory import RunDirectory


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


class Checkpoints:
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
        trainee: Trainee,
        log: logging.Logger,
    ) -> None:
        self._keep = config.checkpoint.keep
        self._runtime = runtime
        self._directory = directory
        self._trainee = trainee
        self._log = log
        self._newest: str | None = None
        self._digest = ""
        self._file = f"network{runtime.place.network:02d}.pt"

    def resume(self) -> Progress:
        """Load the newest usable set, if there is one: a collective.

        Raises: ConfigError when this process does not see the set that rank 0 chose.
        """
        folder = self._directory.checkpoints
        chosen: CheckpointSet | None = None
        if self._runtime.place.rank == 0:
            chosen, damaged = self._directory.newest_usable()
            for path in damaged:
                self._log.warning("%s is missing or damaged: going on from an older set", path)
            clear_after(folder, chosen)
            self._directory.stop.unlink(missing_ok=True)
        name = self._runtime.from_first(
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
        state = load_network(
            chosen.path / self._file, chosen.sha256[self._file], self._runtime.device
        )
        trainee = self._trainee
        trainee.model.load_state_dict(state["model"])
        trainee.optimizer.load_state_dict(state["optimizer"])
        trainee.scheduler.load_state_dict(state["scheduler"])
        trainee.scaler.load_state_dict(state["scaler"])
        self._log.info(
            "going on from %s: epoch %d, step %d, round %d",
            *(chosen.path, state["epoch"], state["step"], state["round"]),
        )
        self._newest = name
        trained = state["trained"]
        return Progress(
            position=Position(state["epoch"], state["step"], state["round"]),
            seconds=float(state["seconds"]),
            lr=state["lr"],
            trained=TrainResult(**trained) if trained else None,
            rounds=state["rounds"],
        )

    def save(self, progress: Progress) -> None:
        """Write this network's file; rank 0 completes the set once all files are durable.

        All networks must have finished as many rounds.
        """
        path = self._write(progress)
        if self._runtime.place.rank == 0:
            self._complete(path, progress.position)

    def leave(self, progress: Progress, reason: str) -> NoReturn:
        """Save where the run stands and end it early; every network must call this.

        Raises: StoppedEarlyError when the set is complete; PeerError when another network did not
            save in time.
        """
        path = self._write(progress)
        if self._runtime.place.rank == 0:
            self._complete(path, progress.position)
            text = f"stopped early by {reason}: the same command goes on from {path}\n"
            write_atomically(self._directory.stopped, text.encode())
        # Together, since a launcher ends those that stay behind the first that leaves.
        self._runtime.from_first("the end of the stop", reason)
        raise StoppedEarlyError(
            f"stopped early by {reason}; everything is in {path}, and the same command goes on "
            "from there"
        )

    def _write(self, progress: Progress) -> Path:
        position, trainee = progress.position, self._trainee
        if progress.lr is None:
            path = set_path(self._directory.checkpoints, position.epoch)
        else:
            path = path_after(
                self._directory.checkpoints, position.epoch, position.round, self._newest
            )
        state = {
            "network": self._runtime.place.network,
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
        }
        digest = save_network(path / self._file, state)
        if self._runtime.roll_call:
            self._runtime.roll_call.post(
                f"saved/{path.name}", f"{digest} {position.epoch} {position.step}"
            )
        self._digest, self._newest = digest, path.name
        return path

    def _complete(self, path: Path, position: Position) -> None:
        """Declare the set complete once every network's file is durable: only rank 0."""
        told = [f"{self._digest} {position.epoch} {position.step}"]
        if self._runtime.roll_call:
            told = self._runtime.roll_call.collect(
                f"saved/{path.name}", self._runtime.timeout_seconds
            )
        saved = [text.split() for text in told]
        complete_set(
            path,
            epoch=position.epoch,
            round_=position.round,
            sha256=[digest for digest, _, _ in saved],
            positions=[(int(epoch), int(step)) for _, epoch, step in saved],
        )
        prune(path.parent, self._keep)
