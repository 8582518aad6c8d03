"""Where a comparison stands: what was chosen, what is to be run, as a function of plan and rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dist_graft.errors import ConfigError
from dist_graft.studies.arms import Design, LrTrial, design, lr_trials
from dist_graft.studies.execution import Run
from dist_graft.studies.overrides import resolve
from dist_graft.studies.plan import Plan, read_plan
from dist_graft.studies.results import Row
from dist_graft.studies.selection import (
    LrCandidate,
    Regime,
    best_lrs,
    chosen_regime,
    lr_candidates,
    regimes,
)


@dataclass(frozen=True, kw_only=True)
class State:
    """Everything that follows from the plan and the runs that there are."""

    plan: Plan
    confirmed: Plan
    """The plan of the runs on the test set: after a search, that of the chosen regime alone."""
    regimes: Sequence[Regime]
    """Those that are searched, all of them."""
    chosen: Regime | None
    """What the search found; None without a search, or before its end."""
    trials: Sequence[LrTrial]
    candidates: Sequence[LrCandidate]
    best_lr: Mapping[str, float | None]
    """By key of a trial."""
    design: Design | None
    """None before the search has found a regime."""

    @property
    def all_runs(self) -> list[Run]:
        """Of the searches and of the comparison."""
        return [*self.search_runs, *self.lr_runs, *self.comparison_runs]

    @property
    def search_runs(self) -> list[Run]:
        """Of the search for a regime, pairs side by side, seed by seed."""
        return _distinct(
            run
            for number in range(len(self.plan.search.seeds))
            for regime in self.regimes
            for run in (regime.control_runs[number], regime.runs[number])
        )

    @property
    def lr_runs(self) -> list[Run]:
        """Of the search for the best learning rate."""
        return _distinct(run for candidate in self.candidates for run in candidate.runs)

    @property
    def comparison_runs(self) -> list[Run]:
        """Whose test accuracy is read: seed by seed, so that pairs are complete early."""
        arms = self.design.arms if self.design else []
        return _distinct(
            Run(phase="comparison", arm=arm, seed=seed)
            for seed in self.plan.test_seeds
            for arm in arms
        )


def state_of(plan: Plan, rows: Mapping[str, Row]) -> State:
    """What the plan and the rows amount to.

    Raises: ConfigError naming the method whose options `train` would refuse.
    """
    tried, chosen, confirmed = regimes(plan), None, plan
    if tried and all(run.key in rows for regime in tried for run in regime.all_runs):
        chosen = chosen_regime(plan, tried, rows)
    if chosen:
        confirmed = replace(
            plan.in_regime(chosen.recipe),
            networks=[chosen.networks],
            methods={chosen.method: plan.methods[chosen.method]},
        )
    settled = chosen is not None or not tried
    trials = lr_trials(plan, confirmed) if settled else []
    candidates = lr_candidates(plan, trials)
    rates = best_lrs(trials, candidates, rows)
    return State(
        plan=plan,
        confirmed=confirmed,
        regimes=tried,
        chosen=chosen,
        trials=trials,
        candidates=candidates,
        best_lr=rates,
        design=design(confirmed, rates) if settled else None,
    )


def load_plan(path: Path) -> Plan:
    """Read a plan and refuse what could not be trained, before anything runs.

    Raises: ConfigError naming the file, the method and the option.
    """
    plan = read_plan(path)
    try:
        check(plan)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return plan


def check(plan: Plan) -> None:
    """Refuse what could not be trained, in any regime, before anything runs.

    Raises: ConfigError naming the method and the option.
    """
    for regime in plan.in_regimes():
        trials = lr_trials(plan, regime)
        found = design(regime, {trial.key: trial.candidates[0] for trial in trials})
        if not found.main:
            raise ConfigError(
                f"no method has a control of the kind {plan.against!r}: nothing would be compared"
            )
    state = state_of(plan, {})
    for run in (*state.search_runs, *state.lr_runs):
        resolve(run.arm.options, run.arm.networks)


def _distinct(runs: Iterable[Run]) -> list[Run]:
    """Each key once, in order."""
    found: dict[str, Run] = {}
    for run in runs:
        found.setdefault(run.key, run)
    return list(found.values())
