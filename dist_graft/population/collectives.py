"""Collectives on small vectors, across networks and across the replicas of one network."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from dist_graft.population.compat import all_gather_single, group_timeout
from dist_graft.population.runtime.store import call_with_timeout

_POLL_SECONDS = 1.0
_SHORTEST_PAUSE, _LONGEST_PAUSE = 2e-5, 2e-3  # polling interval of an event, seconds
_ABORT_SECONDS = 5.0
_SOURCE_LOCATION = re.compile(r"^\[[^]]*\] *")
_GLOO = re.compile(r"^\[[^]]*\bgloo\b")

Gather = Callable[[Tensor], Tensor]
"""Gathers one vector from each rank: [n] -> [ranks, n]."""


class CommunicationError(Exception):
    """A collective failed because a peer died or did not respond; has the backend's message."""


@contextmanager
def communicating(*, runs_model: bool = False) -> Iterator[None]:
    """Convert a RuntimeError of the collectives in the block into a CommunicationError.

    Args:
        runs_model: whether the block also runs the model, which may raise a RuntimeError itself.
            Only the backend's errors are converted then.
    """
    try:
        yield
    except RuntimeError as error:
        if runs_model and not raised_by_backend(error):
            raise
        # Gloo's messages start with a source location and end with general advice.
        text = _SOURCE_LOCATION.sub("", first_line(error)).partition(". This is typically")[0]
        raise CommunicationError(text) from error


def raised_by_backend(error: BaseException) -> bool:
    """Whether torch.distributed or gloo raised the error, usually because a peer has died."""
    return isinstance(error, dist.DistError) or bool(_GLOO.match(str(error)))


def first_line(error: BaseException) -> str:
    """First line of an error's message, or its type if it has none."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def wait_for(
    work: dist.Work,
    seconds: float | None,
    on_wait: Callable[[float], None] = lambda waited: None,
) -> None:
    """Wait for an asynchronous collective over gloo; signals are handled during the wait.

    Args:
        work: the collective.
        seconds: timeout; None: the backend's own timeout.
        on_wait: called about once a second with the seconds waited.

    Raises: RuntimeError of the backend or after the timeout.
    """
    start = time.monotonic()
    while True:
        left = _POLL_SECONDS if seconds is None else seconds + start - time.monotonic()
        try:
            work.wait(timedelta(seconds=min(_POLL_SECONDS, max(left, 0.001))))
        except RuntimeError:
            waited = time.monotonic() - start
            if work.is_completed():
                work.wait()  # raises if the collective failed
                return
            if seconds is not None and waited >= seconds:
                raise RuntimeError(f"no response within {seconds:g} s") from None
            on_wait(waited)
        else:
            return


def wait_for_device(
    device: torch.device,
    seconds: float | None,
    on_wait: Callable[[float], None] = lambda waited: None,
    *,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Wait until the device has finished what is queued; call this before a read from it.

    A read would block the host behind a collective whose peer has died, until the watchdog of NCCL
    aborts the process, which can take minutes. Signals are handled during this wait. On a CPU it
    returns at once.

    Args:
        device: of the tensor that is read next.
        seconds: timeout; None: the group's own timeout.
        on_wait: called about once a second with the seconds waited; an error that it raises ends
            the wait.
        group: group of the collectives that are queued; None: none, only `seconds` applies.

    Raises: CommunicationError after the timeout, or when a collective failed.
    """
    if device.type == "cpu":
        return
    if seconds is None and group is not None:
        seconds = group_timeout(group, device)
    start, pause, calls = time.monotonic(), _SHORTEST_PAUSE, 0
    with communicating():
        event = record_event(device)
        while not event.query():
            waited = time.monotonic() - start
            if seconds is not None and waited >= seconds:
                raise CommunicationError(f"no response within {seconds:g} s")
            if waited >= (calls + 1) * _POLL_SECONDS:
                calls += 1
                on_wait(waited)
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)


def record_event(device: torch.device) -> torch.Event:
    """Event that completes when the work queued on the current stream is done."""
    event = torch.Event(device)
    event.record()
    return event


def abort_nccl(*groups: dist.ProcessGroup | None) -> None:
    """Abort the NCCL communicators of the groups, so that the device does not wait any more.

    Their collectives end with undefined results: the process must exit without using them. Not a
    collective; gives up after a few seconds.
    """
    for group in groups:
        if group is not None and "nccl" in dist.get_backend_config(group):
            with suppress(RuntimeError, TimeoutError):
                call_with_timeout(group.abort, _ABORT_SECONDS)


def gather_vectors(
    vector: Tensor,
    *,
    group: dist.ProcessGroup,
    device: torch.device,
    seconds: float | None = None,
    on_wait: Callable[[float], None] = lambda waited: None,
) -> Tensor:
    """Gather one vector from each rank: [n] -> [ranks, n], on the CPU.

    Every rank of the group must call this with the same n.

    Args:
        vector: this rank's vector.
        group: the process group.
        device: device on which the group transfers tensors.
        seconds: timeout; None: the group's own timeout.
        on_wait: called about once a second while waiting, with the seconds waited.

    Raises: CommunicationError if a peer died or did not respond in time.
    """
    gathered = gather_on_device(
        vector, group=group, device=device, seconds=seconds, on_wait=on_wait
    )
    wait_for_device(device, seconds, on_wait, group=group)
    return gathered.cpu()


def gather_on_device(
    vector: Tensor,
    *,
    group: dist.ProcessGroup,
    device: torch.device,
    seconds: float | None = None,
    on_wait: Callable[[float], None] = lambda waited: None,
) -> Tensor:
    """Gather vectors as `gather_vectors` does, but leave them on `device`.

    The host does not wait for the device: call `wait_for_device` before a read.
    """
    local = vector.to(device)
    ranks = dist.get_world_size(group)
    gathered = local.new_empty(ranks * local.numel())
    with communicating():
        work = all_gather_single(gathered, local, group=group, async_op=True)
        assert work is not None  # this rank belongs to the group
        if device.type == "cpu":
            wait_for(work, seconds, on_wait)
        else:
            work.wait()
    return gathered.view(ranks, -1)


def gather_bytes(
    data: bytes, gather: Gather, *, lengths: Sequence[int] | None = None
) -> list[bytes]:
    """Gather one byte string from each rank; every rank of the group must call this.

    Args:
        data: this rank's bytes.
        gather: collective over the group.
        lengths: length of each rank's bytes; None: the lengths are gathered first.

    Returns: the bytes of each rank.
    """
    if lengths is None:
        lengths = gather(torch.tensor([len(data)])).flatten().tolist()
    padded = bytearray(data.ljust(max(1, *lengths), b" "))  # a buffer must not be empty
    rows = gather(torch.frombuffer(padded, dtype=torch.uint8))
    return [bytes(row[:length].tolist()) for row, length in zip(rows, lengths, strict=True)]
