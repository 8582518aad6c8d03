"""Columns of `measurements` and of the delivered model for the rows of `made_up`."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pandas as pd
from made_up import carry_out

from dist_graft.studies.controls import Run
from dist_graft.studies.plan import Plan
from dist_graft.studies.records import Results
from dist_graft.studies.selection import StudyState
from dist_graft.studies.train_options import has_exchange


def measured(run: Run) -> dict[str, Any]:
    """Made-up measurements of a run."""
    draws, networks = random.Random(f"{run.key} measured"), run.arm.networks
    exchanges = has_exchange(run.config, networks)
    values: dict[str, Any] = {
        "nll": 0.4 + draws.gauss(0, 0.01),
        "calibration_error": 5 + draws.gauss(0, 0.2),
        "images_seen": 10_000 * run.cost,
        "steps": 79 * run.config.epochs,
        "heals": 0,
        "delivers": run.arm.delivers,
    }
    if networks > 1:
        values |= {
            "soup_nll": 0.38,
            "soup_calibration_error": 4.0,
            "ensemble_nll": 0.35,
            "ensemble_calibration_error": 2.0,
            "disagreement": 3 + 6 * (not exchanges) + draws.random(),
            "barrier": 0.02 + 1.5 * (not exchanges),
        }
    if exchanges:
        values["barrier_before"] = 0.9
        epochs = run.config.epochs
        values |= {"rounds": epochs, "bytes_moved": 300_000 * networks * epochs}
    if run.config.method == "graft" and exchanges:
        width = 0.0 if run.config.graft.criterion == "constant" else 0.12
        course = [0.5 + width * (0.5 + draws.random() / 5) for _ in range(run.config.epochs)]
        values |= {
            "coefficient_min": 0.5 - 1.4 * width,
            "coefficient_5": 0.5 - width,
            "coefficient_median": 0.5,
            "coefficient_95": 0.5 + width,
            "coefficient_max": 0.5 + 1.4 * width,
            "coefficient_near_half": 30.0,
            "coefficients_5": " ".join(f"{1 - value:.6g}" for value in course),
            "coefficients_median": " ".join(["0.5"] * len(course)),
            "coefficients_95": " ".join(f"{value:.6g}" for value in course),
        }
    if run.config.method == "papa":
        values["cumulative_pull"] = 0.12
    if run.config.method == "wash":
        values["moves_per_scalar"] = 0.12
    return values


def with_columns(results: Results, runs: list[Run], **columns: Any) -> Results:
    """Add the measurements of runs to their rows, and columns that replace them, in memory."""
    found = pd.DataFrame([measured(run) | columns for run in runs], index=[r.key for r in runs])
    found = found[~found.index.duplicated()].reindex(results.rows.index)
    kept = results.rows.drop(columns=[c for c in found if c in results.rows])
    results.rows = kept.join(found)
    return results


def carry_out_measured(
    plan: Plan, folder: Path, value_of: Any, **columns: Any
) -> tuple[StudyState, Results]:
    """As `made_up.carry_out`, with measurements."""
    state, results = carry_out(plan, folder, value_of)
    return state, with_columns(results, state.comparison_runs, **columns)
