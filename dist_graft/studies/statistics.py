"""Paired comparisons over seeds: t-tests, Holm's correction, equivalence tests, sample sizes.

The sampling unit is the seed. Networks of one population are not independent.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from scipy import special, stats
from statsmodels.stats.multitest import multipletests

from dist_graft.studies.controls import Arm, Contrast, Run
from dist_graft.studies.records import COUNTED

ALPHA = 0.05
"""Family-wise error rate of a table, level of each equivalence test, and 1 − confidence."""
POWER = 0.8
"""Power at which minimum detectable differences and numbers of seeds are computed."""
UNDER_TRAINED = "under-trained regime"
"""Prefix of the reason why a long training is not a valid control."""
_ROUNDING = 1e-9  # percentage points: differences this close count as equal


@dataclass(frozen=True)
class PairedTest:
    """Two-sided paired t-test of n differences, in the unit of the values."""

    n: int
    mean: float
    """NaN without pairs."""
    deviation: float | None
    """Sample standard deviation (n − 1); None with fewer than two pairs."""
    p: float | None
    """p-value; None if undefined: fewer than two pairs, or no variation."""


def paired_test(differences: Iterable[float]) -> PairedTest:
    """Test paired differences against zero.

    Without variation p is None. Accuracies are counts of images divided by their number, so a few
    differences can be equal by chance.
    """
    values = list(differences)
    spread = mean_and_deviation(values)
    if spread is None:
        return PairedTest(0, math.nan, None, None)
    mean, deviation = spread
    if deviation is None:
        return PairedTest(1, mean, None, None)
    if max(values) - min(values) < _ROUNDING:
        return PairedTest(len(values), mean, 0.0, None)
    p = float(stats.ttest_1samp(values, 0.0).pvalue)
    return PairedTest(len(values), mean, deviation, p)


@dataclass(frozen=True)
class HolmDecision:
    """Result of Holm's procedure for one row of a table."""

    level: float
    """Significance level that the p-value was compared with; for rows after the first that was not
    rejected, the level of that one."""
    adjusted_p: float
    rejected: bool
    """Whether a difference is shown, at a family-wise error rate of ALPHA."""


def holm(p_values: Sequence[float | None]) -> list[HolmDecision]:
    """Apply Holm's step-down procedure (Scandinavian Journal of Statistics 6, 1979).

    The i-th smallest of m p-values, counted from 0, is compared with ALPHA / (m − i), until one is
    larger. A missing p-value counts as 1.

    Returns: one decision per p-value, in the same order.
    """
    if not p_values:
        return []
    p = np.array([1.0 if value is None else value for value in p_values])
    rejected, adjusted, _, _ = multipletests(p, ALPHA, method="holm")
    rank = np.empty(len(p), dtype=int)
    rank[np.argsort(p, kind="stable")] = np.arange(len(p))
    levels = ALPHA / (len(p) - np.minimum(rank, rejected.sum()))
    return [
        HolmDecision(*row)
        for row in zip(levels.tolist(), adjusted.tolist(), rejected.tolist(), strict=True)
    ]


def half_width(n: int, deviation: float, level: float) -> float:
    """Half-width t(n − 1) · s / √n of the mean's t-interval, at confidence 1 − `level`."""
    return float(stats.t.isf(level / 2, n - 1)) * deviation / math.sqrt(n)


def minimum_detectable_difference(
    n: int, deviation: float, level: float, power: float = POWER
) -> float:
    """True difference that n pairs with this deviation show with probability `power`.

    From the noncentral t distribution, two-sided at `level`, ignoring rejections of the wrong sign.
    """
    critical = stats.t.isf(level / 2, n - 1)
    return float(special.nctdtrinc(n - 1, 1 - power, critical)) * deviation / math.sqrt(n)


def equivalence_p(n: int, mean: float, deviation: float, margin: float) -> float:
    """p-value of the hypothesis that the true mean is not within ±margin.

    Two one-sided t-tests (TOST; Schuirmann, Journal of Pharmacokinetics and Biopharmaceutics 15,
    1987). Below 0.05 exactly if the 90% confidence interval of the mean is within ±margin.
    """
    return float(stats.t.sf((margin - abs(mean)) * math.sqrt(n) / deviation, n - 1))


def seeds_needed(
    deviation: float, effect: float, power: float = POWER, alpha: float = ALPHA
) -> int:
    """Number of seeds that show a true difference with probability `power`.

    The first number whose minimum detectable difference is at most `effect`.

    Args:
        deviation: standard deviation of the difference between two runs with the same seed.
        effect: true difference, in the same unit.
        power: probability of showing it.
        alpha: level of the two-sided paired t-test.

    Raises: ValueError unless effect > 0 and deviation is finite and not negative.
    """
    if not (effect > 0 and 0 <= deviation < math.inf):
        raise ValueError(
            f"effect must be above 0 and deviation at least 0, got {effect} and {deviation}"
        )
    if deviation == 0:
        return 2

    # The t-test needs more seeds than the test with a known deviation, and not many more.
    known = (stats.norm.isf(alpha / 2) + stats.norm.ppf(power)) * deviation / effect
    n = max(2, math.ceil(known**2))
    while minimum_detectable_difference(n, deviation, alpha, power) > effect:
        n += 1
    return n


