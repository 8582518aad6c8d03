"""Choices on a validation split: the regime and the learning rate."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from made_up import carry_out, make_plan

from dist_graft.studies.controls import Run, lr_trials
from dist_graft.studies.plan import Plan, parse_plan
from dist_graft.studies.selection import gain, study_state

SEARCH = {
    "recipes": {"plain": None, "fast": {"optim.lr": 0.4}},
    "seeds": [0, 1],
    "confirm_seeds": [10, 11, 12, 13, 14],
}


def searching(**changes: Any) -> Plan:
    content = {"name": "p", "methods": ["graft", "papa"], "networks": [2, 4], "search": SEARCH}
    return parse_plan(content | changes)


def best_when_fast_and_four(run: Run) -> float:
    """Accuracy such that grafting gains 1 for four fast networks, and other exchanges lose 1."""
    config, k = run.config, run.arm.networks
    gains = {"none": 0.0, "graft": 1.0 if k == 4 and config.optim.lr == 0.4 else -1.0}
    return 80.0 + run.seed / 10 + gains.get(config.method, -1.0)


class TestRegimes:
    def test_regime_with_the_largest_gain_is_confirmed_with_unseen_seeds(
        self, tmp_path: Path
    ) -> None:
        state, results = carry_out(searching(), tmp_path, best_when_fast_and_four)
        assert str(state.chosen) == "graft, 4 networks, fast"
        assert state.confirmed.networks == [4]
        assert list(state.confirmed.methods) == ["graft"]
        assert state.confirmed.recipe == {"optim": {"lr": 0.4}}
        assert {run.seed for run in state.comparison_runs} == {10, 11, 12, 13, 14}
        rows = results.rows
        tested = set(rows.loc[rows["split"] == "test", "seed"])
        assert tested == {10, 11, 12, 13, 14}

    def test_search_runs_hold_out_a_validation_split(self) -> None:
        runs = study_state(searching()).search_runs
        assert {run.config.data.val_fraction for run in runs} == {0.1}
        assert {run.split for run in runs} == {"validation"}
        # 2 recipes, 2 sizes: graft, papa and one control that both share; 2 seeds
        assert len(runs) == 2 * 2 * 3 * 2

    def test_confirmation_trains_on_all_images(self, tmp_path: Path) -> None:
        state, _ = carry_out(searching(), tmp_path, best_when_fast_and_four)
        assert {run.config.data.val_fraction for run in state.comparison_runs} == {0.0}

    def test_validation_split_of_the_recipe_is_kept(self) -> None:
        runs = study_state(searching(recipe={"data.val_fraction": 0.2})).search_runs
        assert {run.config.data.val_fraction for run in runs} == {0.2}

    def test_no_regime_is_chosen_before_the_search_has_finished(self, tmp_path: Path) -> None:
        _, results = carry_out(searching(), tmp_path, best_when_fast_and_four)
        first = study_state(searching()).search_runs[0]
        rows = results.rows.drop(first.key)
        state = study_state(searching(), rows)
        assert state.chosen is None
        assert state.design is None
        assert state.comparison_runs == []

    def test_regime_with_a_failed_run_is_excluded(self, tmp_path: Path) -> None:
        def value(run: Run) -> float:
            broken = run.phase == "search" and run.arm.name == "graft, fast" and run.seed == 1
            return math.nan if broken and run.arm.networks == 4 else best_when_fast_and_four(run)

        state, _ = carry_out(searching(), tmp_path, value)
        assert state.chosen is not None
        assert str(state.chosen) != "graft, 4 networks, fast"

    def test_population_sizes_of_a_regime_are_searched_and_confirmed(self, tmp_path: Path) -> None:
        recipes = {"plain": None, "many": {"networks": 3, "optim.lr": 0.4}}
        plan = searching(methods=["graft"], search=SEARCH | {"recipes": recipes})

        def value(run: Run) -> float:
            gains = run.arm.networks == 3 and run.config.method == "graft"
            return 80.0 + run.seed / 10 + gains

        state, _ = carry_out(plan, tmp_path, value)
        tried = {(regime.recipe, regime.networks) for regime in state.regimes}
        assert tried == {("plain", 2), ("plain", 4), ("many", 3)}
        assert {run.arm.networks for run in state.search_runs} == {2, 3, 4}
        assert str(state.chosen) == "graft, 3 networks, many"
        assert state.confirmed.networks == [3]
        assert state.confirmed.recipe == {"optim": {"lr": 0.4}}
        assert {run.arm.networks for run in state.comparison_runs} == {3, 1}

    def test_candidates_include_the_rates_of_every_regime(self) -> None:
        recipes = {"many": {"networks": 3, "optim.lr_diversity": "cosine"}}
        plan = searching(search=SEARCH | {"recipes": recipes})
        (trial,) = lr_trials(plan, plan.with_regime("many"))
        assert trial.candidates == (0.025, 0.075, 0.1)

    def test_gain_is_paired_by_seed(self, tmp_path: Path) -> None:
        state, results = carry_out(searching(), tmp_path, best_when_fast_and_four)
        assert state.chosen is not None
        result = gain(state.chosen, results.rows, "largest_lr_member")
        assert (result.n, result.deviation) == (2, 0.0)
        assert result.mean == pytest.approx(1.0)


def comparing(**changes: Any) -> Plan:
    return make_plan(**{"recipe": {"optim.lr_diversity": "cosine"}} | changes)


class TestLearningRates:
    def test_best_rate_on_validation_is_chosen(self, tmp_path: Path) -> None:
        def value(run: Run) -> float:
            return 80.0 - 100 * abs(run.config.optim.lr - 0.05)

        state, results = carry_out(comparing(), tmp_path, value)
        assert list(state.best_lr.values()) == [0.05]
        trials = results.rows[results.rows["phase"] == "best_lr"]
        assert set(trials["split"]) == {"validation"}
        assert set(trials["seed"]) == {1000, 1001}
        assert set(trials["networks"]) == {1}
        assert any(arm.name == "independent, best lr 0.05" for arm in state.design.arms)

    def test_single_candidate_needs_no_trial(self, tmp_path: Path) -> None:
        plan = comparing(recipe={})
        assert study_state(plan).lr_runs == []
        assert list(study_state(plan).best_lr.values()) == [0.1]

    def test_ties_go_to_the_smaller_rate(self, tmp_path: Path) -> None:
        state, _ = carry_out(comparing(), tmp_path, lambda run: 80.0)
        assert list(state.best_lr.values()) == [0.05]

    def test_rate_with_a_failed_run_is_excluded(self, tmp_path: Path) -> None:
        def value(run: Run) -> float:
            broken = run.phase == "best_lr" and run.config.optim.lr == 0.05 and run.seed == 1001
            return math.nan if broken else 80.0 - run.config.optim.lr

        state, _ = carry_out(comparing(), tmp_path, value)
        assert list(state.best_lr.values()) == [0.1]

    def test_no_rate_remains(self, tmp_path: Path) -> None:
        def value(run: Run) -> float:
            return math.nan if run.phase == "best_lr" else 80.0

        state, _ = carry_out(comparing(), tmp_path, value)
        assert list(state.best_lr.values()) == [None]
        assert "best learning rate: unknown, its trials are missing or failed" in (
            state.design.omitted
        )


def test_runs_are_ordered_by_seed() -> None:
    runs = study_state(comparing(recipe={})).comparison_runs
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)


def test_runs_are_distinct() -> None:
    runs = study_state(comparing(methods=["graft", "independent"], recipe={})).comparison_runs
    keys = [run.key for run in runs]
    assert len(keys) == len(set(keys))


def test_state_does_not_depend_on_the_order_of_rows(tmp_path: Path) -> None:
    state, results = carry_out(searching(), tmp_path, best_when_fast_and_four)
    again = study_state(searching(), results.rows[::-1])
    assert str(again.chosen) == str(state.chosen)
    assert [run.key for run in again.comparison_runs] == [run.key for run in state.comparison_runs]
