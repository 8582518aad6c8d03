"""Restores the training state of one network from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dist_graft.errors import ConfigError, RunDirectoryError
from dist_graft.population.grafter import Grafter
from dist_graft.population.runtime.replicas import Replicas
from dist_graft.training.checkpoint.manager import Progress
from dist_graft.training.checkpoint.membership import Origin
from dist_graft.training.state import TrainState


def restore(
    path: Path,
    stored: dict[str, Any],
    origin: Origin | None,
    *,
    state: TrainState,
    grafter: Grafter | None,
    replicas: Replicas,
    steps_per_epoch: int,
) -> Progress:
    """Restore a network, in place, from the result of `CheckpointManager.load`.

    Args:
        path: path of the checkpoint, for errors.
        stored: content of the network's file.
        origin: where the network starts if the networks change (resume_networks).
        state: of the network.
        grafter: its rule may have state; None without rounds.
        replicas: processes of the network.
        steps_per_epoch: of the run.

    Raises: RunDirectoryError if the checkpoint does not fit model and optimizer; ConfigError if a
        network that continues had another optimizer.
    """
    initial_lrs = list(state.scheduler.base_lrs)
    try:
        progress = Progress.from_state_dict(stored)
        if origin is None:
            state.load_state_dict(stored)
        elif origin.kind == "continue":
            state.continue_from(stored)
        elif origin.kind == "copy":
            state.model.load_state_dict(stored["model"])
        if origin is None or origin.kind != "fresh":
            replicas.restore_buffers(state.model_and_average(), progress.buffers)
        if grafter:
            if origin is None or "rule" in stored:
                grafter.load_rule_state(stored.get("rule", {}))
            else:
                grafter.reset_rule_state()
    except ConfigError:  # a ValueError that already says what to do
        raise
    except (RuntimeError, ValueError, KeyError, TypeError, IndexError) as error:
        first = next(iter(str(error).strip().splitlines()[1:2]), str(error)).strip()
        raise RunDirectoryError(
            f"{path} does not fit this model and optimizer ({first}): pass the options of "
            "the run that wrote it, or choose another run_dir"
        ) from error
    if origin is not None:
        if origin.kind != "continue":
            state.reset_optimizer()
        position = progress.position
        state.skip_to(position.epoch * steps_per_epoch + position.step, initial_lrs)
        progress.adopt(state.lr, fresh=origin.kind == "fresh")
    return progress
