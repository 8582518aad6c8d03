"""Processes of a launcher as networks, for frameworks that take them for replicas of one model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

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


def gather_texts(text: str, group: dist.ProcessGroup | None = None) -> list[str]:
    """Gather a text from every process of a group, by rank. A collective."""
    texts: list[str] = [""] * dist.get_world_size(group)
    dist.all_gather_object(texts, text, group=group)
    return texts
