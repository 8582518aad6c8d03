"""Warnings about processes that hold replicas of one network instead of different networks."""

from __future__ import annotations

import logging

import torch.distributed as dist

from dist_graft.population.round.record import GraftRecord

_log = logging.getLogger("dist_graft")
_MESH = (
    "if each network is trained by several processes, pass group and replica_group of a device "
    "mesh (docs/your_loop.md)"
)
_ROUNDS = 2


def warn_if_synchronized(gradients: dist.ProcessGroup, networks: dist.ProcessGroup) -> None:
    """Warn if gradients are averaged between processes that graft each other.

    Args:
        gradients: group over which a data-parallel wrapper averages gradients.
        networks: group of the networks.
    """
    shared = {*dist.get_process_group_ranks(gradients)} & {*dist.get_process_group_ranks(networks)}
    if len(shared) > 1 and dist.get_rank(networks) == 0:
        _log.warning(
            "ranks %s average their gradients (DistributedDataParallel) and graft each other: they "
            "hold replicas of one network, and grafting changes nothing; %s",
            ", ".join(map(str, sorted(shared))),
            _MESH,
        )


class IdentityCheck:
    """Warns once if this network equaled its donors in each of the first two rounds."""

    def __init__(self) -> None:
        self._identical = 0
        self._rounds = 0

    def observe(self, record: GraftRecord) -> None:
        """Take note of a round."""
        has_donor = bool(record.mixing.donors[record.network])
        if self._rounds == _ROUNDS or not (has_donor and record.distance):
            return
        self._rounds += 1
        self._identical += not any(record.distance.values())
        if self._identical == _ROUNDS:
            _log.warning(
                "network %d equaled its donor in the first %d rounds: the networks are trained on "
                "the same samples in the same order, or their gradients are averaged; give each "
                "network its own data order; %s",
                record.network,
                _ROUNDS,
                _MESH,
            )
