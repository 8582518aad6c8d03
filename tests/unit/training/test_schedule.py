from __future__ import annotations

import dataclasses
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from dist_graft.training.schedule import Cadence, Position, Segment, segments

RUNS = st.fixed_dictionaries(
    {
        "epochs": st.integers(1, 30),
        "steps_per_epoch": st.integers(1, 9),
        "cadence": st.one_of(
            st.builds(Cadence, every_epochs=st.integers(0, 8), start_epoch=st.integers(0, 3)),
            st.builds(Cadence, every_steps=st.integers(0, 12), start_epoch=st.integers(0, 3)),
        ),
        "save_every": st.integers(0, 8),
    }
)


def of(run: dict[str, Any], start: Position | None = None) -> list[Segment]:
    return list(segments(**run, start=start or Position()))


def events(run: dict[str, Any], start: Position | None = None) -> list[tuple[Any, ...]]:
    """All that happens to the weights, in order, each with the position after it."""
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
def test_what_is_left_of_a_run_is_the_rest_of_the_whole_run(
    run: dict[str, Any], data: st.DataObject
) -> None:
    whole = of(run)
    saved = [segment.epoch + 1 for segment in whole if segment.save]
    start = data.draw(st.sampled_from([0, *saved]))
    assert [s for s in whole if s.epoch < start] + of(run, Position(start)) == whole


@given(RUNS, st.lists(st.floats(0, 1), max_size=5))
def test_a_run_interrupted_anywhere_and_often_does_the_same(
    run: dict[str, Any], cuts: list[float]
) -> None:
    """It can stop after a step, before what follows it, or after a round inside an epoch."""
    whole = events(run)
    done: list[tuple[Any, ...]] = []
    start = Position()
    for cut in cuts:
        left = events(run, start)
        count = round(cut * len(left))
        while count and left[count - 1][0] == "round" and left[count][0] == "epoch":
            count -= 1  # what follows the last round of an epoch is not interrupted
        done += left[:count]
        start = left[count - 1][1] if count else start
    assert done + events(run, start) == whole


@given(RUNS)
def test_rounds_before_a_step_are_counted_without_walking(run: dict[str, Any]) -> None:
    cadence, length = run["cadence"], run["steps_per_epoch"]
    rounds = [(s.epoch, s.last) for s in of(run) if s.round]
    for epoch in range(run["epochs"]):
        for step in range(length + 1):
            before = [place for place in rounds if place < (epoch, step)]
            assert cadence.rounds_before(epoch, step, length) == len(before)


@given(RUNS)
def test_rounds_follow_what_the_number_divides(run: dict[str, Any]) -> None:
    cadence, length = run["cadence"], run["steps_per_epoch"]
    first = min(cadence.start_epoch, run["epochs"]) * length
    every = cadence.every_steps or cadence.every_epochs * length
    rounds = [segment.epoch * length + segment.last for segment in of(run) if segment.round]
    steps = range(first + 1, run["epochs"] * length + 1)
    assert rounds == [step for step in steps if every and step % every == 0]


@given(RUNS)
def test_the_end_of_a_run_is_saved_and_said_once(run: dict[str, Any]) -> None:
    whole = of(run)
    assert [segment.ends_run for segment in whole] == [False] * (len(whole) - 1) + [True]
    assert whole[-1].save
    every = run["save_every"]
    for segment in whole[:-1]:
        due = every > 0 and (segment.epoch + 1) % every == 0
        assert segment.save == (segment.evaluate and due)


@given(RUNS)
def test_networks_are_evaluated_after_every_epoch(run: dict[str, Any]) -> None:
    length = run["steps_per_epoch"]
    ends = [(s.epoch, s.last) for s in of(run) if s.evaluate]
    assert ends == [(epoch, length) for epoch in range(run["epochs"])]


@given(RUNS)
def test_a_segment_is_cut_only_where_something_happens(run: dict[str, Any]) -> None:
    assert all(segment.evaluate or segment.round for segment in of(run))


@given(RUNS, st.integers(1, 30))
def test_more_epochs_change_nothing_before_the_old_end(run: dict[str, Any], more: int) -> None:
    before, after = of(run), of(run | {"epochs": run["epochs"] + more})
    assert after[: len(before) - 1] == before[:-1]
    assert after[len(before) - 1] == dataclasses.replace(
        before[-1], ends_run=False, save=after[len(before) - 1].save
    )


def test_nothing_is_left_of_a_finished_run() -> None:
    run = {"epochs": 3, "steps_per_epoch": 2, "cadence": Cadence(), "save_every": 1}
    assert of(run, Position(3)) == []
