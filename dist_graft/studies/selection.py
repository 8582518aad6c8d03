"""What is chosen on a validation split, before any test: a learning rate, a regime."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dist_graft.studies.arms import NO_EXCHANGE, Arm, LrTrial
from dist_graft.studies.execution import Run
from dist_graft.studies.overrides import Options, merge, population_part
from dist_graft.studies.plan import Plan
from dist_graft.studies.results import Row
from dist_graft.studies.statistics import Paired, paired

Rows = Mapping[str, Row]


@dataclass(frozen=True, kw_only=True)
class LrCandidate:
    """A learning rate of a single network, and the runs that try it."""

    trial: LrTrial
    lr: float
    runs: tuple[Run, ...]


@dataclass(frozen=True, kw_only=True)
class Regime:
    """A recipe, a size of population and a method, and the runs that try it, pair by pair."""

    recipe: str
    networks: int
    method: str
    runs: tuple[Run, ...]
    control_runs: tuple[Run, ...]

    @property
    def all_runs(self) -> tuple[Run, ...]:
        """The method's and the control's."""
        return self.runs + self.control_runs

    def __str__(self) -> str:
        return f"{self.method}, {self.networks} networks, {self.recipe}"


def lr_candidates(plan: Plan, trials: Sequence[LrTrial]) -> list[LrCandidate]:
    """All learning rates that have to be tried; none where there is but one."""
    found = []
    for trial in trials:
        if len(trial.candidates) < 2:
            continue
        for lr in trial.candidates:
            options = merge(trial.options, {"optim": {"lr": lr}})
            options = _validated(options, plan.best_lr.val_fraction)
            name = f"one network, lr {lr:.4g}"
            arm = Arm(name=name, role="control", networks=1, options=options, group=1)
            runs = tuple(Run(phase="best_lr", arm=arm, seed=seed) for seed in plan.lr_seeds)
            found.append(LrCandidate(trial=trial, lr=lr, runs=runs))
    return found


def best_lrs(
    trials: Sequence[LrTrial], candidates: Sequence[LrCandidate], rows: Rows
) -> dict[str, float | None]:
    """By key of the trial, the learning rate with the best mean validation accuracy.

    A learning rate with a run that failed is out; None when none is left. Of equals the smaller.
    """
    found: dict[str, float | None] = {}
    for trial in trials:
        if len(trial.candidates) == 1:
            found[trial.key] = trial.candidates[0]
            continue
        scores = {
            candidate.lr: score
            for candidate in candidates
            if candidate.trial.key == trial.key
            and (score := mean_outcome(candidate.runs, rows, "largest_lr_member")) is not None
        }
        found[trial.key] = max(sorted(scores), key=scores.__getitem__) if scores else None
    return found


def regimes(plan: Plan) -> list[Regime]:
    """All regimes of the search: each recipe, size of population and method."""
    found = []
    for name in plan.search.recipes:
        here = plan.in_regime(name)
        for networks in here.networks:
            for method in plan.methods:
                overrides = plan.method_options(method)
                arms = (
                    Arm(
                        name=f"{method}, {name}",
                        role="method",
                        networks=networks,
                        group=networks,
                        options=_validated(merge(here.recipe, overrides), plan.search.val_fraction),
                    ),
                    Arm(
                        name=f"no exchange, {name}",
                        role="control",
                        networks=networks,
                        group=networks,
                        options=_validated(
                            merge(here.recipe, population_part(overrides), NO_EXCHANGE),
                            plan.search.val_fraction,
                        ),
                    ),
                )
                runs, control_runs = (
                    tuple(Run(phase="search", arm=arm, seed=seed) for seed in plan.search.seeds)
                    for arm in arms
                )
                found.append(
                    Regime(
                        recipe=name,
                        networks=networks,
                        method=method,
                        runs=runs,
                        control_runs=control_runs,
                    )
                )
    return found


def gain(regime: Regime, rows: Rows, outcome: str) -> Paired:
    """Validation accuracy with exchange less that without, by seed, in percentage points."""
    pairs = [
        (rows[run.key].outcomes[outcome], rows[control.key].outcomes[outcome])
        for run, control in zip(regime.runs, regime.control_runs, strict=True)
        if all(_ended_well(one, rows, outcome) for one in (run, control))
    ]
    return paired([mine - other for mine, other in pairs])


def chosen_regime(plan: Plan, tried: Sequence[Regime], rows: Rows) -> Regime | None:
    """The regime with the largest mean gain over no exchange; those with failed runs are out."""
    gains = {
        str(regime): result.mean
        for regime in tried
        if (result := gain(regime, rows, plan.primary)).n == len(plan.search.seeds)
    }
    complete = [regime for regime in tried if str(regime) in gains]
    return max(complete, key=lambda regime: gains[str(regime)], default=None)


def mean_outcome(runs: Sequence[Run], rows: Rows, outcome: str) -> float | None:
    """Mean over the runs; None when one of them is missing or failed."""
    if not all(_ended_well(run, rows, outcome) for run in runs):
        return None
    return statistics.fmean(rows[run.key].outcomes[outcome] for run in runs)


def _ended_well(run: Run, rows: Rows, outcome: str) -> bool:
    row = rows.get(run.key)
    return row is not None and row.status == "ok" and outcome in row.outcomes


def _validated(options: Options, fraction: float) -> Options:
    """The options with a validation split: the recipe's own, or one of the fraction."""
    if options.get("data", {}).get("val_fraction", 0) > 0:
        return options
    return merge(options, {"data": {"val_fraction": fraction}})
