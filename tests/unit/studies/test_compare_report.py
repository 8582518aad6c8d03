"""The report: verdicts, numbers in its tables, and self-contained files."""

from __future__ import annotations

import base64
import hashlib
import math
import re
import struct
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from made_up import carry_out, make_plan

from dist_graft.studies.controls import Arm, Contrast, Run
from dist_graft.studies.plan import Plan
from dist_graft.studies.records import Results, read_starts, record_start
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
from dist_graft.studies.report import (
    build_report,
    caveats,
    digits_for,
    findings,
    format_signed,
    format_spread,
    overall_conclusion,
    verdict,
    write_report,
)
from dist_graft.studies.selection import StudyState, study_state
from dist_graft.studies.statistics import ContrastResult, holm, paired_test

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
    state, results = carry_out(plan(), out, value_of)
    blocks, conclusions = build_report(state, results, read_starts(out))
    assert blocks[1] == Paragraph(conclusions[0], "summary")
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
        names = ["cost", "curves_2_networks", "curves_4_networks", "differences", "filters"]
        assert sorted(pictures) == sorted(f"{n}.png" for n in [*names, "outcomes", "primary"])
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

    def test_begins_with_the_conclusion(self, written: Written) -> None:
        out, _, _, blocks = written
        assert isinstance(blocks[1], Paragraph)
        lines = [line for line in (out / "report.md").read_text().splitlines() if line]
        assert lines[:2] == ["# Comparison: fashion", f"**{blocks[1].text}**"]

    def test_counts_failed_runs(self, written: Written) -> None:
        _, state, results, blocks = written
        count = len(state.comparison_runs)
        (text,) = [b.text for b in blocks if isinstance(b, Paragraph) and "incomplete" in b.text]
        assert numbers(text) == [count - 1, count, 1]
        (failed,) = results.rows.index[results.rows["status"] == "failed"]
        rows = {row["run"]: row for row in table_of(blocks, "run", "core-s")}
        assert rows[failed]["on"] == "failed"
        assert rows[failed]["largest lr"] == rows[failed]["each member"] == "–"
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
            for column in ("each seed", "uniform soup", "filters", "wall time, s")
        )
        assert primary["mean ± std"] == spread("delivered", 2)
        assert numbers(primary["each seed"]) == rows["delivered"].round(2).tolist()
        assert outcomes["ensemble"] == spread("ensemble", 2)
        assert outcomes["uniform soup, batch norm averaged"] == spread("uniform_soup_as_is", 2)
        assert filters["L1 norm below 0.1"] == spread("invalid_0.1", 1)
        assert filters["filters"] == "240"
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
            assert overall_conclusion([]) == conclusions[0]

    def test_with_one_seed_and_one_network(self, tmp_path: Path) -> None:
        single = plan(seeds=[1], networks=[1], methods={"internal": None})
        state, results = carry_out(single, tmp_path, value_of)
        blocks, conclusions = build_report(state, results, [])
        assert overall_conclusion([]) == conclusions[0]
        (row,) = table_of(blocks, "min. detectable")
        assert (row["n"], row["p (Holm)"], row["conclusion"]) == ("1", "–", "no conclusion")

    def test_during_and_after_a_search(self, tmp_path: Path) -> None:
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


# Verdicts


def arm(name: str) -> Arm:
    return Arm(name=name, role="method", networks=4, group=4, options={})


GRAFT, PAPA = arm("graft"), arm("papa")


def contrast(
    differences: list[float],
    *,
    method: Arm = GRAFT,
    control: str = "no exchange",
    planned: int | None = None,
) -> ContrastResult:
    """Result of the only contrast of a table."""
    test = paired_test(differences)
    (decision,) = holm([test.p])
    outcome = "largest_lr_member"
    return ContrastResult(
        contrast=Contrast(
            method=method,
            control=arm(control),
            control_name=control,
            outcome=outcome,
            control_outcome=outcome,
        ),
        differences=pd.Series(differences),
        planned=len(differences) if planned is None else planned,
        test=test,
        decision=decision,
    )


BETTER, WORSE, UNCLEAR = [0.5, 0.6, 0.55, 0.4], [-0.5, -0.6, -0.55, -0.4], [-0.4, 0.1, -0.2, 0.15]


@pytest.mark.parametrize(
    ("differences", "planned", "word", "printed"),
    [
        ([-0.4, 0.1, -0.2, 0.15, -0.15], 5, "no difference shown", [-0.10, 0.28, 5, 0.38]),
        ([0.5, 0.6, 0.55, 0.4, 0.45], 5, "better", [0.5, 0.098, 5]),
        ([-5.0, -6.0, -5.5], 3, "worse", [-5.5, 1.2, 3]),
        ([0.5, 0.6, 0.55, 0.4], 5, "better", [0.51, 0.14, 4, 5]),
        ([0.3], 1, "no conclusion", [1, 0.3]),
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


@pytest.mark.parametrize(
    ("results", "printed", "named"),
    [
        ([contrast(UNCLEAR)], [], []),
        ([contrast(UNCLEAR), contrast(UNCLEAR)], [2], []),
        ([contrast(BETTER), contrast(UNCLEAR)], [1, 2, 4], ["Better", GRAFT.label]),
        (
            [contrast(BETTER), contrast(WORSE, method=PAPA)],
            [1, 2, 4, 1, 2, 4],
            ["Better", GRAFT.label, "Worse", PAPA.label],
        ),
        ([contrast([0.3])], [], ["No conclusion"]),
        ([], [], ["No conclusion"]),
    ],
)
def test_overall_conclusion(
    results: list[ContrastResult], printed: list[float], named: list[str]
) -> None:
    text = overall_conclusion(results)
    assert numbers(text) == printed
    assert (
        re.findall("Better|Worse|No conclusion|graft, 4 networks|papa, 4 networks", text) == named
    )


def test_caveats_name_the_controls_that_a_better_method_does_not_beat() -> None:
    secondary = [
        contrast(UNCLEAR, control="shuffled"),
        contrast(BETTER, control="constant"),
        contrast(WORSE, control="one network, 4 x epochs"),
        contrast(UNCLEAR, control="wash", method=PAPA),
    ]
    texts = caveats([contrast(BETTER), contrast(UNCLEAR, method=PAPA)], secondary)
    assert [text.partition(": ")[2] for text in texts] == ["shuffled.", "one network, 4 x epochs."]
    assert all(text.startswith(GRAFT.label) for text in texts)


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
