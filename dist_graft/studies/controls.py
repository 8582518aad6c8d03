"""Arms of a comparison: the plan's methods, their controls, and the contrasts between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from dist_graft.config import GraftConfig, TrainConfig
from dist_graft.errors import ConfigError
from dist_graft.run_directory import OPEN_ENDED_SCHEDULES
from dist_graft.studies.plan import BASELINES, Plan
from dist_graft.studies.train_options import (
    NO_EXCHANGE,
    Delivery,
    TrainOptions,
    build_config,
    delivery,
    has_exchange,
    key_of,
    merge,
    single_network,
    without_exchange,
    without_learning_rates,
)

Role = Literal["method", "control"]
Phase = Literal["search", "tuning", "comparison"]

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
_AVERAGES = {"ema": "EMA", "checkpoint_average": "mean of checkpoints"}
"""Baselines that average the weights of one network, and the name of the average."""


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
    explicit_delivery: Delivery | None = None
    """The delivered model, if it is not the one that the rule declares."""
    start_epochs: int = 0
    """Epochs that one network trains before the others start from its weights; 0: all networks
    train from the beginning."""
    teachers: Arm | None = None
    """Population whose networks, with the same seed, are the teachers; trained first."""

    @property
    def label(self) -> str:
        """Name and population size, for tables and plots."""
        if ONE_NETWORK in self.name:
            return self.name
        return f"{self.name}, {self.networks} network{'s' if self.networks > 1 else ''}"

    @cached_property
    def key(self) -> str:
        """Hash of the training; arms with equal keys have equal runs."""
        return self.run_key(0)

    def run_key(self, seed: int) -> str:
        """Hash of everything that determines the results of the run with this seed."""
        stages: dict[str, int | str] = {}
        if self.start_epochs:
            stages["start_epochs"] = self.start_epochs
        if self.teachers:
            stages["teachers"] = self.teachers.run_key(seed)
        return key_of(self.options, self.networks, seed, self.explicit_delivery, **stages)

    @cached_property
    def delivers(self) -> Delivery:
        """The model by which the arm is judged."""
        return self.explicit_delivery or delivery(self._config, self.networks)

    @property
    def tunable(self) -> bool:
        """Whether optim.lr sets the learning rates of its networks."""
        own = [self._config.diversity, *self._config.members]
        return self._config.optim.lrs is None and not any("optim.lr" in names for names in own)

    def at(self, lr: float) -> Arm:
        """Return the arm with this learning rate."""
        return self.adding({"optim": {"lr": lr}})

    @property
    def of_population_size(self) -> Arm:
        """The arm with K networks instead of one, each trained as that one.

        Only for one network in one process without teachers whose delivered model is measured as a
        mean over networks; other arms remain as they are.
        """
        alone = self.networks == 1 and self._config.runtime.replicas == 1 and not self.teachers
        if not alone or self.delivers not in ("network", "ema", "checkpoints"):
            return self
        return replace(self, networks=self.group)

    def adding(self, options: TrainOptions) -> Arm:
        """Return the arm, and its teachers, with further options."""
        teachers = self.teachers.adding(options) if self.teachers else None
        return replace(self, options=merge(self.options, options), teachers=teachers)

    @cached_property
    def _config(self) -> TrainConfig:
        return build_config(self.options, self.networks)

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
        return self.arm.run_key(self.seed)

    @property
    def teachers(self) -> Run | None:
        """The run whose networks are the teachers of this one."""
        arm = self.arm.teachers
        return Run(phase=self.phase, arm=arm, seed=self.seed) if arm else None

    @property
    def split(self) -> Literal["test", "validation"]:
        """Split on which the accuracies are measured."""
        return "test" if self.phase == "comparison" else "validation"

    @property
    def cost(self) -> int:
        """Number of epochs, summed over the networks and the teachers."""
        teachers = self.teachers.cost if self.teachers else 0
        return teachers + self.trained(self.config.epochs)

    def trained(self, epochs: int) -> int:
        """Epochs trained by all of its networks during its first `epochs`."""
        alone = min(epochs, self.arm.start_epochs)
        return alone + self.arm.networks * (epochs - alone)

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

    tuned: Callable[[Arm], Arm | None]
    """Returns an arm with the learning rate that it trains with; None if there is none."""
    arms: list[Arm] = field(default_factory=list)
    aliases: dict[str, list[str]] = field(default_factory=dict)
    """Other names of an arm, by key: arms that train identically are run once."""
    primary: list[Contrast] = field(default_factory=list)
    """Contrasts with the control that the plan names."""
    secondary: list[Contrast] = field(default_factory=list)
    """Contrasts with the other controls."""
    omitted: list[str] = field(default_factory=list)
    """Controls that are not run, each with the reason."""
    without_rate: list[str] = field(default_factory=list)
    """Arms that are not run because no trial of theirs has succeeded so far."""
    lengthened: dict[str, tuple[Arm, int]] = field(default_factory=dict)
    """By the key of a control that trains longer: one network at the recipe's length, with the same
    average if it delivers one, and the ratio of the lengths."""

    def add(self, arm: Arm) -> Arm | None:
        """Add an arm with its learning rate, and return it or an arm that trains identically.

        Returns None if no learning rate is known.
        """
        try:
            tuned = self.tuned(arm)
            same = next((other for other in self.arms if tuned and other.key == tuned.key), None)
        except ConfigError as error:
            raise ConfigError(f"{arm.name} with {arm.networks} networks: {error}") from error
        if tuned is None:
            self.omit(f"{arm.label}: no learning rate, its trials failed or have not finished")
            self.without_rate.append(arm.label)
        elif same is None:
            self.arms.append(tuned)
        elif arm.name != same.name and arm.name not in self.aliases.setdefault(same.key, []):
            self.aliases[same.key].append(arm.name)
        return same or tuned

    def compare(self, contrast: Contrast, *, primary: bool) -> None:
        """Add a contrast, unless it compares a run with itself or exists already.

        One of the other controls may turn out to be the plan's, by another name.
        """
        if contrast.control.key == contrast.method.key and (
            contrast.outcome == contrast.control_outcome
        ):
            return
        known = {other.identity: other for other in (*self.primary, *self.secondary)}
        same = known.get(contrast.identity)
        if same is None:
            (self.primary if primary else self.secondary).append(contrast)
        elif primary and same not in self.primary:
            self.secondary.remove(same)
            self.primary.append(same)

    def outcome_of(self, arm: Arm, primary: str) -> str:
        """The outcome by which an arm is judged: the plan's, or another one in its contrasts."""
        if has_exchange(arm.config(0), arm.networks):
            return primary
        judged = (c for c in (*self.primary, *self.secondary) if c.control.key == arm.key)
        contrast = next(judged, None)
        return contrast.control_outcome if contrast else primary

    def omit(self, reason: str) -> None:
        """Record that a control is not run."""
        if reason not in self.omitted:
            self.omitted.append(reason)


