"""Device of a process, and whether NCCL can be used."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from dist_graft.errors import ConfigError
from dist_graft.population.runtime.peers import PeerRegistry
from dist_graft.population.runtime.process_info import ProcessInfo


def choose_device(name: str, process: ProcessInfo) -> torch.device:
    """Device of this process; "auto" and "cuda" assign the GPUs of a machine in rank order.

    Raises: ConfigError for an invalid name or a GPU that does not exist.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdigit()):
        raise ConfigError(f"runtime.device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if kind == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    index = int(number) if number else process.local_rank % max(1, count)
    if index >= count:
        raise ConfigError(
            f"runtime.device {name}: torch {torch.__version__} sees {count} GPUs here; use cpu or "
            "auto, or check the driver and CUDA_VISIBLE_DEVICES"
        )
    return torch.device("cuda", index)


def set_matmul_precision(precision: str, device: torch.device) -> None:
    """Set the precision of fp32 matrix products and convolutions on a GPU, for this process.

    Args:
        precision: see `torch.set_float32_matmul_precision`; convolutions follow.
        device: not a GPU: nothing changes.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = precision != "highest"


def can_use_nccl(device: torch.device, peers: PeerRegistry, seconds: float) -> bool:
    """Whether every process has NCCL and a GPU of its own; identical on all ranks.

    Processes may share a GPU if the environment makes NCCL accept this (see `gpu_name`). Every
    process of the run must call this.
    """
    gpu = ""
    if device.type == "cuda" and dist.is_nccl_available():
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        gpu = gpu_name(uuid, peers.rank, torch.cuda.nccl.version(), os.environ)
    peers.publish("the GPU", gpu)
    return all_different(peers.collect("the GPU", seconds))


def gpu_name(
    uuid: str, rank: int, nccl_version: Sequence[int], environment: Mapping[str, str]
) -> str:
    """Name of a process's GPU; NCCL refuses two processes with the same name.

    NCCL takes processes with different values of NCCL_HOSTID to be on different hosts. From NCCL
    2.30, NCCL_MULTI_RANK_GPU_ENABLE=1 lets processes share a GPU. Both are meant for tests.
    """
    shares = environment.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1" and tuple(nccl_version) >= (2, 30)
    return f"{uuid} {environment.get('NCCL_HOSTID', '')} {rank if shares else ''}"


def shared_gpu_variables(rank: int, processes: int) -> dict[str, str]:
    """Environment in which NCCL runs several processes on one GPU; empty if there are enough GPUs.

    For tests: NCCL takes each process to be on a host of its own, and connects them by sockets.
    """
    if processes <= torch.cuda.device_count():
        return {}
    return {"NCCL_HOSTID": str(rank), "NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"}


def all_different(gpus: Sequence[str]) -> bool:
    """Whether no two GPUs are equal and none is missing (an empty string)."""
    return "" not in gpus and len(set(gpus)) == len(gpus)


def nccl_unavailable(device: torch.device) -> ConfigError:
    """Error for `runtime.backend nccl` if NCCL cannot be used."""
    return ConfigError(
        "runtime.backend nccl needs a GPU for every process of the run and a torch build with "
        f"NCCL; this process uses {device}: use auto or gloo (to test NCCL on one GPU, see "
        "docs/gpu.md)"
    )
