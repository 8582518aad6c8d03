"""Verdicts of a report as words and sentences, and its numbers as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import pandas as pd

from dist_graft.studies.statistics import (
    ALPHA,
    UNDER_TRAINED,
    ContrastResult,
    mean_and_deviation,
)

Verdict = Literal["not tested", "no conclusion", "no difference shown", "better", "worse"]

_IN_SHORT_TRAINING = f"; {UNDER_TRAINED}, so longer training alone may gain as much"


def verdict(result: ContrastResult) -> Verdict:
    """Return what a contrast shows, for a table cell."""
    if result.not_tested:
        return "not tested"
    if result.test.n < 2:
        return "no conclusion"
    if not result.decision.rejected:
        return "no difference shown"
    return "better" if result.test.mean > 0 else "worse"


def qualified_verdict(result: ContrastResult) -> str:
    """Return the verdict, with a remark if the control is weak, unless the method is worse."""
    word = verdict(result)
    return f"{word} (weak control)" if word != "worse" and result.weak_control else word


def conclusion(result: ContrastResult, *, under_trained: bool = False) -> str:
    """Return what a contrast shows, as a sentence; `under_trained` as its population size is."""
    names = f"{result.contrast.method.label}, compared with {result.contrast.control_name}"
    remark = _IN_SHORT_TRAINING if under_trained and verdict(result) == "better" else ""
    return f"{names}: {findings(result)}{remark}."


def under_trained_sizes(results: Iterable[ContrastResult]) -> set[int]:
    """Population sizes of the plan whose long control had not converged."""
    return {result.contrast.method.group for result in results if result.under_trained}


def findings(result: ContrastResult) -> str:
    """Return the verdict with the numbers that it is based on."""
    if result.not_tested:
        reason = f"{qualified_verdict(result)}: {result.not_tested}"
        return f"{reason}; difference: {_difference(result)}"
    word = verdict(result)
    text = f"{qualified_verdict(result)}, {_difference(result)}"
    if word == "worse" and result.under_trained:
        text += f" ({UNDER_TRAINED})"
    if result.half_width is None:
        return text
    if word in ("better", "worse"):
        return f"{text}{_small(result)}"
    if word != "no difference shown":
        return text
    if is_equivalent(result):
        return f"{text}; equivalent within ±{result.margin:g} points"
    digits = digits_for(result.half_width)
    return f"{text}; the minimum detectable difference is {result.detectable:.{digits}f}"


def _difference(result: ContrastResult) -> str:
    """Mean difference, its interval, and the number of seeds."""
    test, width = result.test, result.half_width
    if test.n == 0:
        return "no seed has both runs"
    seeds = f"{test.n} seed{'s' if result.planned > 1 else ''}"
    if test.n < result.planned:
        seeds = f"{test.n} of {result.planned} seeds"
    if test.n == 1:
        return f"{format_signed(test.mean)} from {seeds}"
    if width is None:
        mean = format_signed(test.mean)
        undefined = "" if mean == "0.00" else "; without variation the t-test is undefined"
        return f"{mean} for each of {seeds}{undefined}"
    return f"{format_interval(result)} percentage points over {seeds}"


def is_equivalent(result: ContrastResult) -> bool:
    """Whether the true difference is shown to be smaller than the smallest effect of interest."""
    return result.equivalence_p is not None and result.equivalence_p < ALPHA


def _small(result: ContrastResult) -> str:
    """Remark on a difference that is shown, but too small to matter."""
    if not is_equivalent(result):
        return ""
    return (
        f", smaller than the smallest effect of interest (equivalent within ±{result.margin:g} "
        "points)"
    )


def overall_conclusions(
    primary: Sequence[ContrastResult], secondary: Sequence[ContrastResult] = ()
) -> list[str]:
    """Summarize the comparison in at least one sentence, the least favorable first.

    That is: what is worse than a control, what was not tested, what is better than the plan's
    control, and what is not shown to differ from it.
    """
    compared = [result for result in primary if result.test.n > 1]
    if not compared:
        return ["No conclusion yet: no method shares two seeds with its control."]
    tested = [result for result in compared if not result.not_tested]
    unclear = [r for r in tested if verdict(r) == "no difference shown"]
    sentences = [
        *_worse(primary, secondary),
        *_not_tested([*primary, *secondary]),
        *_better(tested, secondary),
    ]
    if unclear:
        names = "; ".join(
            f"{r.contrast.method.label} and {r.contrast.control_name}"
            f"{' (weak control)' if r.weak_control else ''}"
            for r in unclear
        )
        sentences.append(f"No difference is shown between {names}.")
    return sentences


def _worse(primary: Sequence[ContrastResult], secondary: Sequence[ContrastResult]) -> list[str]:
    """One sentence for each method that is worse than a control."""
    sentences = []
    methods = dict.fromkeys(r.contrast.method.label for r in (*primary, *secondary))
    for method in methods:
        results = [r for r in (*primary, *secondary) if r.contrast.method.label == method]
        worse = [r for r in results if verdict(r) == "worse"]
        if not worse:
            continue
        names = "; ".join(
            f"{r.contrast.control_name} ({format_interval(r)}"
            f"{f', {UNDER_TRAINED}' if r.under_trained else ''}{_small(r)})"
            for r in worse
        )
        every = "every control: " if len(worse) == len(results) > 1 else ""
        sentences.append(f"{method} is worse than {every}{names}.")
    return sentences


def _not_tested(results: Sequence[ContrastResult]) -> list[str]:
    """One sentence for each arm that failed its check."""
    sentences: dict[str, str] = {}
    for result in results:
        method, control = result.contrast.method, result.contrast.control
        if reason := result.failed.get(method.key):
            sentences[method.key] = f"{method.label} was not tested: {reason}."
        if (reason := result.failed.get(control.key)) and control.key not in sentences:
            means = [
                r.test.mean for r in results if r.contrast.control.key == control.key and r.test.n
            ]
            sentences[control.key] = f"{result.contrast.control_name}: {reason}" + (
                f"; methods differ from it by {format_signed(min(means), 1)} to "
                f"{format_signed(max(means), 1)} points."
                if means
                else "."
            )
    return list(sentences.values())


def _better(tested: Sequence[ContrastResult], secondary: Sequence[ContrastResult]) -> list[str]:
    """One sentence for each method that is better than the plan's control, with its limits."""
    sentences, results = [], [*tested, *secondary]
    for result in tested:
        if verdict(result) != "better":
            continue
        method = result.contrast.method
        others = [other for other in secondary if other.contrast.method is method]
        text = (
            f"{method.label} is better than {result.contrast.control_name} "
            f"({format_interval(result)}{', weak control' if result.weak_control else ''}"
            f"{_small(result)})"
        )
        unclear = [
            o.contrast.control_name
            + (f", equivalent within ±{o.margin:g}" if is_equivalent(o) else "")
            + (", weak control" if o.weak_control else "")
            for o in others
            if verdict(o) == "no difference shown"
        ]
        if unclear:
            text += f", and not shown to differ from: {'; '.join(unclear)}"
        if method.group in under_trained_sizes(results):
            text += _IN_SHORT_TRAINING
        sentences.append(f"{text}.")
    return sentences


