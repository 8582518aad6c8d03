"""Collectives on small vectors, across networks and across the replicas of one network."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

_LOOK_AGAIN = 1.0
_PLACE = re.compile(r"^\[[^]]*\] *")
_GLOO = re.compile(r"^\[[^]]*\bgloo\b")


class CommunicationError(Exception):
    """A collective failed: a peer died, or did not answer in time; the text is the backend's."""


@contextmanager
def communicating() -> Iterator[None]:
    """Around collectives: their RuntimeError becomes a CommunicationError."""
    try:
        yield
    except RuntimeError as error:
        raise _wire_error(error) from error


@contextmanager
def in_a_step() -> Iterator[None]:
    """Around data-parallel steps: only what the backend raises becomes a CommunicationError.

    A model may fail by itself there, with a RuntimeError as well.
    """
    try:
        yield
    except RuntimeError as error:
        if raised_by_backend(error):
            raise _wire_error(error) from error
        raise


def raised_by_backend(error: BaseException) -> bool:
    """Whether torch.distributed or gloo raised the error, usually because a peer is gone."""
    return isinstance(error, dist.DistError) or bool(_GLOO.match(str(error)))


def _wire_error(error: RuntimeError) -> CommunicationError:
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    # Gloo begins with a place in its source and ends with general advice.
    return CommunicationError(_PLACE.sub("", first).partition(". This is typically")[0])


def wait_for(
    work: dist.Work,
    seconds: float | None,
    on_wait: Callable[[float], None] = lambda waited: None,
) -> None:
    """Wait for a gather on the CPU; signals are served meanwhile.

    Args:
        work: of an asynchronous collective over gloo.
        seconds: after which to give up; None: the backend's own time-out.
        on_wait: called about once a second with the seconds waited.

    Raises: RuntimeError, the backend's or for the time-out.
    """
    began = time.monotonic()
    while True:
        left = _LOOK_AGAIN if seconds is None else seconds + began - time.monotonic()
        try:
            work.wait(timedelta(seconds=min(_LOOK_AGAIN, max(left, 0.001))))
        except RuntimeError:
            waited = time.monotonic() - began
            if work.is_completed():
                work.wait()  # came meanwhile, or fails for good
                return
            if seconds is not None and waited >= seconds:
                raise RuntimeError(f"no answer within {seconds:g} s") from None
            on_wait(waited)
        else:
            return


def gather_vectors(
    vector: Tensor,
    *,
    group: dist.ProcessGroup,
    device: torch.device,
    seconds: float | None = None,
    on_wait: Callable[[float], None] = lambda waited: None,
) -> Tensor:
    """All networks' vectors of one agreed length: [n] -> [networks, n], on the CPU.

    Every rank of the group must call this.

    Args:
        vector: of this network.
        group: whose ranks are the networks.
        device: where vectors must lie to travel.
        seconds: after which to give up, on the CPU; None: the group's own time-out.
        on_wait: called about once a second while waiting on the CPU.
    """
    mine = vector.to(device)
    networks = dist.get_world_size(group)
    everyone = mine.new_empty(networks * mine.numel())
    with communicating():
        work = dist.all_gather_single(everyone, mine, group=group, async_op=True)
        assert work is not None  # this rank is of the group
        if device.type == "cpu":
            wait_for(work, seconds, on_wait)
        else:
            work.wait()
    return everyone.cpu().view(networks, -1)
