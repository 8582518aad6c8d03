"""The report: verdicts, numbers in its tables, and self-contained files."""

from __future__ import annotations

import base64
import hashlib
import math
import re
import struct
import zlib
from collections.abc import Iterable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from made_up import carry_out, made_up_curve, made_up_row, make_plan
from matplotlib.figure import Figure
from measured_rows import carry_out_measured

from dist_graft.config import DataConfig
from dist_graft.studies import measured_sections, plots, report
from dist_graft.studies.conclusions import (
    conclusion,
    digits_for,
    findings,
    format_signed,
    format_spread,
    overall_conclusions,
    qualified_verdict,
    under_trained_sizes,
    verdict,
)
from dist_graft.studies.controls import Arm, Contrast, Run
from dist_graft.studies.measured_sections import (
    beside_published,
    built_in_method,
    calibration,
    costs,
    differences_between_networks,
    image_sampling,
    read_published,
    superseded,
    training_images,
    without_average,
)
from dist_graft.studies.plan import BUILT_IN, Plan
from dist_graft.studies.records import Results, Start, read_starts, record_start
from dist_graft.studies.rendering import (
    Block,
    Code,
    Heading,
    Items,
    Paragraph,
    Picture,
    Table,
    to_html,
    to_markdown,
)
from dist_graft.studies.report import build_report, write_report
from dist_graft.studies.selection import StudyState, study_state
from dist_graft.studies.statistics import (
    ArmResult,
    ContrastResult,
    arm_result,
    holm,
    paired_test,
)
from dist_graft.studies.train_options import Delivery, TrainOptions

PNG = b"\x89PNG\r\n\x1a\n"