def build_design(plan: Plan, best_lr: Mapping[str, float | None] | None = None) -> Design:
    """Build the arms and contrasts of every population size.

    Args:
        plan: a plan without a search, or with the regime that the search chose.
        best_lr: best learning rate of each arm, by the key of the arm with the first rate of the
            plan; None: all arms with the first rate.

    Raises: ConfigError naming the method whose options ``train`` would reject.
    """

    def tuned(arm: Arm) -> Arm | None:
        if not plan.rates or not arm.tunable:
            return arm
        first = arm.at(plan.rates[0])
        if best_lr is None:
            return first
        lr = best_lr.get(first.key)
        return None if lr is None else arm.at(lr)

    design = Design(tuned=tuned)
    for control in plan.leave_out:
        design.omit(f"{control}: left out by the plan")
    for networks in plan.networks:
        methods = {name: design.add(method_arm(plan, name, networks)) for name in plan.methods}
        for name, method in methods.items():
            if method and method.name == name:  # otherwise an earlier method trains identically
                _add_controls(design, plan, method)
        _compare_with_isolated(design, plan, [arm for arm in methods.values() if arm])
    return design


def method_arm(plan: Plan, name: str, networks: int) -> Arm:
    """The arm of a method, with the learning rate that the plan declares."""
    return Arm(
        name=name,
        role="method",
        networks=networks,
        options=merge(plan.recipe, plan.method_options(name)),
        group=networks,
        explicit_delivery=plan.method_delivery(name),
    )


