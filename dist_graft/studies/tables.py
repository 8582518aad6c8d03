"""The report's tables of arms and contrasts."""

from __future__ import annotations

from collections.abc import Sequence

from dist_graft.studies.lines import ArmLine, ContrastLine, mean_and_deviation
from dist_graft.studies.render import Table
from dist_graft.studies.verdict import enough_digits, signed, word


def contrast_table(lines: Sequence[ContrastLine]) -> Table:
    """Differences, their corrected intervals and p-values, and what they show."""
    rows = []
    for line in lines:
        digits = 2 if line.half_width is None else enough_digits(line.half_width)
        mean = signed(line.result.mean, digits) if line.result.n else "–"
        rows.append(
            (
                line.contrast.method.label,
                line.contrast.control_name,
                mean if line.half_width is None else f"{mean} ± {line.half_width:.{digits}f}",
                str(line.result.n),
                _p_text(line),
                "–" if line.smallest is None else f"{line.smallest:.{digits}f}",
                word(line),
            )
        )
    header = ("method", "control", "difference", "n", "p (Holm)", "could have shown", "in words")
    return Table(header, rows)


def _p_text(line: ContrastLine) -> str:
    if line.result.p is None:
        return "–"
    p = line.decision.adjusted_p
    return f"{p:.3f}" if p >= 0.001 else "<0.001"


def arm_table(lines: Sequence[ArmLine], outcome: str) -> Table:
    """Mean, deviation and each seed of one outcome."""
    rows = []
    for line in lines:
        values = line.values(outcome)
        rows.append(
            (
                line.arm.label,
                line.arm.role,
                spread_text(list(values.values())),
                str(len(values)),
                " ".join(f"{value:.2f}" for value in values.values()),
            )
        )
    return Table(("trained", "as", "mean ± std", "n", "each seed"), rows)


def spread_text(values: Sequence[float], digits: int = 2) -> str:
    """Mean ± standard deviation; the mean alone with one value."""
    told = mean_and_deviation(values)
    if told is None:
        return "–"
    mean, deviation = told
    return f"{mean:.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")
