"""Data-parallel training of one network by several processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dist_graft.population.collectives import communicating, gather_vectors, wait_for_device
from dist_graft.population.runtime.peers import PeerRegistry, reporting_lost_peers
from dist_graft.population.runtime.timeouts import Timeouts

_RESPONSE_SECONDS = 2.0  # in which live replicas respond


class Replicas:
    """Processes that train one network, each on its share of every batch.

    All hold the same parameters, because gradients are averaged in every step. The running
    statistics of batch norm differ between processes until they are averaged. With a single process
    nothing here communicates.

    Args:
        group: process group, in the order of the shares; None: a single process.
        timeouts: timeouts of the collectives; None: the group's own timeout.
        peers: lets errors name the missing processes.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        timeouts: Timeouts | None = None,
        peers: PeerRegistry | None = None,
    ) -> None:
        self.group = group
        self._timeouts = timeouts
        self._peers = peers
        self._wrapped: DistributedDataParallel | None = None

    @property
    def index(self) -> int:
        """Index of this process within the group."""
        return dist.get_rank(self.group) if self.group else 0

    def convert_sync_batchnorm(self, model: nn.Module) -> nn.Module:
        """Replace batch norm by SyncBatchNorm over the processes; GPUs only, tensors are kept."""
        synced = nn.SyncBatchNorm.convert_sync_batchnorm(model, self.group)
        return cast(nn.Module, synced)

    def wrap(self, model: nn.Module) -> nn.Module:
        """Wrap the model in DistributedDataParallel, if there are several processes: a collective.

        Raises: PeerError when another process died or did not respond.
        """
        if self.group is None:
            return model
        what = "the start of data-parallel training"
        self._gather(torch.zeros(1), what)  # over gloo: NCCL would wait for a dead process
        with self._reporting_lost_peers(what), communicating():
            self._wrapped = DistributedDataParallel(
                model,
                process_group=self.group,
                # Otherwise DDP rebuilds its buckets after the first step. That changes the order of
                # the sums, and a resumed run would differ from an uninterrupted one.
                find_unused_parameters=True,
            )
            # Buffers are sent at the start only. The argument's name depends on torch's version.
            self._wrapped.broadcast_buffers = False
        return self._wrapped

    @contextmanager
    def backward(self, *, last: bool) -> Iterator[None]:
        """Context for a forward and backward pass; the last one of a step is a collective.

        Raises: PeerError when another process died or did not respond.
        """
        if self._wrapped is None:
            yield
            return
        with (
            self._reporting_lost_peers("a step"),
            communicating(runs_model=True) if last else nullcontext(),
            nullcontext() if last else self._wrapped.no_sync(),
        ):
            yield

    def wait_for_device(self, device: torch.device) -> None:
        """Wait for the steps that are queued on the device; call this before a read from it.

        Raises: PeerError when another process died or did not respond.
        """
        if self.group is not None:
            with self._reporting_lost_peers("a step"):
                wait_for_device(device, self._seconds, self._check_peers)

    def agree(self, flags: Sequence[bool]) -> list[bool]:
        """Logical or of each flag over the processes: a collective."""
        if self.group is None:
            return list(flags)
        gathered = self._gather(torch.tensor(flags, dtype=torch.uint8), "a step")
        return [bool(flag) for flag in gathered.amax(dim=0)]

    def gather(self, values: list[float], what: str) -> list[list[float]]:
        """Gather values of the same length from each process: a collective."""
        if self.group is None:
            return [values]
        rows = self._gather(torch.tensor(values, dtype=torch.float64), what)
        return [list(map(float, row)) for row in rows.tolist()]

    def average_buffers(self, model: nn.Module) -> None:
        """Average the floating-point buffers over the processes, in place: a collective."""
        if self.group is not None:
            average_buffers(model, lambda vector: self._gather(vector, "the running statistics"))

    def gather_buffers(self, model: nn.Module) -> Tensor | None:
        """Gather all floating-point buffers, float64 [processes, elements]: a collective."""
        if self.group is None:
            return None
        return self._gather(_pack(model), "a checkpoint")

    def restore_buffers(self, model: nn.Module, gathered: Tensor | None) -> None:
        """Load this process's buffers from the result of `gather_buffers`."""
        if gathered is not None:
            _unpack(gathered[self.index], model)

    def _gather(self, vector: Tensor, what: str) -> Tensor:
        assert self.group is not None
        with self._reporting_lost_peers(what):
            return gather_vectors(
                vector,
                group=self.group,
                device=torch.device("cpu"),
                seconds=self._seconds,
            )

    @property
    def _seconds(self) -> float | None:
        return self._timeouts.seconds if self._timeouts else None

    def _check_peers(self, _: float) -> None:
        if self._peers:
            self._peers.check_alive()

    def _reporting_lost_peers(self, what: str) -> AbstractContextManager[None]:
        return reporting_lost_peers(
            what,
            partial(self._lost, what),
            otherwise="another process of this network",
            groups=[self.group],
        )

    def _lost(self, what: str) -> list[str]:
        """Descriptions of the processes of this network that died or do not respond."""
        if self._peers is None or self.group is None:
            return []
        ranks = dist.get_process_group_ranks(self.group)
        return self._peers.dead_peers() or self._peers.unresponsive(
            f"lost during {what}", ranks, _RESPONSE_SECONDS
        )


def average_buffers(model: nn.Module, gather: Callable[[Tensor], Tensor]) -> None:
    """Average a module's floating-point buffers over several processes, in place.

    Buffers that are equal in all processes do not change.

    Args:
        model: module of this process.
        gather: collective that returns the vectors of all processes, [n] -> [processes, n].
    """
    local = _pack(model)
    if not len(local):
        return
    gathered = gather(local)
    _unpack(gathered[0] + (gathered - gathered[0]).mean(dim=0), model)


def _float_buffers(model: nn.Module) -> list[Tensor]:
    return [buffer for buffer in model.buffers() if buffer.is_floating_point()]


def _pack(model: nn.Module) -> Tensor:
    """All floating-point buffers, float64 [elements], on the CPU."""
    parts = [buffer.detach().double().flatten().cpu() for buffer in _float_buffers(model)]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def _unpack(vector: Tensor, model: nn.Module) -> None:
    buffers = _float_buffers(model)
    parts = vector.split([buffer.numel() for buffer in buffers]) if buffers else ()
    with torch.no_grad():
        for buffer, part in zip(buffers, parts, strict=True):
            buffer.copy_(part.view(buffer.shape))
