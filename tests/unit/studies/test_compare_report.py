from __future__ import annotations

import base64
import hashlib
import math
import re
import struct
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from made_up import carried_out

from dist_graft.studies.execution import Run
from dist_graft.studies.history import read_history, register
from dist_graft.studies.plan import Plan, plan_of
from dist_graft.studies.render import Code, Heading, Items, Paragraph, Picture, Table
from dist_graft.studies.render import markdown as as_markdown
from dist_graft.studies.render import page as as_page
from dist_graft.studies.report import build, write_report
from dist_graft.studies.results import Results
from dist_graft.studies.state import State, state_of
from dist_graft.studies.tables import spread_text

PNG = b"\x89PNG\r\n\x1a\n"


def plan(**changes: Any) -> Plan:
    content = {
        "name": "fashion",
        "recipe": {"epochs": 8},
        "methods": {"graft": None, "dlr": {"optim.lr_diversity": "cosine"}},
        "networks": [2, 4],
        "seeds": [1, 2, 3],
        "leave_out": ["shuffled"],
    }
    return plan_of(content | changes)


def value_of(run: Run) -> float:
    if run.arm.name == "dlr" and run.seed == 3 and run.arm.networks == 4:
        return math.nan
    noise = int(run.key, 16) % 100 / 1000
    return 86.0 + run.seed / 10 + noise + (2 if run.config.method == "graft" else 0)


