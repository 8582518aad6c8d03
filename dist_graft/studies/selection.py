"""Choices made on a validation split, and the runs that a plan still needs."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from dist_graft.errors import ConfigError
from dist_graft.studies.controls import (
    Arm,
    Design,
    Phase,
    Run,
    build_design,
    independent_arm,
    method_arm,
    uninformed_arm,
)
from dist_graft.studies.plan import BUILT_IN, PILOT_SEEDS, Plan, read_plan
from dist_graft.studies.records import COLUMNS, COUNTED
from dist_graft.studies.statistics import PairedTest, paired_test
from dist_graft.studies.train_options import has_exchange, merge, without_exchange


@dataclass(frozen=True, kw_only=True)
class Trial:
    """The runs that choose the learning rate of one arm on a validation split."""

    arm: Arm
    """With the first learning rate of the plan."""
    runs: Mapping[float, Sequence[Run]]
    """Runs by learning rate, ascending."""
    scores: Mapping[float, float]
    """Mean accuracy of the delivered model, of the rates whose runs have all finished."""
    finished: bool
    """Whether all runs have ended, and the rates need no extension."""

    @property
    def best(self) -> float | None:
        """Learning rate with the best score; ties go to the smaller one. None without scores."""
        return max(sorted(self.scores), key=self.scores.__getitem__, default=None)

    @property
    def best_runs(self) -> Sequence[Run]:
        """Runs of the best learning rate so far; those of the first one without scores."""
        rate = self.best
        return next(iter(self.runs.values())) if rate is None else self.runs[rate]

    @property
    def at_edge(self) -> bool:
        """Whether the best of several rates is the smallest or largest whose trials succeeded."""
        scored = sorted(self.scores)
        return len(self.runs) > 1 and self.best in (*scored[:1], *scored[-1:])

    @property
    def all_runs(self) -> list[Run]:
        """The runs of all rates."""
        return [run for runs in self.runs.values() for run in runs]


@dataclass(frozen=True, kw_only=True)
class Regime:
    """A recipe, population size and method, with the trials of the method and its references."""

    recipe: str
    networks: int
    method: str
    trial: Trial
    """Of the method."""
    references: Sequence[Trial]
    """Of independent networks and, if the method exchanges, of constant coefficients."""

    @property
    def finished(self) -> bool:
        """Whether all runs have ended."""
        return all(trial.finished for trial in (self.trial, *self.references))

    @property
    def reference(self) -> Trial:
        """The best reference so far."""
        return max(self.references, key=lambda trial: max(trial.scores.values(), default=-1.0))

    def __str__(self) -> str:
        return f"{self.method}, {self.networks} networks, {self.recipe}"


@dataclass(frozen=True, kw_only=True)
class StudyState:
    """Choices made so far, and the runs that the plan needs."""

    plan: Plan
    confirmed: Plan
    """Plan of the runs on the test set; after a search, only the chosen regime."""
    regimes: Sequence[Regime]
    """Regimes of the search."""
    chosen: Regime | None
    """Regime that the search chose; None without a search, or before it has finished."""
    trials: Sequence[Trial]
    """Learning rate trials of each method and control."""
    design: Design | None
    """Arms whose learning rates are chosen; None until the search has chosen a regime and the rate
    of a method is chosen."""

    @property
    def all_runs(self) -> list[Run]:
        """Runs of the searches and of the comparison."""
        return [*self.search_runs, *self.tuning_runs, *self.comparison_runs]

    @property
    def search_runs(self) -> list[Run]:
        """Runs of the regime search, seed by seed."""
        runs = [
            run
            for regime in self.regimes
            for trial in (*regime.references, regime.trial)
            for run in trial.all_runs
        ]
        return _distinct(sorted(runs, key=lambda run: self.plan.search.seeds.index(run.seed)))

    @property
    def tuning_runs(self) -> list[Run]:
        """Runs of the learning rate trials."""
        return self.trial_runs()

    def trial_runs(self, exclude: Collection[tuple[str, int]] = ()) -> list[Run]:
        """Return the runs of the trials, except those of some arms: name and networks of each."""
        return _distinct(
            run
            for trial in self.trials
            if (trial.arm.name, trial.arm.networks) not in exclude
            for run in trial.all_runs
        )

    @property
    def comparison_runs(self) -> list[Run]:
        """Runs that are evaluated on the test set, seed by seed, so that pairs finish early."""
        return self._runs(self.design.arms if self.design else [])

    @property
    def pilot_runs(self) -> list[Run]:
        """The first seeds of the first primary pair."""
        pair = self.design.primary[:1] if self.design else []
        arms = [arm for contrast in pair for arm in (contrast.method, contrast.control)]
        seeds = self.plan.test_seeds[:PILOT_SEEDS]
        return [run for run in self._runs(arms) if run.seed in seeds]

    @property
    def at_edge(self) -> list[str]:
        """Keys of the arms whose best learning rate is the smallest or largest that succeeded."""
        ended = [trial for trial in self.trials if trial.finished and trial.at_edge]
        return [trial.arm.at(trial.best).key for trial in ended if trial.best is not None]

    @property
    def warnings(self) -> list[str]:
        """Notes on the protocol, for the report."""
        plan, texts = self.confirmed, []
        if len(plan.rates) < 2:
            source = "as the plan sets them"
            if plan.rates:
                source = f"{plan.rates[0]:.4g} in all arms"
                own = [
                    arm.label
                    for arm in (self.design.arms if self.design else [])
                    if not arm.tunable
                ]
                source += f", except those with their own ({'; '.join(own)})" if own else ""
            texts.append(f"Learning rates were not tuned: {source}.")
        for trial in self.trials:
            name = trial.arm.label
            if trial.finished and trial.at_edge:
                texts.append(
                    f"The best learning rate of {name}, {trial.best:.4g}, is at the edge of the "
                    f"rates whose trials succeeded ({_join(sorted(trial.scores))})."
                )
            failed = sorted(set(trial.runs) - set(trial.scores))
            if trial.finished and failed:
                texts.append(f"Trials of {name} failed at learning rate {_join(failed)}.")
        if self.design and len(plan.rates) > 1:
            texts += [
                f"{arm.label} was not tuned: optim.lrs, members, or diversity set its rates."
                for arm in self.design.arms
                if not arm.tunable
            ]
        arms = self.design.arms if self.design else []
        if "one_network" in plan.leave_out or plan.primary == "ensemble":
            texts.append(
                "There is no control that trains longer, so it is not known whether the regime is "
                "under-trained."
            )
        samples = sorted({n for arm in arms if (n := arm.config(0).data.test_samples)})
        if samples:
            texts.append(f"Only the first {_join(samples)} test images are used.")
        return texts

    def _runs(self, arms: Sequence[Arm]) -> list[Run]:
        return _distinct(
            Run(phase="comparison", arm=arm, seed=seed)
            for seed in self.plan.test_seeds
            for arm in arms
        )


def study_state(plan: Plan, rows: pd.DataFrame | None = None, *, pilot: bool = False) -> StudyState:
    """Derive choices and runs from a plan and its results.

    Args:
        plan: as `read_plan` returns it.
        rows: indexed by key, as `Results.rows`; None: no results.
        pilot: whether only the first primary pair is needed.

    Raises: ConfigError naming the method whose options ``train`` would reject, or a seed that is
    used on the validation and on the test split.
    """
    if rows is None:
        rows = pd.DataFrame(columns=list(COLUMNS)).set_index("key")
    regimes, chosen, confirmed = search_regimes(plan, rows), None, plan
    if regimes and all(regime.finished for regime in regimes):
        chosen = best_regime(plan, regimes, rows)
    if chosen:
        confirmed = replace(
            plan.with_regime(chosen.recipe),
            networks=[chosen.networks],
            methods={chosen.method: plan.methods[chosen.method]},
        )
    trials: list[Trial] = []
    design: Design | None = None
    if chosen is not None or not regimes:
        declared = build_design(confirmed)
        arms = declared.arms
        if pilot:
            arms = [arm for pair in declared.primary[:1] for arm in (pair.method, pair.control)]
        if len(confirmed.rates) > 1:
            trials = [
                run_trial(confirmed, arm, "tuning", plan.tuning_seeds, rows)
                for arm in arms
                if arm.tunable
            ]
        best = {t.arm.key: t.best for t in trials if t.finished and t.best is not None}
        if best or not trials:
            design = build_design(confirmed, best if trials else None)
            design = design if design.arms else None
    state = StudyState(
        plan=plan,
        confirmed=confirmed,
        regimes=regimes,
        chosen=chosen,
        trials=trials,
        design=design,
    )
    for run in state.all_runs:
        measured = str(rows["split"].get(run.key, run.split))
        if measured != run.split:
            raise ConfigError(
                f"seed {run.seed} is needed on the {run.split} split, but the same training of "
                f"{run.arm.label} has a result on the {measured} split: choose other seeds, or "
                "another directory with --out"
            )
    return state


def load_plan(path: Path) -> Plan:
    """Read a plan and check that all of its runs, in all regimes, can be trained.

    Raises: ConfigError naming the file, the method and the option.
    """
    plan = read_plan(path)
    try:
        for regime in plan.with_each_regime():
            if not build_design(regime).primary:
                raise ConfigError(
                    f"against: no method has the control {plan.against!r}, nothing can be compared"
                )
        for run in study_state(plan).all_runs:
            _ = run.config
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return plan


def run_trial(
    plan: Plan, arm: Arm, phase: Phase, seeds: Sequence[int], rows: pd.DataFrame
) -> Trial:
    """Return the runs that try the plan's learning rates for an arm, and their scores.

    While the best rate is the smallest or the largest, the next one in the same ratio is added, at
    most `tuning.max_extensions` times. An arm that is not tuned has a single rate, its own. An arm
    of one network tries each rate with K networks, so that chance has as little influence on its
    choice as on that of a population.
    """
    fraction = plan.search.val_fraction if phase == "search" else plan.tuning.val_fraction
    rates = plan.rates if plan.rates and arm.tunable else [arm.config(0).optim.lr]
    extensions = plan.tuning.max_extensions if len(rates) > 1 else 0
    while True:
        runs = {}
        for rate in rates:
            tried = arm.at(rate) if plan.rates and arm.tunable else arm
            name = f"{arm.name}, lr {rate:.4g}" if len(rates) > 1 else arm.name
            own = tried.config(0).data.val_fraction
            tried = replace(tried, name=name).adding({"data": {"val_fraction": own or fraction}})
            tried = tried.of_population_size
            runs[rate] = [Run(phase=phase, arm=tried, seed=seed) for seed in seeds]
        scores = {
            rate: score
            for rate in rates
            if (score := mean_outcome(runs[rate], rows, "delivered")) is not None
        }
        ended = all(run.key in rows.index for tried in runs.values() for run in tried)
        trial = Trial(arm=arm, runs=runs, scores=scores, finished=ended)
        if not ended or trial.best not in (rates[0], rates[-1]) or extensions == 0:
            return trial
        extensions -= 1
        rates = _extended(rates, downward=trial.best == rates[0])


def _extended(rates: Sequence[float], *, downward: bool) -> list[float]:
    """Add a rate below or above, in the ratio of the two rates that are closest to it."""
    if downward:
        return [float(f"{rates[0] * rates[0] / rates[1]:.6g}"), *rates]
    return [*rates, float(f"{rates[-1] * rates[-1] / rates[-2]:.6g}")]


def search_regimes(plan: Plan, rows: pd.DataFrame) -> list[Regime]:
    """Return each combination of recipe, population size and method that the plan searches."""
    regimes = []
    for name in plan.search.recipes:
        regime = plan.with_regime(name)
        for networks in regime.networks:
            for method_name in plan.methods:
                method = method_arm(regime, method_name, networks)
                arms = [
                    method,
                    independent_arm(regime, method),
                    _constant_arm(regime, method),
                ]
                trial, *references = (
                    run_trial(
                        regime,
                        replace(arm, name=f"{arm.name}, {name}"),
                        "search",
                        plan.search.seeds,
                        rows,
                    )
                    for arm in arms
                    if arm is not None
                )
                regimes.append(
                    Regime(
                        recipe=name,
                        networks=networks,
                        method=method_name,
                        trial=trial,
                        references=references,
                    )
                )
    return regimes


def _constant_arm(plan: Plan, method: Arm) -> Arm | None:
    """Grafting with constant coefficients, the second reference of a method that exchanges.

    A method without coefficients of layers is compared with the built-in method `constant`, in the
    training of the method. Returns None if that is the method itself, or without an exchange.
    """
    if method.networks < 2 or not has_exchange(method.config(0), method.networks):
        return None
    arm = uninformed_arm(plan, method, "constant")
    if arm is None:
        training = without_exchange(merge(plan.recipe, plan.method_options(method.name)))
        arm = Arm(
            name=f"constant (as {method.name})",
            role="control",
            networks=method.networks,
            options=merge(training, BUILT_IN["constant"]),
            group=method.networks,
            explicit_delivery=method.explicit_delivery,
        )
    return None if arm.key == method.key else arm


def gain(regime: Regime, rows: pd.DataFrame, outcome: str) -> PairedTest:
    """Test the method's validation accuracy minus the best reference's, by seed, in points.

    Method and references are each at their best learning rate. The references are independent
    networks and constant coefficients.
    """
    method, reference = (
        _outcomes(trial.best_runs, rows, outcome) for trial in (regime.trial, regime.reference)
    )
    return paired_test((method - reference).dropna())


def best_regime(plan: Plan, regimes: Sequence[Regime], rows: pd.DataFrame) -> Regime | None:
    """Return the regime with the largest mean gain.

    A regime is excluded if its method, or one of its references, has no score: the method may be
    better than the others only because the best reference failed.
    """
    gains = {
        str(regime): test.mean
        for regime in regimes
        if all(trial.scores for trial in regime.references)
        and (test := gain(regime, rows, plan.primary)).n == len(plan.search.seeds)
    }
    complete = [regime for regime in regimes if str(regime) in gains]
    return max(complete, key=lambda regime: gains[str(regime)], default=None)


def mean_outcome(runs: Sequence[Run], rows: pd.DataFrame, outcome: str) -> float | None:
    """Return the mean over the runs; None if one of them is missing or failed."""
    values = _outcomes(runs, rows, outcome)
    return None if values.isna().any() else statistics.fmean(values)


def _outcomes(runs: Sequence[Run], rows: pd.DataFrame, outcome: str) -> pd.Series[float]:
    """Outcome by seed; NaN for runs that are missing or failed."""
    known = rows.loc[rows["status"].isin(COUNTED), outcome].astype(float)
    return known.reindex([run.key for run in runs]).set_axis([run.seed for run in runs])


def _join(numbers: Iterable[float]) -> str:
    return ", ".join(f"{number:.6g}" for number in numbers)


def _distinct(runs: Iterable[Run]) -> list[Run]:
    """Return the first run of each key, in order."""
    found: dict[str, Run] = {}
    for run in runs:
        found.setdefault(run.key, run)
    return list(found.values())
