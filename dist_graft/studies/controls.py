"""Arms of a comparison: the plan's methods, their controls, and the contrasts between them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from dist_graft.config import GraftConfig, TrainConfig
from dist_graft.errors import ConfigError
from dist_graft.studies.plan import Plan
from dist_graft.studies.train_options import (
    TrainOptions,
    merge,
    resolve,
    run_key,
    without_exchange,
    without_learning_rates,
)
from dist_graft.training.learning_rates import learning_rates

Role = Literal["method", "control"]
Phase = Literal["search", "best_lr", "comparison"]

NO_EXCHANGE: TrainOptions = {"method": "none", "graft": {"every": 0}}
ONE_NETWORK = "one network"
_UNINFORMED: dict[str, TrainOptions] = {
    # The coefficient is 1/2 for any of these options. With their defaults, equal runs share a key.
    "constant": {
        "criterion": "constant",
        **{name: getattr(GraftConfig(), name) for name in ("amplitude", "sensitivity", "num_bins")},
    },
    "shuffled": {"criterion": "shuffled"},
}
"""Options of `graft` whose coefficients do not depend on the information of the layer."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A way to train a population, repeated with several seeds."""

    name: str
    role: Role
    networks: int
    options: TrainOptions
    """Options of ``train``, including the recipe's."""
    group: int
    """Population size under which tables and plots show the arm."""

    @property
    def label(self) -> str:
        """Name and population size, for tables and plots."""
        if self.name.startswith(ONE_NETWORK):
            return self.name
        return f"{self.name}, {self.networks} network{'s' if self.networks > 1 else ''}"

    @cached_property
    def key(self) -> str:
        """Hash of the training; arms with equal keys have equal runs."""
        return run_key(self.config(0), self.networks)

    @cached_property
    def _config(self) -> TrainConfig:
        return resolve(self.options, self.networks)

    def config(self, seed: int) -> TrainConfig:
        """Configuration of the run with this seed."""
        return replace(self._config, seed=seed)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run of a comparison."""

    phase: Phase
    arm: Arm
    seed: int

    @property
    def config(self) -> TrainConfig:
        """Configuration of the training."""
        return self.arm.config(self.seed)

    @property
    def key(self) -> str:
        """Hash of everything that determines the results."""
        return run_key(self.config, self.arm.networks)

    @property
    def split(self) -> Literal["test", "validation"]:
        """Split on which the accuracies are measured."""
        return "test" if self.phase == "comparison" else "validation"

    @property
    def cost(self) -> int:
        """Number of epochs, summed over the networks."""
        return self.arm.networks * self.config.epochs

    def __str__(self) -> str:
        return f"{self.arm.label}, seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """A method and the control that it is compared with, seed by seed."""

    method: Arm
    control: Arm
    control_name: str
    outcome: str
    """Outcome of the method's runs."""
    control_outcome: str
    """Outcome of the control's runs."""

    @property
    def identity(self) -> tuple[str, str, str, str]:
        """Equal for contrasts between the same numbers."""
        return self.method.key, self.outcome, self.control.key, self.control_outcome


@dataclass(kw_only=True)
class Design:
    """Arms of a comparison and the contrasts between them."""

    arms: list[Arm] = field(default_factory=list)
    aliases: dict[str, list[str]] = field(default_factory=dict)
    """Other names of an arm, by key: arms that train identically are run once."""
    primary: list[Contrast] = field(default_factory=list)
    """Contrasts with the control that the plan names."""
    secondary: list[Contrast] = field(default_factory=list)
    """Contrasts with the other controls."""
    omitted: list[str] = field(default_factory=list)
    """Controls that are not run, each with the reason."""

    def add(
        self, name: str, role: Role, networks: int, options: TrainOptions, *, group: int
    ) -> Arm:
        """Add an arm and return it, or return the arm that trains identically."""
        arm = Arm(name=name, role=role, networks=networks, options=options, group=group)
        try:
            same = next((other for other in self.arms if other.key == arm.key), None)
        except ConfigError as error:
            raise ConfigError(f"{name} with {networks} networks: {error}") from error
        if same is None:
            self.arms.append(arm)
            return arm
        if name != same.name and name not in self.aliases.setdefault(same.key, []):
            self.aliases[same.key].append(name)
        return same

    def compare(self, contrast: Contrast, *, primary: bool) -> None:
        """Add a contrast, unless it compares a run with itself or exists already."""
        if contrast.control.key == contrast.method.key and (
            contrast.outcome == contrast.control_outcome
        ):
            return
        known = {other.identity for other in (*self.primary, *self.secondary)}
        if contrast.identity not in known:
            (self.primary if primary else self.secondary).append(contrast)

    def omit(self, reason: str) -> None:
        """Record that a control is not run."""
        if reason not in self.omitted:
            self.omitted.append(reason)


@dataclass(frozen=True, kw_only=True)
class LrTrial:
    """Search for the best learning rate of a single network under one recipe."""

    key: str
    options: TrainOptions
    candidates: tuple[float, ...]