def independent_arm(plan: Plan, method: Arm) -> Arm:
    """As many independent networks as the method has, with one learning rate."""
    training = without_exchange(plan.method_options(method.name))
    if plan.rates:  # they replace the method's
        training = without_learning_rates(training)
    alone = single_network(plan.recipe)
    options = single_network(merge(plan.recipe, training))
    explicit = _delivery_of_training(method)
    suffix = "" if options == alone and not explicit else f" (as {method.name})"
    config = method.config(0)
    suffix += " (without the members' options)" if config.members or config.diversity else ""
    return replace(_control(f"independent{suffix}", method, options), explicit_delivery=explicit)


def uninformed_arm(plan: Plan, method: Arm, criterion: str) -> Arm | None:
    """The method with coefficients that ignore the layer's information.

    Returns None for methods without coefficients of layers.
    """
    if not _has_layer_coefficients(method):
        return None
    suffix = f" (as {method.name})" if method.name != "graft" else ""
    options = merge(plan.recipe, plan.method_options(method.name))
    control = _control(
        f"{criterion}{suffix}", method, merge(options, {"graft": _UNINFORMED[criterion]})
    )
    return replace(control, explicit_delivery=method.explicit_delivery)


def _delivery_of_training(method: Arm) -> Delivery | None:
    """The averages over a training that the plan sets, which its controls deliver as well."""
    explicit = method.explicit_delivery
    return explicit if explicit in ("ema", "checkpoints") else None


def _control(name: str, method: Arm, options: TrainOptions, networks: int | None = None) -> Arm:
    return Arm(
        name=name,
        role="control",
        networks=networks or method.networks,
        options=options,
        group=method.networks,
    )


def _add_controls(design: Design, plan: Plan, method: Arm) -> None:
    networks = method.networks
    training = without_exchange(plan.method_options(method.name))

    # The same population without exchange
    explicit = _delivery_of_training(method)
    suffix = f" (as {method.name})" if training or explicit else ""
    isolated = _control(f"no exchange{suffix}", method, merge(plan.recipe, training, NO_EXCHANGE))
    isolated = replace(isolated, explicit_delivery=explicit)
    _add_contrast(design, plan, method, "no_exchange", isolated)

    # Independent networks with one learning rate, and one network trained longer
    independent = independent_arm(plan, method)
    short = _add_contrast(design, plan, method, "best_lr", independent)
    if networks > 1 and "one_network" not in plan.leave_out:
        suffix = independent.name.removeprefix("independent")
        name = f"{ONE_NETWORK}, {networks} x epochs{suffix}"
        longer = merge(independent.options, _longer_training(independent.options, networks))
        one = replace(_control(name, method, longer, 1), explicit_delivery=explicit)
        long = _add_contrast(design, plan, method, "one_network", one)
        if long and short:
            design.lengthened[long.key] = short, networks

    # Coefficients that ignore the layer's information
    for criterion in _UNINFORMED:
        uninformed = uninformed_arm(plan, method, criterion)
        if uninformed and criterion not in plan.leave_out:
            _add_contrast(design, plan, method, criterion, uninformed)

    averages: dict[Delivery, Arm] = {}  # of one network at the recipe's length
    for baseline in baseline_arms(plan, method):
        added = _add_contrast(design, plan, method, "baseline", baseline)
        if not added:
            continue
        if short and added.config(0).runtime.replicas > short.config(0).runtime.replicas:
            design.lengthened[added.key] = short, networks  # data-parallel
        if added.delivers in ("ema", "checkpoints"):
            average = averages.setdefault(added.delivers, added)
            if added.config(0).epochs > average.config(0).epochs:
                design.lengthened[added.key] = average, networks
    _omit_lengths(design, plan, networks)


