from __future__ import annotations

from pathlib import Path

import pytest
from made_up import curve_of, row_of

from dist_graft.errors import RunDirectoryError
from dist_graft.studies.execution import Run
from dist_graft.studies.plan import plan_of
from dist_graft.studies.results import Results
from dist_graft.studies.state import state_of


@pytest.fixture
def runs() -> list[Run]:
    plan = plan_of({"name": "p", "methods": ["graft"], "networks": [2], "seeds": [0, 1]})
    return state_of(plan, {}).comparison_runs


def test_what_is_added_is_read_again(tmp_path: Path, runs: list[Run]) -> None:
    results = Results(tmp_path)
    for run in runs:
        results.add(row_of(run, 87.25), curve_of(run, 87.25))
    again = Results(tmp_path)
    assert list(again.rows) == [run.key for run in runs]
    for run in runs:
        key, row = run.key, results.rows[run.key]
        assert again.rows[key].arm == row.arm
        assert again.rows[key].outcomes == pytest.approx(dict(row.outcomes), abs=1e-4)
        assert again.rows[key].filters == row.filters
        assert list(again.rows[key].members) == pytest.approx(list(row.members), abs=1e-4)
        assert [p.epoch for p in again.curves[key]] == list(range(run.config.epochs))


def test_a_row_that_failed_is_not_taken_for_a_result(tmp_path: Path, runs: list[Run]) -> None:
    results = Results(tmp_path)
    results.add(row_of(runs[0], 0, status="failed", error='it, said: "no"'))
    again = Results(tmp_path)
    assert not again.has(runs[0].key)
    assert again.rows[runs[0].key].error == 'it, said: "no"'
    again.add(row_of(runs[0], 80.0))
    assert Results(tmp_path).has(runs[0].key)
    assert len(Results(tmp_path).rows) == 1


def test_a_line_that_a_crash_cut_off_is_forgotten(tmp_path: Path, runs: list[Run]) -> None:
    results = Results(tmp_path)
    for run in runs[:2]:
        results.add(row_of(run, 87.0), curve_of(run, 87.0))
    for name in ("results.csv", "curves.csv"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:-7])
    again = Results(tmp_path)
    assert list(again.rows) == [runs[0].key]
    again.add(row_of(runs[1], 87.5), curve_of(runs[1], 87.5))
    assert Results(tmp_path).rows[runs[1].key].outcomes["largest_lr_member"] == 87.5
    assert len(Results(tmp_path).curves[runs[1].key]) == 20


def test_a_header_that_a_crash_cut_off_is_forgotten(tmp_path: Path, runs: list[Run]) -> None:
    (tmp_path / "results.csv").write_text("key,pha")
    Results(tmp_path).add(row_of(runs[0], 87.0))
    assert Results(tmp_path).has(runs[0].key)


def test_lines_are_only_ever_added(tmp_path: Path, runs: list[Run]) -> None:
    results, before = Results(tmp_path), b""
    for run in runs:
        results.add(row_of(run, 87.0))
        now = (tmp_path / "results.csv").read_bytes()
        assert now.startswith(before)
        assert now.endswith(b"\n")
        before = now


def test_a_curve_that_is_given_again_starts_anew(tmp_path: Path, runs: list[Run]) -> None:
    results = Results(tmp_path)
    results.add(row_of(runs[0], 80.0), curve_of(runs[0], 80.0))
    results.add(row_of(runs[0], 90.0), curve_of(runs[0], 90.0)[:12])
    curve = Results(tmp_path).curves[runs[0].key]
    assert len(curve) == 12


@pytest.mark.parametrize("text", ["a,b\n1,2\n", "key\nx\n"])
def test_another_table_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "results.csv").write_text(text)
    with pytest.raises(RunDirectoryError, match=r"results\.csv is not one of this version"):
        Results(tmp_path)