class Page(HTMLParser):
    """Text of an HTML document, and the files that it refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.open_tags: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open_tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open_tags.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def table_of(blocks: Iterable[Block], *columns: str) -> list[dict[str, str]]:
    """Rows of the first table that has these columns."""
    table = next(b for b in blocks if isinstance(b, Table) and set(columns) <= set(b.header))
    return [dict(zip(table.header, row, strict=True)) for row in table.rows]


def numbers(text: str) -> list[float]:
    return [float(number.replace("−", "-")) for number in re.findall(r"[+−]?\d+\.?\d*", text)]


# A comparison with one failed run


def plan(**changes: Any) -> Plan:
    content = {
        "name": "fashion",
        "recipe": {"epochs": 8},
        "methods": {"graft": None, "dlr": {"optim.lr_diversity": "cosine"}},
        "networks": [2, 4],
        "seeds": [1, 2, 3],
        "leave_out": ["shuffled"],
    }
    return make_plan(**content | changes)


def value_of(run: Run) -> float:
    if run.arm.name == "dlr" and run.seed == 3 and run.arm.networks == 4:
        return math.nan
    noise = int(run.key, 16) % 100 / 1000
    return 86.0 + run.seed / 10 + noise + (2 if run.config.method == "graft" else 0)


Written = tuple[Path, StudyState, Results, list[Block]]
"""Directory, state, results and blocks of a report."""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    out = tmp_path_factory.mktemp("comparison")
    record_start(plan(), out, runs_before=0, command=["dist-graft", "compare", "my plan.yaml"])
    state, results = carry_out_measured(plan(), out, value_of)
    blocks, conclusions = build_report(state, results, read_starts(out))
    assert blocks[1:3] == [Paragraph(conclusions[0]), Paragraph(conclusions[1], "summary")]
    write_report("fashion", blocks, out)
    return out, state, results, blocks


class TestReport:
    def test_contains_every_run_arm_and_control(self, written: Written) -> None:
        out, state, results, _ = written
        assert len(results.rows) > 20
        assert state.design is not None
        contrasts = (*state.design.primary, *state.design.secondary)
        names = [arm.label for arm in state.design.arms]
        names += [contrast.control_name for contrast in contrasts]
        for text in ((out / "report.md").read_text(), Page((out / "report.html").read_text()).text):
            for name in (*results.rows.index, *names, *state.design.omitted):
                assert name in text

    def test_is_self_contained(self, written: Written) -> None:
        text = (written[0] / "report.html").read_text()
        page = Page(text)
        assert page.open_tags == []
        assert page.loaded
        assert all(source.startswith("data:image/png;base64,") for source in page.loaded)
        assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", text)
        assert "<script" not in text
        assert "@media print" in text

    def test_has_pictures_of_modest_size(self, written: Written) -> None:
        out = written[0]
        pictures = {path.name: path.read_bytes() for path in (out / "pictures").iterdir()}
        names = ["coefficients", "cost", "differences", "filters", "outcomes", "primary"]
        names += ["published"]
        names += [f"{kind}_{k}_networks" for kind in ("curves", "cost_curves") for k in (2, 4)]
        assert sorted(pictures) == sorted(f"{name}.png" for name in names)
        embedded = [
            base64.b64decode(source.partition(",")[2])
            for source in Page((out / "report.html").read_text()).loaded
        ]
        assert sorted(embedded) == sorted(pictures.values())
        for content in pictures.values():
            assert content.startswith(PNG)
            width, height = struct.unpack(">II", content[16:24])
            assert 900 <= width <= 1200
            assert height <= 1600
            assert len(content) < 150_000
        linked = re.findall(r"\]\((pictures/\S+\.png)\)", (out / "report.md").read_text())
        assert sorted(linked) == sorted(f"pictures/{name}" for name in pictures)

    def test_begins_with_what_is_missing_and_the_conclusion(self, written: Written) -> None:
        out, _, _, blocks = written
        missing, first = [block.text for block in blocks if isinstance(block, Paragraph)][:2]
        assert missing.startswith("This report is incomplete: ")
        lines = [line for line in (out / "report.md").read_text().splitlines() if line]
        assert lines[:3] == ["# Comparison: fashion", missing, f"**{first}**"]

    def test_counts_failed_runs(self, written: Written) -> None:
        _, state, results, blocks = written
        count = len(state.comparison_runs)
        (text,) = [b.text for b in blocks if isinstance(b, Paragraph) and "incomplete" in b.text]
        assert numbers(text) == [count - 1, count, 1]
        (failed,) = results.rows.index[results.rows["status"] == "failed"]
        rows = {row["run"]: row for row in table_of(blocks, "run", "core-s")}
        assert rows[failed]["on"] == "failed"
        assert rows[failed]["outcome"] == rows[failed]["each member"] == "–"
        errors = [b.texts for b in blocks if isinstance(b, Items)]
        assert ["dlr, K = 4, seed 3: weights are not finite"] in errors
        contrasts = table_of(blocks, "min. detectable")
        assert {row["n"] for row in contrasts if row["method"] == "dlr, 4 networks"} == {"2"}

    def test_means_and_deviations_equal_numpys(self, written: Written) -> None:
        _, state, results, blocks = written
        runs = [run for run in state.comparison_runs if run.arm.label == "graft, 4 networks"]
        rows = results.rows.loc[[run.key for run in runs]]

        def spread(column: str, digits: int) -> str:
            values = rows[column].to_numpy(dtype=float)
            return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}"

        primary, outcomes, filters, cost = (
            {row["arm"]: row for row in table_of(blocks, column)}["graft, 4 networks"]
            for column in ("each seed", "uniform soup", "filters counted", "wall time, s")
        )
        assert primary["mean ± std"] == spread("delivered", 2)
        assert numbers(primary["each seed"]) == rows["delivered"].round(2).tolist()
        assert outcomes["ensemble"] == spread("ensemble", 2)
        assert outcomes["uniform soup, batch norm averaged"] == spread("uniform_soup_as_is", 2)
        shares = 100 * rows["invalid_0.1"].to_numpy(dtype=float) / 240
        assert filters["L1 norm below 0.1, %"] == f"{shares.mean():.1f} ± {shares.std(ddof=1):.1f}"
        assert filters["filters counted"] == "240"
        assert cost["CPU time, core-s"] == spread("core_seconds", 1)

    def test_differences_are_paired_by_seed(self, written: Written) -> None:
        _, state, results, blocks = written
        method, control = (
            results.rows.loc[
                [run.key for run in state.comparison_runs if run.arm.label == label],
                "delivered",
            ].to_numpy()
            for label in ("graft, 2 networks", "no exchange, 2 networks")
        )
        row = table_of(blocks, "min. detectable")[0]
        assert (row["method"], row["control"]) == ("graft, 2 networks", "no exchange")
        mean = np.mean(method - control)
        assert numbers(row["difference"])[0] == pytest.approx(mean, abs=0.005)

    def test_tables_of_measurements_equal_the_rows(self, written: Written) -> None:
        _, state, results, blocks = written
        runs = [run for run in state.comparison_runs if run.arm.label == "graft, 4 networks"]
        rows = results.rows.loc[[run.key for run in runs]]
        calibration, apart, coefficients, cost = (
            {row["arm"]: row for row in table_of(blocks, column)}["graft, 4 networks"]
            for column in ("NLL, members", "disagreement, %", "median", "moved, MB")
        )
        assert numbers(calibration["NLL, members"])[0] == round(rows["nll"].mean(), 3)
        assert calibration["delivers"] == "member"
        assert numbers(apart["disagreement, %"])[0] == round(rows["disagreement"].mean(), 2)
        assert float(coefficients["95%"]) == rows["coefficient_95"].mean()
        assert float(cost["moved, MB"]) == pytest.approx(rows["bytes_moved"].mean() / 1e6)
        assert float(cost["images seen, million"]) == rows["images_seen"].mean() / 1e6
        assert (cost["heals"], cost["diverged runs"]) == ("0", "0")

    def test_head_names_the_setting(self, written: Written) -> None:
        blocks = written[3]
        (index,) = (i for i, block in enumerate(blocks) if block == Heading(2, "Setting"))
        assert index <= 4
        setting = blocks[index + 1]
        assert isinstance(setting, Items)
        facts = dict(text.split(": ", 1) for text in setting.texts)
        assert facts["data"] == "fashion-mini, all training images, all test images"
        assert facts["model"] == "resnet20"
        assert facts["training"].startswith("8 to 32 epochs, batch size 128")
        assert "other options of the recipe" not in facts
        assert facts["images seen by an arm"] == "160,000 to 320,000"
        assert facts["optimizer steps of a network"] == "632 to 2,528"
        assert "core" in facts["hardware"]
        assert facts["seeds"].startswith("3. They share their training and test images")

    def test_names_runs_that_two_tables_share(self, written: Written) -> None:
        blocks = written[3]
        (text,) = [
            b.text for b in blocks if isinstance(b, Paragraph) and b.text.startswith("Both tables")
        ]
        assert "graft, 2 networks" in text
        assert "one network" not in text

    def test_states_its_provenance(self, written: Written) -> None:
        out, _, _, blocks = written
        plan_yaml = (out / "plan.yaml").read_bytes()
        facts = dict(
            text.split(": ", 1)
            for block in blocks
            if isinstance(block, Items)
            for text in block.texts
            if ": " in text
        )
        assert hashlib.sha256(plan_yaml).hexdigest() in facts["plan"]
        assert facts["command"] == "dist-graft compare 'my plan.yaml'"
        assert "core" in facts["hardware"]
        assert facts["versions of the runs"] == "dist_graft 0.1.0 torch 2.14.1"
        assert blocks[-1] == Code(plan_yaml.decode())

    def test_names_the_commits(self, written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
        out, state, results, _ = written
        monkeypatch.setattr(report, "git_commit", lambda: "feed-dirty")
        (start,) = read_starts(out)
        starts = [replace(start, commit=commit) for commit in ("aaa", "bbb-dirty", "aaa", "")]
        _, facts, _ = report._provenance(state, results.rows, starts)
        assert isinstance(facts, Items)
        assert [text for text in facts.texts if text.startswith("commit ")] == [
            "commit of the report: feed-dirty",
            "commit of the comparison: aaa",
            "commit of the comparison: bbb-dirty",
            "commit of the runs: 0123abcd",
        ]


class TestIncompleteReport:
    @pytest.mark.parametrize("share", [0.0, 0.5])
    def test_counts_missing_runs(self, share: float, written: Written, tmp_path: Path) -> None:
        results = Results(tmp_path)
        rows = written[2].rows
        results.rows = rows.iloc[: int(share * len(rows))]
        state = study_state(plan(), results.rows)
        blocks, conclusions = build_report(state, results, [])
        text = next(b.text for b in blocks if isinstance(b, Paragraph) and "incomplete" in b.text)
        runs = state.comparison_runs
        known = sum(run.key in results.rows.index for run in runs)
        assert numbers(text) == [known, len(runs), len(runs) - known]
        if share == 0:
            assert overall_conclusions([]) == conclusions[1:2]

    def test_with_one_seed_and_one_network(self, tmp_path: Path) -> None:
        single = plan(seeds=[1], networks=[1], methods={"internal": None})
        state, results = carry_out(single, tmp_path, value_of)
        blocks, conclusions = build_report(state, results, [])
        assert overall_conclusions([]) == conclusions[:1]
        (row,) = table_of(blocks, "min. detectable")
        assert (row["n"], row["p (Holm)"], row["conclusion"]) == ("1", "–", "no conclusion")

    def test_during_and_after_a_search(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for module in (report, measured_sections):
            monkeypatch.setattr(module, "png", lambda figure: PNG)  # drawn by other tests
        search = {
            "recipes": {"plain": None, "fast": {"optim.lr": 0.4}, "many": {"networks": 3}},
            "seeds": [0],
            "confirm_seeds": [10, 11, 12, 13, 14],
        }
        tuning = {"rates": [0.1, 0.2], "max_extensions": 0}
        searching = plan(seeds=[], search=search, networks=[2], tuning=tuning)
        state, results = carry_out(searching, tmp_path, value_of)
        blocks, _ = build_report(state, results, [])
        regimes = table_of(blocks, "regime")
        options = [(row["regime"], row["options"], row["networks"]) for row in regimes[::2]]
        assert options == [
            ("plain", "recipe unchanged", "2"),
            ("fast", "optim.lr=0.4", "2"),
            ("many", "networks=3", "3"),
        ]
        for row in regimes:
            gain = float(row["method, %"]) - float(row["best reference, %"])
            assert numbers(row["gain ± std"])[0] == pytest.approx(gain, abs=0.011)
        assert [row[""] for row in regimes].count("chosen") == 1
        assert {row["chosen"] for row in table_of(blocks, "chosen", "0.1")} <= {"0.1", "0.2", "–"}
        assert len(table_of(blocks, "chosen", "0.1")) == len(state.trials)

        results.rows = results.rows.iloc[:0]
        blocks, _ = build_report(study_state(searching, results.rows), results, [])
        assert len(table_of(blocks, "regime")) == 6
        with pytest.raises(StopIteration):
            table_of(blocks, "min. detectable")


class TestChangedPlan:
    """Runs of a plan that was changed after it had results."""

    @staticmethod
    def build(
        folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> tuple[Plan, Plan, Results, list[Start]]:
        """Plans of three and of two seeds, of which the second was made after the results."""
        for module in (report, measured_sections):
            monkeypatch.setattr(module, "png", lambda figure: PNG)
        first, second = (
            make_plan(name="p", recipe={"epochs": 8}, methods=["average"], seeds=seeds)
            for seeds in ([1, 2, 3], [1, 2])
        )
        record_start(first, folder, runs_before=0, command=["compare"])
        _, results = carry_out(first, folder, value_of)
        record_start(
            second, folder, runs_before=len(results.rows), tests_before=9, command=["compare"]
        )
        return first, second, results, read_starts(folder)

    def test_lists_the_runs_that_it_left_out(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        _, second, results, starts = self.build(tmp_path, monkeypatch)
        blocks, conclusions = build_report(study_state(second, results.rows), results, starts)
        assert isinstance(blocks[2], Items)
        texts = list(blocks[2].texts)
        assert any("when 9 runs had results, 9 of them on the test set." in t for t in texts)
        assert any(text.startswith("3 test runs of an earlier plan are not used") for text in texts)
        assert set(texts) <= set(conclusions)
        rows = table_of(blocks, "unused outcome")
        assert [row["seed"] for row in rows] == ["3"] * 3
        run = study_state(make_plan(name="p", recipe={"epochs": 8}, methods=["average"], seeds=[3]))
        value = results.rows.loc[run.comparison_runs[0].key, "delivered"]
        assert float(rows[0]["unused outcome"]) == pytest.approx(value, abs=0.006)
        assert "earlier plan: sha256" in to_markdown(blocks)

    def test_seeds_removed_after_a_pilot_are_told_from_others(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        _, second, results, starts = self.build(tmp_path, monkeypatch)
        pilot = replace(starts[0], command="dist-graft compare p.yaml --pilot")
        state = study_state(second, results.rows)
        for before, remark in (([pilot], True), ([pilot, starts[0]], False), ([], False)):
            texts = build_report(state, results, [*before, starts[1]])[1]
            (text,) = [text for text in texts if "plan was changed" in text]
            assert text.endswith("(of a pilot, which prints no test accuracies).") == remark

    def test_a_later_plan_replaced_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first, _, results, starts = self.build(tmp_path, monkeypatch)
        state = study_state(first, results.rows)
        text = to_markdown(build_report(state, results, starts)[0])
        assert "later plan: sha256" in text
        assert "earlier plan" not in text
        text = to_markdown(build_report(state, results, starts[:1])[0])
        assert "plan was changed" not in text


def test_superseded_rows_are_shown_with_the_reason(tmp_path: Path) -> None:
    small = plan(networks=[2], methods={"average": None}, seeds=[1, 2], recipe={"epochs": 4})
    state, results = carry_out(small, tmp_path, value_of)
    assert superseded(results, small.primary) == []
    first, second = state.comparison_runs[:2]
    results.add(made_up_row(first, 90.0) | {"finished": "later", "reason": "a bug in the schedule"})
    results.add(made_up_row(second, 0.0, error="out of memory"))
    results.add(made_up_row(second, 91.0) | {"reason": "the earlier attempt failed"})
    (row,) = [
        row
        for row in table_of(superseded(results, small.primary), "before")
        if row["arm"] == first.arm.name and row["seed"] == str(first.seed)
    ]
    assert numbers(row["before"])[0] == pytest.approx(value_of(first), abs=0.006)
    assert row["after"].startswith("90.00 (later, ")
    assert row["reason"] == "a bug in the schedule"
    results.all_rows = results.all_rows.assign(reason="a bug in the schedule")
    rows = table_of(superseded(results, small.primary), "before")
    assert {row["reason"] for row in rows} == {"a bug in the schedule"}


def test_superseded_rows_of_an_arm_that_left_the_plan_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (report, measured_sections):
        monkeypatch.setattr(module, "png", lambda figure: PNG)
    before, after = (
        make_plan(recipe={"epochs": 1}, methods=methods, seeds=[1])
        for methods in (["average", "wash"], ["average"])
    )
    _, results = carry_out(before, tmp_path, value_of)
    (run,) = (r for r in study_state(before).comparison_runs if r.arm.name == "wash")
    results.add(made_up_row(run, 80.0) | {"reason": "too few moves"})
    blocks, _ = build_report(study_state(after, results.rows), results, [])
    (row,) = table_of(blocks, "before", "after", "reason")
    assert (row["arm"], row["reason"]) == ("wash", "too few moves")


def test_a_complete_report_begins_with_the_conclusion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (report, measured_sections):
        monkeypatch.setattr(module, "png", lambda figure: PNG)
    small = plan(networks=[2], methods={"average": None}, seeds=[1, 2], recipe={"epochs": 4})
    blocks, conclusions = build_report(*carry_out(small, tmp_path, value_of), [])
    assert blocks[1] == Paragraph(conclusions[0], "summary")


def test_runs_that_await_their_repetition_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (report, measured_sections):
        monkeypatch.setattr(module, "png", lambda figure: PNG)
    small = plan(networks=[2], methods={"average": None}, seeds=[1, 2], recipe={"epochs": 4})
    state, results = carry_out(small, tmp_path, value_of)
    options: dict[str, Any] = {"runs_before": 4, "command": ["dist-graft"], "redo": "average"}
    record_start(small, tmp_path, **options, reason="a bug")
    starts = read_starts(tmp_path)
    runs = [run for run in state.comparison_runs if run.arm.name == "average"]
    new = {"finished": starts[0].time, "reason": "a bug"}
    for count, run in zip((2, 1, 0), (*runs, None), strict=True):
        missing = build_report(state, results, starts)[1][0]
        text = f"{count} are still to be repeated, and count as they were (average, 2 networks)"
        assert (text in missing) == (count > 0)
        assert missing.startswith("This report is incomplete") == (count > 0)
        if run:
            results.add(made_up_row(run, 80.0) | new)


def test_arms_that_are_judged_by_another_outcome_are_shown_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With uniform soups, networks without exchange are judged by what they deliver."""
    for module in (report, measured_sections):
        monkeypatch.setattr(module, "png", lambda figure: PNG)
    soups = plan(
        networks=[2],
        methods={"graft": {"delivers": "soup"}},
        seeds=[1, 2],
        recipe={"epochs": 4},
        primary="uniform_soup",
        baselines=["local_sgd"],
    )
    state, results = carry_out(soups, tmp_path, value_of)
    blocks, _ = build_report(state, results, [])
    rows = {row["arm"]: numbers(row["each seed"]) for row in table_of(blocks, "each seed", "role")}
    assert state.design is not None
    for arm in state.design.arms:
        exchanges = arm.name in ("graft", "constant", "local SGD")
        outcome = "uniform_soup" if exchanges else "delivered"
        expected = arm_result(arm, [1, 2], results.rows).values(outcome)
        assert rows[arm.label] == pytest.approx(expected.tolist(), abs=0.006)
    (note,) = [b.text for b in blocks if isinstance(b, Paragraph) and b.text.startswith("Judged,")]
    assert note.endswith(": no exchange, 2 networks; one network, 2 x epochs.")


