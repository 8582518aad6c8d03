"""Options of processes, devices and precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dist_graft.config.validation import MAX_SECONDS, above_zero, at_least, at_most
from dist_graft.errors import ConfigError

CompileMode = Literal["reduce-overhead", "max-autotune"]


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """Devices, processes and precision."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N; auto: a GPU if there is one."""
    backend: Literal["auto", "nccl", "gloo"] = "auto"
    """Communication backend; auto: NCCL if every process has its own GPU, gloo otherwise."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of forward and backward passes; weights stay fp32. fp16 uses loss scaling (GPU
    only)."""
    replicas: int = 1
    """Data-parallel processes per network, each on its part of every batch: launch networks x
    replicas processes."""
    sync_bn: bool = False
    """Synchronize batch norm over the replicas of a network (SyncBatchNorm, GPU only). Running
    statistics are averaged before each round in any case."""
    threads: int = 0
    """CPU threads per process; 0: an equal share of the available cores."""
    timeout_seconds: float = 600.0
    """Timeout for other processes at startup and in the first epoch; after a process's own first
    epoch, timeout_epochs times its duration if that is longer."""
    timeout_epochs: float = 5.0
    """Timeout for other processes afterwards, in units of the longest epoch of any network, but at
    least one minute (or timeout_seconds if that is less)."""
    channels_last: bool = True
    """Use the channels-last memory format for images and convolutions."""
    matmul_precision: Literal["highest", "high", "medium"] = "high"
    """Precision of fp32 convolutions and matrix products on a GPU; highest: fp32; high: TF32, which
    torch also uses for convolutions by default; medium: TF32 in convolutions, bf16 in matrix
    products where torch has it."""
    compile: bool | CompileMode = False
    """Compile the network with torch.compile, for each batch size separately; true: its default
    mode; reduce-overhead: with CUDA graphs; max-autotune: CUDA graphs and kernels selected by
    autotuning."""
    deterministic: bool = False
    """Use deterministic GPU kernels, so that the same command gives the same weights."""

    def __post_init__(self) -> None:
        at_least("runtime.replicas", self.replicas, 1)
        if self.sync_bn and self.replicas == 1:
            raise ConfigError("runtime.sync_bn requires runtime.replicas above 1")
        if self.deterministic and self.compile == "max-autotune":
            raise ConfigError(
                "runtime.compile max-autotune selects kernels by their measured speed: with "
                "runtime.deterministic, use true or reduce-overhead"
            )
        at_least("runtime.threads", self.threads, 0)
        above_zero("runtime.timeout_seconds", self.timeout_seconds)
        at_most("runtime.timeout_seconds", self.timeout_seconds, MAX_SECONDS)
        at_least("runtime.timeout_epochs", self.timeout_epochs, 1)
