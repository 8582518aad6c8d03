"""All options of a training run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from dist_graft.config.checkpoint import CheckpointConfig
from dist_graft.config.data import DataConfig
from dist_graft.config.distill import DistillConfig
from dist_graft.config.graft import GraftConfig, refuse_intervals
from dist_graft.config.members import checked_diversity, checked_members
from dist_graft.config.model import ModelConfig
from dist_graft.config.monitor import MonitorConfig
from dist_graft.config.optim import OptimConfig
from dist_graft.config.population import PopulationConfig
from dist_graft.config.runtime import RuntimeConfig
from dist_graft.config.validation import at_least, check_kwargs, known_or_own, require
from dist_graft.errors import ConfigError
from dist_graft.grafting.rules import RULES
from dist_graft.grafting.rules.base import RoundSchedule

_Config = TypeVar("_Config")


def callback_with_arguments(
    entry: str | dict[str, dict[str, Any]],
) -> tuple[str, dict[str, Any]]:
    """Return the reference and the arguments of an entry of `callbacks`.

    Raises: ConfigError if it is a mapping of another form.
    """
    if isinstance(entry, str):
        return entry, {}
    legal = "package.module:Name or {package.module:Name: {argument: value}}"
    require(len(entry) == 1, "callbacks", entry, legal)
    ((reference, kwargs),) = entry.items()
    require(isinstance(kwargs, dict), "callbacks", entry, legal)
    return reference, kwargs


def is_named_weights(init_from: str) -> bool:
    """Whether init_from names pretrained weights instead of a path."""
    return init_from.startswith(("torchvision:", "timm:"))


def _with_method_sections(config: type[_Config]) -> type[_Config]:
    """Add a field for every method that has its own options, after the section graft."""
    annotations: dict[str, Any] = {}
    for name, kind in config.__annotations__.items():
        annotations[name] = kind
        if name == "graft":
            for method, rule in RULES.items():
                if rule.options:
                    annotations[method] = rule.options
                    setattr(config, method, field(default_factory=rule.options))
    config.__annotations__ = annotations
    return config


@dataclass(frozen=True, kw_only=True)
@_with_method_sections
class TrainConfig:
    """Configuration of a training run."""

    run_dir: str = "runs/run"
    """Output folder: configuration, metrics, logs and checkpoints."""
    epochs: int = 20
    """Total number of epochs."""
    seed: int = 0
    """Random seed; the same command with the same seed gives the same weights."""
    resume: Literal["auto", "never", "must"] = "auto"
    """auto: resume from the latest complete checkpoint in run_dir if there is one; must: fail if
    there is none; never: fail if run_dir already contains a run."""
    resume_networks: list[int | Literal["fresh"]] | None = None
    """Resume with other networks: for network 0, 1, ... of the resumed run, the network of the
    checkpoint that it continues, or fresh to start from new weights. Networks beyond the list start
    from copies of the listed ones."""
    method: str = "graft"
    """How the networks exchange weights: a built-in method such as graft or average
    (docs/variants.md lists all), none, or package.module:name of a user-defined rule."""
    on_divergence: Literal["heal", "abort", "exclude"] = "heal"
    """What to do on NaN or Inf in a network's weights or loss. heal: copy the weights of the
    previous network; abort: stop the run; exclude: no network grafts from it."""
    callbacks: list[str | dict[str, dict[str, Any]]] = field(default_factory=list)
    """package.module:Name of callbacks to add; repeat the option to add several. A mapping
    {package.module:Name: {argument: value}} passes arguments."""
    init_from: str | None = None
    """Initial weights: a run, a checkpoint, or an export (network k starts from its network k),
    one .safetensors or .pt file for all networks, or pretrained weights of the model by name:
    torchvision:DEFAULT or another of its weights, timm:DEFAULT. Ignored when a run resumes."""
    init_strict: bool = True
    """Refuse init_from if a tensor is missing or has another shape; false: such tensors, like those
    of a head for other classes, keep their initialization."""
    members: list[dict[str, Any]] = field(default_factory=list)
    """Options of individual networks: a list with one mapping per network, such as
    [{optim.lr: 0.05}, {data.mixup: 0.2}]. Options of sections optim (except the schedule), data
    (augmentation only), and model (dropout only) may differ."""
    diversity: dict[str, Any] = field(default_factory=dict)
    """Options to draw for each network from the seed, by uniform, log_uniform, or choice: a mapping
    such as {optim.weight_decay: {log_uniform: [1e-5, 1e-3]}, data.mixup: {choice: [0, 0.2]}}.
    members overrides it."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    graft: GraftConfig = field(default_factory=GraftConfig)
    population: PopulationConfig = field(default_factory=PopulationConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)

    def __post_init__(self) -> None:
        require(bool(self.run_dir), "run_dir", self.run_dir, "a folder")
        for reference, kwargs in map(callback_with_arguments, self.callbacks):
            known_or_own("callbacks", reference, ())
            check_kwargs(f"callbacks {reference}", kwargs, {})
        object.__setattr__(self, "members", checked_members(self))
        object.__setattr__(self, "diversity", checked_diversity(self))
        at_least("epochs", self.epochs, 1)
        at_least("optim.schedule_epochs", self.optim.schedule_epochs, self.epochs)
        span = self.optim.schedule_epochs or self.epochs
        if span % self.optim.cycles:
            raise ConfigError(
                f"optim.cycles must divide the {span} epochs of the schedule, got "
                f"{self.optim.cycles}"
            )
        require(0 <= self.seed < 2**63, "seed", self.seed, "in [0, 2^63)")
        known_or_own("method", self.method, (*RULES, "none"))
        if self.resume_networks is not None:
            self._check_resume_networks(self.resume_networks)
        require(self.init_from != "", "init_from", self.init_from, "a path or a name")
        if self.graft.exchange == "files":
            self._check_files()
        elif self.population != PopulationConfig():
            raise ConfigError("the options of section population require graft.exchange files")
        if self.graft.rule and (self.method != "graft" or self.is_self_grafting):
            raise ConfigError("graft.rule requires method graft and graft.source external")
        if self.method in RULES and RULES[self.method].same_start:
            self.check_same_start(f"method {self.method}")
        if self.data.skip_broken and self.runtime.replicas > 1:
            raise ConfigError(
                "data.skip_broken requires runtime.replicas 1: replicas need equal parts of a batch"
            )

    @property
    def is_self_grafting(self) -> bool:
        """Whether rounds take place inside each network, without an exchange."""
        return self.method == "graft" and self.graft.source != "external"

    def _check_resume_networks(self, networks: list[int | Literal["fresh"]]) -> None:
        numbers = [entry for entry in networks if isinstance(entry, int)]
        legal = "a list of network numbers (at least one) and fresh"
        require(
            bool(numbers) and all(number >= 0 for number in numbers),
            "resume_networks",
            networks,
            legal,
        )
        if self.resume == "never":
            raise ConfigError("resume_networks requires resume auto or must")
        if self.graft.qsr_alpha is not None:
            raise ConfigError(
                "resume_networks requires rounds that do not depend on the learning rates: leave "
                "out graft.qsr_alpha"
            )
        if self.graft.exchange == "files":
            raise ConfigError(
                "resume_networks requires networks that run together: with graft.exchange files, "
                "start jobs for more networks, with a larger population.size, or fewer jobs"
            )
        if "fresh" in networks and self.method in RULES and RULES[self.method].same_start:
            raise ConfigError(
                f"method {self.method} keeps all networks equal after a round: none can start from "
                "new weights (resume_networks fresh)"
            )

    def refuse_unused(self) -> None:
        """Raise ConfigError for options of the exchange that have no effect beside others.

        It is called before a run starts, not for every configuration: run directories of earlier
        versions may have such options, and remain readable.
        """
        options, graft = getattr(self, self.method, None), self.graft
        if isinstance(options, RoundSchedule) and options.interval is not None:
            refuse_intervals(graft, f"method {self.method}")
        if graft.level == "filter" and graft.source != "external":
            raise ConfigError("graft.level filter requires graft.source external")
        if graft.level == "filter" and graft.criterion in ("constant", "shuffled"):
            raise ConfigError(
                f"graft.criterion {graft.criterion} is a control for graft.level layer: at level "
                "filter, the batch norm scales decide, whatever the criterion"
            )

    def check_same_start(self, name: str) -> None:
        """Check what a method or rule needs that keeps all networks equal after a round.

        Args: name: of the method or rule, for the error.
        Raises: ConfigError.
        """
        if not self.model.shared_init:
            raise ConfigError(
                f"{name} requires model.shared_init true: all networks start with the same weights"
            )
        if self.on_divergence == "exclude":
            raise ConfigError(
                f"{name} gives all networks the same weights, so none can be excluded: set "
                "on_divergence to heal or abort"
            )

    def _check_files(self) -> None:
        """Check what `graft.exchange files` needs."""
        if self.population.size is None:
            raise ConfigError(
                "graft.exchange files requires population.size, the number of networks"
            )
        if self.optim.ema_decay is not None and self.graft.ema:
            raise ConfigError(
                "graft.exchange files publishes weights, not moving averages: set graft.ema false "
                "to keep optim.ema_decay, whose averages then do not take part in rounds"
            )
        if self.method in RULES and RULES[self.method].synchronous:
            raise ConfigError(
                f"method {self.method} needs all networks at the same step, which jobs that come "
                "and go (graft.exchange files) cannot provide: use graft.exchange all_gather or p2p"
            )
