from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from made_up import carried_out

from dist_graft.studies.arms import lr_trials
from dist_graft.studies.execution import Run
from dist_graft.studies.plan import Plan, plan_of
from dist_graft.studies.results import Results
from dist_graft.studies.selection import gain
from dist_graft.studies.state import state_of

SEARCH = {
    "recipes": {"plain": None, "fast": {"optim.lr": 0.4}},
    "seeds": [0, 1],
    "confirm_seeds": [10, 11, 12, 13, 14],
}


def searching(**changes: Any) -> Plan:
    content = {"name": "p", "methods": ["graft", "papa"], "networks": [2, 4], "search": SEARCH}
    return plan_of(content | changes)


def best_when_fast_and_four(run: Run) -> float:
    """Grafting four fast networks gains 1, every other exchange loses 1."""
    config, k = run.config, run.arm.networks
    gains = {"none": 0.0, "graft": 1.0 if k == 4 and config.optim.lr == 0.4 else -1.0}
    return 80.0 + run.seed / 10 + gains.get(config.method, -1.0)


class TestRegimes:
    def test_the_largest_gain_on_validation_is_confirmed_on_unseen_seeds(
        self, tmp_path: Path
    ) -> None:
        state, results = carried_out(searching(), tmp_path, best_when_fast_and_four)
        assert str(state.chosen) == "graft, 4 networks, fast"
        assert state.confirmed.networks == [4]
        assert list(state.confirmed.methods) == ["graft"]
        assert state.confirmed.recipe == {"optim": {"lr": 0.4}}
        assert {run.seed for run in state.comparison_runs} == {10, 11, 12, 13, 14}
        tested = {row.seed for row in results.rows.values() if row.split == "test"}
        assert tested == {10, 11, 12, 13, 14}

    def test_everything_that_is_tried_keeps_a_validation_split(self) -> None:
        runs = state_of(searching(), {}).search_runs
        assert {run.config.data.val_fraction for run in runs} == {0.1}
        assert {run.split for run in runs} == {"validation"}
        # 2 recipes, 2 sizes: graft, papa and one control that both share; 2 seeds
        assert len(runs) == 2 * 2 * 3 * 2

    def test_what_is_confirmed_is_trained_on_all_images(self, tmp_path: Path) -> None:
        state, _ = carried_out(searching(), tmp_path, best_when_fast_and_four)
        assert {run.config.data.val_fraction for run in state.comparison_runs} == {0.0}

    def test_a_recipes_own_validation_split_is_kept(self) -> None:
        runs = state_of(searching(recipe={"data.val_fraction": 0.2}), {}).search_runs
        assert {run.config.data.val_fraction for run in runs} == {0.2}

    def test_before_its_end_nothing_is_chosen(self, tmp_path: Path) -> None:
        _, results = carried_out(searching(), tmp_path, best_when_fast_and_four)
        first = state_of(searching(), {}).search_runs[0]
        rows = {key: row for key, row in results.rows.items() if key != first.key}
        state = state_of(searching(), rows)
        assert state.chosen is None
        assert state.design is None
        assert state.comparison_runs == []

    def test_a_regime_with_a_failed_run_is_out(self, tmp_path: Path) -> None:
        def value(run: Run) -> float:
            broken = run.phase == "search" and run.arm.name == "graft, fast" and run.seed == 1
            return math.nan if broken and run.arm.networks == 4 else best_when_fast_and_four(run)

        state, _ = carried_out(searching(), tmp_path, value)
        assert state.chosen is not None
        assert str(state.chosen) != "graft, 4 networks, fast"

    def test_a_regimes_own_size_of_population_is_tried_and_confirmed(self, tmp_path: Path) -> None:
        recipes = {"plain": None, "many": {"networks": 3, "optim.lr": 0.4}}
        plan = searching(methods=["graft"], search=SEARCH | {"recipes": recipes})

        def value(run: Run) -> float:
            gains = run.arm.networks == 3 and run.config.method == "graft"
            return 80.0 + run.seed / 10 + gains

        state, _ = carried_out(plan, tmp_path, value)
        tried = {(regime.recipe, regime.networks) for regime in state.regimes}
        assert tried == {("plain", 2), ("plain", 4), ("many", 3)}
        assert {run.arm.networks for run in state.search_runs} == {2, 3, 4}
        assert str(state.chosen) == "graft, 3 networks, many"
        assert state.confirmed.networks == [3]
        assert state.confirmed.recipe == {"optim": {"lr": 0.4}}
        assert {run.arm.networks for run in state.comparison_runs} == {3, 1}

    def test_learning_rates_of_a_regimes_own_population_are_candidates(self) -> None:
        recipes = {"many": {"networks": 3, "optim.lr_diversity": "cosine"}}
        plan = searching(search=SEARCH | {"recipes": recipes})
        (trial,) = lr_trials(plan, plan.in_regime("many"))
        assert trial.candidates == (0.025, 0.075, 0.1)

    def test_gains_are_paired_by_seed(self, tmp_path: Path) -> None:
        state, results = carried_out(searching(), tmp_path, best_when_fast_and_four)
        assert state.chosen is not None
        result = gain(state.chosen, results.rows, "largest_lr_member")
        assert (result.n, result.deviation) == (2, 0.0)
        assert result.mean == pytest.approx(1.0)


