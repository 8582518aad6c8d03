"""Choices on a validation split: the regime and the learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made_up import carry_out, made_up_row, make_plan

from dist_graft.studies.controls import Run
from dist_graft.studies.plan import Plan, parse_plan
from dist_graft.studies.records import Results
from dist_graft.studies.rendering import to_markdown
from dist_graft.studies.report import build_report
from dist_graft.studies.selection import gain, study_state

SEARCH = {
    "recipes": {"plain": None, "fast": {"optim.lr": 0.4}},
    "seeds": [0, 1],
    "confirm_seeds": [10, 11, 12, 13, 14],
}


def searching(**changes: Any) -> Plan:
    content = {"name": "p", "methods": ["graft", "papa"], "networks": [2, 4], "search": SEARCH}
    return parse_plan(content | {"tuning": "none"} | changes)


def best_when_fast_and_four(run: Run) -> float:
    """Accuracy such that grafting gains 1 for four fast networks, and other exchanges lose 1."""
    config, k = run.config, run.arm.networks
    gains = {"none": 0.0, "graft": 1.0 if k == 4 and config.optim.lr == 0.4 else -1.0}
    if config.graft.criterion == "constant":
        return 70.0
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
        # 2 recipes, 2 sizes: graft, papa, independent (which both share) and constant; 2 seeds
        assert len(runs) == 2 * 2 * 4 * 2

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

    @pytest.mark.parametrize("failing", ["graft, fast", "independent, fast"])
    def test_regime_with_a_failed_run_is_excluded(self, failing: str, tmp_path: Path) -> None:
        def value(run: Run) -> float:
            broken = run.phase == "search" and run.arm.name == failing and run.seed == 1
            return math.nan if broken and run.arm.networks == 4 else best_when_fast_and_four(run)

        state, _ = carry_out(searching(), tmp_path, value)
        assert state.chosen is not None
        assert str(state.chosen) != "graft, 4 networks, fast"

    def test_population_sizes_of_a_regime_are_searched_and_confirmed(self, tmp_path: Path) -> None:
        recipes = {"plain": None, "many": {"networks": 3, "optim.lr": 0.4}}
        plan = searching(methods=["graft"], search=SEARCH | {"recipes": recipes})

        def value(run: Run) -> float:
            entropy = run.config.graft.criterion == "entropy"
            gains = run.arm.networks == 3 and run.config.method == "graft" and entropy
            return 80.0 + run.seed / 10 + gains

        state, _ = carry_out(plan, tmp_path, value)
        tried = {(regime.recipe, regime.networks) for regime in state.regimes}
        assert tried == {("plain", 2), ("plain", 4), ("many", 3)}
        assert {run.arm.networks for run in state.search_runs} == {2, 3, 4}
        assert str(state.chosen) == "graft, 3 networks, many"
        assert state.confirmed.networks == [3]
        assert state.confirmed.recipe == {"optim": {"lr": 0.4}}
        assert {run.arm.networks for run in state.comparison_runs} == {3, 1}

    def test_gain_is_over_the_better_of_independent_and_constant(self, tmp_path: Path) -> None:
        def value(run: Run) -> float:
            if run.config.graft.criterion == "constant":
                return 80.5 if run.config.optim.lr == 0.4 else 70.0
            return best_when_fast_and_four(run)

        state, results = carry_out(searching(), tmp_path, value)
        gains = {str(r): gain(r, results.rows, "delivered").mean for r in state.regimes}
        assert gains["graft, 4 networks, fast"] == pytest.approx(81.05 - 80.5)
        assert gains["graft, 4 networks, plain"] == pytest.approx(-1.0)
        references = {r.reference.arm.name for r in state.regimes if r.method == "graft"}
        assert references == {"constant, fast", "independent, plain"}

    def test_methods_without_coefficients_are_also_measured_against_constant(
        self, tmp_path: Path
    ) -> None:
        def value(run: Run) -> float:
            return 80.0 + run.seed / 10 + {"none": 0.0, "graft": 2.0}.get(run.config.method, 1.0)

        methods = {
            **dict.fromkeys(("papa", "wash", "average", "filter", "constant", "independent")),
            "diloco": {"delivers": "soup"},
        }
        state, results = carry_out(searching(methods=methods, networks=[2]), tmp_path, value)
        gains = {r.method: gain(r, results.rows, "delivered").mean for r in state.regimes}
        expected = dict.fromkeys(("papa", "wash", "average", "diloco"), -1.0)
        expected |= {"filter": 0.0, "constant": 2.0, "independent": 0.0}
        assert gains == pytest.approx(expected)
        references = {r.method: r.references[1:] for r in state.regimes if r.recipe == "plain"}
        names = {name: [trial.arm.name for trial in found] for name, found in references.items()}
        exchanging = ("papa", "wash", "average", "filter", "diloco")
        assert names == {name: [f"constant (as {name}), plain"] for name in exchanging} | {
            "constant": [],
            "independent": [],
        }
        (diloco,) = references["diloco"]
        assert diloco.arm.config(0).model.shared_init
        assert diloco.arm.delivers == "soup"
        assert diloco.arm.networks == 2

    def test_one_network_has_no_constant_coefficients(self) -> None:
        state = study_state(searching(methods=["internal"], networks=[1]))
        assert {len(regime.references) for regime in state.regimes} == {1}

    def test_regimes_are_compared_at_the_best_rates(self, tmp_path: Path) -> None:
        def value(run: Run) -> float:
            best = 0.2 if run.config.method == "papa" else 0.1
            return 80.0 - 10 * abs(run.config.optim.lr - best)

        tuned = {"rates": [0.05, 0.1, 0.2, 0.4]}
        plan = searching(methods=["papa"], networks=[2], tuning=tuned)
        state, results = carry_out(plan, tmp_path, value)
        for regime in state.regimes:
            assert (regime.trial.best, regime.reference.best) == (0.2, 0.1)
            assert gain(regime, results.rows, "delivered").mean == pytest.approx(0)

    def test_gain_is_paired_by_seed(self, tmp_path: Path) -> None:
        state, results = carry_out(searching(), tmp_path, best_when_fast_and_four)
        assert state.chosen is not None
        result = gain(state.chosen, results.rows, "delivered")
        assert (result.n, result.deviation) == (2, 0.0)
        assert result.mean == pytest.approx(1.0)


TUNED = {"tuning": {"rates": [0.05, 0.1, 0.2]}, "leave_out": ["constant", "shuffled"]}


def comparing(**changes: Any) -> Plan:
    return make_plan(**TUNED | changes)


def near(best: float) -> Callable[[Run], float]:
    """Accuracy that falls with the distance of the learning rate from the best one."""
    return lambda run: 80.0 - abs(math.log2(run.config.optim.lr / best))


class TestTuning:
    def test_every_arm_is_tuned_over_the_same_rates_and_seeds(self, tmp_path: Path) -> None:
        def value(run: Run) -> float:
            if run.config.method == "graft":
                return near(0.2)(run) if run.config.epochs == 20 else 0.0
            return near(0.1)(run) if run.config.epochs == 20 else near(0.05)(run)

        state, results = carry_out(
            comparing(tuning={**TUNED["tuning"], "max_extensions": 0}), tmp_path, value
        )
        assert [trial.arm.name for trial in state.trials] == [
            "graft",
            "no exchange",
            "one network, 2 x epochs",
        ]
        assert [trial.best for trial in state.trials] == [0.2, 0.1, 0.05]
        assert [list(trial.runs) for trial in state.trials] == [[0.05, 0.1, 0.2]] * 3
        assert state.design is not None
        assert [arm.config(0).optim.lr for arm in state.design.arms] == [0.2, 0.1, 0.05]
        rows = results.rows[results.rows["phase"] == "tuning"]
        assert len(rows) == 3 * 3 * 2
        assert set(rows["split"]) == {"validation"}
        assert set(rows["seed"]) == {1000, 1001}
        assert set(rows.loc[rows["arm"].str.startswith("one network"), "epochs"]) == {40}
        assert set(rows["networks"]) == {2}  # one network is tried twice, side by side
        tested = results.rows[results.rows["phase"] == "comparison"]
        assert set(tested.loc[tested["arm"].str.startswith("one network"), "networks"]) == {1}

    def test_only_single_processes_are_tried_side_by_side(self) -> None:
        """Networks that take several processes, or deliver an ensemble, are tried as they are."""
        baselines = ["ema", "checkpoint_average", "data_parallel", "snapshots", "distilled"]
        plan = comparing(baselines=baselines, tuning={"rates": [0.1, 0.2]})
        trials = study_state(plan).trials
        networks = {t.arm.name: {run.arm.networks for run in t.all_runs} for t in trials}
        alone = {name.partition(" ")[0] for name, sizes in networks.items() if sizes == {1}}
        assert alone == {"data", "snapshot", "distilled"}
        assert all(sizes == {2} for name, sizes in networks.items() if "EMA" in name)
        assert {run.arm.delivers for t in trials if "EMA" in t.arm.name for run in t.all_runs} == {
            "ema"
        }

    def test_the_delivered_model_decides(self, tmp_path: Path) -> None:
        plan = comparing(tuning={"rates": [0.1, 0.2], "max_extensions": 0})
        results = Results(tmp_path)
        for run in study_state(plan).tuning_runs:
            lr = run.config.optim.lr
            results.add(made_up_row(run, 80.0) | {"delivered": 100 * lr, "mean_of_members": -lr})
        assert {trial.best for trial in study_state(plan, results.rows).trials} == {0.2}

    @pytest.mark.parametrize(
        ("best", "extensions", "tried", "edge"),
        [
            (0.1, 2, [0.05, 0.1, 0.2], False),
            (0.4, 2, [0.05, 0.1, 0.2, 0.4, 0.8], False),
            (0.0125, 1, [0.025, 0.05, 0.1, 0.2], True),
            (0.8, 2, [0.05, 0.1, 0.2, 0.4, 0.8], True),
            (0.8, 0, [0.05, 0.1, 0.2], True),
        ],
    )
    def test_a_choice_at_the_edge_extends_the_rates(
        self, best: float, extensions: int, tried: list[float], edge: bool, tmp_path: Path
    ) -> None:
        plan = comparing(tuning={**TUNED["tuning"], "max_extensions": extensions})
        state, _ = carry_out(plan, tmp_path, near(best))
        assert [list(trial.runs) for trial in state.trials] == [tried] * 3
        warnings = [text for text in state.warnings if "at the edge of the rates" in text]
        assert len(warnings) == (3 if edge else 0)
        assert state.design is not None
        assert state.at_edge == ([arm.key for arm in state.design.arms] if edge else [])

    def test_the_best_rate_below_one_that_failed_is_at_the_edge(self, tmp_path: Path) -> None:
        def value(run: Run) -> float:
            is_tuning, lr = run.phase == "tuning", run.config.optim.lr
            return math.nan if is_tuning and lr == 0.2 else near(0.2)(run)

        state, _ = carry_out(comparing(), tmp_path, value)
        assert [list(trial.runs) for trial in state.trials] == [[0.05, 0.1, 0.2]] * 3
        assert [(trial.best, trial.at_edge) for trial in state.trials] == [(0.1, True)] * 3
        assert sum("failed at learning rate 0.2" in text for text in state.warnings) == 3

    def test_an_arm_is_left_out_until_its_rate_is_chosen(self, tmp_path: Path) -> None:
        state, results = carry_out(comparing(), tmp_path, near(0.1))
        assert state.design is not None
        last = study_state(comparing()).tuning_runs[-1]
        state = study_state(comparing(), results.rows.drop(last.key))
        assert state.design is not None
        assert [arm.name for arm in state.design.arms] == ["graft", "no exchange"]
        assert any(text.startswith("one network, 2 x epochs: no") for text in state.design.omitted)
        assert study_state(comparing()).design is None

    def test_without_tuning_there_are_no_trials_and_a_warning(self) -> None:
        state = study_state(comparing(tuning="none"))
        assert state.tuning_runs == []
        assert state.design is not None
        assert state.warnings[0].startswith("Learning rates were not tuned")

    def test_a_single_rate_is_that_of_all_arms(self) -> None:
        state = study_state(comparing(tuning={"rates": [0.3]}))
        assert state.tuning_runs == []
        assert state.design is not None
        assert {arm.config(0).optim.lr for arm in state.design.arms} == {0.3}
        assert "0.3 in all arms" in state.warnings[0]

    def test_learning_rates_of_each_network_are_not_tuned(self, tmp_path: Path) -> None:
        methods = {"graft": {"optim.lrs": [0.1, 0.2]}}
        state, _ = carry_out(comparing(methods=methods), tmp_path, near(0.1))
        assert [trial.arm.name for trial in state.trials] == [
            "independent",
            "one network, 2 x epochs",
        ]
        assert sum("was not tuned: optim.lrs" in text for text in state.warnings) == 2

    def test_ties_go_to_the_smaller_rate(self, tmp_path: Path) -> None:
        plan = comparing(tuning={"rates": [0.1, 0.2], "max_extensions": 0})
        state, _ = carry_out(plan, tmp_path, lambda run: 80.0)
        assert {trial.best for trial in state.trials} == {0.1}

    def test_a_rate_with_a_failed_run_is_excluded(self, tmp_path: Path) -> None:
        def value(run: Run) -> float:
            broken = run.phase == "tuning" and run.config.optim.lr == 0.1 and run.seed == 1001
            return math.nan if broken else near(0.1)(run)

        plan = comparing(tuning={**TUNED["tuning"], "max_extensions": 0})
        state, _ = carry_out(plan, tmp_path, value)
        assert {trial.best for trial in state.trials} == {0.05}
        assert sum("failed at learning rate 0.1" in text for text in state.warnings) == 3

    def test_an_arm_without_a_rate_is_omitted(self, tmp_path: Path) -> None:
        def value(run: Run) -> float:
            broken = run.phase == "tuning" and run.config.method == "none"
            return math.nan if broken else 80.0

        state, results = carry_out(comparing(), tmp_path, value)
        assert state.design is not None
        text = to_markdown(build_report(state, results, [])[0])
        assert "arms without a learning rate are missing (no exchange, 2 networks; ind" in text
        assert [arm.name for arm in state.design.arms] == ["graft"]
        assert state.design.primary == []
        omitted = [text for text in state.design.omitted if "no learning rate" in text]
        assert [text.partition(",")[0] for text in omitted] == [
            "no exchange",
            "independent",
            "one network",
        ]

    def test_without_a_rate_of_any_method_there_is_no_design(self, tmp_path: Path) -> None:
        def value(run: Run) -> float:
            broken = run.phase == "tuning" and run.arm.name.startswith("graft")
            return math.nan if broken else 80.0

        state, results = carry_out(comparing(), tmp_path, value)
        assert state.design is None
        blocks, (conclusion,) = build_report(state, results, [])
        assert conclusion.startswith("No conclusion yet")
        assert "Learning rates" in to_markdown(blocks)

    def test_a_diverged_trial_counts(self, tmp_path: Path) -> None:
        plan = comparing(tuning={"rates": [0.1, 0.2], "max_extensions": 0})
        results = Results(tmp_path)
        for run in study_state(plan).tuning_runs:
            row = made_up_row(run, 80.0)
            if run.config.optim.lr == 0.1 and run.seed == 1000:
                row |= {"status": "diverged", "delivered": 10.0}
            results.add(row)
        state = study_state(plan, results.rows)
        assert {trial.best for trial in state.trials} == {0.2}
        assert all(trial.scores[0.1] == 45.0 for trial in state.trials)


class TestReportOfTuning:
    def text(
        self, folder: Path, value: Callable[[Run], float] | None = None, **changes: Any
    ) -> str:
        state, results = carry_out(comparing(**changes), folder, value or near(0.1))
        return to_markdown(build_report(state, results, [])[0])

    def test_says_what_was_tried_and_chosen(self, tmp_path: Path) -> None:
        text = self.text(tmp_path, baselines=["data_parallel"])
        assert "with seeds 1000, 1001 (n = 2)" in text
        assert "Tried with one network only: data parallel, one network on 2 processes." in text
        assert (
            "learning rates, chosen on validation images: 0.1 (graft, 2 networks); "
            "0.1 (no exchange, 2 networks); 0.1 (one network, 2 x epochs); 0.1 (data parallel"
        ) in text
        assert "intervals and p-values do not cover that choice" in text

    def test_one_seed_is_called_one_seed(self, tmp_path: Path) -> None:
        tuning = {"rates": [0.05, 0.1, 0.2], "seeds": [7]}
        assert "with seed 7 (n = 1)" in self.text(tmp_path, tuning=tuning)

    def test_a_rate_that_failed_is_told_from_one_that_was_not_tried(self, tmp_path: Path) -> None:
        def value(run: Run) -> float:
            broken = run.phase == "tuning" and run.config.optim.lr == 0.05
            best = 0.4 if run.config.method == "graft" else 0.1
            return math.nan if broken else near(best)(run)

        table = self.text(tmp_path, value).partition("## Learning rates")[2].partition("##")[0]
        lines = [line for line in table.splitlines() if " | failed | " in line]
        rates = {line.split(" | ")[0]: line.count("–") for line in lines}  # 0.4 and 0.8
        assert rates == {
            "| graft, 2 networks": 0,
            "| no exchange, 2 networks": 2,
            "| one network, 2 x epochs": 2,
        }

    def test_a_rate_at_the_edge_makes_the_control_weak(self, tmp_path: Path) -> None:
        tuning = {**TUNED["tuning"], "max_extensions": 0}
        text = self.text(tmp_path, near(0.2), tuning=tuning)
        assert "| no exchange, 2 networks | warning | its best learning rate, 0.2, is at" in text

    def test_validation_runs_of_another_plan_are_counted(self, tmp_path: Path) -> None:
        _, results = carry_out(comparing(), tmp_path, near(0.1))
        other = comparing(recipe={"optim.momentum": 0.5})
        _, conclusions = build_report(study_state(other, results.rows), results, [])
        assert any(line.startswith("18 runs on a validation split are") for line in conclusions)
        assert any("6 test runs of an earlier plan" in line for line in conclusions)


def test_a_plan_without_a_longer_training_says_so() -> None:
    for changes in ({"leave_out": ["one_network"]}, {"primary": "ensemble"}):
        assert any("under-trained" in text for text in study_state(make_plan(**changes)).warnings)
    assert not any("under-trained" in text for text in study_state(make_plan()).warnings)


def test_a_plan_with_few_test_images_says_so() -> None:
    assert study_state(make_plan(recipe={"data.test_samples": 500})).warnings[-1:] == [
        "Only the first 500 test images are used."
    ]


def test_a_pilot_needs_the_first_seeds_of_the_primary_pair(tmp_path: Path) -> None:
    plan = comparing(methods=["graft", "papa"], seeds=[4, 5, 6, 7], baselines=["ema"])
    state = study_state(plan, pilot=True)
    assert {trial.arm.name for trial in state.trials} == {"graft", "no exchange"}
    results = Results(tmp_path)
    for run in state.tuning_runs:
        results.add(made_up_row(run, near(0.1)(run)))
    runs = study_state(plan, results.rows, pilot=True).pilot_runs
    names = [(run.arm.name, run.seed) for run in runs]
    assert names == [(name, seed) for seed in (4, 5, 6) for name in ("graft", "no exchange")]
    keys = {run.key for run in study_state(plan, results.rows).tuning_runs}
    assert set(results.rows.index) <= keys  # the trials of a pilot are those of the comparison


def test_runs_are_ordered_by_seed() -> None:
    runs = study_state(make_plan()).comparison_runs
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)


def test_runs_are_distinct() -> None:
    runs = study_state(make_plan(methods=["graft", "independent"])).comparison_runs
    keys = [run.key for run in runs]
    assert len(keys) == len(set(keys))


def test_state_does_not_depend_on_the_order_of_rows(tmp_path: Path) -> None:
    state, results = carry_out(searching(), tmp_path, best_when_fast_and_four)
    again = study_state(searching(), results.rows[::-1])
    assert str(again.chosen) == str(state.chosen)
    assert [run.key for run in again.comparison_runs] == [run.key for run in state.comparison_runs]
