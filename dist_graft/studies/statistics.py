"""Differences between runs that share a seed: intervals, Holm's correction, what could be shown.

The unit is the seed: networks of one population are not independent of each other.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import special

ALPHA = 0.05
"""Chance of any false difference in a table."""
POWER = 0.8
"""Chance with which `smallest_difference` would have been shown."""
_ROUNDING = 1e-9  # percentage points: differences this close are equal


@dataclass(frozen=True)
class Paired:
    """Differences of n pairs; the unit is that of the values."""

    n: int
    mean: float
    """NaN without pairs."""
    deviation: float | None
    """Sample standard deviation (n − 1); None with fewer than two pairs."""
    p: float | None
    """Of the two-sided paired t-test; None when it cannot be computed: fewer than two pairs, or no
    spread at all."""


def paired(differences: Sequence[float]) -> Paired:
    """Two-sided paired t-test against zero.

    Equal differences have no spread to measure the mean by, so that p is None; where accuracies are
    counts of a few images, they come about by chance.
    """
    n = len(differences)
    if n == 0:
        return Paired(0, math.nan, None, None)
    mean = statistics.fmean(differences)
    if n == 1:
        return Paired(1, mean, None, None)
    deviation = statistics.stdev(differences)
    if max(differences) - min(differences) < _ROUNDING:
        return Paired(n, mean, 0.0, None)
    t = mean / (deviation / math.sqrt(n))
    return Paired(n, mean, deviation, float(2 * special.stdtr(n - 1, -abs(t))))


@dataclass(frozen=True)
class Decision:
    """What Holm's procedure says of one line of a table."""

    level: float
    """Significance level that the line was held against; for lines that the procedure did not
    reach, the one at which it stopped."""
    adjusted_p: float
    shown: bool
    """Whether the difference is shown, with a chance of at most alpha of any false one."""


def holm(p_values: Sequence[float | None], alpha: float = ALPHA) -> list[Decision]:
    """Holm's step-down procedure (Scandinavian Journal of Statistics 6, 1979).

    The i-th smallest of m p-values, counted from 0, is held against alpha / (m − i), until one is
    larger. A line without a p-value counts as one that is 1.

    Returns: a decision for each value, in the order given. An interval at a line's level excludes
    zero exactly when its difference is shown.
    """
    m = len(p_values)
    filled = [1.0 if p is None else p for p in p_values]
    decisions: dict[int, Decision] = {}
    going, level, adjusted = True, alpha, 0.0
    for place, index in enumerate(sorted(range(m), key=lambda index: filled[index])):
        adjusted = max(adjusted, min(1.0, (m - place) * filled[index]))
        if going:
            level = alpha / (m - place)
            going = filled[index] <= level
        decisions[index] = Decision(level, adjusted, going)
    return [decisions[index] for index in range(m)]


def half_width(n: int, deviation: float, level: float) -> float:
    """Half of the t-interval of the mean, at confidence 1 − level: t(n − 1) · s / √n."""
    return float(-special.stdtrit(n - 1, level / 2)) * deviation / math.sqrt(n)


def smallest_difference(n: int, deviation: float, level: float, power: float = POWER) -> float:
    """The true difference that n pairs with this spread would have shown with chance `power`.

    From the noncentral t distribution, two-sided at `level`; that a difference of the wrong sign is
    shown is left out of account.
    """
    critical = float(-special.stdtrit(n - 1, level / 2))
    return float(special.nctdtrinc(n - 1, 1 - power, critical)) * deviation / math.sqrt(n)
