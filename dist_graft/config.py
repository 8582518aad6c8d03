"""Everything that can be set: one frozen dataclass a section, units in the field texts."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dist_graft.errors import ConfigError


def _require(ok: bool, name: str, value: object, legal: str) -> None:
    if not ok:
        raise ConfigError(f"{name} must be {legal}, got {value!r}")


def _at_least(name: str, value: float | None, least: float) -> None:
    if value is not None:
        _require(math.isfinite(value) and value >= least, name, value, f"at least {least}")


def _above_zero(name: str, value: float) -> None:
    _require(math.isfinite(value) and value > 0, name, value, "above 0")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What the networks are trained and tested on."""

    name: str = "fashion-mini"
    """fashion-mini (shipped), fashion-mnist, cifar10, cifar100 or imagefolder."""
    root: str = "data"
    """Folder that holds the data sets; for imagefolder the one with train/ and val/ in it."""
    batch_size: int = 128
    """Images a network sees in one optimizer step."""
    train_samples: int | None = None
    """Use the first N training images only (before a validation split is taken)."""
    test_samples: int | None = None
    """Use the first N test images only."""
    val_fraction: float = 0.0
    """Share of the training images that is kept for validation, in [0, 1)."""
    image_size: int | None = None
    """Pixels: small images are padded with black to this size; imagefolder crops to it (224)."""
    channels: int | None = None
    """1 (grey) or 3; unset: as the data set has them."""
    augment: bool = True
    """Random crops and flips while training, the usual ones of the data set."""
    workers: int = 4
    """Processes that decode images for each network (imagefolder only)."""
    download: bool = True
    """Download CIFAR when it is missing, once on every machine."""

    def __post_init__(self) -> None:
        _at_least("data.batch_size", self.batch_size, 1)
        _at_least("data.train_samples", self.train_samples, 1)
        _at_least("data.test_samples", self.test_samples, 1)
        _require(0 <= self.val_fraction < 1, "data.val_fraction", self.val_fraction, "in [0, 1)")
        _at_least("data.image_size", self.image_size, 1)
        _require(self.channels in (None, 1, 3), "data.channels", self.channels, "1 or 3")
        _at_least("data.workers", self.workers, 0)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture that all networks share."""

    name: str = "resnet20"
    """resnet20/32/44/56/110, mobilenetv2, vgg16_bn, wrn28_10 (all for small images), or any
    name of torchvision.models (torchvision/NAME where both have it)."""
    activation: Literal["relu", "leaky_relu"] = "relu"
    """Of the small-image ResNets."""
    shared_init: bool = False
    """Start all networks from the same weights instead of each from its own."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """How every network is trained."""

    name: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.1
    """Learning rate of the network that has the largest one."""
    lr_diversity: Literal["none", "cosine"] = "none"
    """cosine: network k of K gets lr (1 + cos(pi (K - 1 - k) / K)) / 2."""
    lrs: list[float] | None = None
    """The networks' learning rates one by one, instead of lr and lr_diversity."""
    momentum: float = 0.9
    """Of SGD, in [0, 1)."""
    nesterov: bool = False
    """Nesterov's momentum (SGD)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Of AdamW, each in [0, 1)."""
    weight_decay: float = 5e-4
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    """How the learning rate falls; it changes at the start of an epoch."""
    step_epochs: int = 60
    """Epochs between two falls of the step schedule."""
    step_factor: float = 0.1
    """What the step schedule multiplies with, in (0, 1]."""
    warmup_epochs: float = 0.0
    """Epochs over which the learning rate first rises linearly, step by step."""
    clip_norm: float | None = None
    """Largest norm of the whole gradient; unset: no clipping."""
    accumulation: int = 1
    """Parts that a batch is cut into, whose gradients add up before the step."""
    label_smoothing: float = 0.0
    """In [0, 1)."""

    def __post_init__(self) -> None:
        _above_zero("optim.lr", self.lr)
        for value in self.lrs or ():
            _above_zero("optim.lrs", value)
        if self.lrs is not None and self.lr_diversity != "none":
            raise ConfigError("optim.lrs and optim.lr_diversity exclude each other: give one")
        _require(0 <= self.momentum < 1, "optim.momentum", self.momentum, "in [0, 1)")
        _require(all(0 <= b < 1 for b in self.betas), "optim.betas", self.betas, "in [0, 1)")
        if self.nesterov and (self.name != "sgd" or self.momentum == 0):
            raise ConfigError("optim.nesterov needs optim.name sgd and optim.momentum above 0")
        _at_least("optim.weight_decay", self.weight_decay, 0)
        _at_least("optim.step_epochs", self.step_epochs, 1)
        _require(0 < self.step_factor <= 1, "optim.step_factor", self.step_factor, "in (0, 1]")
        _at_least("optim.warmup_epochs", self.warmup_epochs, 0)
        if self.clip_norm is not None:
            _above_zero("optim.clip_norm", self.clip_norm)
        _at_least("optim.accumulation", self.accumulation, 1)
        _require(
            0 <= self.label_smoothing < 1,
            "optim.label_smoothing",
            self.label_smoothing,
            "in [0, 1)",
        )


