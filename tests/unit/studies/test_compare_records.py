"""results.csv and curves.csv: append-only, and robust to crashes."""

from __future__ import annotations

import csv
import math
from hashlib import sha256
from pathlib import Path

import pandas as pd
import pytest
from made_up import made_up_curve, made_up_row, make_plan

from dist_graft.errors import RunDirectoryError
from dist_graft.studies.controls import Run
from dist_graft.studies.plan import Plan
from dist_graft.studies.records import OUTCOMES, Results, plan_sha256, record_start
from dist_graft.studies.selection import study_state


@pytest.fixture
def runs() -> list[Run]:
    return study_state(make_plan()).comparison_runs


def test_rows_and_curves_round_trip(tmp_path: Path, runs: list[Run]) -> None:
    results, rows = Results(tmp_path), [made_up_row(run, 87.25) for run in runs]
    for run, row in zip(runs, rows, strict=True):
        results.add(row, made_up_curve(run, 87.25))
    again = Results(tmp_path)
    pd.testing.assert_frame_equal(again.rows, results.rows)
    pd.testing.assert_frame_equal(again.curves, results.curves)
    assert again.rows.index.tolist() == [run.key for run in runs]
    for run, row in zip(runs, rows, strict=True):
        read = again.rows.loc[run.key]
        for name in ("arm", "seed", "networks", "filters", "invalid_0.1", "versions", "error"):
            assert read[name] == row[name]
        for name in OUTCOMES:
            expected = row.get(name, math.nan)
            assert read[name] == pytest.approx(expected, abs=1e-4, nan_ok=True)
        members = [float(member) for member in read["members"].split()]
        assert members == pytest.approx(row["members"], abs=1e-4)
        curve = again.curves[again.curves["key"] == run.key]
        assert curve["epoch"].tolist() == list(range(run.config.epochs))


def test_a_failed_row_is_superseded_and_kept(tmp_path: Path, runs: list[Run]) -> None:
    key = runs[0].key
    Results(tmp_path).add(made_up_row(runs[0], 0, error='it, said: "no"'))
    results = Results(tmp_path)
    assert not results.succeeded(key)
    assert results.rows.loc[key, "error"] == 'it, said: "no"'
    results.add(made_up_row(runs[0], 80.0))
    results = Results(tmp_path)
    assert results.succeeded(key)
    assert len(results.rows) == 1
    assert results.all_rows["status"].tolist() == ["failed", "ok"]


def test_superseded_rows_name_the_rows_that_replaced_them(tmp_path: Path, runs: list[Run]) -> None:
    results = Results(tmp_path)
    for attempt, reason in enumerate(["", "first", "second"]):
        for run in runs[: 1 if attempt else 2]:
            finished = f"2026-01-0{attempt + 1}T00:00:00Z"
            results.add(made_up_row(run, 80.0) | {"finished": finished, "reason": reason})
    found = results.superseded()
    assert [(old["key"], new["key"]) for old, new in found] == [(runs[0].key,) * 2] * 2
    assert [(old["reason"], new["reason"]) for old, new in found] == [
        ("", "first"),
        ("first", "second"),
    ]
    assert [new["finished"][:10] for _, new in found] == ["2026-01-02", "2026-01-03"]
    assert results.rows.loc[runs[0].key, "reason"] == "second"


def test_a_truncated_line_is_ignored(tmp_path: Path, runs: list[Run]) -> None:
    results = Results(tmp_path)
    for run in runs[:2]:
        results.add(made_up_row(run, 87.0), made_up_curve(run, 87.0))
    for name in ("results.csv", "curves.csv"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:-7])
    again = Results(tmp_path)
    assert again.rows.index.tolist() == [runs[0].key]
    again.add(made_up_row(runs[1], 87.5), made_up_curve(runs[1], 87.5))
    results = Results(tmp_path)
    assert results.rows.loc[runs[1].key, "largest_lr_member"] == 87.5
    assert (results.curves["key"] == runs[1].key).sum() == 20


