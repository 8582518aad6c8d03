"""Where the launcher put this process, read from the environment without importing torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from dist_graft.errors import StartError


@dataclass(frozen=True)
class Place:
    """A process among the processes of a run: one network each."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    launched: bool = False
    """Whether a launcher such as torchrun started the process."""
    restarts: int = 0
    """How often the launcher has started the processes again."""

    @property
    def network(self) -> int:
        """The network that the process trains."""
        return self.rank

    @property
    def networks(self) -> int:
        """Size of the population."""
        return self.world_size

    def cpu_share(self) -> int:
        """Cores that the process may count as its own, at least 1."""
        return max(1, len(os.sched_getaffinity(0)) // self.local_world_size)


def read_place(environment: Mapping[str, str] = os.environ) -> Place:
    """The place that RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE say; alone without them.

    Raises: StartError when only some are set, or they contradict each other.
    """
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        return Place()
    try:
        rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        local_rank = int(environment.get("LOCAL_RANK", rank))
        local_world_size = int(environment.get("LOCAL_WORLD_SIZE", world_size))
    except (KeyError, ValueError) as error:
        raise StartError(
            f"the environment has no usable RANK and WORLD_SIZE ({error}): start with torchrun"
        ) from error
    if not (0 <= rank < world_size and 0 <= local_rank < local_world_size <= world_size):
        raise StartError(
            f"RANK {rank} of WORLD_SIZE {world_size} and LOCAL_RANK {local_rank} of "
            f"LOCAL_WORLD_SIZE {local_world_size} do not fit: start with torchrun"
        )
    restarts = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    return Place(
        rank,
        world_size,
        local_rank,
        local_world_size,
        launched=True,
        restarts=int(restarts) if restarts.isdigit() else 0,
    )