def _compare_with_isolated(design: Design, plan: Plan, methods: Sequence[Arm]) -> None:
    """Compare methods that exchange with those that do not, such as at another learning rate."""
    isolated = [arm for arm in methods if not has_exchange(arm.config(0), arm.networks)]
    for method in methods:
        for control in isolated:
            if method not in isolated and control.delivers == "member":
                contrast = Contrast(
                    method=method,
                    control=control,
                    control_name=control.name,
                    outcome=plan.primary,
                    control_outcome="delivered" if plan.primary == "uniform_soup" else plan.primary,
                )
                design.compare(contrast, primary=False)


def baseline_arms(plan: Plan, method: Arm) -> Iterator[Arm]:
    """Yield the plan's baselines for a population size K.

    - ema: the moving average of the weights of one network, at the recipe's length and K times as
      long.
    - checkpoint_average: the mean of the last checkpoints of one network, likewise. The checkpoints
      of the long run are K times as far apart.
    - data_parallel: one network on K processes, with K times the batch size and K times the epochs:
      as many steps as a member, and as many images as the population.
    - local_sgd: K networks that become their mean every few steps.
    - branches: K networks that start from the weights of one network in the middle of its training,
      and continue its schedule without exchange; their soup.
    - snapshots: one network, K times as long, whose cosine schedule restarts in each cycle; the
      ensemble of its checkpoints at the ends of the cycles (arXiv 1704.00109).
    - distilled: one network whose teachers are a population without exchange.

    With K = 1, only ema, checkpoint_average and local_sgd exist.
    """
    for name, own in plan.baselines.items():
        options = merge(plan.recipe, BASELINES[name], own or {})
        explicit: Delivery | None = options.pop("delivers", None)
        if name in _AVERAGES:
            arms = _averages_of_one_network(name, method, options)
        elif name == "local_sgd":
            arms = [_control("local SGD", method, options)]
        elif method.networks > 1:
            arms = [_BASELINE_ARMS[name](plan, method, options)]
        else:
            arms = []
        for arm in arms:
            yield replace(arm, explicit_delivery=explicit)


def _averages_of_one_network(name: str, method: Arm, options: TrainOptions) -> list[Arm]:
    networks, lengths = method.networks, options.pop("lengths")
    alone = single_network(options)
    variants = {}
    if 1 in lengths or networks == 1:
        variants[_average_name(name, 1)] = alone
    if "K" in lengths and networks > 1:
        variants[_average_name(name, networks)] = merge(alone, _longer_training(alone, networks))
    return [_control(label, method, variant, 1) for label, variant in variants.items()]


def _average_name(baseline: str, factor: int) -> str:
    return f"{_AVERAGES[baseline]} of {ONE_NETWORK}{f', {factor} x epochs' if factor > 1 else ''}"


def _omit_lengths(design: Design, plan: Plan, networks: int) -> None:
    """Record the lengths at which the plan does not average one network."""
    for name in _AVERAGES:
        if name not in plan.baselines:
            continue
        lengths = merge(BASELINES[name], plan.baselines[name] or {})["lengths"]
        for length, factor in ((1, 1), ("K", networks)):
            if networks > 1 and length not in lengths:
                option = f"baselines.{name}.lengths"
                design.omit(f"{_average_name(name, factor)}: left out by the plan ({option})")


def _data_parallel(plan: Plan, method: Arm, options: TrainOptions) -> Arm:
    networks, alone = method.networks, single_network(options)
    parallel = {
        "data": {"batch_size": networks * build_config(alone, 1).data.batch_size},
        "runtime": {"replicas": networks},
    }
    longer = merge(alone, _longer_training(alone, networks), parallel)
    return _control(f"data parallel, {ONE_NETWORK} on {networks} processes", method, longer, 1)


