"""Runs that were never trained: rows as a comparison would write them, with numbers made up."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path

from dist_graft.studies.execution import Run
from dist_graft.studies.outcomes import CurvePoint
from dist_graft.studies.plan import Plan
from dist_graft.studies.results import Results, Row
from dist_graft.studies.state import State, state_of
from dist_graft.training.learning_rates import learning_rates


def row_of(run: Run, value: float, *, status: str = "ok", error: str = "") -> Row:
    """A row whose primary outcome is `value`, and everything else near it."""
    rates = learning_rates(run.config.optim, run.arm.networks)
    draws = random.Random(run.key)
    members = [value - draws.uniform(0, 0.8) for _ in rates[1:]] + [value]
    outcomes = {"largest_lr_member": value, "mean_of_members": sum(members) / len(members)}
    if run.split == "test":
        outcomes |= {
            "ensemble": value + 0.4 * math.log2(len(members)),
            "uniform_soup": value - (0 if run.config.method == "graft" else 70),
            "uniform_soup_as_is": value - (0.1 if run.config.method == "graft" else 4),
        }
    return Row(
        key=run.key,
        phase=run.phase,
        arm=run.arm.name,
        role=run.arm.role,
        networks=run.arm.networks,
        seed=run.seed,
        status=status,
        split=run.split,
        outcomes=outcomes if status == "ok" else {},
        members=members if status == "ok" else (),
        learning_rates=rates,
        filters={
            "filters": 240,
            "invalid_0.1": draws.randint(8, 30),
            "invalid_0.01": draws.randint(2, 9),
        }
        if status == "ok"
        else {},
        wall_seconds=11.0 * run.cost * draws.uniform(0.95, 1.1),
        core_seconds=6.0 * run.cost * draws.uniform(0.97, 1.03),
        epochs=run.config.epochs,
        finished="2026-01-02T03:04:05Z",
        versions="dist_graft 0.1.0 torch 2.14.1",
        commit="0123abcd",
        error=error,
    )


def curve_of(run: Run, value: float) -> list[CurvePoint]:
    """A learning curve that ends near `value`."""
    draws, epochs = random.Random(run.key), run.config.epochs
    return [
        CurvePoint(epoch, shown, shown - 0.3)
        for epoch in range(epochs)
        for shown in [value - 30 * math.exp(-6 * (epoch + 1) / epochs) + draws.gauss(0, 0.3)]
    ]


def carried_out(
    plan: Plan, folder: Path, value_of: Callable[[Run], float]
) -> tuple[State, Results]:
    """The plan with all its runs, each as good as `value_of` says; NaN makes a run fail."""
    results = Results(folder)
    for name in ("search_runs", "lr_runs", "comparison_runs"):
        for run in getattr(state_of(plan, results.rows), name):
            value = value_of(run)
            if math.isnan(value):
                results.add(row_of(run, 0.0, status="failed", error="weights are not finite"))
            else:
                results.add(row_of(run, value), curve_of(run, value))
    return state_of(plan, results.rows), results