def comparing(**changes: Any) -> Plan:
    content = {"name": "p", "methods": ["graft"], "networks": [2], "seeds": [0, 1]}
    return plan_of(content | {"recipe": {"optim.lr_diversity": "cosine"}} | changes)


class TestLearningRates:
    def test_the_best_on_validation_is_taken(self, tmp_path: Path) -> None:
        def value(run: Run) -> float:
            return 80.0 - 100 * abs(run.config.optim.lr - 0.05)

        state, results = carried_out(comparing(), tmp_path, value)
        assert list(state.best_lr.values()) == [0.05]
        tried = [row for row in results.rows.values() if row.phase == "best_lr"]
        assert {row.split for row in tried} == {"validation"}
        assert {row.seed for row in tried} == {1000, 1001}
        assert {row.networks for row in tried} == {1}
        assert any(arm.name == "independent, best lr 0.05" for arm in state.design.arms)

    def test_one_candidate_is_not_tried(self, tmp_path: Path) -> None:
        plan = comparing(recipe={})
        assert state_of(plan, {}).lr_runs == []
        assert list(state_of(plan, {}).best_lr.values()) == [0.1]

    def test_of_equals_the_smaller(self, tmp_path: Path) -> None:
        state, _ = carried_out(comparing(), tmp_path, lambda run: 80.0)
        assert list(state.best_lr.values()) == [0.05]

    def test_a_rate_that_diverges_is_out(self, tmp_path: Path) -> None:
        def value(run: Run) -> float:
            broken = run.phase == "best_lr" and run.config.optim.lr == 0.05 and run.seed == 1001
            return math.nan if broken else 80.0 - run.config.optim.lr

        state, _ = carried_out(comparing(), tmp_path, value)
        assert list(state.best_lr.values()) == [0.1]

    def test_none_is_left(self, tmp_path: Path) -> None:
        def value(run: Run) -> float:
            return math.nan if run.phase == "best_lr" else 80.0

        state, _ = carried_out(comparing(), tmp_path, value)
        assert list(state.best_lr.values()) == [None]
        assert "best learning rate: not known, its trials are missing or failed" in (
            state.design.absent
        )


def test_runs_go_seed_by_seed_so_that_pairs_are_complete_early() -> None:
    runs = state_of(comparing(recipe={}), {}).comparison_runs
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)


def test_every_run_is_there_once() -> None:
    runs = state_of(comparing(methods=["graft", "independent"], recipe={}), {}).comparison_runs
    keys = [run.key for run in runs]
    assert len(keys) == len(set(keys))


def test_what_is_there_does_not_depend_on_the_order_of_rows(tmp_path: Path) -> None:
    state, results = carried_out(searching(), tmp_path, best_when_fast_and_four)
    turned = dict(reversed(list(results.rows.items())))
    again = state_of(searching(), turned)
    assert str(again.chosen) == str(state.chosen)
    assert [run.key for run in again.comparison_runs] == [run.key for run in state.comparison_runs]
    assert Results(tmp_path).rows.keys() == results.rows.keys()