def test_diverged_runs_count(tmp_path: Path) -> None:
    small = plan(networks=[2], methods={"average": None}, recipe={"epochs": 4})
    state, results = carry_out(small, tmp_path, value_of)
    run = state.comparison_runs[0]
    results.rows.loc[run.key, ["status", "largest_lr_member"]] = ["diverged", 10.0]
    found = arm_result(run.arm, small.seeds, results.rows)
    assert found.diverged == [run.seed]
    assert found.values("largest_lr_member")[run.seed] == 10.0
    assert len(found.rows) == 3
    assert found.failed == []


def test_outcomes_that_cannot_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured_sections, "png", lambda figure: PNG)
    small = plan(networks=[2], methods={"average": None}, recipe={"epochs": 4})
    state, results = carry_out(small, tmp_path, value_of)
    names = ["largest_lr_member", "mean_of_members", "ensemble", "uniform_soup"]
    results.rows = results.rows.assign(**dict.fromkeys(names, np.nan))
    blocks, _ = build_report(state, results, [])
    assert "Members, ensembles and soups" in [b.text for b in blocks if isinstance(b, Heading)]
    assert "outcomes" not in [b.name for b in blocks if isinstance(b, Picture)]


def test_simulated_speeds_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (report, measured_sections):
        monkeypatch.setattr(module, "png", lambda figure: PNG)
    for method, count in (("graft-files", 2), ("average", 0)):
        small = plan(networks=[2], methods=[method], recipe={"epochs": 4}, seeds=[1])
        (folder := tmp_path / method).mkdir()
        state, results = carry_out(small, folder, value_of)
        blocks, _ = build_report(state, results, [])
        text = "imes include the pauses of simulated slow networks: graft-files, 2 networks"
        assert to_markdown(blocks).count(text) == count


