"""Process groups of a round: across the networks, and across the replicas of one network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from dist_graft.errors import SEE_PEER, PeerError
from dist_graft.population.collectives import CommunicationError, abort_nccl, gather_vectors
from dist_graft.population.round.exchange import header_device, world
from dist_graft.population.runtime.peers import PeerRegistry
from dist_graft.population.runtime.timeouts import Timeouts


class RoundGroups:
    """The process groups that a process belongs to in a round, and their timeouts.

    See `Grafter` for the arguments.
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
        self._peers = peers
        self._timeouts = timeouts

    @property
    def group(self) -> dist.ProcessGroup:
        """Group across the networks.

        The default group is looked up on every access: a reference to it would keep its threads
        alive after destroy_process_group, and they abort an interpreter that shuts down.
        """
        return self._group or world()

    @property
    def network(self) -> int:
        """Index of this process's network."""
        return dist.get_rank(self.group)

    @property
    def seconds(self) -> float | None:
        """Current timeout; None: the groups' own timeouts."""
        return self._timeouts.seconds if self._timeouts else None

    def check_peers(self, _: float) -> None:
        """Raise CommunicationError if a process on this host has ended."""
        if self._peers:
            self._peers.check_alive()

    @property
    def is_leader(self) -> bool:
        """Whether this process is the first of its network's replicas."""
        return self.replicas is None or dist.get_rank(self.replicas) == 0

    def enter_round(self, round_: int) -> None:
        """Publish that this process has reached a round."""
        if self._peers:
            self._peers.enter_round(round_)

    def gather_networks(
        self, vector: Tensor, device: torch.device, *, what: str = "", round_: int | None = None
    ) -> Tensor:
        """Gather one vector from each network: [n] -> [networks, n], on the CPU.

        Every rank of the group must call this with the same n.

        Args:
            vector: this network's vector.
            device: the network's device.
            what: name of the step, for a warning while waiting.
            round_: the warning names the networks that have not reached this round; None: no
                warning.
        """
        waiting = {}
        if self._timeouts and self._peers and round_ is not None:
            missing = partial(self._peers.missing_from_round, round_)
            waiting["on_wait"] = self._timeouts.warn_when_slow(what, missing)
        return gather_vectors(
            vector,
            group=self.group,
            device=header_device(self.group, device),
            seconds=self.seconds,
            **waiting,
        )

    def gather_replicas(self, vector: Tensor, device: torch.device) -> Tensor:
        """Gather one vector from each replica of this network: [n] -> [replicas, n], on the CPU.

        Every rank of the replica group must call this with the same n.
        """
        if self.replicas is None:
            return vector.cpu()[None]
        return gather_vectors(
            vector,
            group=self.replicas,
            device=header_device(self.replicas, device),
            seconds=self.seconds,
        )

    @contextmanager
    def reporting_missing_peers(self, round_: int, what: str) -> Iterator[None]:
        """Convert a failed collective into a PeerError that names the missing networks.

        Args:
            round_: the round that the missing processes have not reached.
            what: the operation, for the message.
        """
        try:
            yield
        except CommunicationError as error:
            peers = self._peers
            missing = (peers.dead_peers() or peers.missing_from_round(round_)) if peers else []
            names = "; ".join(missing) or "a network that had reached it"
            abort_nccl(self.group, self.replicas)
            raise PeerError(
                f"{what} failed, a peer died or did not respond: {names}; {SEE_PEER} ({error})"
            ) from error
