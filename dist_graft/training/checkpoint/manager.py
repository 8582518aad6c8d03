"""Saves and restores the progress of one network, together with the other networks.

Nothing here is a collective. The trainer agrees with the other networks on the names of
checkpoints; their files are awaited through the key-value store of the run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from dist_graft.config import TrainConfig
from dist_graft.errors import ConfigError, RunDirectoryError
from dist_graft.population.round.record import GraftRecord
from dist_graft.population.runtime.process_group import Runtime
from dist_graft.run_directory import RunDirectory, write_atomically
from dist_graft.training.checkpoint.files import (
    checkpoint_path,
    clear_newer,
    complete_checkpoints,
    load_network,
    network_file,
    newest_usable,
    path_after,
)
from dist_graft.training.checkpoint.membership import Origin, changes_networks, origin
from dist_graft.training.checkpoint.writer import CheckpointWriter
from dist_graft.training.schedule import Position
from dist_graft.training.step import TrainResult


@dataclass
class Progress:
    """Content of a checkpoint besides the training state."""

    position: Position = field(default_factory=Position)
    seconds: float = 0.0
    """Duration of the run so far, without interruptions."""
    lr: float | None = None
    """Learning rate at the start of the current epoch; None between two epochs."""
    trained: TrainResult | None = None
    """Results of the current epoch so far."""
    rounds: dict[str, Any] | None = None
    """Rounds inside the current epoch, as in metrics.jsonl."""
    diverged: bool = False
    """Whether a loss or an fp16 gradient has been NaN or Inf since the last round."""
    buffers: Tensor | None = None
    """Floating-point buffers of each replica, [replicas, elements]."""

    def adopt(self, lr: float, *, fresh: bool) -> None:
        """Adopt another network's progress at the same position.

        Args:
            lr: learning rate of this network.
            fresh: whether it starts from new weights; otherwise from those of the other network.
        """
        if self.lr is not None:
            self.lr = lr
        if fresh:
            self.trained = self.rounds = self.buffers = None
            self.diverged = False

    def count_round(self) -> None:
        """Count one more round."""
        self.position = replace(self.position, round=self.position.round + 1)

    def add_round(self, record: GraftRecord) -> None:
        """Count a round, and add it to the rounds of the epoch in metrics.jsonl.

        Time and bytes are summed over the rounds of the epoch; the rest is from the last one.
        """
        self.count_round()
        before = self.rounds or {"rounds": 0, "seconds": 0.0, "phase_seconds": {}, "bytes": 0}
        self.rounds = {
            "round": record.round,
            "rounds": before["rounds"] + 1,
            "donor": None if record.donor < 0 else record.donor,
            "seconds": before["seconds"] + record.seconds,
            "phase_seconds": {
                phase: before["phase_seconds"].get(phase, 0.0) + seconds
                for phase, seconds in record.phase_seconds.items()
            },
            "bytes": before["bytes"] + record.bytes_received,
            "coefficient": record.coefficient,
            "information": record.information,
            "distance": record.distance,
            "healed_from": record.healed.get(record.network, before.get("healed_from")),
        } | provenance(record)

    def state_dict(self) -> dict[str, Any]:
        """Plain values, for `torch.save`."""
        return {
            "epoch": self.position.epoch,
            "step": self.position.step,
            "round": self.position.round,
            "seconds": self.seconds,
            "lr": self.lr,
            "trained": asdict(self.trained) if self.trained else None,
            "rounds": self.rounds,
            "diverged": self.diverged,
            "buffers": self.buffers,
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Progress:
        """Restore what `state_dict` returned, also in checkpoints of version 0.1.0."""
        trained = dict(state["trained"] or {})
        if "accuracy" in trained:  # 0.1.0 had only accuracy
            trained["metrics"] = {"accuracy": trained.pop("accuracy")}
            trained["counts"] = {"accuracy": float(trained["images"])}
        if "images" in trained:  # the name of `samples` in 0.1.0
            trained["samples"] = trained.pop("images")
        return cls(
            position=Position(state["epoch"], state["step"], state["round"]),
            seconds=float(state["seconds"]),
            lr=state["lr"],
            trained=TrainResult(**trained) if trained else None,
            rounds=state["rounds"],
            diverged=bool(state["diverged"]),
            buffers=state.get("buffers"),
        )


def provenance(record: GraftRecord) -> dict[str, Any]:
    """Where the donors' weights came from, for metrics.jsonl; only with graft.exchange files."""
    if record.donor >= 0 and not record.lags:
        return {}
    return {
        "donor_epoch": record.donor_epoch,
        "lag": record.lags.get(record.donor),
        "lags": {str(donor): lag for donor, lag in record.lags.items()},
        "digest": record.digest,
    }


