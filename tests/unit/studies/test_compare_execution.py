"""The harness around a stand-in for training: what is run, what is not run again, what is said."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dist_graft.errors import ConfigError, RunDirectoryError, StoppedError
from dist_graft.studies import execution, history
from dist_graft.studies.comparison import FailedRunsError, compare
from dist_graft.studies.execution import Run, error_line, train_command
from dist_graft.studies.plan import Plan, plan_of
from dist_graft.studies.results import Results
from dist_graft.studies.state import state_of

STAND_IN = Path(__file__).parent / "stand_in.py"


@pytest.fixture
def behaviour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder that says what runs do; training and evaluating are stood in for."""
    folder = tmp_path / "behaviour"
    folder.mkdir()

    def train(run: Run, at: Path) -> list[str]:
        options = yaml.safe_load((at / "options.yaml").read_text())
        (at / "options.json").write_text(json.dumps(options))
        words = ["train", at / "options.json", at, run.arm.networks, folder]
        return [sys.executable, str(STAND_IN), *map(str, words)]

    monkeypatch.setattr(execution, "train_command", train)
    monkeypatch.setattr(
        execution,
        "evaluate_command",
        lambda at: [sys.executable, str(STAND_IN), "evaluate", str(at)],
    )
    return folder


@pytest.fixture(autouse=True)
def _signals_as_before() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing is tested with the report."""
    from dist_graft.studies import comparison

    monkeypatch.setattr(comparison, "write_report", lambda *_: ["the verdict"])


def plan(**changes: Any) -> Plan:
    content = {
        "name": "p",
        "recipe": {"epochs": 1},
        "methods": ["graft"],
        "networks": [2],
        "seeds": [0, 1],
        "leave_out": ["constant", "shuffled", "one_network"],
    }
    return plan_of(content | changes)


def starts(behaviour: Path) -> list[str]:
    path = behaviour / "starts"
    return path.read_text().split() if path.exists() else []


def folder_of(run: Run) -> str:
    return f"k{run.arm.networks}-seed{run.seed}-{run.key}"


class TestAComparison:
    def test_runs_everything_once(
        self, behaviour: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        text = compare(plan(), tmp_path / "out")
        assert text.splitlines() == ["the verdict", f"report: {tmp_path / 'out/report.html'}"]
        runs = state_of(plan(), {}).comparison_runs
        assert starts(behaviour) == [folder_of(run) for run in runs]
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith("comparison 1/4: graft, 2 networks, seed 0: 80.50 % (test), ")
        assert "about" in lines[0]
        assert "about" not in lines[-1]
        rows = Results(tmp_path / "out").rows
        assert [rows[run.key].outcomes["largest_lr_member"] for run in runs] == [
            80.5,
            80.0,
            81.5,
            81.0,
        ]
        row = rows[runs[0].key]
        assert (row.status, row.split, row.commit) == ("ok", "test", "c0ffee")
        assert row.outcomes["uniform_soup"] == 20.0
        assert row.wall_seconds > 0
        assert row.core_seconds > 0
        assert "filters not counted" in row.error  # the stand-in leaves no weights

    def test_is_not_run_again(self, behaviour: Path, tmp_path: Path) -> None:
        compare(plan(), tmp_path / "out")
        before = (tmp_path / "out/results.csv").read_bytes()
        compare(plan(), tmp_path / "out")
        assert len(starts(behaviour)) == 4
        assert (tmp_path / "out/results.csv").read_bytes() == before

    def test_a_plan_with_more_seeds_runs_what_is_new(self, behaviour: Path, tmp_path: Path) -> None:
        compare(plan(), tmp_path / "out")
        compare(plan(seeds=[0, 1, 2]), tmp_path / "out")
        assert len(starts(behaviour)) == 6
        entries = history.read_history(tmp_path / "out")
        assert [entry.runs_before for entry in entries] == [0, 4]
        first = tmp_path / "out" / f"plan-{entries[0].plan_sha256[:8]}.yaml"
        assert yaml.safe_load(first.read_text())["seeds"] == [0, 1]

    def test_the_plan_is_written_down_before_anything_runs(
        self, behaviour: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def no_training(run: Run, at: Path) -> list[str]:
            raise KeyboardInterrupt

        monkeypatch.setattr(execution, "train_command", no_training)
        with pytest.raises(KeyboardInterrupt):
            compare(plan(), tmp_path / "out")
        import hashlib

        (entry,) = history.read_history(tmp_path / "out")
        content = (tmp_path / "out/plan.yaml").read_bytes()
        assert hashlib.sha256(content).hexdigest() == entry.plan_sha256
        assert entry.primary == "largest_lr_member"
        assert entry.runs_before == 0
        assert not (tmp_path / "out/results.csv").exists()

    @pytest.mark.parametrize("change", [{"primary": "ensemble"}, {"against": "best_lr"}])
    def test_what_is_compared_is_not_changed_afterwards(
        self, behaviour: Path, tmp_path: Path, change: dict[str, str]
    ) -> None:
        compare(plan(), tmp_path / "out")
        with pytest.raises(ConfigError, match="what is compared is not changed afterwards"):
            compare(plan(**change), tmp_path / "out")
        assert len(starts(behaviour)) == 4

    @pytest.mark.parametrize(("keep", "left"), [(0, []), (1, ["epoch_0002"])])
    def test_old_checkpoints_are_deleted(
        self, behaviour: Path, tmp_path: Path, keep: int, left: list[str]
    ) -> None:
        compare(plan(keep_checkpoints=keep), tmp_path / "out")
        for run in (tmp_path / "out/runs").iterdir():
            assert [path.name for path in sorted(run.glob("checkpoints/*"))] == left

    def test_only_one_at_a_time(self, behaviour: Path, tmp_path: Path) -> None:
        import fcntl

        (tmp_path / "out").mkdir()
        with (tmp_path / "out/.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            with pytest.raises(RunDirectoryError, match="another comparison is running in"):
                compare(plan(), tmp_path / "out")

    def test_the_best_learning_rate_is_found_first(self, behaviour: Path, tmp_path: Path) -> None:
        asked = plan(best_lr={"candidates": [0.1, 0.2]})
        compare(asked, tmp_path / "out")
        rows = list(Results(tmp_path / "out").rows.values())
        assert [row.phase for row in rows[:4]] == ["best_lr"] * 4
        assert {row.outcomes["largest_lr_member"] for row in rows[:4]} == {79.0 + 1000, 79.0 + 1001}
        assert {row.phase for row in rows[4:]} == {"comparison"}

    def test_a_report_alone_runs_nothing(self, behaviour: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        with pytest.raises(RunDirectoryError, match="holds no comparison to report on"):
            compare(plan(), out, report_only=True)
        compare(plan(), out)
        assert "the verdict" in compare(plan(), out, report_only=True)
        assert len(starts(behaviour)) == 4
        with pytest.raises(ConfigError, match="holds a comparison of another plan"):
            compare(plan(seeds=[0, 1, 2]), out, report_only=True)


class TestARunThatFails:
    def test_is_told_in_one_line_and_the_others_go_on(
        self, behaviour: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        broken = state_of(plan(), {}).comparison_runs[1]
        (behaviour / folder_of(broken)).write_text("fail")
        with pytest.raises(
            FailedRunsError, match="1 of 4 runs failed, the first with: epoch 0: net"
        ):
            compare(plan(), tmp_path / "out")
        rows = Results(tmp_path / "out").rows
        assert [row.status for row in rows.values()] == ["ok", "failed", "ok", "ok"]
        line = "epoch 0: network 0 has a weight that is not finite in conv.weight"
        assert rows[broken.key].error == line
        assert rows[broken.key].outcomes == {}
        assert f"failed: {line}" in capsys.readouterr().out

    def test_is_tried_again_and_only_that(self, behaviour: Path, tmp_path: Path) -> None:
        broken = state_of(plan(), {}).comparison_runs[1]
        (behaviour / folder_of(broken)).write_text("fail")
        with pytest.raises(FailedRunsError):
            compare(plan(), tmp_path / "out")
        (behaviour / folder_of(broken)).unlink()
        compare(plan(), tmp_path / "out")
        assert starts(behaviour)[4:] == [folder_of(broken)]
        assert all(row.status == "ok" for row in Results(tmp_path / "out").rows.values())

    @pytest.mark.parametrize(
        ("what", "line"), [("silent", "training "), ("killed", "killed by SIGKILL")]
    )
    def test_without_a_line_of_its_own(
        self, behaviour: Path, tmp_path: Path, what: str, line: str
    ) -> None:
        broken = state_of(plan(), {}).comparison_runs[0]
        (behaviour / folder_of(broken)).write_text(what)
        with pytest.raises(FailedRunsError):
            compare(plan(), tmp_path / "out")
        assert Results(tmp_path / "out").rows[broken.key].error.startswith(line)


SEARCH = {
    "recipes": {"plain": None, "fast": {"optim.lr": 0.4}},
    "seeds": [0],
    "confirm_seeds": [10, 11, 12, 13, 14],
}


class TestASearch:
    def plan(self, **changes: Any) -> Plan:
        search = SEARCH | changes
        return plan(seeds=[], search=search, best_lr={"candidates": [0.1, 0.2]})

    def test_comes_before_the_trials_and_the_test(self, behaviour: Path, tmp_path: Path) -> None:
        compare(self.plan(), tmp_path / "out")
        phases = [row.phase for row in Results(tmp_path / "out").rows.values()]
        assert phases == ["search"] * 4 + ["best_lr"] * 4 + ["comparison"] * len(phases[8:])
        assert len(phases) > 8

    def test_is_not_taken_up_again_once_its_regime_was_tested(
        self, behaviour: Path, tmp_path: Path
    ) -> None:
        broken = next(
            r for r in state_of(self.plan(), {}).search_runs if r.arm.name == "graft, fast"
        )
        (behaviour / folder_of(broken)).write_text("fail")
        with pytest.raises(FailedRunsError, match=r"1 of .* runs failed"):
            compare(self.plan(), tmp_path / "out")
        (behaviour / folder_of(broken)).unlink()
        before = starts(behaviour)
        with pytest.raises(FailedRunsError, match=r"1 of .* runs failed"):
            compare(self.plan(), tmp_path / "out")
        assert starts(behaviour) == before

    def test_is_not_widened_once_its_regime_was_tested(
        self, behaviour: Path, tmp_path: Path
    ) -> None:
        compare(self.plan(), tmp_path / "out")
        before = starts(behaviour)
        with pytest.raises(ConfigError, match="is over, and what it found was tested"):
            compare(self.plan(seeds=[0, 1]), tmp_path / "out")
        assert starts(behaviour) == before


class TestASignal:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_ends_the_run_and_the_same_command_goes_on(
        self,
        behaviour: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        number: signal.Signals,
    ) -> None:
        runs = state_of(plan(), {}).comparison_runs
        (behaviour / folder_of(runs[1])).write_text("sleep")
        began = execution.epochs_done

        def stop_in_the_second(folder: Path) -> int:
            if folder.name == folder_of(runs[1]) and began(folder):
                os.kill(os.getpid(), number)
            return began(folder)

        monkeypatch.setattr(execution, "epochs_done", stop_in_the_second)
        with pytest.raises(
            StoppedError, match=r"seed 0, after 1 of 4 runs.*the same command goes on"
        ):
            compare(plan(), tmp_path / "out")
        assert list(Results(tmp_path / "out").rows) == [runs[0].key]
        spent = json.loads((tmp_path / "out/runs" / folder_of(runs[1]) / "cost.json").read_text())
        assert spent["wall_seconds"] > 0

        monkeypatch.setattr(execution, "epochs_done", began)
        (behaviour / folder_of(runs[1])).unlink()
        compare(plan(), tmp_path / "out")
        assert starts(behaviour) == [folder_of(runs[n]) for n in (0, 1, 1, 2, 3)]
        again = Results(tmp_path / "out").rows[runs[1].key]
        assert again.wall_seconds > spent["wall_seconds"]


LINES = [
    ("dist-graft: error: one\nmore\n", 1, "one"),
    (
        "dist-graft: error: network 1: stopped by SIGTERM; x\ndist-graft: error: network 0: two\n",
        1,
        "network 0: two",
    ),
    ("dist-graft: error: stopped by SIGTERM; x\n", 143, "stopped by SIGTERM; x"),
    ("Traceback\nValueError: three\n\n", 1, "ValueError: three"),
    (
        "Root Cause (first observed failure):\n[0]:\n  exitcode  : -6 (pid: 3)\n"
        "  traceback : Signal 6 (SIGABRT) received by PID 3\n=====\n",
        1,
        "a process of the run was killed by SIGABRT",
    ),
    ("", -9, "killed by SIGKILL"),
    ("", 7, "exit status 7, and not a word"),
]


@pytest.mark.parametrize(("output", "status", "line"), LINES)
def test_the_line_that_says_why(output: str, status: int, line: str) -> None:
    assert error_line(output, status) == line


def test_training_is_started_by_torchrun() -> None:
    run = state_of(plan(), {}).comparison_runs[0]
    words = train_command(run, Path("out/runs/x"))
    assert words[1:3] == ["-m", "torch.distributed.run"]
    assert "--nproc-per-node=2" in words
    assert words[words.index("-m", 3) + 1 :][:2] == ["dist_graft", "train"]
    assert words[words.index("--config") + 1] == "out/runs/x/options.yaml"
    assert words[words.index("--run_dir") + 1] == "out/runs/x"
