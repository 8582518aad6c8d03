"""Weights of a network just before the last round of its run (checkpoint.before_last_round)."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dist_graft.errors import RunDirectoryError
from dist_graft.monitoring.callback import Callback
from dist_graft.run_directory import RunDirectory, write_atomically
from dist_graft.training.checkpoint.writer import to_host_memory
from dist_graft.training.weights import State

if TYPE_CHECKING:
    from dist_graft.training.trainer import Trainer

_UNREADABLE = (OSError, EOFError, RuntimeError, KeyError, TypeError, pickle.UnpicklingError)


class WeightsBeforeLastRound(Callback):
    """Writes RUN/networkNN/before_last_round.pt."""

    def on_round_start(self, trainer: Trainer) -> None:
        """Write the weights if this is the last round."""
        last = trainer.cadence.is_last(
            trainer.global_step,
            epochs=trainer.config.epochs,
            steps_per_epoch=trainer.steps_per_epoch,
        )
        if not last or not trainer.process.is_leader:
            return
        content = io.BytesIO()
        state = to_host_memory(trainer.model.state_dict())
        torch.save({"round": trainer.round, "model": state}, content)
        path = trainer.directory.before_last_round(trainer.process.network)
        write_atomically(path, content.getbuffer())


def load_weights_before(run: Path, network: int, round_: int) -> State | None:
    """Load the weights of a network saved before the last round, if `round_` rounds preceded it.

    Raises: RunDirectoryError if the file is damaged.
    """
    path = RunDirectory(run).before_last_round(network)
    if not path.is_file():
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        state: State = content["model"]
        return state if content["round"] == round_ else None
    except _UNREADABLE as error:
        raise RunDirectoryError(f"{path} is damaged: delete it, or train the run again") from error
