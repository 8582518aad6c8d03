"""Runs each launched process as its own network, in frameworks that treat processes as replicas."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist

from dist_graft.population.collectives import gather_bytes, gather_vectors
from dist_graft.population.round.exchange import header_device, world
from dist_graft.population.runtime.process_info import ProcessInfo, read_process_info

_LAUNCHER_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    "TORCHELASTIC_RUN_ID",
)


@contextmanager
def launcher_hidden() -> Iterator[ProcessInfo]:
    """Hide the launcher's variables, so that a framework sees a process of its own.

    Yields: rank and number of the processes, read before.
    """
    process = read_process_info()
    hidden = {name: os.environ.pop(name) for name in _LAUNCHER_VARIABLES if name in os.environ}
    try:
        yield process
    finally:
        os.environ.update(hidden)


def local_device(*, use_cpu: bool) -> torch.device:
    """The GPU of this process, by its rank on the machine, or the CPU."""
    if use_cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", read_process_info().local_rank % torch.cuda.device_count())


def join_networks(device: torch.device) -> None:
    """Create the default process group of the launcher's processes, unless there is one.

    A process without a launcher becomes a group of one.
    """
    if dist.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if read_process_info().launched:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def gather_texts(
    text: str, device: torch.device, group: dist.ProcessGroup | None = None
) -> list[str]:
    """Gather a text from every process of a group, by rank. A collective.

    Args:
        text: of this process.
        device: of this process's network.
        group: the process group; None: the default group.

    Raises: CommunicationError if a peer died or did not respond in time.
    """
    group = group or world()
    gather = partial(gather_vectors, group=group, device=header_device(group, device))
    return [content.decode() for content in gather_bytes(text.encode(), gather)]
