"""Choices made on a validation split, and the runs that a plan still needs."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from dist_graft.errors import ConfigError
from dist_graft.studies.controls import (
    NO_EXCHANGE,
    Arm,
    Design,
    LrTrial,
    Role,
    Run,
    build_design,
    lr_trials,
)
from dist_graft.studies.plan import Plan, read_plan
from dist_graft.studies.records import COLUMNS
from dist_graft.studies.statistics import PairedTest, paired_test
from dist_graft.studies.train_options import TrainOptions, merge, resolve, without_exchange


@dataclass(frozen=True, kw_only=True)
class LrCandidate:
    """A learning rate of a single network and the runs that try it."""

    trial: LrTrial
    lr: float
    runs: Sequence[Run]


@dataclass(frozen=True, kw_only=True)
class Regime:
    """A recipe, population size and method, with the paired runs that try it."""

    recipe: str
    networks: int
    method: str
    runs: Sequence[Run]
    control_runs: Sequence[Run]

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
    candidates: Sequence[LrCandidate]
    best_lr: Mapping[str, float | None]
    """Best learning rate by key of its trial."""
    design: Design | None
    """None until the search has chosen a regime."""

    @property
    def all_runs(self) -> list[Run]:
        """Runs of the searches and of the comparison."""
        return [*self.search_runs, *self.lr_runs, *self.comparison_runs]

    @property
    def search_runs(self) -> list[Run]:
        """Runs of the regime search, seed by seed, the runs of a pair next to each other."""
        return _distinct(
            run
            for number in range(len(self.plan.search.seeds))
            for regime in self.regimes
            for run in (regime.control_runs[number], regime.runs[number])
        )

    @property
    def lr_runs(self) -> list[Run]:
        """Runs of the learning rate search."""
        return _distinct(run for candidate in self.candidates for run in candidate.runs)

    @property
    def comparison_runs(self) -> list[Run]:
        """Runs that are evaluated on the test set, seed by seed, so that pairs finish early."""
        arms = self.design.arms if self.design else []
        return _distinct(
            Run(phase="comparison", arm=arm, seed=seed)
            for seed in self.plan.test_seeds
            for arm in arms
        )


def study_state(plan: Plan, rows: pd.DataFrame | None = None) -> StudyState:
    """Derive choices and runs from a plan and its results.

    Args: rows: indexed by key, as `Results.rows`; None: no results.
    Raises: ConfigError naming the method whose options ``train`` would reject.
    """
    if rows is None:
        rows = pd.DataFrame(columns=list(COLUMNS)).set_index("key")
    regimes, chosen, confirmed = search_regimes(plan), None, plan
    searched = [run for regime in regimes for run in (*regime.runs, *regime.control_runs)]
    if regimes and all(run.key in rows.index for run in searched):
        chosen = best_regime(plan, regimes, rows)
    if chosen:
        confirmed = replace(
            plan.with_regime(chosen.recipe),
            networks=[chosen.networks],
            methods={chosen.method: plan.methods[chosen.method]},
        )
    decided = chosen is not None or not regimes
    trials = lr_trials(plan, confirmed) if decided else []
    candidates = lr_candidates(plan, trials)
    best_lr = best_learning_rates(trials, candidates, rows)
    return StudyState(
        plan=plan,
        confirmed=confirmed,
        regimes=regimes,
        chosen=chosen,
        candidates=candidates,
        best_lr=best_lr,
        design=build_design(confirmed, best_lr) if decided else None,
    )


def load_plan(path: Path) -> Plan:
    """Read a plan and check that all of its runs, in all regimes, can be trained.

    Raises: ConfigError naming the file, the method and the option.
    """
    plan = read_plan(path)
    try:
        for regime in plan.with_each_regime():
            trials = lr_trials(plan, regime)
            if not build_design(
                regime, {trial.key: trial.candidates[0] for trial in trials}
            ).primary:
                raise ConfigError(
                    f"against: no method has the control {plan.against!r}, nothing can be compared"
                )
        state = study_state(plan)
        for run in (*state.search_runs, *state.lr_runs):
            resolve(run.arm.options, run.arm.networks)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return plan


def lr_candidates(plan: Plan, trials: Sequence[LrTrial]) -> list[LrCandidate]:
    """Return the learning rates to try; none for a trial with a single candidate."""
    candidates = []
    for trial in trials:
        if len(trial.candidates) == 1:
            continue
        for lr in trial.candidates:
            options = merge(trial.options, {"optim": {"lr": lr}})
            options = _with_validation(options, plan.best_lr.val_fraction)
            name = f"one network, lr {lr:.4g}"
            arm = Arm(name=name, role="control", networks=1, options=options, group=1)
            runs = [Run(phase="best_lr", arm=arm, seed=seed) for seed in plan.lr_seeds]
            candidates.append(LrCandidate(trial=trial, lr=lr, runs=runs))
    return candidates


def best_learning_rates(
    trials: Sequence[LrTrial], candidates: Sequence[LrCandidate], rows: pd.DataFrame
) -> dict[str, float | None]:
    """Return the learning rate with the best mean validation accuracy, by key of the trial.

    Ties go to the smaller rate. Rates with a failed run are excluded; None if none remains.
    """
    best: dict[str, float | None] = {}
    for trial in trials:
        if len(trial.candidates) == 1:
            best[trial.key] = trial.candidates[0]
            continue
        scores = {
            candidate.lr: score
            for candidate in candidates
            if candidate.trial.key == trial.key
            and (score := mean_outcome(candidate.runs, rows, "largest_lr_member")) is not None
        }
        best[trial.key] = max(sorted(scores), key=scores.__getitem__, default=None)
    return best


def search_regimes(plan: Plan) -> list[Regime]:
    """Return each combination of recipe, population size and method that the plan searches."""

    def runs(name: str, role: Role, networks: int, options: TrainOptions) -> list[Run]:
        options = _with_validation(options, plan.search.val_fraction)
        arm = Arm(name=name, role=role, networks=networks, options=options, group=networks)
        return [Run(phase="search", arm=arm, seed=seed) for seed in plan.search.seeds]

    regimes = []
    for name in plan.search.recipes:
        regime = plan.with_regime(name)
        for networks in regime.networks:
            for method in plan.methods:
                options = plan.method_options(method)
                isolated = merge(regime.recipe, without_exchange(options), NO_EXCHANGE)
                regimes.append(
                    Regime(
                        recipe=name,
                        networks=networks,
                        method=method,
                        runs=runs(
                            f"{method}, {name}", "method", networks, merge(regime.recipe, options)
                        ),
                        control_runs=runs(f"no exchange, {name}", "control", networks, isolated),
                    )
                )
    return regimes


def gain(regime: Regime, rows: pd.DataFrame, outcome: str) -> PairedTest:
    """Test validation accuracy with exchange minus without, by seed, in percentage points."""
    values = _outcomes(regime.runs, rows, outcome) - _outcomes(regime.control_runs, rows, outcome)
    return paired_test(values.dropna())


def best_regime(plan: Plan, regimes: Sequence[Regime], rows: pd.DataFrame) -> Regime | None:
    """Return the regime with the largest mean gain; regimes with failed runs are excluded."""
    gains = {
        str(regime): test.mean
        for regime in regimes
        if (test := gain(regime, rows, plan.primary)).n == len(plan.search.seeds)
    }
    complete = [regime for regime in regimes if str(regime) in gains]
    return max(complete, key=lambda regime: gains[str(regime)], default=None)


def mean_outcome(runs: Sequence[Run], rows: pd.DataFrame, outcome: str) -> float | None:
    """Return the mean over the runs; None if one of them is missing or failed."""
    values = _outcomes(runs, rows, outcome)
    return None if values.isna().any() else statistics.fmean(values)


def _outcomes(runs: Sequence[Run], rows: pd.DataFrame, outcome: str) -> pd.Series[float]:
    """Outcome by seed; NaN for runs that are missing or failed."""
    known = rows.loc[rows["status"] == "ok", outcome].astype(float)
    return known.reindex([run.key for run in runs]).set_axis([run.seed for run in runs])


def _with_validation(options: TrainOptions, fraction: float) -> TrainOptions:
    """Hold out a validation split, unless the options already do."""
    if options.get("data", {}).get("val_fraction", 0) > 0:
        return options
    return merge(options, {"data": {"val_fraction": fraction}})


def _distinct(runs: Iterable[Run]) -> list[Run]:
    """Return the first run of each key, in order."""
    found: dict[str, Run] = {}
    for run in runs:
        found.setdefault(run.key, run)
    return list(found.values())
