"""Who is trained, and who is compared with whom: the plan's methods and the controls of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from dist_graft.config import GraftConfig, TrainConfig
from dist_graft.errors import ConfigError
from dist_graft.studies.overrides import (
    Options,
    key_of,
    merge,
    population_part,
    resolve,
    without_learning_rates,
)
from dist_graft.studies.plan import Plan
from dist_graft.training.learning_rates import learning_rates

NO_EXCHANGE: Options = {"method": "none", "graft": {"every": 0}}
ONE_NETWORK = "one network"
_BLIND: dict[str, Options] = {
    # the coefficient is one half whatever these are: at their defaults, equal runs are run once
    "constant": {
        "criterion": "constant",
        **{name: getattr(GraftConfig(), name) for name in ("amplitude", "sensitivity", "num_bins")},
    },
    "shuffled": {"criterion": "shuffled"},
}
"""Options whose coefficients know nothing of the layers."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A way of training a population, to be repeated with several seeds."""

    name: str
    role: Literal["method", "control"]
    networks: int
    options: Options
    """Of `train`, the recipe's included."""
    group: int
    """Size of the populations that it is looked at with."""

    @property
    def label(self) -> str:
        """Name and size of the population, for tables and plots."""
        if self.name.startswith(ONE_NETWORK):
            return self.name
        return f"{self.name}, {self.networks} network{'s' if self.networks > 1 else ''}"

    @cached_property
    def key(self) -> str:
        """Equal for arms whose runs are the same."""
        return key_of(self.config(0), self.networks)

    @cached_property
    def _config(self) -> TrainConfig:
        return resolve(self.options, self.networks)

    def config(self, seed: int) -> TrainConfig:
        """What a run of this arm is trained with."""
        return replace(self._config, seed=seed)


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """A method and what it is compared with, seed by seed."""

    method: Arm
    control: Arm
    control_name: str
    outcome: str
    """Of the method's runs."""
    control_outcome: str
    """Of the control's runs."""

    @property
    def pair(self) -> tuple[str, str, str, str]:
        """Equal for contrasts between the same numbers."""
        return self.method.key, self.outcome, self.control.key, self.control_outcome


@dataclass(kw_only=True)
class Design:
    """All arms of a comparison, and the contrasts between them."""

    arms: list[Arm] = field(default_factory=list)
    also: dict[str, list[str]] = field(default_factory=dict)
    """Further names of an arm, by its key: two that train the same are run once."""
    main: list[Contrast] = field(default_factory=list)
    """Against the control that the plan names."""
    further: list[Contrast] = field(default_factory=list)
    """Against the other controls."""
    absent: list[str] = field(default_factory=list)
    """Controls that are not there, and why."""

    def add(
        self,
        name: str,
        role: Literal["method", "control"],
        networks: int,
        options: Options,
        group: int,
    ) -> Arm:
        """Add an arm, or return the one that trains the same."""
        arm = Arm(name=name, role=role, networks=networks, options=options, group=group)
        try:
            same = next((other for other in self.arms if other.key == arm.key), None)
        except ConfigError as error:
            raise ConfigError(f"{name} with {networks} networks: {error}") from error
        if same is None:
            self.arms.append(arm)
            return arm
        if name != same.name and name not in self.also.setdefault(same.key, []):
            self.also[same.key].append(name)
        return same

    def compare(self, contrast: Contrast, *, main: bool) -> None:
        """Add a contrast, unless it compares a run with itself or is there already."""
        if contrast.control.key == contrast.method.key and (
            contrast.outcome == contrast.control_outcome
        ):
            return
        if contrast.pair not in {other.pair for other in (*self.main, *self.further)}:
            (self.main if main else self.further).append(contrast)

    def note(self, absence: str) -> None:
        """Say that a control is not there, and why."""
        if absence not in self.absent:
            self.absent.append(absence)


@dataclass(frozen=True, kw_only=True)
class LrTrial:
    """A single network under a recipe, whose best learning rate is asked for."""

    key: str
    options: Options
    candidates: tuple[float, ...]


def lr_trials(plan: Plan, confirmed: Plan) -> list[LrTrial]:
    """The single networks whose best learning rate the controls need, one for each population.

    Args: plan: whose networks' learning rates are the candidates, in all of its regimes.
    confirmed: whose populations need controls.
    """
    candidates = tuple(plan.best_lr.candidates or sorted(set(_members_rates(plan))))
    if plan.best_lr.value is not None:
        candidates = (plan.best_lr.value,)
    trials: dict[str, LrTrial] = {}
    for name in confirmed.methods:
        population = population_part(confirmed.method_options(name))
        options = _single(merge(confirmed.recipe, population))
        key = key_of(resolve(options, 1), 1)
        trials[key] = LrTrial(key=key, options=options, candidates=candidates)
    return list(trials.values())


