"""Whether an arm was tested: each check on made-up rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from made_up import make_plan
from measured_rows import carry_out_measured

from dist_graft.studies import measured_sections, report, statistics
from dist_graft.studies.checks import (
    Check,
    check_arms,
    check_chance,
    check_coefficients,
    check_doubling,
    check_reactivation,
    check_rounds,
    check_saturation,
    check_soup,
)
from dist_graft.studies.controls import Arm
from dist_graft.studies.measurements import MEASURED
from dist_graft.studies.records import Results
from dist_graft.studies.rendering import Table
from dist_graft.studies.report import build_report
from dist_graft.studies.selection import StudyState
from dist_graft.studies.statistics import ArmResult


def arm_result(
    options: dict[str, Any], *, networks: int = 4, **columns: Sequence[Any]
) -> ArmResult:
    """An arm with one row for each seed; columns have one value for each."""
    arm = Arm(name="an arm", role="method", networks=networks, options=options, group=networks)
    rows = pd.DataFrame(columns or {"seed": [0]})
    defaults = {"status": "ok", "key": [f"run {seed}" for seed in range(len(rows))]}
    rows = rows.assign(**{k: v for k, v in defaults.items() if k not in rows})
    return ArmResult(arm=arm, rows=rows, failed=[], missing=[])


PAPA, WASH = {"method": "papa"}, {"method": "wash"}


@pytest.mark.parametrize(
    ("rounds", "failures"),
    [([0, 0], ["no round took place"]), ([0, 3], []), ([np.nan, np.nan], [])],
)
def test_an_exchange_needs_a_round(rounds: Sequence[float], failures: list[str]) -> None:
    assert list(check_rounds(arm_result({}, rounds=rounds)).failures) == failures


class TestSoup:
    @pytest.mark.parametrize(
        ("soups", "passes"),
        [([89.5, 88.5], True), ([89.01, 89.01], True), ([88.9, 88.9], False), ([10, 10], False)],
    )
    def test_must_be_within_one_point_of_the_mean_member(
        self, soups: list[float], passes: bool
    ) -> None:
        check = check_soup(arm_result(PAPA, mean_of_members=[90, 90], uniform_soup=soups))
        assert (check.not_tested is None) == passes
        assert bool(check.facts) == passes

    def test_prints_pull_and_moves(self) -> None:
        columns = {"mean_of_members": [90, 90], "uniform_soup": [10, 10.5]}
        pull = check_soup(arm_result(PAPA, cumulative_pull=[0.1, 0.14], **columns))
        assert "79.8 points below" in pull.failures[0]
        assert "cumulative pull 0.12 e-folds" in pull.failures[0]
        moves = check_soup(arm_result(WASH, moves_per_scalar=[100.0, 100.0], **columns))
        text = "moves per scalar (mean over the layers) 100"
        assert text in moves.failures[0]
        close = columns | {"uniform_soup": [90.25, 90.25]}
        fact = check_soup(arm_result(WASH, moves_per_scalar=[100.0, 100.0], **close))
        assert fact.facts == [f"soup 0.25 points above the mean member, {text}"]

    def test_of_the_runs_that_did_not_diverge(self) -> None:
        columns = {"mean_of_members": [90, 10], "uniform_soup": [90, 10]}
        one = check_soup(arm_result(PAPA, status=["ok", "diverged"], **columns))
        assert one.facts == ["soup 0.00 points below the mean member"]
        none = check_soup(arm_result(PAPA, status=["diverged", "diverged"], **columns))
        assert none == Check()

    def test_that_was_not_evaluated(self) -> None:
        check = check_soup(arm_result(PAPA, mean_of_members=[90.0], uniform_soup=[np.nan]))
        assert check.failures == ["its soup was not evaluated"]


class TestReactivation:
    @staticmethod
    def check(invalid: Sequence[Any]) -> Check:
        counts = {"invalid_0.1": invalid, "filters": [200] * len(invalid)}
        return check_reactivation(arm_result({}), arm_result({}, **counts))

    def test_fails_without_invalid_filters(self) -> None:
        check = self.check([0, 0])
        assert check.not_tested is not None
        assert "no filter is invalid without exchange" in check.not_tested

    def test_warns_of_few(self) -> None:
        check = self.check([2, 4])
        assert check.not_tested is None
        (text,) = check.warnings
        assert text.startswith("1.5 % of the filters are invalid without exchange")

    @pytest.mark.parametrize(("own", "remark"), [(0.2, False), (0.1, True)])
    def test_says_if_the_learning_rates_differ(self, own: float, remark: bool) -> None:
        control = arm_result({"optim": {"lr": 0.2}}, **{"invalid_0.1": [20], "filters": [200]})
        (text,) = check_reactivation(arm_result({"optim": {"lr": own}}), control).facts
        assert text.endswith(", at other learning rates (0.2)") == remark

    def test_none_at_another_learning_rate_is_a_warning(self) -> None:
        """Grafting may have had filters to reactivate at its own rate."""
        control = arm_result({"optim": {"lr": 0.2}}, **{"invalid_0.1": [0], "filters": [200]})
        check = check_reactivation(arm_result({"optim": {"lr": 0.4}}), control)
        assert check.not_tested is None
        assert "0 % of the filters" in check.warnings[0]
        assert "at other learning rates (0.2)" in check.warnings[0]

    def test_prints_the_share(self) -> None:
        (text,) = self.check([6, 10]).facts
        assert text.startswith("4 % of the filters are invalid without exchange")

    @pytest.mark.parametrize(
        "control", [None, arm_result({}, **{"invalid_0.1": [], "filters": []})]
    )
    def test_warns_if_they_were_not_counted(self, control: ArmResult | None) -> None:
        check = check_reactivation(arm_result({}), control)
        assert check.not_tested is None
        assert len(check.warnings) == 1


class TestCoefficients:
    @staticmethod
    def check(
        low: float, high: float, *, near_half: float = 80.0, options: dict[str, Any] | None = None
    ) -> Check:
        return check_coefficients(
            arm_result(
                options or {},
                coefficient_min=[0.5, low],
                coefficient_max=[high, 0.5],
                **{f"coefficient_{name}": [0.5, 0.5] for name in ("5", "median", "95")},
                coefficient_near_half=[near_half, 90.0],
            )
        )

    @pytest.mark.parametrize(
        ("low", "high", "passes"),
        [
            (0.5, 0.5, False),
            (0.48, 0.52, False),
            (0.485, 0.51, False),
            (0.479, 0.51, True),
            (0.49, 0.521, True),
            (0.3, 0.7, True),
        ],
    )
    def test_must_leave_one_half(self, low: float, high: float, passes: bool) -> None:
        check = self.check(low, high)
        assert (check.not_tested is None) == passes
        (text,) = (*check.failures, *check.facts)
        assert text.startswith(f"coefficients {low:.3f} to {high:.3f}")
        assert "85 % within 0.02 of 1/2" in text

    @pytest.mark.parametrize(("near_half", "warns"), [(89.8, False), (90.0, True), (100.0, True)])
    def test_warns_if_nearly_all_are_near_one_half(self, near_half: float, warns: bool) -> None:
        check = self.check(0.3, 0.7, near_half=near_half)
        assert check.not_tested is None
        text = f"{(near_half + 90) / 2:.0f} % of the coefficients are within 0.02 of 1/2: nearly"
        assert [warning.startswith(text) for warning in check.warnings] == [True] * warns

    def test_of_channels_are_not_checked(self) -> None:
        check = self.check(0.49, 0.51, options={"graft": {"level": "filter"}})
        assert (check.failures, check.facts) == ((), ())
        assert check.warnings == ["coefficients of channels are not checked"]

    def test_warns_if_they_were_not_measured(self) -> None:
        check = check_coefficients(arm_result({}))
        assert check.not_tested is None
        assert len(check.warnings) == 1

    def test_needs_donors(self) -> None:
        none = arm_result({}, rounds=[8, 8], rounds_with_donor=[0.0, 0.0])
        assert check_coefficients(none).failures == ["no round had a donor: nothing was grafted"]
        names = ("min", "5", "median", "95", "max", "near_half")
        columns = {f"coefficient_{name}": [0.3] for name in names}
        few = check_coefficients(arm_result({}, rounds_with_donor=[40.0], **columns))
        assert (few.not_tested, few.warnings) == (None, ["only 40 % of its rounds had a donor"])
        assert not check_coefficients(arm_result({}, rounds_with_donor=[60.0], **columns)).warnings

    def test_need_rounds(self) -> None:
        assert check_coefficients(arm_result({}, rounds=[0, 0])) == Check(warnings=[])

    def test_rounds_without_coefficients_fail(self) -> None:
        check = check_coefficients(arm_result({}, rounds=[8, 8]))
        assert check.failures == ["its rounds have no coefficients"]


class TestSaturation:
    @staticmethod
    def check(accuracy: Sequence[float], options: dict[str, Any] | None = None) -> Check:
        result = arm_result(options or {}, networks=1, key=["a", "b"])
        curves = pd.concat(
            pd.DataFrame({"key": key, "mean_of_members": np.array(accuracy) + shift})
            .rename_axis("epoch")
            .reset_index()
            for key, shift in (("a", -1), ("b", 1), ("another arm", -50))
        )
        return check_saturation(result, curves)

    def test_passes_if_the_last_quarter_adds_little(self) -> None:
        check = self.check([50, 60, 70, 80, 85, 90, 90.1, 90.29])
        assert check.not_tested is None
        assert check.facts == ["the last quarter of its training added 0.29 points"]

    def test_a_loss_is_no_lack_of_training(self) -> None:
        check = self.check([50, 60, 70, 80, 85, 90, 89.5, 89])
        assert not check.failures
        assert check.warnings == ["the last quarter of its training lost 1.00 points"]

    def test_under_trained(self) -> None:
        check = self.check([50, 60, 70, 80, 85, 90, 90.2, 90.4])
        assert check.not_tested is not None
        assert check.not_tested.startswith("under-trained regime: ")
        assert "added 0.40 points (margin 0.3)" in check.not_tested

    @pytest.mark.parametrize(("step_epochs", "remark"), [(3, True), (4, True), (7, False)])
    def test_names_the_last_stage_of_a_step_schedule(self, step_epochs: int, remark: bool) -> None:
        """The last quarter begins in epoch 6 of 8; stages begin in 6, 4 and 7."""
        schedule = {"optim": {"schedule": "step", "step_epochs": step_epochs}}
        (text,) = self.check([50, 60, 70, 80, 85, 90, 90.1, 90.29], schedule).facts
        assert ("in the last stage of the step schedule" in text) == remark

    def test_needs_four_epochs(self) -> None:
        assert "under-trained regime" in str(self.check([90, 90, 90]).not_tested)
        assert self.check([80, 90, 90, 90]).not_tested is None

    def test_curves_of_runs_that_diverged_do_not_count(self) -> None:
        result = arm_result({}, key=["a", "b"], status=["ok", "diverged"])
        points = [("a", epoch, 50 + 10 * epoch) for epoch in range(4)]
        points += [("b", epoch, 10) for epoch in range(4)]
        curves = pd.DataFrame(points, columns=["key", "epoch", "mean_of_members"])
        assert "added 10.00" in str(check_saturation(result, curves).not_tested)

    def test_warns_without_a_curve(self) -> None:
        none = pd.DataFrame({"key": [], "epoch": [], "mean_of_members": []})
        assert len(check_saturation(arm_result({}), none).warnings) == 1


class TestDoubling:
    @staticmethod
    def check(long: Sequence[float], short: Sequence[float], factor: int = 4) -> Check:
        return check_doubling(
            arm_result({}, delivered=long), arm_result({}, delivered=short), factor
        )

    @pytest.mark.parametrize(
        ("gain", "warns"), [(0.59, False), (0.61, True), (0.01, False), (-0.01, True)]
    )
    def test_warns_if_longer_training_helps_or_does_harm(self, gain: float, warns: bool) -> None:
        """Four times the epochs are two doublings, of 0.3 points each; any loss does harm."""
        check = self.check([80 + gain, 90 + gain], [80, 90])
        assert bool(check.warnings) == warns
        assert bool(check.facts) != warns
        assert check.not_tested is None

    def test_has_an_interval_over_the_seeds(self) -> None:
        (text,) = self.check([80.3, 90.5], [80, 90], factor=2).warnings
        # t(0.975, 1) = 12.706, times 0.1414 / sqrt(2)
        assert text.startswith("2 times the epochs gained 0.40 ± 1.27 points per doubling (2 seeds")

    def test_a_loss_makes_a_weak_control(self) -> None:
        (text,) = self.check([78, 88], [80, 90]).warnings
        assert text.startswith("4 times the epochs lost 1.00")
        assert "more training lowers accuracy" in text
        assert self.check([78, 88], [80, 90]).weak
        assert self.check([79.9, 90], [80, 90]).weak
        assert not self.check([82, 92], [80, 90]).weak

    def test_without_a_common_seed(self) -> None:
        check = self.check([np.nan, 90], [80, np.nan])
        assert (check.warnings, check.facts) == ((), ())


class TestChance:
    @pytest.mark.parametrize(("accuracy", "count"), [(10.2, 1), (19.9, 1), (20.1, 0), (90, 0)])
    def test_warns_near_chance(self, accuracy: float, count: int) -> None:
        assert len(check_chance(arm_result({}, score=[accuracy]), "score").warnings) == count

    def test_depends_on_the_number_of_classes(self) -> None:
        many = {"data": {"name": "cifar100"}}
        assert not check_chance(arm_result(many, score=[10.2]), "score").warnings
        assert check_chance(arm_result(many, score=[1.3]), "score").warnings

    def test_counts_divergence_and_heals(self) -> None:
        rows = arm_result({}, score=[90, 90], status=["ok", "diverged"], heals=[2, 1])
        diverged, heals = check_chance(rows, "score").warnings
        assert "seed 1" in diverged
        assert heals.startswith("3 times")


class TestOfAComparison:
    """Checks change verdicts, but neither differences nor Holm's correction."""

    @pytest.fixture(autouse=True)
    @staticmethod
    def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
        for module in (report, measured_sections):
            monkeypatch.setattr(module, "png", lambda figure: b"")

    @staticmethod
    def carry_out(
        folder: Path,
        *,
        soup: float = 0.5,
        invalid: int = 20,
        methods: Any = ("graft", "papa", "average"),
        leave_out: Sequence[str] = ("constant", "shuffled"),
        **columns: Any,
    ) -> tuple[StudyState, Results, list[ArmResult]]:
        """Made-up runs of methods whose long control is saturated."""
        folder.mkdir()
        plan = make_plan(
            methods=methods if isinstance(methods, dict) else list(methods),
            networks=[4],
            seeds=[1, 2, 3],
            recipe={"epochs": 8},
            leave_out=list(leave_out),
        )
        state, results = carry_out_measured(
            plan, folder, lambda run: 86 + run.seed + (run.config.method == "graft"), **columns
        )
        soups = results.rows["mean_of_members"] - soup
        results.rows = results.rows.assign(**{"uniform_soup": soups, "invalid_0.1": invalid})
        results.curves = results.curves.assign(mean_of_members=86.0)
        assert state.design is not None
        arms = [statistics.arm_result(a, plan.seeds, results.rows) for a in state.design.arms]
        return state, results, arms

    def outcomes(self, folder: Path, **changes: Any) -> dict[str, list[str]]:
        """Names of the arms that passed, failed, or have a warning."""
        state, results, arms = self.carry_out(folder / "out", **changes)
        assert state.design is not None
        checks = check_arms(state.design, arms, results.curves, state.plan.primary)
        return {
            kind: [arm.name.partition(",")[0] for arm, check in checks if getattr(check, kind)]
            for kind in ("failures", "warnings", "facts")
        }

    def test_all_pass(self, tmp_path: Path) -> None:
        found = self.outcomes(tmp_path, soup=0.5, invalid=20)
        assert found == {
            "failures": [],
            "warnings": [],
            "facts": ["graft", "papa", "one network"],
        }

    def test_the_long_control_is_compared_with_independent_networks(self, tmp_path: Path) -> None:
        state, results, arms = self.carry_out(tmp_path / "out", soup=0.5, invalid=20)
        assert state.design is not None
        checks = check_arms(state.design, arms, results.curves, state.plan.primary)
        (facts,) = (check.facts for arm, check in checks if arm.name.startswith("one network"))
        assert facts[-1] == (
            "4 times the epochs gained 0.00 points per doubling (3 seeds), less than 0.3"
        )

    def test_a_rate_at_the_edge_makes_a_control_weak(self, tmp_path: Path) -> None:
        state, results, arms = self.carry_out(tmp_path / "out", soup=0.5, invalid=20)
        assert state.design is not None
        edge = [arm.key for arm in state.design.arms if arm.name in ("graft", "no exchange")]
        checks = check_arms(state.design, arms, results.curves, state.plan.primary, edge)
        found = {arm.name: check for arm, check in checks if check.warnings}
        assert list(found) == ["graft", "no exchange"]
        assert [check.weak for check in found.values()] == [False, True]
        assert found["graft"].warnings == [
            "its best learning rate, 0.1, is at the edge of those whose trials succeeded"
        ]

    def test_coefficients_of_one_half_are_no_grafting(self, tmp_path: Path) -> None:
        half = {"coefficient_min": 0.49, "coefficient_max": 0.51}
        assert self.outcomes(tmp_path, soup=0.5, invalid=20, **half)["failures"] == ["graft"]

    def test_arms_without_a_round_were_not_tested(self, tmp_path: Path) -> None:
        methods, leave_out = ("graft", "diloco", "average"), ["shuffled"]
        found = self.outcomes(tmp_path, methods=methods, leave_out=leave_out, rounds=0)
        assert sorted(found["failures"]) == ["average", "constant", "diloco", "graft"]

    @pytest.mark.parametrize("delivers", ["member", "checkpoints"])
    def test_papa_must_form_a_soup_whatever_it_delivers(
        self, delivers: str, tmp_path: Path
    ) -> None:
        methods = {"papa": {"delivers": delivers}, "average": {"delivers": "soup"}}
        found = self.outcomes(tmp_path, soup=1.5, methods=methods)
        assert found["failures"] == ["papa", "average"]

    def test_rows_of_older_versions_have_no_measurements(self, tmp_path: Path) -> None:
        state, results, arms = self.carry_out(tmp_path / "out", soup=0.5, invalid=20)
        old = [
            replace(result, rows=result.rows.drop(columns=list(MEASURED), errors="ignore"))
            for result in arms
        ]
        assert state.design is not None
        checks = check_arms(state.design, old, results.curves, state.plan.primary)
        texts = [text for _, check in checks for text in (*check.warnings, *check.failures)]
        assert texts == ["its coefficients were not measured"]

    def test_failures_change_verdicts_only(self, tmp_path: Path) -> None:
        tables = []
        for soup, invalid in ((0.5, 20), (1.5, 0)):
            state, results, _ = self.carry_out(tmp_path / str(soup), soup=soup, invalid=invalid)
            blocks, _ = build_report(state, results, [])
            tables.append(next(b for b in blocks if isinstance(b, Table) and "n" in b.header))
        passed, failed = tables
        assert "not tested" not in {row[-1] for row in passed.rows}
        verdicts = {row[0]: row[-1] for row in failed.rows}
        assert verdicts["graft, 4 networks"] == verdicts["papa, 4 networks"] == "not tested"
        assert verdicts["average, 4 networks"] != "not tested"
        for before, after in zip(passed.rows, failed.rows, strict=True):
            assert before[2:5] == after[2:5]  # difference, n, p

    @staticmethod
    def rows(state: StudyState, results: Results, column: str) -> list[tuple[str, ...]]:
        """Rows of the report's tables that have this column."""
        blocks, _ = build_report(state, results, [])
        tables = [b for b in blocks if isinstance(b, Table) and column in b.header]
        return [tuple(row) for table in tables for row in table.rows]

    def test_a_rising_long_training_is_no_control(self, tmp_path: Path) -> None:
        state, results, arms = self.carry_out(tmp_path / "out")
        (long,) = (result for result in arms if result.arm.name.startswith("one network"))
        of_long = results.curves["key"].isin(long.rows["key"])
        results.curves.loc[of_long, "mean_of_members"] += results.curves["epoch"]
        verdicts = {row[-1] for row in self.rows(state, results, "p (Holm)") if "one" in row[1]}
        assert verdicts == {"not tested"}

    def test_diverged_and_healed_runs_are_named(self, tmp_path: Path) -> None:
        state, results, arms = self.carry_out(tmp_path / "out")
        graft, *_ = (result.rows["key"] for result in arms if result.arm.name == "graft")
        results.rows.loc[graft[2], "status"] = "diverged"
        results.rows.loc[graft[3], "heals"] = 2
        rows = self.rows(state, results, "numbers")
        warnings = [text for _, word, text in rows if word == "warning"]
        assert [text[:23] for text in warnings] == [
            "diverged with seed 2, w",
            "2 times, a network that",
        ]

    def test_a_long_training_that_lowers_accuracy_is_a_weak_control(self, tmp_path: Path) -> None:
        state, results, arms = self.carry_out(tmp_path / "out")
        (long,) = (result for result in arms if result.arm.name.startswith("one network"))
        results.rows.loc[long.rows["key"], "delivered"] -= [1.99, 2.0, 2.01]
        verdicts = {row[-1] for row in self.rows(state, results, "p (Holm)") if "one" in row[1]}
        assert verdicts == {"better (weak control)"}