def lr_trials(plan: Plan, confirmed: Plan) -> list[LrTrial]:
    """Return the learning rate searches that the controls need, one for each way of training.

    Args:
        plan: the learning rates of its networks, in all of its regimes, are the candidates.
        confirmed: the plan whose populations need controls.
    """
    candidates = tuple(plan.best_lr.candidates or sorted(set(_learning_rates(plan))))
    if plan.best_lr.value is not None:
        candidates = (plan.best_lr.value,)
    trials: dict[str, LrTrial] = {}
    for name in confirmed.methods:
        training = without_exchange(confirmed.method_options(name))
        options = _single_network(merge(confirmed.recipe, training))
        key = run_key(resolve(options, 1), 1)
        trials[key] = LrTrial(key=key, options=options, candidates=candidates)
    return list(trials.values())


def build_design(plan: Plan, best_lr: Mapping[str, float | None]) -> Design:
    """Build the arms and contrasts of every population size.

    Args:
        plan: a plan without a search, or with the regime that the search chose.
        best_lr: best learning rate by key of its trial; None: it was not found.

    Raises: ConfigError naming the method whose options ``train`` would reject.
    """
    design = Design()
    for control in plan.leave_out:
        design.omit(f"{control}: left out by the plan")
    for networks in plan.networks:
        methods = {
            name: design.add(
                name,
                "method",
                networks,
                merge(plan.recipe, plan.method_options(name)),
                group=networks,
            )
            for name in plan.methods
        }
        for name, method in methods.items():
            if method.name == name:  # otherwise an earlier method trains identically
                _add_controls(design, plan, method, best_lr)
    return design


def _add_controls(
    design: Design, plan: Plan, method: Arm, best_lr: Mapping[str, float | None]
) -> None:
    networks, options = method.networks, plan.method_options(method.name)
    training = without_exchange(options)

    # The same population without exchange
    suffix = f" (as {method.name})" if training else ""
    isolated = merge(plan.recipe, training, NO_EXCHANGE)
    _add_contrast(design, plan, method, "no_exchange", f"no exchange{suffix}", isolated)

    # Independent networks, and one network trained longer, at the best learning rate
    single = _single_network(merge(plan.recipe, training))
    lr = best_lr.get(run_key(resolve(single, 1), 1))
    suffix = f" (as {method.name})" if without_learning_rates(training) else ""
    if lr is None:
        design.omit(f"best learning rate{suffix}: unknown, its trials are missing or failed")
    else:
        at_best = merge(single, {"optim": {"lr": lr}})
        name = f"independent, best lr {lr:.4g}{suffix}"
        _add_contrast(design, plan, method, "best_lr", name, at_best)
        if networks > 1 and "one_network" not in plan.leave_out:
            name = f"{ONE_NETWORK}, {networks} x epochs, best lr {lr:.4g}{suffix}"
            longer = merge(at_best, _longer_training(at_best, networks))
            _add_contrast(design, plan, method, "one_network", name, longer)

    # Coefficients that ignore the layer's information
    suffix = f" (as {method.name})" if method.name != "graft" else ""
    if _has_layer_coefficients(method):
        for criterion, graft in _UNINFORMED.items():
            if criterion not in plan.leave_out:
                uninformed = merge(plan.recipe, options, {"graft": graft})
                name = f"{criterion}{suffix}"
                _add_contrast(design, plan, method, criterion, name, uninformed)


def _has_layer_coefficients(method: Arm) -> bool:
    """Whether the method grafts from other networks with coefficients informed by each layer."""
    config = method.config(0)
    return (
        config.method == "graft"
        and method.networks > 1
        and config.graft.source == "external"
        and config.graft.level == "layer"
        and config.graft.criterion not in _UNINFORMED
    )


def _add_contrast(
    design: Design, plan: Plan, method: Arm, kind: str, name: str, options: TrainOptions
) -> None:
    networks = 1 if kind == "one_network" else method.networks
    control = design.add(name, "control", networks, options, group=method.networks)
    contrast = Contrast(
        method=method,
        control=control,
        control_name=name,
        outcome=plan.primary,
        control_outcome=plan.primary,
    )
    design.compare(contrast, primary=kind == plan.against)
    if kind == "best_lr" and networks > 1:
        ensemble = f"ensemble of {networks} {name}"
        design.compare(
            replace(contrast, control_name=ensemble, control_outcome="ensemble"), primary=False
        )


def _single_network(options: TrainOptions) -> TrainOptions:
    """Options of a single network, without a learning rate."""
    return merge(without_learning_rates(options), NO_EXCHANGE)


def _longer_training(options: TrainOptions, factor: int) -> TrainOptions:
    """Options that train `factor` times as long, with the schedule stretched accordingly."""
    config = resolve(options, 1)
    longer: TrainOptions = {"epochs": config.epochs * factor}
    if config.optim.schedule == "step":
        longer["optim"] = {"step_epochs": config.optim.step_epochs * factor}
    return longer


def _learning_rates(plan: Plan) -> Iterator[float]:
    """Yield the learning rates of all networks of all methods, in every regime."""
    for regime in plan.with_each_regime():
        for name in plan.methods:
            for networks in regime.networks:
                options = merge(regime.recipe, plan.method_options(name))
                try:
                    config = resolve(options, networks)
                except ConfigError as error:
                    raise ConfigError(f"{name} with {networks} networks: {error}") from error
                for rate in learning_rates(config.optim, networks):
                    yield float(f"{rate:.6g}")
