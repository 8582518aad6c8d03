"""Functions of torch.distributed under their current names, for torch 2.11 and newer."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.launcher.api import LaunchConfig

from dist_graft.errors import ConfigError

_SHUTDOWN_SECONDS = 30


def all_gather_single(
    output: Tensor, local: Tensor, *, group: dist.ProcessGroup | None, async_op: bool = False
) -> dist.Work | None:
    """Gather a tensor from every rank into one; before torch 2.13 `all_gather_into_tensor`.

    Every rank of the group must call this. Args and result: those of torch.
    """
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    work: dist.Work | None = getattr(dist, name)(output, local, group=group, async_op=async_op)
    return work


def set_timeout(limit: timedelta, group: dist.ProcessGroup) -> None:
    """Set the timeout of a group's later operations; before torch 2.14 a private function."""
    if hasattr(dist, "set_timeout"):
        dist.set_timeout(limit, group)
    else:
        dist.distributed_c10d._set_pg_timeout(limit, group)


def shutdown_option(seconds: int) -> dict[str, Any]:
    """LaunchConfig's `shutdown_timeout`; torch 2.11 always waits 30 seconds.

    Raises: ConfigError if torch cannot wait for another time.
    """
    if hasattr(LaunchConfig, "shutdown_timeout"):
        return {"shutdown_timeout": seconds}
    if seconds != _SHUTDOWN_SECONDS:
        raise ConfigError(
            f"launch: shutdown_timeout must be {_SHUTDOWN_SECONDS} with torch {torch.__version__}, "
            f"got {seconds}: use a newer torch"
        )
    return {}


def group_timeout(group: dist.ProcessGroup, device: torch.device) -> float | None:
    """Timeout in seconds of the group's collectives on a device; None if unknown."""
    try:
        timeout: timedelta = group._get_backend(device).options._timeout
    except (AttributeError, RuntimeError):
        return None
    return timeout.total_seconds()
