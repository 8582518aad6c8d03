"""Results of runs that were never trained, with made-up numbers."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from dist_graft.studies.controls import Run
from dist_graft.studies.execution import Row
from dist_graft.studies.plan import Plan, parse_plan
from dist_graft.studies.records import Results
from dist_graft.studies.selection import StudyState, study_state
from dist_graft.training.learning_rates import learning_rates


def make_plan(**changes: Any) -> Plan:
    """A plan of one method, two networks and two seeds without tuning, with changes."""
    content = {"name": "p", "methods": ["graft"], "networks": [2], "seeds": [0, 1]}
    return parse_plan(content | {"tuning": "none"} | changes)


def made_up_row(run: Run, value: float, *, error: str = "") -> Row:
    """Row of a run whose member with the largest learning rate reaches `value`; others are near.

    With an error, the row of a failed run.
    """
    rates = learning_rates(run.config.optim, run.arm.networks)
    draws = random.Random(run.key)
    members = [value - draws.uniform(0, 0.8) for _ in rates[1:]] + [value]
    outcomes = {"delivered": value, "largest_lr_member": value}
    outcomes["mean_of_members"] = sum(members) / len(members)
    if run.split == "test":
        outcomes |= {
            "ensemble": value + 0.4 * math.log2(len(members)),
            "uniform_soup": value - (0 if run.config.method == "graft" else 70),
            "uniform_soup_as_is": value - (0.1 if run.config.method == "graft" else 4),
        }
    filters = {
        "filters": 240,
        "invalid_0.1": draws.randint(8, 30),
        "invalid_0.01": draws.randint(2, 9),
    }
    measured = {"members": members} | outcomes | filters
    return {
        "key": run.key,
        "phase": run.phase,
        "arm": run.arm.name,
        "role": run.arm.role,
        "networks": run.arm.networks,
        "seed": run.seed,
        "status": "failed" if error else "ok",
        "split": run.split,
        "delivers": run.arm.delivers,
        "learning_rates": rates,
        "wall_seconds": 11.0 * run.cost * draws.uniform(0.95, 1.1),
        "core_seconds": 6.0 * run.cost * draws.uniform(0.97, 1.03),
        "epochs": run.config.epochs,
        "finished": "2026-01-02T03:04:05Z",
        "versions": "dist_graft 0.1.0 torch 2.14.1",
        "commit": "0123abcd",
        "error": error,
        **({} if error else measured),
    }


def made_up_curve(run: Run, value: float) -> pd.DataFrame:
    """Learning curve that ends near `value`."""
    draws, epochs = random.Random(run.key), run.config.epochs
    accuracy = [
        value - 30 * math.exp(-6 * (epoch + 1) / epochs) + draws.gauss(0, 0.3)
        for epoch in range(epochs)
    ]
    curve = pd.DataFrame({"epoch": range(epochs), "largest_lr_member": accuracy})
    return curve.assign(mean_of_members=curve["largest_lr_member"] - 0.3)


def carry_out(
    plan: Plan, folder: Path, value_of: Callable[[Run], float]
) -> tuple[StudyState, Results]:
    """Record a result for every run of the plan, `value_of(run)`; NaN means that it failed."""
    results = Results(folder)
    for phase in ("search_runs", "tuning_runs", "comparison_runs"):
        while runs := [
            run
            for run in getattr(study_state(plan, results.rows), phase)
            if run.key not in results.rows.index
        ]:
            for run in runs:
                value = value_of(run)
                if math.isnan(value):
                    results.add(made_up_row(run, value, error="weights are not finite"))
                else:
                    results.add(made_up_row(run, value), made_up_curve(run, value))
    return study_state(plan, results.rows), results
