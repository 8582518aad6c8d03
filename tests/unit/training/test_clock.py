from __future__ import annotations

import dataclasses
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from dist_graft.training.clock import Segment, segments

RUNS = st.fixed_dictionaries(
    {
        "epochs": st.integers(1, 30),
        "steps_per_epoch": st.integers(1, 9),
        "round_every": st.integers(0, 8),
        "save_every": st.integers(0, 8),
    }
)


def of(run: dict[str, Any], start_epoch: int = 0) -> list[Segment]:
    return list(segments(**run, start_epoch=start_epoch))


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
    assert [s for s in whole if s.epoch < start] + of(run, start) == whole


@given(RUNS)
def test_rounds_follow_the_epochs_that_the_number_divides(run: dict[str, Any]) -> None:
    every = run["round_every"]
    rounds = [segment.epoch + 1 for segment in of(run) if segment.round]
    assert rounds == (list(range(every, run["epochs"] + 1, every)) if every else [])


@given(RUNS)
def test_the_end_of_a_run_is_saved_and_said_once(run: dict[str, Any]) -> None:
    whole = of(run)
    assert [segment.ends_run for segment in whole] == [False] * (run["epochs"] - 1) + [True]
    assert whole[-1].save
    every = run["save_every"]
    for segment in whole[:-1]:
        assert segment.save == (every > 0 and (segment.epoch + 1) % every == 0)


@given(RUNS)
def test_networks_are_evaluated_after_every_epoch_and_before_every_round(
    run: dict[str, Any],
) -> None:
    whole = of(run)
    assert [s.epoch for s in whole if s.evaluate] == list(range(run["epochs"]))
    assert all(segment.evaluate for segment in whole if segment.round)


@given(RUNS, st.integers(1, 30))
def test_more_epochs_change_nothing_before_the_old_end(run: dict[str, Any], more: int) -> None:
    before, after = of(run), of(run | {"epochs": run["epochs"] + more})
    assert after[: len(before) - 1] == before[:-1]
    assert after[len(before) - 1] == dataclasses.replace(
        before[-1], ends_run=False, save=after[len(before) - 1].save
    )


def test_nothing_is_left_of_a_finished_run() -> None:
    assert (
        list(segments(epochs=3, steps_per_epoch=2, round_every=1, save_every=1, start_epoch=3))
        == []
    )
