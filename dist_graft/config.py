"""Everything that can be set: one frozen dataclass a section, units in the field texts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dist_graft.config_methods import DistillConfig, PapaConfig, WashConfig
from dist_graft.errors import ConfigError
from dist_graft.validation import above_zero, at_least, known_or_own, require, step_range

_CRITERIA = ("entropy", "filter_entropy", "l1", "constant", "shuffled")
_TOPOLOGIES = ("ring", "random", "exponential")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What the networks are trained and tested on."""

    name: str = "fashion-mini"
    """fashion-mini (shipped), fashion-mnist, cifar10, cifar100 or imagefolder; or
    package.module:name of a function (root) -> images and labels (docs/extending.md)."""
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
    skip_broken: bool = False
    """Leave out images that cannot be decoded, and count them (imagefolder only)."""
    download: bool = True
    """Download CIFAR when it is missing, once on every machine."""

    def __post_init__(self) -> None:
        at_least("data.batch_size", self.batch_size, 1)
        at_least("data.train_samples", self.train_samples, 1)
        at_least("data.test_samples", self.test_samples, 1)
        require(0 <= self.val_fraction < 1, "data.val_fraction", self.val_fraction, "in [0, 1)")
        at_least("data.image_size", self.image_size, 1)
        require(self.channels in (None, 1, 3), "data.channels", self.channels, "1 or 3")
        at_least("data.workers", self.workers, 0)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture that all networks share."""

    name: str = "resnet20"
    """resnet8/14/20/32/44/56/110, mobilenetv2, vgg16_bn, wrn28_10 (all for small images), or any
    name of torchvision.models (torchvision/NAME where both have it); or package.module:name of a
    function (num_classes, channels) -> torch module."""
    activation: Literal["relu", "leaky_relu"] = "relu"
    """Of the small-image ResNets."""
    shared_init: bool = False
    """Start all networks from the same weights instead of each from its own."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """How every network is trained."""

    name: Literal["sgd", "adamw"] = "sgd"
    """The optimizer."""
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
    """Of all weights; decoupled from the gradient with AdamW."""
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
        above_zero("optim.lr", self.lr)
        for value in self.lrs or ():
            above_zero("optim.lrs", value)
        if self.lrs is not None and self.lr_diversity != "none":
            raise ConfigError("optim.lrs and optim.lr_diversity exclude each other: give one")
        require(0 <= self.momentum < 1, "optim.momentum", self.momentum, "in [0, 1)")
        require(all(0 <= b < 1 for b in self.betas), "optim.betas", self.betas, "in [0, 1)")
        if self.nesterov and (self.name != "sgd" or self.momentum == 0):
            raise ConfigError("optim.nesterov needs optim.name sgd and optim.momentum above 0")
        at_least("optim.weight_decay", self.weight_decay, 0)
        at_least("optim.step_epochs", self.step_epochs, 1)
        require(0 < self.step_factor <= 1, "optim.step_factor", self.step_factor, "in (0, 1]")
        at_least("optim.warmup_epochs", self.warmup_epochs, 0)
        if self.clip_norm is not None:
            above_zero("optim.clip_norm", self.clip_norm)
        at_least("optim.accumulation", self.accumulation, 1)
        require(
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
    every_steps: int = 0
    """Optimizer steps between two rounds, instead of epochs; 0: count epochs."""
    start: int = 0
    """Epochs that are trained before rounds begin."""
    source: Literal["external", "internal", "noise"] = "external"
    """Where scions come from: another network, this network's own strongest filters, or noise.
    The last two exchange nothing and work with one network."""
    rule: str | None = None
    """package.module:name of a rule of your own (docs/extending.md), in place of grafting."""
    topology: str = "ring"
    """Who gives to whom: ring (the neighbour), random (a new network in each round), exponential
    (the one at distance 1, 2, 4, ... in turn), or package.module:name of a function (networks,
    round, seed) -> the donor of each network."""
    level: Literal["layer", "filter"] = "layer"
    """layer: one coefficient a layer, by the criterion; filter: one a channel, by the scales of the
    batch norm (plain convolutional chains such as VGG)."""
    criterion: str = "entropy"
    """What a layer's information is: entropy of all its weights (eq. 6), filter_entropy, the sum of
    its filters' entropies (eq. 5), both in nats, or l1, the mean absolute weight. Two test whether
    it matters: constant keeps one half, shuffled permutes the coefficients over the layers. Or
    package.module:name of a function (filters, num_bins) -> number."""
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
    threshold: float = 0.1
    """L1 norm below which a filter is invalid (sources internal and noise)."""
    noise_annealing: float = 0.975
    """a of the noise's standard deviation a^round, in (0, 1]."""
    bucket_mb: float = 32.0
    """Largest size of one network's part of a buffer, in MiB; host memory takes at most 16."""
    reset_momentum: bool = False
    """Forget the optimizer's whole state (momentum, AdamW's moments) after each round."""

    def __post_init__(self) -> None:
        at_least("graft.every", self.every, 0)
        at_least("graft.every_steps", self.every_steps, 0)
        at_least("graft.start", self.start, 0)
        known_or_own("graft.criterion", self.criterion, _CRITERIA)
        known_or_own("graft.topology", self.topology, _TOPOLOGIES)
        if self.rule is not None:
            known_or_own("graft.rule", self.rule, ())
        above_zero("graft.threshold", self.threshold)
        require(
            0 < self.noise_annealing <= 1,
            "graft.noise_annealing",
            self.noise_annealing,
            "in (0, 1]",
        )
        require(1 <= self.num_bins <= 4096, "graft.num_bins", self.num_bins, "in [1, 4096]")
        require(0 <= self.amplitude <= 1, "graft.amplitude", self.amplitude, "in [0, 1]")
        at_least("graft.sensitivity", self.sensitivity, 0)
        above_zero("graft.bucket_mb", self.bucket_mb)


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


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is kept to go on from."""

    every: int = 1
    """Epochs between two checkpoint sets; 0: none but the last epoch's."""
    every_minutes: float | None = None
    """Minutes after the last checkpoint set at which there is another, also inside an epoch."""
    keep: int = 2
    """Newest complete sets that are kept."""
    max_failures: int = 3
    """Sets in a row that may fail to be written (a full disk) before the run ends."""
    grace_seconds: float = 25.0
    """Within which a run that is asked to stop must have saved and left."""

    def __post_init__(self) -> None:
        at_least("checkpoint.every", self.every, 0)
        if self.every_minutes is not None:
            above_zero("checkpoint.every_minutes", self.every_minutes)
        at_least("checkpoint.keep", self.keep, 1)
        at_least("checkpoint.max_failures", self.max_failures, 0)
        above_zero("checkpoint.grace_seconds", self.grace_seconds)


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """What a run shows of itself."""

    tensorboard: bool = True
    """Write TensorBoard events."""
    progress: Literal["auto", "bar", "lines"] = "auto"
    """A bar, or one line an epoch; auto: a bar on a terminal."""
    profile_steps: str | None = None
    """A:B, in quotes in YAML: each network profiles the optimizer steps A to B - 1 of the run,
    counted from 0, and all between them: RUN/networkNN/trace.json.gz, for ui.perfetto.dev."""

    def __post_init__(self) -> None:
        if self.profile_steps is not None:
            step_range("monitor.profile_steps", self.profile_steps)


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
    method: Literal["graft", "average", "papa", "wash", "none"] = "graft"
    """How the networks influence each other; average: all become the mean, as often as
    graft.every says; none: not at all."""
    on_divergence: Literal["heal", "abort", "exclude"] = "heal"
    """What becomes of a network whose weights or loss are no longer finite. heal: it takes the
    weights of the network before it, and goes on; abort: the run ends; exclude: nobody takes from
    it."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    graft: GraftConfig = field(default_factory=GraftConfig)
    papa: PapaConfig = field(default_factory=PapaConfig)
    wash: WashConfig = field(default_factory=WashConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)

    def __post_init__(self) -> None:
        require(bool(self.run_dir), "run_dir", self.run_dir, "a folder")
        at_least("epochs", self.epochs, 1)
        require(0 <= self.seed < 2**63, "seed", self.seed, "in [0, 2^63)")
        if self.graft.rule and (self.method, self.graft.source) != ("graft", "external"):
            raise ConfigError("graft.rule needs method graft and graft.source external")
        if self.data.skip_broken and self.runtime.replicas > 1:
            raise ConfigError(
                "data.skip_broken needs runtime.replicas 1: no part of a batch may shrink"
            )