@dataclass(frozen=True, kw_only=True)
class GraftConfig:
    """How the networks graft each other."""

    every: int = 1
    """Epochs between two rounds; 0: never, the networks are independent."""
    criterion: Literal["entropy", "filter_entropy", "l1"] = "entropy"
    """What a layer's information is: entropy of all its weights (eq. 6), the sum of its filters'
    entropies (eq. 5), both in nats, or the mean absolute weight."""
    num_bins: int = 10
    """Bins of the histogram that the entropy is computed from."""
    amplitude: float = 0.4
    """A of eq. 7, in [0, 1]: the coefficient stays within A/2 of one half."""
    sensitivity: float = 5.0
    """c of eq. 7, per unit of information: how fast the coefficient leaves one half."""
    lead: Literal["conv", "conv+linear"] = "conv"
    """Which layers lead a graft unit; conv+linear for MLPs and transformers."""
    exchange: Literal["all_gather", "p2p"] = "all_gather"
    """all_gather: every process sees every network; p2p: only the donor's weights travel."""
    bucket_mb: float = 32.0
    """Size of one network's part of an exchange buffer, in MiB."""
    reset_momentum: bool = False
    """Forget the optimizer's whole state (momentum, AdamW's moments) after each round."""

    def __post_init__(self) -> None:
        _at_least("graft.every", self.every, 0)
        _require(1 <= self.num_bins <= 4096, "graft.num_bins", self.num_bins, "in [1, 4096]")
        _require(0 <= self.amplitude <= 1, "graft.amplitude", self.amplitude, "in [0, 1]")
        _at_least("graft.sensitivity", self.sensitivity, 0)
        _above_zero("graft.bucket_mb", self.bucket_mb)


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """Where and how the processes run."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N; auto takes a GPU when there is one."""
    backend: Literal["auto", "nccl", "gloo"] = "auto"
    """auto: NCCL when every process of the machine has a GPU of its own, gloo otherwise."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the forward and backward passes; the weights stay fp32. fp16 scales the loss (GPU)."""
    threads: int = 0
    """CPU threads a process computes with; 0: its share of the cores it may use."""
    timeout_seconds: float = 600.0
    """How long a process waits for another before it gives up."""
    channels_last: bool = True
    """Keep images and convolutions in channels-last memory format."""
    compile: bool = False
    """torch.compile the network."""
    deterministic: bool = False
    """Deterministic kernels on a GPU, so that equal commands give equal weights."""

    def __post_init__(self) -> None:
        _at_least("runtime.threads", self.threads, 0)
        _above_zero("runtime.timeout_seconds", self.timeout_seconds)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is kept to go on from."""

    every: int = 1
    """Epochs between two checkpoint sets; 0: none but the last epoch's."""
    keep: int = 2
    """Newest complete sets that are kept."""

    def __post_init__(self) -> None:
        _at_least("checkpoint.every", self.every, 0)
        _at_least("checkpoint.keep", self.keep, 1)


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """What a run shows of itself."""

    tensorboard: bool = True
    """Write TensorBoard events."""
    progress: Literal["auto", "bar", "lines"] = "auto"
    """A bar, or one line an epoch; auto: a bar on a terminal."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a population of networks that graft each other."""

    run_dir: str = "runs/run"
    """Folder of the run: configuration, metrics, events, checkpoints."""
    epochs: int = 20
    """Passes over the training images, in all."""
    seed: int = 0
    """All draws follow from it: the same seed and command give the same networks."""
    resume: Literal["auto", "never", "must"] = "auto"
    """auto: go on from the newest complete checkpoint set, or start; must: refuse to start anew;
    never: refuse to go on."""
    method: Literal["graft", "none"] = "graft"
    """How the networks influence each other; none: not at all."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    graft: GraftConfig = field(default_factory=GraftConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)

    def __post_init__(self) -> None:
        _require(bool(self.run_dir), "run_dir", self.run_dir, "a folder")
        _at_least("epochs", self.epochs, 1)
        _require(0 <= self.seed < 2**63, "seed", self.seed, "in [0, 2^63)")


def from_nested(kind: type[Any], values: Mapping[str, Any]) -> Any:
    """A configuration dataclass from nested dictionaries, as YAML holds them.

    Raises: ConfigError for a value out of range; TypeError for a name that is no field.
    """
    types = typing.get_type_hints(kind)
    return kind(**{name: _as_field(types.get(name), value) for name, value in values.items()})


def _as_field(kind: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            section = getattr(kind, "__name__", "").removesuffix("Config").lower()
            raise ConfigError(f"{section} must be a section with options, got {value!r}")
        return from_nested(typing.cast("type[Any]", kind), value)
    return tuple(value) if typing.get_origin(kind) is tuple else value