class Page(HTMLParser):
    """What a browser would have to fetch, and what it would show."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, State, Results, list[str]]:
    """A folder with a report on a comparison in which one run failed."""
    out = tmp_path_factory.mktemp("comparison")
    register(plan(), out, runs_before=0, command=["dist-graft", "compare", "my plan.yaml"])
    state, results = carried_out(plan(), out, value_of)
    return out, state, results, write_report(state, results, read_history(out), out)


class TestAReport:
    def test_names_every_run(self, report: tuple[Path, State, Results, list[str]]) -> None:
        out, _, results, _ = report
        assert len(results.rows) > 20
        for name in ("report.html", "report.md"):
            text = (out / name).read_text()
            assert not [key for key in results.rows if key not in text]

    def test_names_every_arm_and_control(
        self, report: tuple[Path, State, Results, list[str]]
    ) -> None:
        out, state, _, _ = report
        text = Page((out / "report.html").read_text()).text
        assert state.design is not None
        for arm in state.design.arms:
            assert arm.label in text
        for contrast in (*state.design.main, *state.design.further):
            assert contrast.control_name in text
        assert "shuffled: left out by the plan" in text

    def test_is_one_file_that_needs_no_other(
        self, report: tuple[Path, State, Results, list[str]]
    ) -> None:
        text = (report[0] / "report.html").read_text()
        page = Page(text)
        assert page.open == []
        assert page.sources
        assert all(source.startswith("data:image/png;base64,") for source in page.sources)
        assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", text)
        assert "<script" not in text
        assert "@media print" in text

    def test_has_pictures_of_modest_size(
        self, report: tuple[Path, State, Results, list[str]]
    ) -> None:
        out = report[0]
        pictures = {path.name: path.read_bytes() for path in (out / "pictures").iterdir()}
        names = ["cost", "curves_2_networks", "curves_4_networks", "differences", "filters"]
        assert sorted(pictures) == sorted(f"{n}.png" for n in [*names, "outcomes", "primary"])
        inline = [
            base64.b64decode(source.partition(",")[2])
            for source in Page((out / "report.html").read_text()).sources
        ]
        assert sorted(inline) == sorted(pictures.values())
        for content in pictures.values():
            assert content.startswith(PNG)
            width, height = struct.unpack(">II", content[16:24])
            assert 900 <= width <= 1200
            assert height <= 1600
            assert len(content) < 150_000
        linked = re.findall(r"\]\((pictures/\S+\.png)\)", (out / "report.md").read_text())
        assert sorted(linked) == sorted(f"pictures/{name}" for name in pictures)

    def test_begins_with_the_verdict(self, report: tuple[Path, State, Results, list[str]]) -> None:
        out, _, _, sentences = report
        lines = [line for line in (out / "report.md").read_text().splitlines() if line]
        assert lines[0] == "# Comparison: fashion"
        assert lines[1] == f"**{sentences[0]}**"
        assert sentences[0].startswith("Better than its control in ")
        assert any("against no exchange (as dlr): " in sentence for sentence in sentences)

    def test_has_the_sections_in_order(
        self, report: tuple[Path, State, Results, list[str]]
    ) -> None:
        text = (report[0] / "report.md").read_text()
        assert re.findall(r"^## (.*)$", text, re.MULTILINE) == [
            "Primary outcome",
            "Against the other controls",
            "Learning curves",
            "Members, ensembles and soups",
            "Invalid filters",
            "Cost",
            "Best learning rate of a single network",
            "Runs that failed",
            "Every run",
            "Statistics",
            "Options beyond the recipe",
            "How this was made",
        ]

    def test_tells_what_failed(self, report: tuple[Path, State, Results, list[str]]) -> None:
        text = (report[0] / "report.md").read_text()
        assert "- dlr, K = 4, seed 3: weights are not finite" in text
        assert "1 failed (listed below; their seeds are missing from the comparisons)" in text
        assert "(2 of 3 seeds)" in text

    def test_tells_how_it_was_made(self, report: tuple[Path, State, Results, list[str]]) -> None:
        out = report[0]
        text = (out / "report.md").read_text()
        assert hashlib.sha256((out / "plan.yaml").read_bytes()).hexdigest() in text
        assert "before anything ran" in text
        assert "command: dist-graft compare 'my plan.yaml'" in text
        assert "core" in text.partition("hardware: ")[2].splitlines()[0]
        assert "runs made with: dist_graft 0.1.0 torch 2.14.1" in text
        assert (out / "plan.yaml").read_text().rstrip() in text

    def test_shows_means_that_numpy_agrees_with(
        self, report: tuple[Path, State, Results, list[str]]
    ) -> None:
        import numpy as np

        out, state, results, _ = report
        runs = [run for run in state.comparison_runs if run.arm.label == "graft, 4 networks"]
        values = [results.rows[run.key].outcomes["largest_lr_member"] for run in runs]
        cells = f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f} | 3 | "
        assert f"| graft, 4 networks | method | {cells}" in (out / "report.md").read_text()


def headings(state: State, results: Results) -> list[str]:
    blocks, _ = build(state, results, [])
    return [block.text for block in blocks if isinstance(block, Heading)]


class TestAReportOnWhatThereIs:
    def test_before_the_first_run(self, tmp_path: Path) -> None:
        state = state_of(plan(), {})
        blocks, sentences = build(state, Results(tmp_path), [])
        assert sentences[0].endswith("there is no answer yet.")
        text = as_markdown(blocks, "pictures")
        count = len(state.comparison_runs)
        assert f"0 of {count} runs ended well, {count} are still to be run" in text

    def test_in_the_middle(self, tmp_path: Path) -> None:
        _, results = carried_out(plan(), tmp_path, value_of)
        rows = dict(list(results.rows.items())[: len(results.rows) // 2])
        results.rows = rows
        blocks, _ = build(state_of(plan(), rows), results, [])
        assert "are still to be run" in as_markdown(blocks, "pictures")

    def test_with_one_seed_and_one_network(self, tmp_path: Path) -> None:
        alone = plan(seeds=[1], networks=[1], methods={"internal": None})
        state, results = carried_out(alone, tmp_path, value_of)
        blocks, sentences = build(state, results, [])
        assert "with one seed, which shows no difference" in as_markdown(blocks, "pictures")
        assert sentences[0].endswith("there is no answer yet.")

    def test_while_a_search_goes_on_and_after_it(self, tmp_path: Path) -> None:
        search = {
            "recipes": {"plain": None, "fast": {"optim.lr": 0.4}, "many": {"networks": 3}},
            "seeds": [0],
            "confirm_seeds": [10, 11, 12, 13, 14],
        }
        searching = plan(seeds=[], search=search, networks=[2])
        state, results = carried_out(searching, tmp_path, value_of)
        assert "Regimes that were tried" in headings(state, results)
        text = as_markdown(build(state, results, [])[0], "pictures")
        assert len(re.findall(r"\| chosen \|", text)) == 2  # a regime and a learning rate
        for line in (
            "plain | as the recipe | 2",
            "fast | optim.lr=0.4 | 2",
            "many | networks=3 | 3",
        ):
            assert f"| {line} |" in text
        assert "test accuracies of these runs were not read" in text

        results.rows = {}
        before = headings(state_of(searching, {}), results)
        assert "Regimes that were tried" in before
        assert "Primary outcome" not in before


class TestRendering:
    BLOCKS = (
        Heading(1, "A & B"),
        Paragraph("1 < 2", "verdict"),
        Items(["one", "two"]),
        Table(("name", "value"), [("a|b", "−0.10 ± 0.30"), ("<c>", "+1.0")]),
        Picture("dots", PNG, 'the "dots"'),
        Code("x: <y>\n"),
    )

    def test_markdown(self) -> None:
        assert as_markdown(self.BLOCKS, "pictures") == (
            "# A & B\n\n**1 < 2**\n\n- one\n- two\n\n| name | value |\n| --- | --- |\n"
            '| a\\|b | −0.10 ± 0.30 |\n| <c> | +1.0 |\n\n![the "dots"](pictures/dots.png)\n\n'
            'the "dots"\n\n```text\nx: <y>\n```\n'
        )

    def test_html_escapes_what_it_shows(self) -> None:
        text = as_page("A & B", self.BLOCKS)
        page = Page(text)
        assert page.open == []
        for shown in ("1 < 2", "a|b", "<c>", 'the "dots"', "x: <y>"):
            assert shown in page.text
        assert "<c>" not in text

    def test_numbers_are_aligned_and_names_are_not(self) -> None:
        text = as_page("t", self.BLOCKS)
        assert '<td class="number">−0.10 ± 0.30</td>' in text
        assert "<td>a|b</td>" in text


@pytest.mark.parametrize(
    ("values", "text"), [([], "–"), ([87.0], "87.00"), ([86.0, 88.0], "87.00 ± 1.41")]
)
def test_spreads(values: list[float], text: str) -> None:
    assert spread_text(values) == text