def _branches(plan: Plan, method: Arm, options: TrainOptions) -> Arm:
    share = options.pop("start")
    alone = single_network(options)
    config = build_config(alone, 1)
    epochs, start = config.epochs, round(share * config.epochs)
    if not 0 < start < epochs:
        raise ConfigError(
            f"baselines.branches.start must leave epochs before and after the branch, got "
            f"{share:g} of {epochs} epochs"
        )
    if config.optim.schedule not in OPEN_ENDED_SCHEDULES and config.optim.schedule_epochs is None:
        alone = merge(alone, {"optim": {"schedule_epochs": epochs}})
    name = f"{method.networks} branches of {ONE_NETWORK} after {start} of {epochs} epochs"
    return replace(_control(name, method, alone), start_epochs=start)


def _snapshots(plan: Plan, method: Arm, options: TrainOptions) -> Arm:
    networks = method.networks
    cycles = options.get("optim", {}).get("cycles", networks)
    whole = {"cycles": 1, "schedule_epochs": None}  # the cycles divide the long run
    alone = single_network(merge(options, {"optim": whole}))
    longer = merge(alone, _longer_training(alone, networks))
    epochs = build_config(longer, 1).epochs
    checkpoint = {"keep": cycles, "every": epochs // cycles, "every_minutes": None}
    name = f"snapshot ensemble of {ONE_NETWORK}, {networks} x epochs in {cycles} cycles"
    cyclic = merge(longer, {"optim": {"cycles": cycles}, "checkpoint": checkpoint})
    return _control(name, method, cyclic, 1)


def _distilled(plan: Plan, method: Arm, options: TrainOptions) -> Arm:
    members = _control("no exchange", method, merge(plan.recipe, NO_EXCHANGE))
    name = f"distilled from {method.networks} members into {ONE_NETWORK}"
    return replace(_control(name, method, single_network(options), 1), teachers=members)


_BASELINE_ARMS: Mapping[str, Callable[[Plan, Arm, TrainOptions], Arm]] = {
    "data_parallel": _data_parallel,
    "branches": _branches,
    "snapshots": _snapshots,
    "distilled": _distilled,
}


def _has_layer_coefficients(method: Arm) -> bool:
    """Whether the method grafts from other networks with coefficients informed by each layer."""
    config = method.config(0)
    return (
        config.method == "graft"
        and config.graft.rule is None
        and method.networks > 1
        and config.graft.source == "external"
        and config.graft.level == "layer"
        and config.graft.criterion not in _UNINFORMED
    )


def _add_contrast(design: Design, plan: Plan, method: Arm, kind: str, declared: Arm) -> Arm | None:
    """Add a control and its contrasts; return the arm, or None if it is not run."""
    is_ensemble = declared.explicit_delivery == "snapshots"
    single = kind == "baseline" or declared.networks < method.networks
    if plan.primary == "ensemble" and single and not is_ensemble:
        design.omit(f"{declared.label}: an ensemble is not compared with a single model")
        return None
    control = design.add(declared)
    if control is None:
        return None
    forms_soup = control.delivers == "soup" or has_exchange(control.config(0), control.networks)
    by_delivered = not forms_soup if plan.primary == "uniform_soup" else kind == "baseline"
    contrast = Contrast(
        method=method,
        control=control,
        control_name=declared.name,
        outcome=plan.primary,
        control_outcome="delivered" if by_delivered else plan.primary,
    )
    if is_ensemble:
        contrast = replace(contrast, outcome="ensemble", control_outcome="ensemble")
    design.compare(contrast, primary=kind == plan.against)
    if kind == "best_lr" and method.networks > 1:
        ensembles = replace(
            contrast,
            control_name=f"{declared.name} (both as ensembles)",
            outcome="ensemble",
            control_outcome="ensemble",
        )
        design.compare(ensembles, primary=False)
    return control


def _longer_training(options: TrainOptions, factor: int) -> TrainOptions:
    """Options that train `factor` times as long, with the schedule stretched accordingly."""
    config = build_config(options, 1)
    longer: TrainOptions = {"epochs": config.epochs * factor}
    if config.optim.schedule == "step":
        longer["optim"] = {"step_epochs": config.optim.step_epochs * factor}
    if config.optim.schedule_epochs:
        longer["optim"] = {"schedule_epochs": config.optim.schedule_epochs * factor}
    if config.checkpoint.every:
        longer["checkpoint"] = {"every": config.checkpoint.every * factor}
    return longer
