"""What `dist-graft plan` is told. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jsonargparse import ArgumentParser

from dist_graft.config.validation import above_zero, at_least, require
from dist_graft.errors import ConfigError

MOST_NETWORKS = 4096
LOCAL = {"nccl": 4.0, "gloo": 0.8}
"""GB/s of weights that a process measures, packs, compares and blends: of a GPU an assumption (some
50 microseconds for each piece of a tensor, the kernels' starts), of one core
from the CPU time of rounds in benchmarks/scale.py (docs/scale.md)."""
LATENCY = {"nccl": 20e-6, "gloo": 100e-6}
"""Seconds that a message takes beside its bytes; assumptions."""


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """A population, and the machines it is to run on; see the help of each option."""

    networks: int
    model: str
    replicas: int = 1
    gpus_per_node: int = 8
    bandwidth_intra: float = 400.0
    bandwidth_inter: float = 25.0
    bandwidth_local: float | None = None
    backend: Literal["nccl", "gloo"] = "nccl"
    bucket_mb: float = 32.0
    optimizer: Literal["sgd", "adamw"] = "sgd"
    classes: int | None = None
    image_size: int | None = None
    images: int | None = None
    images_per_second: float | None = None
    epoch_seconds: float | None = None
    tflops: float = 50.0

    def __post_init__(self) -> None:
        require(
            1 <= self.networks <= MOST_NETWORKS,
            "networks",
            self.networks,
            f"in [1, {MOST_NETWORKS}]",
        )
        for name in ("replicas", "gpus_per_node", "classes", "image_size", "images"):
            at_least(name.replace("_", "-"), getattr(self, name), 1)
        for name in (
            *("bandwidth_intra", "bandwidth_inter", "bandwidth_local", "bucket_mb", "tflops"),
            *("images_per_second", "epoch_seconds"),
        ):
            if getattr(self, name) is not None:
                above_zero(name.replace("_", "-"), getattr(self, name))
        if self.epoch_seconds is not None and self.images_per_second is not None:
            raise ConfigError("epoch-seconds and images-per-second exclude each other: give one")

    @property
    def local(self) -> float:
        """Bytes a second that a process measures, packs, compares and blends."""
        return 1e9 * (self.bandwidth_local or LOCAL[self.backend])


def plan_parser(settings: Mapping[str, Any]) -> ArgumentParser:
    """The options of the command."""
    parser = ArgumentParser(
        description="What rounds of a population will cost on a cluster: who runs where, bytes on "
        "each link, time, memory and share of an epoch. Arithmetic only: nothing is started.",
        **settings,
    )
    add = parser.add_argument
    none = PlanOptions(networks=1, model="")
    add("--networks", type=int, required=True, help="of the population, K")
    add("--model", type=str, required=True, help="as train's --model.name")
    add(
        "--replicas",
        type=int,
        default=none.replicas,
        help="processes that train one network, R; each moves 1/R of its weights",
    )
    add("--gpus-per-node", type=int, default=none.gpus_per_node, help="processes on a node")
    add(
        "--bandwidth-intra",
        type=float,
        default=none.bandwidth_intra,
        help="GB/s that a GPU sends, and receives at once, inside a node",
    )
    add(
        "--bandwidth-inter",
        type=float,
        default=none.bandwidth_inter,
        help="GB/s that a node sends, and receives at once, to and from other nodes: all its "
        "network adapters together",
    )
    add(
        "--bandwidth-local",
        type=float | None,
        default=None,
        help="GB/s of weights that a process measures, packs, compares and blends; unset: "
        f"{LOCAL['nccl']:g} on a GPU (an assumption), {LOCAL['gloo']:g} on a core (measured)",
    )
    add(
        "--backend",
        type=Literal["nccl", "gloo"],
        default=none.backend,
        help="nccl: weights travel between GPUs; gloo: between the memories of hosts",
    )
    add("--bucket-mb", type=float, default=none.bucket_mb, help="as train's --graft.bucket_mb")
    add(
        "--optimizer",
        type=Literal["sgd", "adamw"],
        default=none.optimizer,
        help="sgd: with momentum, one number a weight; adamw: two",
    )
    add(
        "--classes",
        type=int | None,
        default=None,
        help="unset: 10 for the networks for small images, 1000 for others",
    )
    add(
        "--image-size",
        type=int | None,
        default=None,
        help="pixels; unset: 32 for the networks for small images, 224 for others",
    )
    add(
        "--images",
        type=int | None,
        default=None,
        help="of an epoch; unset: 50000 (CIFAR) for the networks for small images, 1281167 "
        "(ImageNet) for others",
    )
    add(
        "--images-per-second",
        type=float | None,
        default=None,
        help="that one process trains; unset: from the network's operations and --tflops",
    )
    add(
        "--epoch-seconds",
        type=float | None,
        default=None,
        help="of an epoch without rounds; unset: from images and images a second",
    )
    add(
        "--tflops",
        type=float,
        default=none.tflops,
        help="10^12 operations a second that a process keeps up in training (an assumption), "
        "where neither of the two before is given",
    )
    return parser
