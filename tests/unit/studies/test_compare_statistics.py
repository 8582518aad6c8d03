from __future__ import annotations

import gc
import math
import random
from collections.abc import Iterator
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up import carry_out, make_plan
from scipy import stats
from statsmodels.stats.multitest import multipletests

from dist_graft.studies import measured_sections, report
from dist_graft.studies.controls import Contrast, Run
from dist_graft.studies.rendering import Table
from dist_graft.studies.statistics import (
    equivalence_p,
    half_width,
    holm,
    minimum_detectable_difference,
    paired_test,
    seeds_needed,
    upper_limit,
)


@pytest.fixture(autouse=True, scope="module")
def _no_garbage_collection() -> Iterator[None]:
    """statsmodels collects garbage in each correction, which takes 0.1 s in a full process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "collect", lambda: 0)
        yield


accuracies = st.floats(0, 100, allow_subnormal=False)


def assert_near(value: float | None, expected: float, relative: float = 1e-9) -> None:
    assert value is not None
    assert math.isclose(value, expected, rel_tol=relative, abs_tol=1e-12)


class TestPairedTest:
    @pytest.mark.parametrize("n", [2, 3, 5, 12])
    def test_is_scipys_paired_t_test(self, n: int) -> None:
        rng = np.random.default_rng(n)
        method, control = rng.normal(87, 0.3, n), rng.normal(86.8, 0.3, n)
        result = paired_test(list(method - control))
        reference = stats.ttest_rel(method, control)
        assert result.n == n
        assert_near(result.mean, float(np.mean(method - control)))
        assert_near(result.deviation, float(np.std(method - control, ddof=1)))
        assert_near(result.p, float(reference.pvalue))

    def test_by_hand(self) -> None:
        # differences 1, 2, 3: mean 2, s = 1, t = 2 sqrt(3); with 2 degrees of freedom
        # p = 1 - t / sqrt(t^2 + 2) = 1 - sqrt(12 / 14)
        assert_near(paired_test([1.0, 2.0, 3.0]).p, 1 - math.sqrt(12 / 14))

    def test_one_seed_has_no_deviation_and_no_p(self) -> None:
        result = paired_test([0.4])
        assert (result.n, result.mean, result.deviation, result.p) == (1, 0.4, None, None)

    def test_no_seeds(self) -> None:
        result = paired_test([])
        assert result.n == 0
        assert math.isnan(result.mean)
        assert result.p is None

    @pytest.mark.parametrize("value", [0.0, 0.1, -3.0])
    def test_equal_differences_have_no_p(self, value: float) -> None:
        result = paired_test([value, value, value])
        assert result.p is None
        assert result.deviation == 0
        assert math.isclose(result.mean, value)

    def test_equal_differences_up_to_rounding_have_no_p(self) -> None:
        assert paired_test([87.1 - 87.0, 86.3 - 86.2, 85.6 - 85.5]).p is None

    @given(st.lists(accuracies, min_size=2, max_size=8))
    def test_p_does_not_depend_on_the_sign(self, differences: list[float]) -> None:
        assert paired_test(differences).p == paired_test([-value for value in differences]).p


def test_upper_limit_of_a_deviation() -> None:
    """By hand: 20% of the chi-squared distribution with 2 degrees are below 2 ln 1.25."""
    assert_near(upper_limit(3, 0.4), 0.4 * math.sqrt(2 / (2 * math.log(1.25))))


class TestHolm:
    def test_textbook_example(self) -> None:
        # m = 4: 0.005 <= 0.0125, 0.01 <= 0.0167, 0.03 > 0.025: the last two are not rejected
        decisions = holm([0.01, 0.04, 0.03, 0.005])
        assert [decision.rejected for decision in decisions] == [True, False, False, True]
        for decision, adjusted in zip(decisions, [0.03, 0.06, 0.06, 0.02], strict=True):
            assert_near(decision.adjusted_p, adjusted)
        for decision, level in zip(decisions, [0.05 / 3, 0.025, 0.025, 0.0125], strict=True):
            assert_near(decision.level, level)

    def test_stops_at_the_first_p_that_is_too_large(self) -> None:
        # 0.03 > 0.025, so 0.04 is not rejected although 0.04 <= 0.05
        assert [decision.rejected for decision in holm([0.03, 0.04])] == [False, False]

    def test_single_p_is_not_adjusted(self) -> None:
        (decision,) = holm([0.049])
        assert decision.rejected
        assert decision.adjusted_p == 0.049
        assert decision.level == 0.05

    def test_missing_p_counts_as_one(self) -> None:
        first, second = holm([None, 0.03])
        assert not first.rejected
        assert first.adjusted_p == 1
        assert not second.rejected  # 0.03 > 0.05 / 2

    def test_empty(self) -> None:
        assert holm([]) == []

    @given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
    def test_rejected_if_the_adjusted_p_is_at_most_alpha(self, values: list[float]) -> None:
        for p, decision in zip(values, holm(values), strict=True):
            assert decision.rejected == (p <= decision.level)
            if not math.isclose(decision.adjusted_p, 0.05, rel_tol=1e-9):
                assert decision.rejected == (decision.adjusted_p <= 0.05)
            assert p <= decision.adjusted_p <= 1

    @given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
    def test_equals_closed_testing_with_bonferroni(self, values: list[float]) -> None:
        """The adjusted p is the largest Bonferroni p over all subsets with the hypothesis."""
        m = len(values)
        for index, decision in enumerate(holm(values)):
            subsets = [
                [values[i] for i in range(m) if mask >> i & 1]
                for mask in range(1, 2**m)
                if mask >> index & 1
            ]
            worst = max(min(1.0, len(subset) * min(subset)) for subset in subsets)
            assert_near(decision.adjusted_p, worst)


class TestWidths:
    @pytest.mark.parametrize("n", [2, 3, 5, 30])
    @pytest.mark.parametrize("level", [0.05, 0.05 / 7])
    def test_half_width_equals_scipys_interval(self, n: int, level: float) -> None:
        low, high = stats.t.interval(1 - level, n - 1, loc=0, scale=0.3 / math.sqrt(n))
        assert_near(half_width(n, 0.3, level), high)
        assert_near(-half_width(n, 0.3, level), low)

    @pytest.mark.parametrize(
        ("n", "level"), [(2, 0.05), (3, 0.01), (5, 0.05), (5, 0.005), (20, 0.05)]
    )
    def test_minimum_detectable_difference_has_a_power_of_80_percent(
        self, n: int, level: float
    ) -> None:
        rng = np.random.default_rng(0)
        truth = minimum_detectable_difference(n, 0.3, level)
        samples = rng.normal(truth, 0.3, (60_000, n))
        t = samples.mean(1) / (samples.std(1, ddof=1) / math.sqrt(n))
        shown = np.mean(t > stats.t.ppf(1 - level / 2, n - 1))
        assert abs(shown - 0.8) < 0.006  # four standard errors

    def test_minimum_detectable_difference_approaches_the_normal_one(self) -> None:
        normal = NormalDist()
        n = 100_000
        expected = (normal.inv_cdf(0.975) + normal.inv_cdf(0.8)) * 0.3 / math.sqrt(n)
        assert_near(minimum_detectable_difference(n, 0.3, 0.05), expected, relative=1e-3)

    def test_minimum_detectable_difference_exceeds_the_half_width(self) -> None:
        for n in range(2, 12):
            assert minimum_detectable_difference(n, 1.0, 0.05) > half_width(n, 1.0, 0.05)


class TestEquivalence:
    @pytest.mark.parametrize("mean", [-0.5, -0.31, -0.1, 0.0, 0.2, 0.3, 0.9])
    @pytest.mark.parametrize("n", [2, 5, 12])
    def test_is_the_larger_of_two_one_sided_tests(self, n: int, mean: float) -> None:
        values = np.linspace(-1, 1, n) * 0.2
        values += mean
        low = stats.ttest_1samp(values, -0.3, alternative="greater").pvalue
        high = stats.ttest_1samp(values, 0.3, alternative="less").pvalue
        p = equivalence_p(n, float(values.mean()), float(values.std(ddof=1)), 0.3)
        assert_near(p, float(max(low, high)))

    @pytest.mark.parametrize("mean", [0.0, 0.1, 0.14, 0.15, 0.2])
    def test_is_shown_exactly_if_the_90_percent_interval_is_inside(self, mean: float) -> None:
        inside = abs(mean) + half_width(10, 0.25, 0.1) < 0.3
        assert (equivalence_p(10, mean, 0.25, 0.3) < 0.05) == inside

    def test_both_answers_occur_above(self) -> None:
        assert equivalence_p(10, 0.0, 0.25, 0.3) < 0.05 < equivalence_p(10, 0.2, 0.25, 0.3)


class TestSeedsNeeded:
    @pytest.mark.parametrize(
        ("deviation", "effect"), [(0.48, 0.3), (0.34, 0.3), (0.1, 0.3), (1.0, 0.3), (0.3, 2.0)]
    )
    @pytest.mark.parametrize(("power", "alpha"), [(0.8, 0.05), (0.91, 0.05), (0.8, 0.005)])
    def test_is_the_first_number_whose_detectable_difference_is_small_enough(
        self, deviation: float, effect: float, power: float, alpha: float
    ) -> None:
        n = seeds_needed(deviation, effect, power, alpha)
        assert minimum_detectable_difference(n, deviation, alpha, power) <= effect * (1 + 1e-6)
        if n > 2:
            fewer = minimum_detectable_difference(n - 1, deviation, alpha, power)
            assert fewer > effect * (1 - 1e-6)

    def test_textbook_value(self) -> None:
        # Cohen's d = 0.5, two-sided 5%, power 80%: 34 pairs (G*Power, two dependent means)
        assert seeds_needed(1.0, 0.5) == 34

    def test_needs_two_seeds_without_variation(self) -> None:
        assert seeds_needed(0.0, 0.3) == 2

    @pytest.mark.parametrize(("deviation", "effect"), [(0.3, 0.0), (-0.1, 0.3), (math.nan, 0.3)])
    def test_rejects_what_has_no_answer(self, deviation: float, effect: float) -> None:
        with pytest.raises(ValueError, match="effect must be above 0"):
            seeds_needed(deviation, effect)


def test_tables_of_a_report_equal_scipy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Difference with its interval, p, and equivalence test, from the rows of the runs."""
    for module in (report, measured_sections):
        monkeypatch.setattr(module, "png", lambda figure: b"")
    plan = make_plan(
        methods=["average", "graft", "local_sgd"],
        seeds=[1, 2, 3, 4, 5],
        leave_out=["one_network"],
    )

    def value_of(run: Run) -> float:
        noise = random.Random(run.key).gauss(0, 0.15)
        return 86 + run.seed + noise + 0.5 * (run.config.method == "graft")

    state, results = carry_out(plan, tmp_path, value_of)
    runs = results.rows.set_index(["arm", "networks", "seed"]).sort_index()

    def differences(contrast: Contrast) -> list[float]:
        method, control = contrast.method, contrast.control
        values = runs.loc[(method.name, method.networks), contrast.outcome]
        return list(values - runs.loc[(control.name, control.networks), contrast.control_outcome])

    def printed(p: float) -> str:
        return f"{p:.3f}" if p >= 0.001 else "<0.001"

    assert state.design is not None
    blocks, _ = report.build_report(state, results, [])
    tables = [b.rows for b in blocks if isinstance(b, Table) and "p (Holm)" in b.header]
    for rows, contrasts in zip(tables, (state.design.primary, state.design.secondary), strict=True):
        samples = [differences(contrast) for contrast in contrasts]
        p_values = [stats.ttest_1samp(sample, 0).pvalue for sample in samples]
        holms = multipletests(p_values, method="holm")[1]
        for row, sample, p in zip(rows, samples, holms, strict=True):
            _, _, difference, n, p_cell, equivalent, *_ = row
            mean, digits = np.mean(sample), len(difference.rpartition(".")[2])
            low, high = stats.t.interval(0.95, 4, loc=mean, scale=stats.sem(sample))
            interval = f"{mean:+.{digits}f} ± {(high - low) / 2:.{digits}f}"
            assert (difference, n) == (interval.replace("-", "−"), "5")
            assert p_cell == printed(p)
            above = stats.ttest_1samp(sample, -0.3, alternative="greater").pvalue
            below = stats.ttest_1samp(sample, 0.3, alternative="less").pvalue
            word = "shown" if max(above, below) < 0.05 else "not shown"
            assert equivalent == f"{word} ({printed(max(above, below))})"
    cells = [cell for rows in tables for row in rows for cell in row]
    for some in ("better", "no difference shown"):
        assert some in cells
