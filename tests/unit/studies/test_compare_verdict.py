from __future__ import annotations

import pytest

from dist_graft.studies.arms import Arm, Contrast
from dist_graft.studies.lines import ContrastLine
from dist_graft.studies.statistics import (
    half_width,
    holm,
    paired,
    smallest_difference,
)
from dist_graft.studies.verdict import (
    answer,
    enough_digits,
    reading,
    reservations,
    signed,
    verdict,
    word,
)


def arm(name: str, networks: int = 4) -> Arm:
    return Arm(name=name, role="method", networks=networks, group=networks, options={})


GRAFT, PAPA = arm("graft"), arm("papa")


def line(
    differences: list[float],
    *,
    method: Arm = GRAFT,
    control: str = "no exchange",
    planned: int | None = None,
) -> ContrastLine:
    """A contrast that is alone in its table."""
    result = paired(differences)
    (decision,) = holm([result.p])
    spread = (result.n, result.deviation or 0.0, decision.level)
    told = result.p is not None
    return ContrastLine(
        contrast=Contrast(
            method=method,
            control=arm(control),
            control_name=control,
            outcome="largest_lr_member",
            control_outcome="largest_lr_member",
        ),
        differences=dict(enumerate(differences)),
        planned=len(differences) if planned is None else planned,
        result=result,
        decision=decision,
        half_width=half_width(*spread) if told else None,
        smallest=smallest_difference(*spread) if told else None,
    )


WORDS = [
    (
        [-0.4, 0.1, -0.2, 0.15, -0.15],
        "no difference that these 5 seeds can show: −0.10 ± 0.28; they could have shown 0.38",
        "no difference shown",
    ),
    (
        [0.5, 0.6, 0.55, 0.4, 0.45],
        "better, +0.500 ± 0.098 percentage points over 5 seeds",
        "better",
    ),
    ([-5.0, -6.0, -5.5], "worse, −5.5 ± 1.2 percentage points over 3 seeds", "worse"),
    ([0.3], "+0.30 with one seed, which shows no difference, whatever its size", "no answer"),
    ([0.0, 0.0, 0.0], "no difference at all in any of the 3 seeds", "no difference shown"),
    (
        [0.1, 0.1, 0.1],
        "+0.10 in each of the 3 seeds; without any spread the test says nothing, and no difference "
        "is shown",
        "no difference shown",
    ),
    ([], "nothing to say, no seed has both runs", "no answer"),
]


@pytest.mark.parametrize(("differences", "text", "short"), WORDS)
def test_what_is_read_from_the_differences(differences: list[float], text: str, short: str) -> None:
    assert reading(line(differences)) == text
    assert word(line(differences)) == short


def test_the_verdict_names_both_sides() -> None:
    text = verdict(line([-0.4, 0.1, -0.2, 0.15, -0.15]))
    assert text.startswith("graft, 4 networks, against no exchange: no difference that these 5 ")
    assert text.endswith("could have shown 0.38.")


def test_missing_seeds_are_said() -> None:
    assert reading(line([0.5, 0.6, 0.55, 0.4], planned=5)).endswith("over 4 seeds (4 of 5 seeds)")


@pytest.mark.parametrize(
    ("value", "text"), [(0.123, "+0.12"), (-0.1, "−0.10"), (0.001, "0.00"), (-0.001, "0.00")]
)
def test_signs(value: float, text: str) -> None:
    assert signed(value) == text


@pytest.mark.parametrize(
    ("spread", "digits"), [(12.0, 1), (1.0, 1), (0.99, 2), (0.1, 2), (0.099, 3), (1e-9, 4)]
)
def test_two_figures_of_the_spread_are_printed(spread: float, digits: int) -> None:
    assert enough_digits(spread) == digits


CLEAR, BAD, VAGUE = [0.5, 0.6, 0.55, 0.4], [-0.5, -0.6, -0.55, -0.4], [-0.4, 0.1, -0.2, 0.15]


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        ([line(VAGUE)], "The comparison shows no difference."),
        ([line(VAGUE), line(VAGUE)], "None of the 2 comparisons shows a difference."),
        (
            [line(CLEAR), line(VAGUE)],
            "Better than its control in 1 of 2 comparisons: graft, 4 networks.",
        ),
        (
            [line(CLEAR), line(BAD, method=PAPA)],
            "Better than its control in 1 of 2 comparisons: graft, 4 networks. "
            "Worse than its control in 1 of 2 comparisons: papa, 4 networks.",
        ),
        (
            [line([0.3])],
            "No method has two seeds to compare with its control: there is no answer yet.",
        ),
        ([], "No method has two seeds to compare with its control: there is no answer yet."),
    ],
)
def test_the_answer(lines: list[ContrastLine], text: str) -> None:
    assert answer(lines) == text


def test_who_is_better_is_held_against_the_other_controls() -> None:
    further = [
        line(VAGUE, control="shuffled"),
        line(CLEAR, control="constant"),
        line(BAD, control="one network, 4 x epochs"),
        line(VAGUE, control="wash", method=PAPA),
    ]
    assert reservations([line(CLEAR), line(VAGUE, method=PAPA)], further) == [
        "graft, 4 networks is not shown to differ from: shuffled.",
        "graft, 4 networks is worse than: one network, 4 x epochs.",
    ]