def upper_limit(n: int, deviation: float) -> float:
    """Upper 80% confidence limit of the standard deviation, from that of n normal values."""
    return deviation * math.sqrt((n - 1) / float(stats.chi2.ppf(1 - POWER, n - 1)))


def mean_and_deviation(values: Iterable[float]) -> tuple[float, float | None] | None:
    """Mean and sample standard deviation (n − 1, None for one value); None without values."""
    values = list(values)
    if not values:
        return None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


@dataclass(frozen=True, kw_only=True)
class ArmResult:
    """Runs of an arm."""

    arm: Arm
    rows: pd.DataFrame
    """Rows of the runs that count, indexed by seed: those that succeeded or diverged."""
    failed: Sequence[int]
    """Seeds of the runs that failed."""
    missing: Sequence[int]
    """Seeds of the runs that have not been started."""

    def values(self, column: str) -> pd.Series[float]:
        """Numbers of a column by seed, where they were measured."""
        if column not in self.rows:
            return pd.Series(dtype="float64")
        return self.rows[column].dropna().astype("float64")

    def mean(self, column: str) -> float:
        """Mean over the seeds; NaN if it was not measured."""
        return float(self.values(column).mean())

    @property
    def diverged(self) -> list[int]:
        """Seeds of the runs that diverged."""
        return self.rows.index[self.rows["status"] == "diverged"].tolist()


@dataclass(frozen=True, kw_only=True)
class ContrastResult:
    """Method minus control in percentage points, over the seeds that both have."""

    contrast: Contrast
    differences: pd.Series[float]
    """By seed."""
    planned: int
    """Number of seeds in the plan."""
    test: PairedTest
    decision: HolmDecision
    margin: float
    """Smallest effect of interest."""
    failed: Mapping[str, str] = field(default_factory=dict)
    """Why the method or the control does not count (see `checks`), by the arm's key."""
    weak_control: bool = False
    """Whether it is no evidence to be better than the control."""

    @property
    def not_tested(self) -> str | None:
        """Why the contrast does not count; None if it does.

        A method that is worse than a long training that still improves is worse all the same.
        """
        if self.under_trained and self.decision.rejected and self.test.mean < 0:
            return self.failed.get(self.contrast.method.key)
        control = self.failed.get(self.contrast.control.key)
        if control:
            control = f"{self.contrast.control_name}: {control}"
        return self.failed.get(self.contrast.method.key) or control

    @property
    def under_trained(self) -> bool:
        """Whether the control is a long training that had not converged."""
        return self.failed.get(self.contrast.control.key, "").startswith(UNDER_TRAINED)

    @property
    def half_width(self) -> float | None:
        """Half-width of the unadjusted 95% confidence interval; None without variation."""
        if not self.test.deviation:
            return None
        return half_width(self.test.n, self.test.deviation, ALPHA)

    @property
    def detectable(self) -> float | None:
        """Minimum detectable difference after Holm's correction; None without variation."""
        if not self.test.deviation:
            return None
        return minimum_detectable_difference(self.test.n, self.test.deviation, self.decision.level)

    @property
    def equivalence_p(self) -> float | None:
        """p-value of the equivalence test within ±margin; None without variation."""
        if not self.test.deviation:
            return None
        return equivalence_p(self.test.n, self.test.mean, self.test.deviation, self.margin)


def arm_result(arm: Arm, seeds: Sequence[int], rows: pd.DataFrame) -> ArmResult:
    """Collect the runs of an arm from rows indexed by key."""
    keys = {Run(phase="comparison", arm=arm, seed=seed).key: seed for seed in seeds}
    found = rows.loc[[key for key in keys if key in rows.index]].reset_index().set_index("seed")
    return ArmResult(
        arm=arm,
        rows=found[found["status"].isin(COUNTED)],
        failed=found.index[found["status"] == "failed"].tolist(),
        missing=[seed for key, seed in keys.items() if key not in rows.index],
    )


def contrast_results(
    contrasts: Sequence[Contrast],
    seeds: Sequence[int],
    rows: pd.DataFrame,
    *,
    margin: float,
    failed: Mapping[str, str] | None = None,
    weak: Collection[str] = (),
) -> list[ContrastResult]:
    """Test each contrast, with Holm's correction over all of them.

    Args:
        contrasts: of one table.
        seeds: of the plan.
        rows: indexed by key, as `Results.rows`.
        margin: smallest effect of interest, in percentage points.
        failed: reason by key of each arm that failed its check. Their rows stay in Holm's
            correction, so that a failed check does not make the other rows look better.
        weak: keys of controls that are no evidence for what is better than them.
    """
    differences = [
        (
            arm_result(contrast.method, seeds, rows).values(contrast.outcome)
            - arm_result(contrast.control, seeds, rows).values(contrast.control_outcome)
        )
        .reindex(list(seeds))
        .dropna()
        for contrast in contrasts
    ]
    tests = [paired_test(by_seed) for by_seed in differences]
    decisions = holm([test.p for test in tests])
    return [
        ContrastResult(
            contrast=contrast,
            differences=by_seed,
            planned=len(seeds),
            test=test,
            decision=decision,
            margin=margin,
            failed={
                arm.key: failed[arm.key]
                for arm in (contrast.method, contrast.control)
                if failed and arm.key in failed
            },
            weak_control=contrast.control.key in weak,
        )
        for contrast, by_seed, test, decision in zip(
            contrasts, differences, tests, decisions, strict=True
        )
    ]