def test_head_names_the_other_options_of_the_recipe(tmp_path: Path) -> None:
    recipe = {"data.augment": False, "model.kwargs": {"stem_stride": 2}, "optim.schedule": "step"}
    asked = plan(recipe={"epochs": 8, **recipe})
    state, results = carry_out_measured(asked, tmp_path, value_of)
    blocks, _ = build_report(state, results, [])
    line = (
        "other options of the recipe: data.augment False, model.kwargs {'stem_stride': 2}, "
        "optim.schedule step"
    )
    assert line in to_markdown(blocks)


def test_seeds_with_their_own_images_are_named() -> None:
    shared = image_sampling(DataConfig())
    assert "do not cover" in shared
    assert "held out" not in shared
    own = image_sampling(DataConfig(val_fraction=0.375))
    assert "share their test images" in own
    assert "share their training" not in own
    assert "Two seeds have about 62 % of their training images in common" in own


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "all training images"),
        ({"train_samples": 2000}, "the first 2,000 training images"),
        (
            {"train_samples": 16000, "val_fraction": 0.375},
            "10,000 of the first 16,000 training images; the other 6,000 are held out in each run",
        ),
        ({"val_fraction": 0.1}, "all training images, of which 10 % are held out in each run"),
    ],
)
def test_images_that_a_network_trains_on(options: dict[str, Any], text: str) -> None:
    assert training_images(DataConfig(**options)) == text


def test_arms_that_deliver_an_average_or_an_ensemble_are_named() -> None:
    arms = [
        replace(arm(kind), explicit_delivery=kind)
        for kind in ("member", "soup", "ema", "checkpoints", "snapshots")
    ]
    results = [ArmResult(arm=each, rows=pd.DataFrame(), failed=[], missing=[]) for each in arms]
    assert without_average(results[:1]) == ""
    labels = "soup, 4 networks; ema, 4 networks; checkpoints, 4 networks; snapshots, 4 networks"
    assert without_average(results).endswith(f"that they deliver: {labels}.")