def design(plan: Plan, best_lr: Mapping[str, float | None]) -> Design:
    """Methods and controls for every size of population.

    Args: best_lr: by key of a trial; None when it could not be found.
    Raises: ConfigError naming the method whose options `train` would refuse.
    """
    found = Design()
    for control in plan.leave_out:
        found.note(f"{control}: left out by the plan")
    for networks in plan.networks:
        methods = [
            found.add(
                name, "method", networks, merge(plan.recipe, plan.method_options(name)), networks
            )
            for name in plan.methods
        ]
        for name, method in zip(plan.methods, methods, strict=True):
            if method.name == name:  # else it trains the same as an earlier one
                _add_controls(found, plan, method, best_lr)
    return found


def _add_controls(
    found: Design, plan: Plan, method: Arm, best_lr: Mapping[str, float | None]
) -> None:
    networks, overrides = method.networks, plan.method_options(method.name)
    population = population_part(overrides)
    suffix = f" (as {method.name})" if population else ""
    at_same_rates = merge(plan.recipe, population, NO_EXCHANGE)
    _add_contrast(found, plan, method, "no_exchange", f"no exchange{suffix}", at_same_rates)

    single = _single(merge(plan.recipe, population))
    lr = best_lr.get(key_of(resolve(single, 1), 1))
    suffix = f" (as {method.name})" if without_learning_rates(population) else ""
    if lr is None:
        found.note(f"best learning rate{suffix}: not known, its trials are missing or failed")
    else:
        at_best = merge(single, {"optim": {"lr": lr}})
        name = f"independent, best lr {lr:.4g}{suffix}"
        _add_contrast(found, plan, method, "best_lr", name, at_best)
        if networks > 1 and "one_network" not in plan.leave_out:
            name = f"{ONE_NETWORK}, {networks} x epochs, best lr {lr:.4g}{suffix}"
            longer = merge(at_best, _longer(at_best, networks))
            _add_contrast(found, plan, method, "one_network", name, longer)

    suffix = f" (as {method.name})" if method.name != "graft" else ""
    for criterion in _blind_criteria(method):
        if criterion not in plan.leave_out:
            blind = merge(plan.recipe, overrides, {"graft": _BLIND[criterion]})
            _add_contrast(found, plan, method, criterion, f"{criterion}{suffix}", blind)


def _blind_criteria(method: Arm) -> tuple[str, ...]:
    """Of the criteria that know nothing of the layers, those that the method can be held against.

    They take the place of coefficients by layer, from another network.
    """
    config = method.config(0)
    by_layer = config.graft.source == "external" and config.graft.level == "layer"
    if config.method != "graft" or method.networks == 1 or not by_layer:
        return ()
    return () if config.graft.criterion in _BLIND else tuple(_BLIND)


def _add_contrast(
    found: Design, plan: Plan, method: Arm, kind: str, name: str, options: Options
) -> None:
    """Compare a method with a control, each pair of runs once."""
    networks = 1 if kind == "one_network" else method.networks
    control = found.add(name, "control", networks, options, method.networks)
    contrast = Contrast(
        method=method,
        control=control,
        control_name=name,
        outcome=plan.primary,
        control_outcome=plan.primary,
    )
    found.compare(contrast, main=kind == plan.against)
    if kind == "best_lr" and networks > 1:
        ensemble = f"ensemble of {networks} {name}"
        found.compare(
            replace(contrast, control_name=ensemble, control_outcome="ensemble"), main=False
        )


def _single(options: Options) -> Options:
    """One network alone, its learning rate left to be set."""
    return merge(without_learning_rates(options), NO_EXCHANGE)


def _longer(options: Options, times: int) -> Options:
    """Train so many times as long, under the same schedule drawn out."""
    config = resolve(options, 1)
    longer: Options = {"epochs": config.epochs * times}
    if config.optim.schedule == "step":
        longer["optim"] = {"step_epochs": config.optim.step_epochs * times}
    return longer


def _members_rates(plan: Plan) -> Iterator[float]:
    """Learning rates of all networks of all methods, in every regime."""
    for regime in plan.in_regimes():
        for name in plan.methods:
            for networks in regime.networks:
                options = merge(regime.recipe, plan.method_options(name))
                try:
                    config = resolve(options, networks)
                except ConfigError as error:
                    raise ConfigError(f"{name} with {networks} networks: {error}") from error
                for rate in learning_rates(config.optim, networks):
                    yield float(f"{rate:.6g}")
