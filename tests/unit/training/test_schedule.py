from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from dist_graft.training.schedule import (
    Cadence,
    Position,
    Segment,
    epoch_segments,
    quadratic_steps,
)

LIMITS: Any = {"start_epoch": st.integers(0, 3), "stop_epoch": st.integers(0, 9)}
RUNS = st.fixed_dictionaries(
    {
        "epochs": st.integers(1, 30),
        "steps_per_epoch": st.integers(1, 9),
        "cadence": st.one_of(
            st.builds(Cadence, every_epochs=st.integers(0, 8), **LIMITS),
            st.builds(Cadence, every_steps=st.integers(0, 12), **LIMITS),
            st.builds(
                Cadence,
                after_steps=st.sets(st.integers(1, 300)).map(lambda steps: tuple(sorted(steps))),
                **LIMITS,
            ),
        ),
        "save_every": st.integers(0, 8),
        "votes": st.integers(0, 4),
    }
)


def of(run: dict[str, Any], start: Position | None = None) -> list[Segment]:
    """Segments of the rest of a run."""
    start = start or Position()
    found: list[Segment] = []
    first, rounds = start.step, start.round
    for epoch in range(start.epoch, run["epochs"]):
        part = list(epoch_segments(epoch, **run, first=first, rounds=rounds))
        found += part
        first, rounds = 0, rounds + sum(segment.round for segment in part)
    return found


def events(run: dict[str, Any], start: Position | None = None) -> list[tuple[Any, ...]]:
    """All weight updates in order, each with the position after it."""
    found: list[tuple[Any, ...]] = []
    round_ = start.round if start else 0
    for segment in of(run, start):
        found += [
            ("step", Position(segment.epoch, step + 1, round_))
            for step in range(segment.first, segment.last)
        ]
        if segment.round:
            round_ += 1
            found.append(("round", Position(segment.epoch, segment.last, round_)))
        if segment.evaluate:
            found.append(("epoch", Position(segment.epoch + 1, 0, round_)))
    return found


@given(RUNS)
def test_every_step_of_every_epoch_once_in_order(run: dict[str, Any]) -> None:
    steps = [(s.epoch, step) for s in of(run) for step in range(s.first, s.last)]
    assert steps == [(e, s) for e in range(run["epochs"]) for s in range(run["steps_per_epoch"])]


@given(RUNS, st.data())
def test_a_resumed_run_has_the_remaining_segments(run: dict[str, Any], data: st.DataObject) -> None:
    whole = of(run)
    saved = [segment.epoch + 1 for segment in whole if segment.save]
    start = data.draw(st.sampled_from([0, *saved]))
    rounds = sum(segment.round for segment in whole if segment.epoch < start)
    assert [s for s in whole if s.epoch < start] + of(run, Position(start, 0, rounds)) == whole


@given(RUNS, st.lists(st.floats(0, 1), max_size=5))
def test_interruptions_anywhere_change_nothing(run: dict[str, Any], cuts: list[float]) -> None:
    """A run can stop after a step, before its round or evaluation, or after a round in an epoch."""
    whole = events(run)
    done: list[tuple[Any, ...]] = []
    start = Position()
    for cut in cuts:
        left = events(run, start)
        count = round(cut * len(left))
        while count and left[count - 1][0] == "round" and left[count][0] == "epoch":
            count -= 1  # a run does not stop after the last round of an epoch
        done += left[:count]
        start = left[count - 1][1] if count else start
    assert done + events(run, start) == whole


@given(RUNS)
def test_the_number_of_rounds_before_a_step(run: dict[str, Any]) -> None:
    cadence, length = run["cadence"], run["steps_per_epoch"]
    rounds = [(s.epoch, s.last) for s in of(run) if s.round]
    for epoch in range(run["epochs"]):
        for step in range(length + 1):
            before = [position for position in rounds if position < (epoch, step)]
            assert cadence.rounds_before(epoch, step, length) == len(before)


@given(RUNS)
def test_the_last_round_of_a_run(run: dict[str, Any]) -> None:
    cadence, length = run["cadence"], run["steps_per_epoch"]
    rounds = [s.epoch * length + s.last for s in of(run) if s.round]
    last = [
        steps
        for steps in range(run["epochs"] * length + 1)
        if cadence.is_last(steps, epochs=run["epochs"], steps_per_epoch=length)
    ]
    assert last == rounds[-1:]


@given(RUNS)
def test_rounds_follow_multiples_of_the_interval_or_the_listed_steps(run: dict[str, Any]) -> None:
    cadence, length = run["cadence"], run["steps_per_epoch"]
    epochs = run["epochs"]
    first = min(cadence.start_epoch, epochs) * length
    last = min(cadence.stop_epoch or epochs, epochs) * length
    every = cadence.every_steps or cadence.every_epochs * length
    rounds = [segment.epoch * length + segment.last for segment in of(run) if segment.round]
    steps = range(first + 1, last + 1)
    if cadence.after_steps:
        assert rounds == [step for step in steps if step in cadence.after_steps]
    else:
        assert rounds == [step for step in steps if every and step % every == 0]


