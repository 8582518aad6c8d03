"""The process groups of a round: across the networks, and across the replicas of one network."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from dist_graft.population.collectives import gather_vectors
from dist_graft.population.round.exchange import header_device, world
from dist_graft.population.runtime.peers import PeerRegistry, naming_missing_peers
from dist_graft.population.runtime.timeouts import Timeouts


class RoundGroups:
    """The processes that one process meets in a round, and how long it waits for them.

    Args:
        group: whose ranks are the networks; None: the default group.
        replicas: the processes that hold this network; None: this one alone.
        peers: lets errors name the network that is missing.
        timeouts: how long to wait for the others; None: the groups' own time-outs.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        replicas: dist.ProcessGroup | None,
        peers: PeerRegistry | None,
        timeouts: Timeouts | None,
    ) -> None:
        self._group = group
        self.replicas = replicas
        self._roll_call = peers
        self._patience = timeouts

    @property
    def group(self) -> dist.ProcessGroup:
        """Looked up each time: a default group that is held cannot be destroyed, and its threads
        abort an interpreter that finalizes under them.
        """
        return self._group or world()

    @property
    def network(self) -> int:
        """Index of this process's network."""
        return dist.get_rank(self.group)

    @property
    def seconds(self) -> float | None:
        """After which to give up waiting now; None: the groups' own time-outs."""
        return self._patience.seconds if self._patience else None

    def arrive(self, round_: int) -> None:
        """Say that this process has reached a round."""
        if self._roll_call:
            self._roll_call.enter_round(round_)

    def of_networks(
        self, vector: Tensor, home: torch.device, *, what: str = "", arriving_at: int | None = None
    ) -> Tensor:
        """The networks' vectors of one agreed length, [n] -> [networks, n]: a collective.

        Args:
            vector: of this network.
            home: where the network lives.
            what: is waited for.
            arriving_at: the round in which to look for those who are waited for.
        """
        waiting = {}
        if self._patience and self._roll_call and arriving_at is not None:
            absent = partial(self._roll_call.missing_from_round, arriving_at)
            waiting["on_wait"] = self._patience.warn_when_slow(what, absent)
        return gather_vectors(
            vector,
            group=self.group,
            device=header_device(self.group, home),
            seconds=self.seconds,
            **waiting,
        )

    def of_replicas(self, vector: Tensor, home: torch.device) -> Tensor:
        """The vectors of the processes of this network, [n] -> [processes, n]: a collective."""
        if self.replicas is None:
            return vector.cpu()[None]
        device = header_device(self.replicas, home)
        return gather_vectors(vector, group=self.replicas, device=device, seconds=self.seconds)

    def naming_missing_peers(self, round_: int, what: str) -> AbstractContextManager[None]:
        """Turn the failure of a collective into a PeerError that says who is missing."""
        return naming_missing_peers(self._roll_call, round_, what)