# Numbers as text


def format_signed(value: float, digits: int = 2) -> str:
    """Format a number with its sign: +0.42, −0.10, 0.00."""
    text = f"{abs(value):.{digits}f}"
    if float(text) == 0:
        return text
    return f"{'+' if value > 0 else '−'}{text}"


def digits_for(spread: float) -> int:
    """Number of decimals, 1 to 4, that shows two significant figures of a spread."""
    digits = 1
    while digits < 4 and spread < 10 ** (1 - digits):
        digits += 1
    return digits


def format_interval(result: ContrastResult) -> str:
    """Format mean ± half-width of the interval; only the mean without variation."""
    width = result.half_width
    if width is None:
        return format_signed(result.test.mean)
    digits = digits_for(width)
    return f"{format_signed(result.test.mean, digits)} ± {width:.{digits}f}"


def format_spread(values: Iterable[float], digits: int = 2) -> str:
    """Format mean ± standard deviation; only the mean for a single value."""
    spread = mean_and_deviation(values)
    if spread is None:
        return "–"
    mean, deviation = spread
    return f"{mean:.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")


def format_cell(value: float | None, digits: int = 2) -> str:
    """Format a number that may be missing."""
    return "–" if value is None or pd.isna(value) else f"{value:.{digits}f}"


def format_p(p: float | None) -> str:
    """Format a p-value."""
    return "–" if p is None else f"{p:.3f}" if p >= 0.001 else "<0.001"
