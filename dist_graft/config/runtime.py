"""Options of processes, devices and precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dist_graft.config.validation import above_zero, at_least
from dist_graft.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """Where and how the processes run."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N; auto takes a GPU when there is one."""
    backend: Literal["auto", "nccl", "gloo"] = "auto"
    """auto: NCCL when every process has a GPU of its own, gloo otherwise."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the forward and backward passes; the weights stay fp32. fp16 scales the loss (GPU)."""
    replicas: int = 1
    """Processes that train each network together, each on its part of every batch: start networks x
    replicas of them."""
    sync_bn: bool = False
    """Batch statistics over all replicas of a network (SyncBatchNorm; GPUs only) instead of in
    each; the running statistics are averaged before a round in any case."""
    threads: int = 0
    """CPU threads a process computes with; 0: its share of the cores it may use."""
    timeout_seconds: float = 600.0
    """How long a process waits for another at the start and in the first epoch; once its own first
    epoch is over, timeout_epochs times that one if that is longer."""
    timeout_epochs: float = 5.0
    """Afterwards: in units of the longest epoch that a network has taken, but at least a minute
    (or timeout_seconds where that is less)."""
    channels_last: bool = True
    """Keep images and convolutions in channels-last memory format."""
    compile: bool = False
    """torch.compile the network."""
    deterministic: bool = False
    """Deterministic kernels on a GPU, so that equal commands give equal weights."""

    def __post_init__(self) -> None:
        at_least("runtime.replicas", self.replicas, 1)
        if self.sync_bn and self.replicas == 1:
            raise ConfigError("runtime.sync_bn needs runtime.replicas above 1")
        at_least("runtime.threads", self.threads, 0)
        above_zero("runtime.timeout_seconds", self.timeout_seconds)
        at_least("runtime.timeout_epochs", self.timeout_epochs, 1)
