"""The processes that train one network together, each on its part of every batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dist_graft.errors import PeerError
from dist_graft.population.collectives import (
    CommunicationError,
    communicating,
    gather_vectors,
    in_a_step,
)
from dist_graft.population.runtime.peers import PeerRegistry
from dist_graft.population.runtime.timeouts import Timeouts

_ANSWER_SECONDS = 2.0  # for those of the network who are there to say so


class Replicas:
    """One network's processes. Where there is but one, nothing here communicates.

    All hold the same parameters: gradients are averaged in every step. What batch norm counts
    differs from process to process, until it is averaged.

    Args:
        group: of the processes, in the order of their parts; None: one process alone.
        timeouts: how long to wait for the others.
        peers: lets errors name who is missing.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        timeouts: Timeouts | None = None,
        peers: PeerRegistry | None = None,
    ) -> None:
        self.group = group
        self._patience = timeouts
        self._roll_call = peers
        self._wrapped: DistributedDataParallel | None = None

    @property
    def index(self) -> int:
        """Which of the processes this is."""
        return dist.get_rank(self.group) if self.group else 0

    def convert_sync_batchnorm(self, model: nn.Module) -> nn.Module:
        """The model with batch statistics over all processes, its tensors the same (GPUs only)."""
        synced = nn.SyncBatchNorm.convert_sync_batchnorm(model, self.group)
        return cast(nn.Module, synced)

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model, whose backward passes average the gradients over the processes: a collective.

        Raises: PeerError when another process died or did not answer.
        """
        if self.group is None:
            return model
        with self._lost("the start of data-parallel training"), communicating():
            self._wrapped = DistributedDataParallel(
                model,
                process_group=self.group,
                forward_sync_buffers=False,
                # Else buckets are cut anew after the first step, sums have another order from then
                # on, and a run that was resumed in between has other bits.
                find_unused_parameters=True,
            )
        return self._wrapped

    @contextmanager
    def backward(self, *, last: bool) -> Iterator[None]:
        """Around a forward and backward pass; the last one of a step is a collective.

        Raises: PeerError when another process died or did not answer.
        """
        if self._wrapped is None:
            yield
            return
        with (
            self._lost("a step"),
            in_a_step() if last else nullcontext(),
            nullcontext() if last else self._wrapped.no_sync(),
        ):
            yield

    def agree(self, flags: Sequence[bool]) -> list[bool]:
        """Which of the flags any of the processes has set: a collective."""
        if self.group is None:
            return list(flags)
        everyone = self._gather(torch.tensor(flags, dtype=torch.uint8), "a step")
        return [bool(flag) for flag in everyone.amax(dim=0)]

    def gather(self, values: list[float], what: str) -> list[list[float]]:
        """The processes' numbers, as many from each: a collective."""
        if self.group is None:
            return [values]
        rows = self._gather(torch.tensor(values, dtype=torch.float64), what)
        return [list(map(float, row)) for row in rows.tolist()]

    def gather_rows(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """The processes' matrices below each other: a collective.

        Args:
            rows: of this process, [counts[index], columns].
            counts: rows of each process.
        """
        if self.group is None:
            return rows
        missing = max(counts) - len(rows)
        vector = nn.functional.pad(rows, (0, 0, 0, missing)).flatten()
        everyone = self._gather(vector, "an evaluation").view(len(counts), max(counts), -1)
        return torch.cat([part[:count] for part, count in zip(everyone, counts, strict=True)])

    def average_buffers(self, model: nn.Module) -> None:
        """Make the floating buffers the mean of the processes' own: a collective."""
        if self.group is not None:
            average_buffers(model, lambda vector: self._gather(vector, "the running statistics"))

    def gather_buffers(self, model: nn.Module) -> Tensor | None:
        """Every process's floating buffers, float64 [processes, elements]: a collective."""
        if self.group is None:
            return None
        return self._gather(_packed(model), "a checkpoint set")

    def restore_buffers(self, model: nn.Module, everyone: Tensor | None) -> None:
        """Take this process's own out of what `gather_buffers` has returned."""
        if everyone is not None:
            _unpack(everyone[self.index], model)

    def _gather(self, vector: Tensor, what: str) -> Tensor:
        assert self.group is not None
        with self._lost(what):
            return gather_vectors(
                vector,
                group=self.group,
                device=torch.device("cpu"),
                seconds=self._patience.seconds if self._patience else None,
            )

    @contextmanager
    def _lost(self, what: str) -> Iterator[None]:
        try:
            yield
        except CommunicationError as error:
            gone = self._gone(what)
            raise PeerError(
                f"lost {'; '.join(gone) or 'another process of this network'} during {what}: it "
                f"died or did not answer, and its own output says why ({error})"
            ) from error

    def _gone(self, what: str) -> list[str]:
        """Who of the network's processes is not there any more."""
        if self._roll_call is None or self.group is None:
            return []
        ranks = dist.get_process_group_ranks(self.group)
        return self._roll_call.dead_peers() or self._roll_call.unresponsive(
            f"lost during {what}", ranks, _ANSWER_SECONDS
        )


def average_buffers(model: nn.Module, gather: Callable[[Tensor], Tensor]) -> None:
    """Make a module's floating buffers the mean of those that several processes hold, in place.

    Buffers that are equal already keep their bits.

    Args:
        model: one process's own.
        gather: everyone's vectors, [n] -> [processes, n]: a collective.
    """
    mine = _packed(model)
    if not len(mine):
        return
    everyone = gather(mine)
    _unpack(everyone[0] + (everyone - everyone[0]).mean(dim=0), model)


def _float_buffers(model: nn.Module) -> list[Tensor]:
    return [buffer for buffer in model.buffers() if buffer.is_floating_point()]


def _packed(model: nn.Module) -> Tensor:
    """All floating buffers, float64 [elements], on the CPU."""
    parts = [buffer.detach().double().flatten().cpu() for buffer in _float_buffers(model)]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def _unpack(vector: Tensor, model: nn.Module) -> None:
    buffers = _float_buffers(model)
    parts = vector.split([buffer.numel() for buffer in buffers]) if buffers else ()
    with torch.no_grad():
        for buffer, part in zip(buffers, parts, strict=True):
            buffer.copy_(part.view(buffer.shape))