@pytest.mark.parametrize(
    ("kind", "column"), [("soup", "soup_nll"), ("snapshots", "ensemble_nll"), ("ema", None)]
)
def test_delivered_models_with_a_likelihood_are_not_shown_as_trained(
    kind: Delivery, column: str | None
) -> None:
    values = {"status": ["ok"], "delivers": [kind], "nll": [0.5]}
    rows = pd.DataFrame(values | ({column: [0.4]} if column else {}))
    delivering = replace(arm("own"), explicit_delivery=kind)
    _, text, _ = calibration([ArmResult(arm=delivering, rows=rows, failed=[], missing=[])])
    assert isinstance(text, Paragraph)
    assert ("as trained" in text.text) == (column is None)


def test_diverged_runs_are_left_out_of_measurements() -> None:
    rows = pd.DataFrame(
        {
            "status": ["ok", "diverged", "ok"],
            "delivers": ["member"] * 3,
            "nll": [0.5, 2.3, 0.7],
            "calibration_error": [1.0, 50.0, 3.0],
            "disagreement": [4.0, 90.0, 6.0],
        },
        index=[1, 2, 3],
    )
    result = ArmResult(arm=GRAFT, rows=rows, failed=[], missing=[])
    for section, values in (
        (calibration, ["0.600 ± 0.141", "2.00 ± 1.41"]),
        (differences_between_networks, ["5.00 ± 1.41"]),
    ):
        _, text, table = section([result])
        assert isinstance(text, Paragraph)
        assert isinstance(table, Table)
        assert text.text.endswith("are left out: graft, 4 networks (seed 2).")
        assert list(table.rows[0][2:]) == values
        _, text, _ = section([replace(result, rows=rows[rows["status"] == "ok"])])
        assert isinstance(text, Paragraph)
        assert "left out" not in text.text


def test_costs_count_heals_and_diverged_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured_sections, "png", lambda figure: PNG)
    rows = pd.DataFrame(
        {
            "status": ["ok", "diverged", "diverged"],
            "wall_seconds": [1.0, 2.0, 3.0],
            "core_seconds": [2.0, 3.0, 4.0],
            "heals": [0, 2, 3],
        },
        index=[1, 2, 3],
    )
    result = ArmResult(arm=GRAFT, rows=rows, failed=[], missing=[])
    blocks = costs([result])
    (row,) = table_of(blocks, "heals")
    assert (row["heals"], row["diverged runs"]) == ("5", "2")
    replicas: TrainOptions = {"epochs": 1, "runtime": {"replicas": 2}}
    parallel = replace(result, arm=replace(arm("parallel"), networks=1, options=replicas))
    texts = [
        " ".join(block.text for block in found if isinstance(block, Paragraph))
        for found in (blocks, costs([result, parallel]))
    ]
    assert ["without the gradients of runtime.replicas" in text for text in texts] == [False, True]