class CheckpointManager:
    """Saves, loads and deletes the checkpoints of a run on behalf of one process.

    `check` is called before a file is written, also by another thread; it raises a
    RunDirectoryError if this run must not write any more.
    """

    def __init__(
        self,
        config: TrainConfig,
        runtime: Runtime,
        directory: RunDirectory,
        log: logging.Logger,
        *,
        check: Callable[[], object] = lambda: None,
    ) -> None:
        self._process = runtime.process
        self._folder = directory.checkpoints
        self._directory = directory
        self._log = log
        self._newest: str | None = None
        self._max_failures = config.checkpoint.max_failures
        self._failures = 0
        self._reported = 0
        self._writer = CheckpointWriter(
            runtime.process.network,
            runtime.peers,
            is_leader=runtime.process.is_leader,
            seconds=lambda: runtime.timeouts.seconds,
            keep=config.checkpoint.keep,
            first=runtime.process.first_network,
            check=check,
        )
        self._positions: dict[Path, Position] = {}
        self._loaded: Position | None = None

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is still being written."""
        return self._writer.busy

    def resume_position(self) -> Position:
        """Where a restarted run would resume: the newest complete checkpoint, or the start."""
        for path in reversed(self._writer.completed):
            return self._positions[path]
        return self._loaded or Position()

    def choose(self) -> str:
        """Name of the newest intact checkpoint, or "" when there is none; for rank 0.

        Damaged newer checkpoints are renamed, and incomplete ones are deleted.
        """
        chosen, damaged = newest_usable(self._folder)
        for path in damaged:
            self._log.warning("%s is missing or damaged: using an older checkpoint", path)
        clear_newer(self._folder, chosen)
        return chosen.path.name if chosen else ""

    def load(
        self, name: str, resume_networks: Sequence[int | str] | None = None
    ) -> tuple[Path, dict[str, Any], Origin | None]:
        """Load this network's state from a checkpoint.

        Only this network's file is read and verified: `choose` has verified all of them on rank 0.

        Args:
            name: of the checkpoint.
            resume_networks: networks of the checkpoint to continue; None: all, unchanged.

        Returns: folder, state, and where the network starts if the networks change now.

        Raises: ConfigError when this process does not see the checkpoint, or the checkpoint lacks a
            network to resume; RunDirectoryError when its file is damaged here, or holds another
            network.
        """
        chosen = {found.path.name: found for found in complete_checkpoints(self._folder)}.get(name)
        if chosen is None:
            raise ConfigError(
                f"this process does not see the checkpoint {name} in {self._folder}: all "
                "processes need the same run_dir on a shared disk"
            )
        changed, number = None, self._process.network
        self._writer.resumed_networks = chosen.resumed_networks
        networks = self._process.networks
        if resume_networks is not None and changes_networks(resume_networks, chosen, networks):
            changed = origin(resume_networks, chosen, network=number)
            number = changed.network
            self._writer.resumed_networks = resume_networks
        elif self._directory.job is None and chosen.networks != self._process.networks:
            raise RunDirectoryError(
                f"{chosen.path} holds {chosen.networks} networks, but {self._process.networks} "
                "were started: start as many, name those to continue (--resume_networks), or "
                "choose another run_dir"
            )
        file = network_file(number)
        path = chosen.path / file
        try:
            state = load_network(path, chosen.sha256[file])
        except RunDirectoryError as error:
            raise RunDirectoryError(
                f"{path} is intact on rank 0, but {self._process} reads it as missing or damaged: "
                "check the disk or mount of run_dir there, and rerun the command"
            ) from error
        if state.get("network") != number:
            raise RunDirectoryError(
                f"{path} holds network {state.get('network')}, not network {number}: "
                f"restore the original file names in {chosen.path}"
            )
        self._newest = name
        self._loaded = Position(*(int(state.get(key, 0)) for key in ("epoch", "step", "round")))
        return chosen.path, state, changed

    def save(self, progress: Progress, state: Mapping[str, Any]) -> None:
        """Start saving in the background; all networks must call this at the same position.

        Call `settle` first, which waits for the previous checkpoint.
        """
        path = self.next_path(progress)
        self._newest = path.name
        self._start(path.name, path, progress, state)

    def save_and_wait(self, name: str, progress: Progress, state: Mapping[str, Any]) -> Path:
        """Save and wait until the checkpoint is complete, before the run stops early.

        Raises: RunDirectoryError when the checkpoint could not be written.
        """
        path = self._folder / name
        self._start(f"{name} at the stop", path, progress, state)
        if failure := self.settle(last=True):
            raise RunDirectoryError(f"the run stops, but its state was not saved: {failure}")
        return path

    def finish(self) -> None:
        """Wait for the last checkpoint.

        Raises: RunDirectoryError when it could not be written; PeerError as `settle` does.
        """
        if failure := self.settle(last=True):
            raise RunDirectoryError(f"the last checkpoint is not complete: {failure}")

    def newly_completed(self) -> list[Path]:
        """Checkpoints that were completed since the last call."""
        paths = self._writer.completed[self._reported :]
        self._reported += len(paths)
        return paths

    def abandon(self) -> None:
        """Stop waiting for the files of other networks, which may never be written."""
        self._writer.abandon()

    def close(self) -> None:
        """Abandon the checkpoint that is being written, unless it is complete in a few seconds."""
        self._writer.close()

    def settle(self, *, last: bool = False) -> str:
        """Wait for the checkpoint that is being written; returns why it failed, or "".

        Args:
            last: whether no checkpoint follows: any number of failures in a row is then accepted.

        Raises: RunDirectoryError when too many checkpoints in a row could not be written, on all
            ranks; PeerError when another network exited or did not respond.
        """
        outcome = self._writer.result()
        if outcome is None:
            return ""
        if not outcome.failure:
            self._failures = 0
            return ""
        self._failures += 1
        if self._failures > self._max_failures and not last:
            raise RunDirectoryError(
                f"{self._failures} checkpoints in a row could not be written "
                f"(--checkpoint.max_failures {self._max_failures}): {outcome.failure}"
            )
        self._log.warning(
            "checkpoint %s is not complete: %s; %searlier checkpoints are kept",
            outcome.path,
            outcome.failure,
            "" if last else "training continues, and ",
        )
        return outcome.failure

    def next_path(self, progress: Progress) -> Path:
        """Folder of the next checkpoint."""
        position = progress.position
        if progress.lr is None:
            return checkpoint_path(self._folder, position.epoch)
        return path_after(self._folder, position.epoch, position.round, self._newest)

    def mark_stopped(self, reason: str, path: Path) -> None:
        """Write the marker of a run that stopped early; for rank 0."""
        text = f"stopped early by {reason}: rerun the command to resume from {path}\n"
        write_atomically(self._directory.stopped, text.encode(errors="backslashreplace"))

    def _start(self, label: str, path: Path, progress: Progress, state: Mapping[str, Any]) -> None:
        content = {"network": self._process.network, **progress.state_dict(), **state}
        self._positions[path] = progress.position
        self._writer.start(label, path, progress.position, content)
