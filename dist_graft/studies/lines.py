"""What the runs add up to: a line for each arm, and one for each contrast."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dist_graft.studies.arms import Arm, Contrast, Design
from dist_graft.studies.execution import Run
from dist_graft.studies.results import Row
from dist_graft.studies.statistics import (
    Decision,
    Paired,
    half_width,
    holm,
    paired,
    smallest_difference,
)

Rows = Mapping[str, Row]


@dataclass(frozen=True, kw_only=True)
class ArmLine:
    """An arm's runs, by seed."""

    arm: Arm
    rows: Mapping[int, Row]
    """Those that ended well."""
    failed: Sequence[int]
    """Seeds of those that failed."""
    missing: Sequence[int]
    """Seeds of those that were not run yet."""

    def values(self, outcome: str) -> dict[int, float]:
        """The outcome by seed, as far as it is known."""
        return {
            seed: row.outcomes[outcome]
            for seed, row in self.rows.items()
            if outcome in row.outcomes
        }


@dataclass(frozen=True, kw_only=True)
class ContrastLine:
    """A method less its control, in percentage points, over the seeds that both have."""

    contrast: Contrast
    differences: Mapping[int, float]
    """By seed."""
    planned: int
    """Number of seeds that the plan has."""
    result: Paired
    decision: Decision
    half_width: float | None
    """Of the interval at the decision's level; None without spread."""
    smallest: float | None
    """The difference that could have been shown; None without spread."""


def arm_line(arm: Arm, seeds: Sequence[int], rows: Rows) -> ArmLine:
    """Gather the runs of an arm."""
    found = {seed: rows.get(_key(arm, seed)) for seed in seeds}
    return ArmLine(
        arm=arm,
        rows={seed: row for seed, row in found.items() if row and row.status == "ok"},
        failed=[seed for seed, row in found.items() if row and row.status == "failed"],
        missing=[seed for seed, row in found.items() if row is None],
    )


def arm_lines(design: Design, seeds: Sequence[int], rows: Rows) -> list[ArmLine]:
    """A line for each arm, in the order of the plan."""
    return [arm_line(arm, seeds, rows) for arm in design.arms]


def contrast_lines(
    contrasts: Sequence[Contrast], seeds: Sequence[int], rows: Rows
) -> list[ContrastLine]:
    """A line for each contrast; Holm's correction runs over all of them together."""
    differences = []
    for contrast in contrasts:
        mine = arm_line(contrast.method, seeds, rows).values(contrast.outcome)
        others = arm_line(contrast.control, seeds, rows).values(contrast.control_outcome)
        differences.append({s: mine[s] - others[s] for s in seeds if s in mine and s in others})
    results = [paired(list(by_seed.values())) for by_seed in differences]
    decisions = holm([result.p for result in results])
    lines = []
    for contrast, by_seed, result, decision in zip(
        contrasts, differences, results, decisions, strict=True
    ):
        spread = (
            (result.n, result.deviation, decision.level)
            if result.p is not None and result.deviation is not None
            else None
        )
        lines.append(
            ContrastLine(
                contrast=contrast,
                differences=by_seed,
                planned=len(seeds),
                result=result,
                decision=decision,
                half_width=half_width(*spread) if spread else None,
                smallest=smallest_difference(*spread) if spread else None,
            )
        )
    return lines


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None] | None:
    """Mean and sample standard deviation (n − 1); None without values or with a single one."""
    if not values:
        return None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def _key(arm: Arm, seed: int) -> str:
    return Run(phase="comparison", arm=arm, seed=seed).key