def test_filters_are_compared_by_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of an earlier version count the filters of one member."""
    monkeypatch.setattr(report, "png", lambda figure: PNG)
    rows = pd.DataFrame(
        {
            **{"filters": [240, 960, 960], "invalid_0.1": [24, 48, 960]},
            **{"invalid_0.01": [0, 48, 960], "status": ["ok", "ok", "diverged"]},
        },
        index=[1, 2, 3],
    )
    result = ArmResult(arm=GRAFT, rows=rows, failed=[], missing=[])
    blocks = report._invalid_filters([result])
    assert "left out: graft, 4 networks (seed 3)" in str(blocks[1])
    (row,) = table_of(blocks, "filters counted")
    assert row == {
        "arm": "graft, 4 networks",
        "L1 norm below 0.1, %": "7.5 ± 3.5",
        "L1 norm below 0.01, %": "2.5 ± 3.5",
        "filters counted": "240, 960",
    }


def test_averages_have_columns_of_their_own() -> None:
    average = replace(arm("ema"), explicit_delivery="ema")
    values = {"status": ["ok"], "delivers": ["ema"], "nll": [0.5], "average_nll": [0.25]}
    rows = pd.DataFrame(values)
    measured = ArmResult(arm=average, rows=rows, failed=[], missing=[])
    _, text, table = calibration([measured])
    assert isinstance(text, Paragraph)
    assert "as trained" not in text.text
    assert "the average over the training" in text.text
    assert table == Table(
        ("arm", "delivers", "NLL, members", "NLL, average"),
        [("ema, 4 networks", "ema", "0.500", "0.250")],
    )
    unmeasured = replace(measured, rows=rows.drop(columns="average_nll"))
    _, text, _ = calibration([unmeasured])
    assert isinstance(text, Paragraph)
    assert text.text.endswith("not as the average or ensemble that they deliver: ema, 4 networks.")


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"method": "graft", "graft": {"sensitivity": 500}}, "graft"),
        ({"graft": {"sensitivity": 500}}, "graft"),
        ({"method": "graft", "graft": {"criterion": "constant"}}, "constant"),
        ({"method": "graft", "graft": {"level": "filter"}}, "filter"),
        ({"method": "papa", "papa": {"beta": 0.8}}, "papa"),
        ({"method": "none"}, None),
    ],
)
def test_the_built_in_method_of_an_arm(options: TrainOptions, name: str | None) -> None:
    assert built_in_method(replace(arm("my name"), options=options)) == name


class TestPublished:
    def test_gains_are_differences_of_published_accuracies(self) -> None:
        found = {(p.method, p.setting, p.different_rates): p.gain for p in read_published()}
        assert len(found) == len(read_published())
        assert found["graft", "CIFAR-10, ResNet-32, 2 networks", False] == 0.5
        assert found["graft", "CIFAR-100, ResNet-110, 2 networks", True] == 2.06
        assert found["papa", "ImageNet, various models", False] == 1.6
        several = {p.networks: p.gain for p in read_published() if "CIFAR-10," in p.setting}
        assert [several[networks] for networks in (3, 4, 6, 8)] == [2.13, 2.81, 2.91, 2.78]
        assert {p.method for p in read_published()} <= set(BUILT_IN)
        assert all("arXiv" in p.source for p in read_published())

    def test_only_the_same_methods_are_shown(self) -> None:
        grafting = replace(arm("sharp"), options={"graft": {"sensitivity": 500}})
        other = replace(arm("other"), options={"method": "none"})
        (*_, text, picture, sources) = beside_published(
            [contrast(BETTER, method=grafting), contrast(UNCLEAR, method=other)]
        )
        assert isinstance(picture, Picture)
        assert isinstance(text, Paragraph)
        assert text.text.endswith(
            "No published gain is on file for the method of: other, 4 networks."
        )
        assert isinstance(sources, Items)
        assert [source.partition(":")[0] for source in sources.texts] == ["graft"]
        assert beside_published([contrast(UNCLEAR, method=other)]) == []

    def test_larger_populations_are_shown_beside_as_large_ones(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        drawn: list[tuple[str, str, float, bool]] = []
        monkeypatch.setattr(measured_sections, "png", lambda figure: PNG)
        monkeypatch.setattr(plots, "forest", lambda results, published: drawn.extend(published))
        beside_published([contrast(BETTER, method=replace(GRAFT, options={"method": "graft"}))])
        sizes = [re.findall(r"(\d+) networks", setting)[0] for _, setting, *_ in drawn]
        assert [sizes.count(size) for size in "23468"] == [16, 0, 2, 0, 0]


class TestPlots:
    @pytest.mark.parametrize("differences", [[-0.5, 0.5], [-0.1, 0.1, 0.05]])
    def test_clipped_intervals_end_in_arrows(self, differences: list[float]) -> None:
        result = contrast(differences)
        for figure in (
            plots.differences([result]),
            plots.forest([result], [("a", "b", 0.1, False)]),
        ):
            (axes,) = figure.axes
            low, high = axes.get_xlim()
            assert result.half_width is not None
            clipped = {
                "<": result.test.mean - result.half_width < low,
                ">": result.test.mean + result.half_width > high,
            }
            markers = [line.get_marker() for line in axes.lines]
            assert {marker: marker in markers for marker in clipped} == clipped
        assert any(clipped.values()) == (len(differences) == 2)

    def test_published_gains_of_a_setting_share_a_row(self) -> None:
        published = [("a", "b", 0.1, False), ("a", "c", 0.2, False), ("a", "b", 0.3, True)]
        figure = plots.forest([contrast(BETTER)], published)
        assert isinstance(figure, Figure)
        squares = [line for line in figure.axes[0].lines if line.get_marker() == "s"]
        places = [(line.get_xdata()[0], line.get_ydata()[0]) for line in squares]
        assert places == [(0.1, 1), (0.2, 2), (0.3, 1)]
        assert [line.get_markerfacecolor() == "white" for line in squares] == [False, False, True]

    @pytest.mark.parametrize("count", [0, 3])
    def test_filter_plot_says_that_none_is_invalid(self, count: int) -> None:
        rows = pd.DataFrame({"filters": [100, 100], "invalid_0.1": [0, count]})
        result = ArmResult(arm=GRAFT, rows=rows, failed=[], missing=[])
        figure = plots.invalid_filters([result], {"invalid_0.1": "below 0.1"})
        assert isinstance(figure, Figure)
        texts = [text.get_text() for text in figure.axes[0].texts]
        assert texts == ([] if count else ["no filter is invalid in any run"])


# Verdicts


def arm(name: str) -> Arm:
    """An arm whose training differs from that of arms with other names."""
    options = {"epochs": 1 + zlib.crc32(name.encode()) % 10_000}
    return Arm(name=name, role="method", networks=4, group=4, options=options)


GRAFT, PAPA = arm("graft"), arm("papa")


def contrast(
    differences: list[float],
    *,
    method: Arm = GRAFT,
    control: str = "no exchange",
    planned: int | None = None,
    margin: float = 0.3,
    failed: dict[str, str] | None = None,
    weak: bool = False,
) -> ContrastResult:
    """Result of the only contrast of a table; `failed` has the reason by name of an arm."""
    test = paired_test(differences)
    (decision,) = holm([test.p])
    outcome = "largest_lr_member"
    made = Contrast(
        method=method,
        control=arm(control),
        control_name=control,
        outcome=outcome,
        control_outcome=outcome,
    )
    keys = {method.name: method.key, control: made.control.key}
    return ContrastResult(
        contrast=made,
        differences=pd.Series(differences),
        planned=len(differences) if planned is None else planned,
        test=test,
        decision=decision,
        margin=margin,
        failed={keys[name]: reason for name, reason in (failed or {}).items()},
        weak_control=weak,
    )


BETTER, WORSE, UNCLEAR = [0.5, 0.6, 0.55, 0.4], [-0.5, -0.6, -0.55, -0.4], [-0.4, 0.1, -0.2, 0.15]


@pytest.mark.parametrize(
    ("differences", "planned", "word", "printed"),
    [
        ([-0.4, 0.1, -0.2, 0.15, -0.15], 5, "no difference shown", [-0.10, 0.28, 5, 0.38]),
        ([0.5, 0.6, 0.55, 0.4, 0.45], 5, "better", [0.5, 0.098, 5]),
        ([-5.0, -6.0, -5.5], 3, "worse", [-5.5, 1.2, 3]),
        ([0.5, 0.6, 0.55, 0.4], 5, "better", [0.51, 0.14, 4, 5]),
        ([0.01, -0.02, 0.03, -0.01], 4, "no difference shown", [0.002, 0.035, 4, 0.3]),
        ([0.3], 1, "no conclusion", [0.3, 1]),
        ([0.0, 0.0, 0.0], 3, "no difference shown", [0.0, 3]),
        ([0.1, 0.1, 0.1], 3, "no difference shown", [0.1, 3]),
        ([], 2, "no conclusion", []),
    ],
)
def test_verdict_and_its_numbers(
    differences: list[float], planned: int, word: str, printed: list[float]
) -> None:
    result = contrast(differences, planned=planned)
    assert verdict(result) == word
    assert findings(result).startswith(word)
    assert numbers(findings(result)) == printed


@pytest.mark.parametrize("differences", [BETTER, WORSE, UNCLEAR, [0.3], [], [0.1, 0.1]])
@pytest.mark.parametrize("failed", ["graft", "no exchange"])
def test_a_failed_check_leaves_no_other_verdict(differences: list[float], failed: str) -> None:
    result = contrast(differences, failed={failed: "soup 70 points below"})
    assert verdict(result) == "not tested"
    text = conclusion(result)
    assert "not tested: " in text
    assert "soup 70 points below" in text
    others = ("better", "worse", "no difference", "no conclusion", "equivalent")
    assert not any(word in text for word in others)


SMALL = [0.1, 0.12, 0.11, 0.09]
"""Differences that are shown, and smaller than the smallest effect of interest."""
ONE = "one network, 4 x epochs"
SHORT = {ONE: "under-trained regime: the last quarter added 2 points"}


@pytest.mark.parametrize("sign", [1, -1])
def test_a_difference_that_is_too_small_says_so(sign: int) -> None:
    result = contrast([sign * value for value in SMALL])
    remark = "smaller than the smallest effect of interest (equivalent within ±0.3 points)"
    assert remark in findings(result)
    assert remark in overall_conclusions([result])[0]
    large = contrast([10 * sign * value for value in SMALL])
    assert remark not in findings(large)
    assert remark not in overall_conclusions([large])[0]


def test_worse_than_a_training_that_still_improves_is_worse() -> None:
    worse, better, unclear = (
        contrast(values, control=ONE, failed=SHORT) for values in (WORSE, BETTER, UNCLEAR)
    )
    assert [verdict(r) for r in (worse, better, unclear)] == ["worse", "not tested", "not tested"]
    assert findings(worse).endswith("(under-trained regime)")
    first, *_ = overall_conclusions([contrast(UNCLEAR)], [worse])
    assert first == "graft, 4 networks is worse than one network, 4 x epochs (−0.51 ± 0.14, " + (
        "under-trained regime)."
    )
    failed = contrast(WORSE, control=ONE, failed=SHORT | {"graft": "its soup is at chance"})
    assert verdict(failed) == "not tested"


def test_better_in_an_under_trained_regime_says_so() -> None:
    better, long = contrast(BETTER), contrast(UNCLEAR, control=ONE, failed=SHORT)
    remark = "under-trained regime, so longer training alone may gain as much."
    assert under_trained_sizes([better, long]) == {4}
    assert overall_conclusions([better], [long])[-1].endswith(remark)
    assert remark not in overall_conclusions([better])[-1]
    assert conclusion(better, under_trained=True).endswith(remark)
    assert remark not in conclusion(contrast(UNCLEAR), under_trained=True)


def test_a_weak_control_is_named_unless_the_method_is_worse() -> None:
    better, worse, unclear = (
        contrast(values, control=ONE, weak=True) for values in (BETTER, WORSE, UNCLEAR)
    )
    assert qualified_verdict(better) == "better (weak control)"
    assert findings(better).startswith("better (weak control), +0.51 ± 0.14")
    assert overall_conclusions([better])[0].endswith("(+0.51 ± 0.14, weak control).")
    assert qualified_verdict(worse) == "worse"
    assert "weak control" not in findings(worse) + overall_conclusions([worse])[0]
    assert qualified_verdict(unclear) == "no difference shown (weak control)"
    assert findings(unclear).startswith("no difference shown (weak control), −0.09")
    assert overall_conclusions([unclear])[0].endswith(f"and {ONE} (weak control).")
    (text,) = overall_conclusions([contrast(BETTER)], [unclear])
    assert text.endswith(f"not shown to differ from: {ONE}, weak control.")
    not_tested, single = (
        contrast(values, control=ONE, weak=True, failed=failed)
        for values, failed in ((BETTER, SHORT), ([0.3], None))
    )
    assert findings(not_tested).startswith("not tested (weak control): one network")
    assert qualified_verdict(single) == "no conclusion (weak control)"
    assert qualified_verdict(contrast(BETTER)) == "better"
    assert "weak control" not in overall_conclusions([contrast(UNCLEAR)])[0]


def summary(*results: ContrastResult, secondary: Iterable[ContrastResult] = ()) -> list[str]:
    """What each sentence of the summary says about which arms."""
    pattern = "worse|better|No difference|No conclusion|not tested|graft, 4|papa, 4"
    sentences = overall_conclusions(results, list(secondary))
    return [" ".join(re.findall(pattern, text)) for text in sentences]


class TestSummary:
    def test_without_pairs(self) -> None:
        assert summary() == summary(contrast([0.3])) == ["No conclusion"]

    def test_names_what_is_worse_before_what_is_better(self) -> None:
        better, worse = contrast(BETTER), contrast(WORSE, method=PAPA)
        assert summary(better, worse) == ["papa, 4 worse", "graft, 4 better"]

    def test_better_never_stands_above_worse_than_another_control(self) -> None:
        long = contrast(WORSE, control="one network, 4 x epochs")
        assert summary(contrast(BETTER), secondary=[long]) == ["graft, 4 worse", "graft, 4 better"]

    def test_worse_than_every_control(self) -> None:
        long = contrast(WORSE, control="one network, 4 x epochs")
        (text,) = overall_conclusions([contrast(WORSE)], [long])
        assert text.endswith(
            "every control: no exchange (−0.51 ± 0.14); one network, 4 x epochs (−0.51 ± 0.14)."
        )

    def test_better_names_controls_without_a_shown_difference(self) -> None:
        secondary = [
            contrast(UNCLEAR, control="shuffled"),
            contrast(BETTER, control="constant"),
            contrast(UNCLEAR, control="of papa", method=PAPA),
        ]
        text, _ = overall_conclusions([contrast(BETTER), contrast(UNCLEAR, method=PAPA)], secondary)
        assert text.endswith("not shown to differ from: shuffled.")

    def test_better_names_controls_that_are_equivalent(self) -> None:
        equal = contrast([-0.02, 0.03, -0.01, 0.02, 0.0], control="constant")
        (text,) = overall_conclusions([contrast(BETTER)], [equal])
        assert text.endswith("not shown to differ from: constant, equivalent within ±0.3.")

    def test_failed_check_of_a_method(self) -> None:
        failed = contrast(BETTER, method=PAPA, failed={"papa": "its soup is at chance"})
        unclear = contrast(UNCLEAR)
        assert summary(unclear, failed) == ["papa, 4 not tested", "No difference graft, 4"]
        assert summary(failed) == ["papa, 4 not tested"]

    def test_failed_check_of_a_control_keeps_the_differences_in_sight(self) -> None:
        control = "one network, 4 x epochs"
        secondary = [
            contrast(values, control=control, method=method, failed={control: "under-trained"})
            for values, method in ((WORSE, GRAFT), (BETTER, PAPA))
        ]
        first, *_ = overall_conclusions([contrast(UNCLEAR)], secondary)
        assert first == (
            "one network, 4 x epochs: under-trained; methods differ from it by −0.5 to +0.5 points."
        )


# Numbers and rendering


@pytest.mark.parametrize(
    ("value", "text"), [(0.123, "+0.12"), (-0.1, "−0.10"), (0.001, "0.00"), (-0.001, "0.00")]
)
def test_format_signed(value: float, text: str) -> None:
    assert format_signed(value) == text


@pytest.mark.parametrize(
    ("spread", "digits"), [(12.0, 1), (1.0, 1), (0.99, 2), (0.1, 2), (0.099, 3), (1e-9, 4)]
)
def test_digits_show_two_significant_figures(spread: float, digits: int) -> None:
    assert digits_for(spread) == digits


@pytest.mark.parametrize(
    ("values", "text"), [([], "–"), ([87.0], "87.00"), ([86.0, 88.0], "87.00 ± 1.41")]
)
def test_format_spread(values: list[float], text: str) -> None:
    assert format_spread(values) == text


BLOCKS = (
    Heading(1, "A & B"),
    Paragraph("1 < 2", "summary"),
    Items(["one", "two"]),
    Table(("name", "value"), [("a|b", "−0.10 ± 0.30"), ("<c>", "+1.0")]),
    Picture("dots", PNG, 'the "dots"'),
    Code("x: <y>\n"),
)


def test_markdown() -> None:
    assert to_markdown(BLOCKS) == (
        "# A & B\n\n**1 < 2**\n\n- one\n- two\n\n| name | value |\n| --- | --- |\n"
        '| a\\|b | −0.10 ± 0.30 |\n| <c> | +1.0 |\n\n![the "dots"](pictures/dots.png)\n\n'
        'the "dots"\n\n```text\nx: <y>\n```\n'
    )


def test_html_escapes_text_and_aligns_numbers() -> None:
    text = to_html("A & B", BLOCKS)
    page = Page(text)
    assert page.open_tags == []
    for shown in ("A & B", "1 < 2", "a|b", "<c>", 'the "dots"', "x: <y>"):
        assert shown in page.text
    assert "<c>" not in text
    assert '<td class="number">−0.10 ± 0.30</td>' in text
    assert "<td>a|b</td>" in text


class TestBaselinesInStages:
    """Branches, a snapshot ensemble, and a distilled network, on made-up rows."""

    BRANCHES = "2 branches of one network after 4 of 8 epochs"
    SNAPSHOTS = "snapshot ensemble of one network, 2 x epochs in 2 cycles"
    DISTILLED = "distilled from 2 members into one network"

    @pytest.fixture(scope="class")
    @staticmethod
    def blocks(tmp_path_factory: pytest.TempPathFactory) -> list[Block]:
        declared = plan(
            methods=["graft"],
            networks=[2],
            leave_out=["constant", "shuffled"],
            baselines=["branches", "snapshots", "distilled"],
            tuning="none",
        )
        folder = tmp_path_factory.mktemp("stages")
        state, results = carry_out_measured(declared, folder, lambda run: 86.0 + run.seed)
        return build_report(state, results, [])[0]

    def test_costs(self, blocks: list[Block]) -> None:
        rows = {row["arm"]: row for row in table_of(blocks, "images seen, million")}
        images = {name: float(row["images seen, million"]) for name, row in rows.items()}
        assert images[self.BRANCHES] == (4 + 2 * 4) * 0.01
        assert images[self.SNAPSHOTS] == images["graft, 2 networks"] == 2 * 8 * 0.01
        assert images[self.DISTILLED] == (2 * 8 + 8) * 0.01
        text = next(b.text for b in blocks if isinstance(b, Paragraph) and "To train" in b.text)
        assert f"{self.BRANCHES}: 4 + 2 x 4 epochs of a network, instead of 2 x 8" in text
        assert f"{self.DISTILLED}: the 2 members are included" in text
        assert "snapshot" not in text

    def test_curves_by_cost(self) -> None:
        design = study_state(
            plan(networks=[2], seeds=[1], baselines=["branches", "distilled"])
        ).design
        assert design is not None
        runs = {
            arm.label: Run(phase="comparison", arm=arm, seed=1)
            for arm in design.arms
            if arm.label in ("graft, 2 networks", self.BRANCHES, self.DISTILLED)
        }
        arms = [
            ArmResult(
                arm=run.arm,
                rows=pd.DataFrame(
                    {
                        "key": [run.key],
                        "images_seen": [10_000 * run.cost],
                        "wall_seconds": [60.0 * run.cost],
                    }
                ),
                failed=[],
                missing=[],
            )
            for run in runs.values()
        ]
        curves = pd.concat(made_up_curve(run, 86.0).assign(key=run.key) for run in runs.values())
        figure = plots.accuracy_by_cost(arms, curves, "mean_of_members", "accuracy")
        assert isinstance(figure, Figure)
        epochs = {
            "graft, 2 networks": [2, 4, 6, 8, 10, 12, 14, 16],
            self.BRANCHES: [1, 2, 3, 4, 6, 8, 10, 12],
            self.DISTILLED: [17, 18, 19, 20, 21, 22, 23, 24],
        }
        for axes, unit in zip(figure.axes, (0.01, 1.0), strict=True):
            for label, curve in zip(runs, axes.lines[::2], strict=True):
                expected = [unit * count for count in epochs[label]]
                assert list(curve.get_xdata()) == pytest.approx(expected)

    def test_delivered_models(self, blocks: list[Block]) -> None:
        rows = table_of(blocks, "delivers", "NLL, members")
        delivered = {row["arm"]: row["delivers"] for row in rows}
        assert {name: delivered[name] for name in (self.BRANCHES, self.DISTILLED)} == {
            self.BRANCHES: "soup",
            self.DISTILLED: "network",
        }
        assert delivered[self.SNAPSHOTS] == "snapshots"

    def test_snapshots_are_among_the_ensembles_only(self, blocks: list[Block]) -> None:
        primary = [row["arm"] for row in table_of(blocks, "arm", "role", "each seed")]
        assert self.SNAPSHOTS not in primary
        assert {self.BRANCHES, self.DISTILLED} <= set(primary)
        ensembles = [row["arm"] for row in table_of(blocks, "arm", "ensemble", "uniform soup")]
        assert self.SNAPSHOTS in ensembles
        assert self.DISTILLED not in ensembles
        tables = [b for b in blocks if isinstance(b, Table) and "p (Holm)" in b.header]
        names = [row[1] for table in tables for row in table.rows]
        assert {self.BRANCHES, self.SNAPSHOTS, self.DISTILLED} <= set(names)

    def test_a_soup_of_branches_must_form(self, blocks: list[Block]) -> None:
        checks = {row["arm"]: row for row in table_of(blocks, "arm", "result", "numbers")}
        assert checks[self.BRANCHES]["result"] == "not tested"
        assert "points below the mean member" in checks[self.BRANCHES]["numbers"]
        (row,) = (
            row
            for table in (b for b in blocks if isinstance(b, Table) and "p (Holm)" in b.header)
            for row in table.rows
            if row[1] == self.BRANCHES
        )
        assert row[-1] == "not tested"

    def test_barrier_before_and_after_the_last_round(self, blocks: list[Block]) -> None:
        before = "loss barrier before the last round, nats"
        rows = {row["arm"]: row for row in table_of(blocks, before)}
        graft = rows["graft, 2 networks"]
        assert (numbers(graft[before])[0], numbers(graft["loss barrier, nats"])[0]) == (0.9, 0.02)
        assert rows["no exchange, 2 networks"][before] == "–"