@given(RUNS)
def test_checkpoints_follow_multiples_of_their_interval_and_the_last_epoch(
    run: dict[str, Any],
) -> None:
    whole = of(run)
    assert whole[-1].save
    every = run["save_every"]
    for segment in whole[:-1]:
        due = every > 0 and (segment.epoch + 1) % every == 0
        assert segment.save == (segment.evaluate and due)


@given(RUNS)
def test_each_epoch_ends_with_an_evaluation(run: dict[str, Any]) -> None:
    length = run["steps_per_epoch"]
    ends = [(s.epoch, s.last) for s in of(run) if s.evaluate]
    assert ends == [(epoch, length) for epoch in range(run["epochs"])]


@given(RUNS)
def test_a_segment_ends_only_at_an_event(run: dict[str, Any]) -> None:
    assert all(segment.evaluate or segment.round or segment.vote for segment in of(run))


@given(RUNS)
def test_votes_cut_each_epoch_into_equal_parts(run: dict[str, Any]) -> None:
    length, votes = run["steps_per_epoch"], run["votes"]
    parts = {length * point // (votes + 1) for point in range(1, votes + 1)} - {0}
    steps = [*sorted(parts), length] if votes else []
    expected = [(epoch, step) for epoch in range(run["epochs"]) for step in steps]
    assert [(s.epoch, s.last) for s in of(run) if s.vote] == expected


@given(RUNS)
def test_votes_change_neither_rounds_nor_steps(run: dict[str, Any]) -> None:
    assert events(run) == events(run | {"votes": 0})


@given(RUNS, st.integers(0, 8))
def test_a_resumed_epoch_has_the_remaining_votes(run: dict[str, Any], step: int) -> None:
    first = min(step, run["steps_per_epoch"])
    whole, rest = (
        {
            s.last
            for s in epoch_segments(0, **run, first=start, votes_after=start, rounds=0)
            if s.vote
        }
        for start in (0, first)
    )
    end = {run["steps_per_epoch"]} if run["votes"] else set()
    assert rest == {last for last in whole if last > first} | end


@given(RUNS, st.integers(0, 30), st.integers(0, 30))
def test_networks_that_stopped_at_different_steps_vote_at_the_same_steps(
    run: dict[str, Any], one: int, other: int
) -> None:
    steps = [min(step, run["steps_per_epoch"]) for step in (one, other)]
    first, second = (
        [
            s.last
            for s in epoch_segments(0, **run, first=step, votes_after=max(steps), rounds=0)
            if s.vote
        ]
        for step in steps
    )
    assert first == second


@given(RUNS, st.integers(1, 30))
def test_more_epochs_change_only_the_checkpoint_at_the_former_end(
    run: dict[str, Any], more: int
) -> None:
    before, after = of(run), of(run | {"epochs": run["epochs"] + more})
    assert after[: len(before) - 1] == before[:-1]
    assert after[len(before) - 1] == dataclasses.replace(
        before[-1], save=after[len(before) - 1].save
    )


def test_a_finished_run_has_no_segments() -> None:
    run = {"epochs": 3, "steps_per_epoch": 2, "cadence": Cadence(), "save_every": 1}
    assert of(run, Position(3)) == []


RULES = st.fixed_dictionaries(
    {
        "alpha": st.floats(1e-3, 1e3),
        "base": st.integers(1, 20),
        "first": st.integers(0, 50),
        "last": st.integers(0, 300),
    }
)


@given(RULES, st.lists(st.floats(1e-3, 1), min_size=1, max_size=20))
def test_quadratic_steps_follow_the_rule_and_end_with_the_run(
    rule: dict[str, Any], rates: list[float]
) -> None:
    def lr(step: int) -> float:
        return rates[step % len(rates)]

    found = quadratic_steps(lr, **rule)
    assert found[-1:] == ((rule["last"],) if rule["first"] < rule["last"] else ())
    before = rule["first"]
    for step in found:
        interval = max(rule["base"], math.floor((rule["alpha"] / lr(before)) ** 2))
        assert step == min(before + interval, rule["last"])
        before = step


@given(RULES, st.floats(1e-3, 1), st.data())
def test_quadratic_steps_continue_from_any_round(
    rule: dict[str, Any], decay: float, data: st.DataObject
) -> None:
    def lr(step: int) -> float:
        return 1 / (1 + decay * step)

    whole = quadratic_steps(lr, **rule)
    start = data.draw(st.integers(0, len(whole)))
    first = whole[start - 1] if start else rule["first"]
    assert quadratic_steps(lr, **rule | {"first": first}) == whole[start:]


@given(RULES, st.floats(1e-3, 1))
def test_quadratic_intervals_grow_as_the_learning_rate_falls(
    rule: dict[str, Any], decay: float
) -> None:
    found = quadratic_steps(lambda step: 1 / (1 + decay * step), **rule)
    intervals = [after - before for before, after in itertools.pairwise(found[:-1])]
    assert intervals == sorted(intervals)


def test_quadratic_steps_at_a_learning_rate_of_zero_wait_for_the_end() -> None:
    assert quadratic_steps(lambda step: 0.0, alpha=0.1, base=2, first=3, last=50) == (50,)
    assert quadratic_steps(lambda step: 1e-300, alpha=1e200, base=2, first=3, last=50) == (50,)