def test_a_truncated_header_is_ignored(tmp_path: Path, runs: list[Run]) -> None:
    (tmp_path / "results.csv").write_text("key,pha")
    Results(tmp_path).add(made_up_row(runs[0], 87.0))
    assert Results(tmp_path).succeeded(runs[0].key)


def test_files_only_grow(tmp_path: Path, runs: list[Run]) -> None:
    results, before = Results(tmp_path), b""
    for run in runs:
        results.add(made_up_row(run, 87.0))
        content = (tmp_path / "results.csv").read_bytes()
        assert content.startswith(before)
        assert content.endswith(b"\n")
        before = content


def test_a_repeated_curve_replaces_the_first(tmp_path: Path, runs: list[Run]) -> None:
    results = Results(tmp_path)
    results.add(made_up_row(runs[0], 80.0), made_up_curve(runs[0], 80.0))
    results.add(made_up_row(runs[0], 90.0), made_up_curve(runs[0], 90.0)[:12])
    curve = Results(tmp_path).curves
    assert curve["epoch"].tolist() == list(range(12))
    assert curve["largest_lr_member"].iloc[-1] > 85


def test_rows_of_a_version_with_fewer_measurements_are_kept(
    tmp_path: Path, runs: list[Run]
) -> None:
    Results(tmp_path).add(made_up_row(runs[0], 80.0, error='it, said: "no"'))
    path = tmp_path / "results.csv"
    rows = list(csv.reader(path.read_text().splitlines()))
    removed = rows[0].index("average_nll")
    older = [[*row[:removed], *row[removed + 1 :]] for row in rows]
    with path.open("w") as file:
        csv.writer(file, lineterminator="\n").writerows(older)
        file.write("trunca")  # by a crash
    content = path.read_bytes()
    results = Results(tmp_path)
    assert math.isnan(results.rows.loc[runs[0].key, "average_nll"])
    assert path.read_bytes() == content
    results.add(made_up_row(runs[1], 81.0))
    again = path.read_text().splitlines()
    assert list(csv.reader(again))[:2] == rows
    assert [row["key"] for row in csv.DictReader(again)] == [run.key for run in runs[:2]]


@pytest.mark.parametrize("text", ["a,b\n1,2\n", "key\nx\n"])
def test_unknown_columns_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "results.csv").write_text(text)
    with pytest.raises(RunDirectoryError, match=r"results\.csv has an unknown format"):
        Results(tmp_path)


class TestPlanFile:
    """plan.yaml, and the copies of earlier plans."""

    def record(self, plan: Plan, folder: Path) -> None:
        record_start(plan, folder, runs_before=0, command=["dist-graft"])

    def test_an_earlier_plan_is_kept_under_its_hash(self, tmp_path: Path) -> None:
        first, second = make_plan(), make_plan(seeds=[0, 1, 2])
        self.record(first, tmp_path)
        before = (tmp_path / "plan.yaml").read_bytes()
        self.record(second, tmp_path)
        kept = tmp_path / f"plan-{plan_sha256(first)[:8]}.yaml"
        assert kept.read_bytes() == before
        assert sha256((tmp_path / "plan.yaml").read_bytes()).hexdigest() == plan_sha256(second)

    def test_a_start_that_was_killed_before_its_line_replaces_no_plan(self, tmp_path: Path) -> None:
        first, second = make_plan(), make_plan(seeds=[0, 1, 2])
        self.record(first, tmp_path)
        before = (tmp_path / "plan.yaml").read_bytes()
        history = (tmp_path / "history.jsonl").read_bytes()
        self.record(second, tmp_path)
        (tmp_path / "history.jsonl").write_bytes(history)
        self.record(second, tmp_path)
        kept = tmp_path / f"plan-{plan_sha256(first)[:8]}.yaml"
        assert kept.read_bytes() == before
        assert sha256((tmp_path / "plan.yaml").read_bytes()).hexdigest() == plan_sha256(second)
