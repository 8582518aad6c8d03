"""Execution of a comparison, with a stand-in for training: runs, retries, signals, results."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from made_up import make_plan

from dist_graft.analysis import stored_weights
from dist_graft.errors import ConfigError, RunDirectoryError, StartError, StoppedError
from dist_graft.population.runtime.process_info import ProcessInfo
from dist_graft.studies import command, comparison, execution
from dist_graft.studies.comparison import FailedRunsError, compare, dry_run
from dist_graft.studies.controls import Run
from dist_graft.studies.execution import (
    RunFailedError,
    count_filters,
    count_images,
    error_line,
    finished_epochs,
    is_finished,
    largest,
    read_curve,
    read_delivered,
    read_test,
    read_validation,
    summarize,
    train_commands,
)
from dist_graft.studies.plan import Plan
from dist_graft.studies.records import OUTCOMES, Results, plan_sha256, read_starts
from dist_graft.studies.selection import study_state
from dist_graft.studies.statistics import seeds_needed, upper_limit
from dist_graft.studies.train_options import build_config
from dist_graft.training.checkpoint.files import checkpoint_path, mark_complete, save_network
from dist_graft.training.models import build_model

STAND_IN = Path(__file__).parent / "stand_in.py"


@pytest.fixture
def behaviour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of files that control the stand-ins for training and evaluation."""
    folder = tmp_path / "behaviour"
    folder.mkdir()

    def train(run: Run, at: Path) -> list[list[str]]:
        options = yaml.safe_load((at / "options.yaml").read_text())
        (at / "options.json").write_text(json.dumps(options))
        words = ["train", at / "options.json", at, run.arm.networks, folder]
        return [[sys.executable, str(STAND_IN), *map(str, words)]]

    monkeypatch.setattr(execution, "train_commands", train)
    monkeypatch.setattr(
        execution,
        "evaluate_command",
        lambda run, at: [sys.executable, str(STAND_IN), "evaluate", str(at)],
    )
    return folder


@pytest.fixture(autouse=True)
def _restore_signal_handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "build_report", lambda *_: ([], ["the conclusion"]))
    monkeypatch.setattr(comparison, "write_report", lambda *_: None)


def plan(**changes: Any) -> Plan:
    leave_out = ["constant", "shuffled", "one_network"]
    return make_plan(**{"recipe": {"epochs": 1}, "leave_out": leave_out} | changes)


def starts(behaviour: Path) -> list[str]:
    path = behaviour / "starts"
    return path.read_text().split() if path.exists() else []


def folder_of(run: Run) -> str:
    return f"k{run.arm.networks}-seed{run.seed}-{run.key}"


class TestComparison:
    def test_runs_everything_once(
        self, behaviour: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        text = compare(plan(), tmp_path / "out")
        first, *warnings, last = text.splitlines()
        assert (first, last) == ("the conclusion", f"report: {tmp_path / 'out/report.html'}")
        assert warnings == study_state(plan()).warnings
        runs = study_state(plan()).comparison_runs
        assert starts(behaviour) == [folder_of(run) for run in runs]
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == "comparison 1/4: graft, 2 networks, seed 0: started"
        assert lines[1].startswith("comparison 1/4: graft, 2 networks, seed 0: 80.50 % (test), ")
        assert "about" in lines[1]
        assert "about" not in lines[-1]
        rows = Results(tmp_path / "out").rows
        assert rows.index.tolist() == [run.key for run in runs]
        assert rows["delivered"].tolist() == [80.5, 80.0, 81.5, 81.0]
        row = rows.iloc[0]
        assert row[["status", "split", "commit", "dirty"]].tolist() == [
            *("ok", "test", "c0ffee", "no")
        ]
        assert row[["delivers", "plan_sha256", "supersedes", "reason"]].tolist() == [
            *("member", plan_sha256(plan()), "", "")
        ]
        assert row[["steps", "images_seen"]].tolist() == [8, 2 * 1_000]
        assert row["uniform_soup"] == 20.0
        assert row["wall_seconds"] > 0
        assert row["core_seconds"] > 0
        assert "filters not counted" in row["error"]  # the stand-in saves no weights

    def test_finished_runs_are_not_repeated(self, behaviour: Path, tmp_path: Path) -> None:
        compare(plan(), tmp_path / "out")
        before = (tmp_path / "out/results.csv").read_bytes()
        compare(plan(), tmp_path / "out")
        assert len(starts(behaviour)) == 4
        assert (tmp_path / "out/results.csv").read_bytes() == before

    def test_added_seeds_are_run(self, behaviour: Path, tmp_path: Path) -> None:
        compare(plan(), tmp_path / "out")
        compare(plan(seeds=[0, 1, 2]), tmp_path / "out")
        assert len(starts(behaviour)) == 6
        entries = read_starts(tmp_path / "out")
        assert [entry.runs_before for entry in entries] == [0, 4]
        first = tmp_path / "out" / f"plan-{entries[0].plan_sha256[:8]}.yaml"
        assert yaml.safe_load(first.read_text())["seeds"] == [0, 1]

    def test_plan_is_recorded_before_the_first_run(
        self, behaviour: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def no_training(run: Run, at: Path) -> list[list[str]]:
            raise KeyboardInterrupt

        monkeypatch.setattr(execution, "train_commands", no_training)
        with pytest.raises(KeyboardInterrupt):
            compare(plan(), tmp_path / "out")
        (entry,) = read_starts(tmp_path / "out")
        content = (tmp_path / "out/plan.yaml").read_bytes()
        assert hashlib.sha256(content).hexdigest() == entry.plan_sha256
        assert (entry.primary, entry.smallest_effect) == ("delivered", 0.3)
        assert entry.runs_before == 0
        assert not (tmp_path / "out/results.csv").exists()

    @pytest.mark.parametrize(
        "change",
        [
            {"primary": "ensemble"},
            {"against": "best_lr"},
            {"smallest_effect": 0.5},
            {"tuning": {"rates": [0.1, 0.2]}},
        ],
    )
    def test_what_decides_must_not_change(
        self, behaviour: Path, tmp_path: Path, change: dict[str, Any]
    ) -> None:
        compare(plan(), tmp_path / "out")
        with pytest.raises(ConfigError, match="must not change once there are runs"):
            compare(plan(**change), tmp_path / "out")
        assert len(starts(behaviour)) == 4

    def test_default_seeds_of_the_trials_must_not_move(
        self, behaviour: Path, tmp_path: Path
    ) -> None:
        """A test seed that was one of the trials would move them to other seeds."""
        tuned = plan(tuning={"rates": [0.1, 0.2], "max_extensions": 0})
        compare(tuned, tmp_path / "out")
        count = len(starts(behaviour))
        with pytest.raises(ConfigError, match="tuning must not change once there are runs"):
            compare(replace(tuned, seeds=[0, 1, 1000]), tmp_path / "out")
        history = tmp_path / "out/history.jsonl"
        line = json.loads(history.read_text())
        assert line["tuning"]["seeds"] == [1000, 1001]
        line["tuning"]["seeds"] = None  # an earlier version
        history.write_text(json.dumps(line) + "\n")
        compare(tuned, tmp_path / "out")
        assert len(starts(behaviour)) == count

    def test_a_seed_is_measured_on_one_split(self, behaviour: Path, tmp_path: Path) -> None:
        """If the recipe holds out images, a trial and a test train in the same way."""
        search = {"recipes": {"as it is": {}}, "seeds": [0, 1], "confirm_seeds": [2, 3, 4, 5, 6]}
        recipe = {"epochs": 1, "data.val_fraction": 0.2}
        asked = plan(recipe=recipe, seeds=[], search=search)
        compare(asked, tmp_path / "out")
        moved = search | {"seeds": [0], "confirm_seeds": [1, 2, 3, 4, 5, 6]}
        history = (tmp_path / "out/history.jsonl").read_bytes()
        with pytest.raises(ConfigError, match="seed 1 is needed on the test split, but"):
            compare(plan(recipe=recipe, seeds=[], search=moved), tmp_path / "out")
        assert (tmp_path / "out/history.jsonl").read_bytes() == history

    def test_runs_that_were_measured_in_another_way_are_not_continued(
        self, behaviour: Path, tmp_path: Path
    ) -> None:
        compare(plan(), tmp_path / "out")
        history = tmp_path / "out/history.jsonl"
        lines = [json.loads(line) for line in history.read_text().splitlines()]
        for line in lines:
            del line["protocol"]
        history.write_text("".join(json.dumps(line) + "\n" for line in lines))
        with pytest.raises(ConfigError, match="did not re-estimate batch norm in all networks"):
            compare(plan(seeds=[0, 1, 2]), tmp_path / "out")
        assert len(starts(behaviour)) == 4

    def test_an_evaluation_of_an_earlier_version_is_repeated(
        self, behaviour: Path, tmp_path: Path
    ) -> None:
        compare(plan(), tmp_path / "out")
        (tmp_path / "out/results.csv").unlink()
        for path in (tmp_path / "out/runs").glob("*/evaluation.json"):
            path.write_text(json.dumps({"protocol": 2, "epoch": 2, "members": []}))
        compare(plan(), tmp_path / "out")
        assert len(starts(behaviour)) == 4
        assert set(Results(tmp_path / "out").rows["status"]) == {"ok"}

    @pytest.mark.parametrize(("keep", "left"), [(0, []), (1, ["epoch_0002"])])
    def test_old_checkpoints_are_deleted(
        self, behaviour: Path, tmp_path: Path, keep: int, left: list[str]
    ) -> None:
        compare(plan(keep_checkpoints=keep), tmp_path / "out")
        for run in (tmp_path / "out/runs").iterdir():
            assert [path.name for path in sorted(run.glob("checkpoints/*"))] == left

    def test_directory_is_locked(self, behaviour: Path, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        with (tmp_path / "out/.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            with pytest.raises(RunDirectoryError, match="another comparison is running in"):
                compare(plan(), tmp_path / "out")

    def test_tuning_comes_first_and_extends_its_rates(
        self, behaviour: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        asked = plan(tuning={"rates": [0.1, 0.2], "max_extensions": 1}, methods=["graft"])
        text = compare(asked, tmp_path / "out")
        rows = Results(tmp_path / "out").rows
        # 2 arms, 3 rates (ties go to the smaller rate, so one is added below), 2 seeds
        assert rows["phase"].tolist() == ["tuning"] * 12 + ["comparison"] * 4
        on_validation = {1079.0, 1079.5, 1080.0, 1080.5}
        assert set(rows["delivered"][:12]) == on_validation
        assert (
            text.count("0.05, is at the edge of the rates whose trials succeeded (0.05, 0.1, 0.2)")
            == 2
        )
        assert "tuning 1/8: graft, lr 0.1, 2 networks, seed 1000: started" in (
            capsys.readouterr().out
        )

    def test_report_only_runs_nothing(self, behaviour: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        with pytest.raises(RunDirectoryError, match="has no comparison to report on"):
            compare(plan(), out, report_only=True)
        compare(plan(), out)
        history = (out / "history.jsonl").read_bytes()
        assert "the conclusion" in compare(plan(), out, report_only=True)
        assert (out / "history.jsonl").read_bytes() == history
        assert len(starts(behaviour)) == 4
        with pytest.raises(ConfigError, match="has the comparison of another plan"):
            compare(plan(seeds=[0, 1, 2]), out, report_only=True)

    def test_a_pilot_has_no_report(self, behaviour: Path, tmp_path: Path) -> None:
        compare(plan(), tmp_path / "out", pilot=True)
        with pytest.raises(ConfigError, match="has a pilot only, whose accuracies must not"):
            compare(plan(), tmp_path / "out", report_only=True)
        compare(plan(), tmp_path / "out")
        assert "the conclusion" in compare(plan(), tmp_path / "out", report_only=True)


class TestStages:
    """Runs that are trained in two stages."""

    def test_teachers_are_trained_before_their_student_once(
        self, behaviour: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        members = {}

        def networks_of(folder: Path, run: Run) -> list[Path]:
            members[folder.name] = run
            return [tmp_path / "teacher.pt"]

        monkeypatch.setattr(execution, "_networks_of", networks_of)
        student_only = plan(baselines=["distilled"], seeds=[3])
        runs = {run.arm.name: run for run in study_state(student_only).comparison_runs}
        student = runs["distilled from 2 members into one network"]
        assert student.teachers
        teachers = folder_of(student.teachers)
        out = tmp_path / "out"
        row, _ = execution.execute_run(
            student, out, keep_checkpoints=1, on_progress=lambda done: None
        )
        assert (row["status"], row["delivers"]) == ("ok", "network")
        assert starts(behaviour) == [teachers, folder_of(student)]
        assert list(members) == [teachers]
        options = yaml.safe_load((out / "runs" / folder_of(student) / "options.yaml").read_text())
        assert options["distill"]["teachers"] == [str(tmp_path / "teacher.pt")]
        costs = [
            json.loads((out / "runs" / name / "cost.json").read_text())["wall_seconds"]
            for name in (teachers, folder_of(student))
        ]
        assert row["wall_seconds"] == pytest.approx(sum(costs))

        # The control whose networks they are is evaluated, and not trained again.
        compare(student_only, out)
        assert starts(behaviour).count(teachers) == 1
        assert starts(behaviour).count(folder_of(student)) == 1

    def test_a_branch_resumes_in_the_stage_that_is_due(
        self, behaviour: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        branching = plan(baselines=["branches"], recipe={"epochs": 4}, networks=[3])
        run = next(r for r in study_state(branching).comparison_runs if "branches" in r.arm.name)
        commands: list[list[str]] = []
        monkeypatch.setattr(
            execution, "_execute", lambda found, output, on_wait: commands.extend(found)
        )
        monkeypatch.setattr(execution, "train_commands", train_commands)

        def due(epoch: int, networks: int) -> list[str]:
            commands.clear()
            folder = tmp_path / f"{epoch} {networks}"
            if epoch:
                path = checkpoint_path(folder / "checkpoints", epoch)
                files = [f"network{network:02d}.pt" for network in range(networks)]
                sums = [save_network(path / name, {}) for name in files]
                mark_complete(path, epoch=epoch, round_=0, sha256=sums)
            with pytest.raises(RunFailedError, match="without writing summary"):
                execution._train(run, folder, [], lambda done: None)
            return [
                f"{words[4]} {' '.join(words[-2:])}".removeprefix("--nproc-per-node=")
                for words in commands
            ]

        start, rest = "1 --epochs 2", "3 --resume_networks [0]"
        assert due(0, 1) == due(1, 1) == [start, rest]
        assert due(2, 1) == due(2, 3) == due(3, 3) == [rest]


class TestFailedRun:
    def test_is_reported_in_one_line_and_the_others_run(
        self,
        behaviour: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(execution, "git_commit", lambda: "f00d-dirty")
        broken = study_state(plan()).comparison_runs[1]
        (behaviour / folder_of(broken)).write_text("fail")
        with pytest.raises(
            FailedRunsError, match="1 of 4 runs failed, the first with: out of memory"
        ):
            compare(plan(), tmp_path / "out")
        rows = Results(tmp_path / "out").rows
        assert rows["status"].tolist() == ["ok", "failed", "ok", "ok"]
        line = "out of memory"
        assert rows.loc[broken.key, "error"] == line
        # It failed before it wrote config.yaml
        assert rows.loc[broken.key, ["commit", "dirty"]].tolist() == ["f00d-dirty", "yes"]
        assert "torch" in rows.loc[broken.key, "versions"]
        assert rows.drop(broken.key)["commit"].unique().tolist() == ["c0ffee"]
        assert rows.loc[broken.key, list(OUTCOMES)].isna().all()
        assert f"failed: {line}" in capsys.readouterr().out

    def test_is_retried_alone(self, behaviour: Path, tmp_path: Path) -> None:
        broken = study_state(plan()).comparison_runs[1]
        (behaviour / folder_of(broken)).write_text("fail")
        with pytest.raises(FailedRunsError):
            compare(plan(), tmp_path / "out")
        (behaviour / folder_of(broken)).unlink()
        compare(plan(), tmp_path / "out")
        assert starts(behaviour)[4:] == [folder_of(broken)]
        results = Results(tmp_path / "out")
        assert set(results.rows["status"]) == {"ok"}
        assert results.all_rows["status"].tolist() == ["ok", "failed", "ok", "ok", "ok"]
        assert results.rows.loc[broken.key, "reason"] == "the earlier attempt failed"
        ((old, new),) = results.superseded()
        assert (old["status"], new["reason"]) == ("failed", "the earlier attempt failed")

    def test_a_trial_is_retried_until_its_arm_was_tested(
        self, behaviour: Path, tmp_path: Path
    ) -> None:
        tuning = {"rates": [0.1, 0.2], "seeds": [9], "max_extensions": 0}
        asked = plan(methods=["graft", "papa"], seeds=[0], tuning=tuning)
        compare(asked, tmp_path / "out", pilot=True)  # tests graft and its control
        trials = study_state(asked).tuning_runs
        assert len(starts(behaviour)) == 4 + 2
        broken = [run for run in trials if run.config.method == "papa"]
        for run in broken:
            (behaviour / folder_of(run)).write_text("fail")
        with pytest.raises(FailedRunsError, match="2 of 8 runs failed"):
            compare(asked, tmp_path / "out")
        for run in broken:
            (behaviour / folder_of(run)).unlink()
        before = len(starts(behaviour))
        compare(asked, tmp_path / "out")
        assert len(starts(behaviour)) == before + 2 + 1  # the trials, and the test of papa
        assert set(Results(tmp_path / "out").rows["status"]) == {"ok"}

    def test_a_trial_is_tried_twice_before_the_tests(self, behaviour: Path, tmp_path: Path) -> None:
        tuning = {"rates": [0.1, 0.2], "seeds": [9], "max_extensions": 0}
        asked = plan(seeds=[0], tuning=tuning)
        once, always = study_state(asked).tuning_runs[:2]
        (behaviour / folder_of(once)).write_text("fail once")
        (behaviour / folder_of(always)).write_text("fail")
        with pytest.raises(FailedRunsError, match="except those on a validation split"):
            compare(asked, tmp_path / "out")
        rows = Results(tmp_path / "out").all_rows
        assert rows.loc[rows["key"] == once.key, "status"].tolist() == ["failed", "ok"]
        assert rows.loc[rows["key"] == always.key, "status"].tolist() == ["failed", "failed"]
        assert rows["phase"].tolist() == ["tuning"] * 6 + ["comparison"] * 2

    @pytest.mark.parametrize(
        ("what", "line"), [("silent", "training "), ("killed", "killed by SIGKILL")]
    )
    def test_without_an_error_line(
        self, behaviour: Path, tmp_path: Path, what: str, line: str
    ) -> None:
        broken = study_state(plan()).comparison_runs[0]
        (behaviour / folder_of(broken)).write_text(what)
        with pytest.raises(FailedRunsError):
            compare(plan(), tmp_path / "out")
        assert Results(tmp_path / "out").rows.loc[broken.key, "error"].startswith(line)


class TestLostCheckpoint:
    """A run that was killed between summary.json and its last checkpoint."""

    def test_is_trained_again(self, behaviour: Path, tmp_path: Path) -> None:
        broken = study_state(plan()).comparison_runs[0]
        (behaviour / folder_of(broken)).write_text("lose once")
        compare(plan(), tmp_path / "out")
        assert starts(behaviour).count(folder_of(broken)) == 2
        assert len(starts(behaviour)) == 5
        assert set(Results(tmp_path / "out").rows["status"]) == {"ok"}

    def test_fails_the_second_time(self, behaviour: Path, tmp_path: Path) -> None:
        broken = study_state(plan()).comparison_runs[0]
        (behaviour / folder_of(broken)).write_text("lose")
        with pytest.raises(
            FailedRunsError, match="last checkpoint is of epoch 0, but it trained 1"
        ):
            compare(plan(), tmp_path / "out")
        assert starts(behaviour).count(folder_of(broken)) == 2
        rows = Results(tmp_path / "out").rows
        assert rows.loc[broken.key, ["commit", "dirty"]].tolist() == ["c0ffee", "no"]
        assert rows["status"].tolist() == ["failed", "ok", "ok", "ok"]


class TestDivergence:
    @pytest.mark.parametrize(
        ("action", "error"),
        [
            ("diverge", "epoch 0: network 0 has a weight that is not finite in conv (round 1)"),
            ("heal", "network 1 copied network 0"),
        ],
    )
    def test_counts_as_chance_accuracy_and_is_not_retried(
        self, action: str, error: str, behaviour: Path, tmp_path: Path
    ) -> None:
        broken = study_state(plan()).comparison_runs[0]
        (behaviour / folder_of(broken)).write_text(action)
        compare(plan(), tmp_path / "out")
        rows = Results(tmp_path / "out").rows
        assert rows["status"].tolist() == ["diverged", "ok", "ok", "ok"]
        names = ["delivered", "largest_lr_member", "mean_of_members", "ensemble"]
        names += ["uniform_soup", "uniform_soup_as_is"]
        assert rows.loc[broken.key, names].tolist() == [10.0] * 6  # ten classes
        if action == "diverge":
            curves = Results(tmp_path / "out").curves
            assert curves.loc[curves["key"] == broken.key, "mean_of_members"].tolist() == [10.0]
        assert rows.loc[broken.key, "error"].startswith(error)
        assert rows.loc[broken.key, ["versions", "commit", "dirty"]].tolist() == [
            *("dist_graft 0 torch 0", "c0ffee", "no")
        ]
        compare(plan(), tmp_path / "out")
        assert len(starts(behaviour)) == 4

    def test_a_path_with_the_word_is_no_divergence(self, behaviour: Path, tmp_path: Path) -> None:
        broken = study_state(plan()).comparison_runs[0]
        (behaviour / folder_of(broken)).write_text("no space")
        with pytest.raises(FailedRunsError, match="No space left"):
            compare(plan(), tmp_path / "out")
        assert Results(tmp_path / "out").rows.loc[broken.key, "status"] == "failed"


class TestRedo:
    def redo(self, out: Path, arm: str = "graft", reason: str = "a bug in graft") -> str:
        return compare(plan(), out, redo=arm, reason=reason)

    def test_appends_rows_that_supersede(self, behaviour: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        compare(plan(), out)
        before = (out / "results.csv").read_text()
        self.redo(out)
        assert (out / "results.csv").read_text().startswith(before)
        runs = [run for run in study_state(plan()).comparison_runs if run.arm.name == "graft"]
        assert starts(behaviour)[4:] == [f"{folder_of(run)}-redo1" for run in runs]
        results = Results(out)
        for run in runs:
            old, new = results.all_rows[results.all_rows["key"] == run.key].to_dict("records")
            assert (new["supersedes"], new["reason"]) == (old["finished"], "a bug in graft")
            assert (out / "runs" / folder_of(run) / "summary.json").exists()
        assert {new["reason"] for _, new in results.superseded()} == {"a bug in graft"}
        assert [old["key"] for old, _ in results.superseded()] == [run.key for run in runs]
        compare(plan(), out)
        assert len(starts(behaviour)) == 6

    def test_resumes_without_asking_again(
        self, behaviour: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / "out"
        compare(plan(), out)

        def stopped(*_: object, **__: object) -> None:
            raise StoppedError("stopped by SIGTERM; ...")

        with monkeypatch.context() as patch:
            patch.setattr(comparison, "execute_run", stopped)
            with pytest.raises(StoppedError):
                self.redo(out)
        assert "2 runs, " in dry_run(plan(), out)
        compare(plan(), out)
        assert "0 runs, " in dry_run(plan(), out)
        assert len(starts(behaviour)) == 6
        assert len(Results(out).superseded()) == 2

    def test_can_be_repeated(self, behaviour: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        compare(plan(seeds=[0]), out)
        for reason in ("first", "second"):
            compare(plan(seeds=[0]), out, redo="graft, 2 networks", reason=reason)
        assert [name.partition("-redo")[2] for name in starts(behaviour)] == ["", "", "1", "2"]
        assert [new["reason"] for _, new in Results(out).superseded()] == ["first", "second"]

    def test_of_an_unknown_arm(self, behaviour: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="--redo 'papa' is not an arm of the comparison"):
            self.redo(tmp_path / "out", arm="papa")
        assert not (tmp_path / "out/history.jsonl").exists()

    @pytest.mark.parametrize(("arm", "reason"), [("graft", ""), ("graft", " "), ("", "a bug")])
    def test_needs_an_arm_and_a_reason(
        self, arm: str, reason: str, behaviour: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(ConfigError, match="--redo and --reason belong together"):
            self.redo(tmp_path / "out", arm=arm, reason=reason)
        assert not (tmp_path / "out").exists()


class TestPilotAndDryRun:
    def test_dry_run_lists_the_runs(self, behaviour: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        tuned = plan(tuning={"rates": [0.1, 0.2]})
        lines = dry_run(tuned, out).splitlines()
        assert lines[0] == "1. tuning: graft, lr 0.1, 2 networks, seed 1000"
        assert lines[8] == "then up to 4 runs on the test set, once the trials have finished"
        assert lines[9] == "8 runs, estimated time: unknown, no run has finished"
        assert not out.exists()
        compare(plan(), out)
        results = Results(out)
        more = dry_run(plan(seeds=[0, 1, 2]), out).splitlines()
        assert more[:2] == [
            "1. comparison: graft, 2 networks, seed 2",
            "2. comparison: no exchange, 2 networks, seed 2",
        ]
        hours = results.rows["wall_seconds"].mean() * 2 / 3600
        assert more[2] == f"2 runs, estimated time: {hours:.2f} h"
        assert len(starts(behaviour)) == 4

    def test_pilot_plans_the_number_of_seeds(
        self,
        behaviour: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        asked = plan(seeds=[3, 4, 5, 6], methods=["graft", "papa"], smallest_effect=0.5)
        deviations = iter([0.0, 0.4, -0.4, 0.0])
        execute_run = comparison.execute_run

        def noisy(run: Run, *args: Any, **options: Any) -> Any:
            row, curve = execute_run(run, *args, **options)
            row["wall_seconds"] = 3600.0
            if run.arm.name == "graft":
                row["delivered"] += next(deviations)
            return row, curve

        monkeypatch.setattr(comparison, "execute_run", noisy)
        text = compare(asked, tmp_path / "out", pilot=True)
        assert len(starts(behaviour)) == 6
        printed = capsys.readouterr().out
        assert printed.count("trained in ") == 6
        assert "%" not in printed
        lines = text.splitlines()
        assert "standard deviation of 0.40 points over 3 seeds" in lines[0]
        needed, careful = (
            seeds_needed(deviation, 0.5, alpha=0.05 / 2)  # two methods
            for deviation in (0.4, upper_limit(3, 0.4))
        )
        assert "0.05 / 2" in lines[1]
        assert lines[1].endswith(f": {needed} (the plan has 4)")
        assert lines[2].endswith(f"it takes {careful} seeds")
        # 9 is the smallest n with a power of 0.8 at 0.025, from scipy's noncentral t distribution.
        # A run of 2 networks and 1 epoch took an hour, so a seed of 3 arms takes 3 hours.
        assert needed == 9
        assert lines[3] == "estimated time of 9 seeds of 3 arms, without trials: 27.00 h"
        assert len(lines) == 4  # no arm of one network
        compare(asked, tmp_path / "out")
        assert len(starts(behaviour)) == 3 * 4  # those of the pilot are not repeated

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"redo": "graft"}, "--redo and --reason belong together"),
            ({"reason": "why"}, "--redo and --reason belong together"),
            ({"redo": "graft", "reason": " "}, "--redo and --reason belong together"),
            ({"pilot": True, "dry_run": True}, "--dry_run and --pilot are mutually exclusive"),
        ],
    )
    def test_options_that_do_not_fit(self, options: dict[str, Any], message: str) -> None:
        given = {"plan": "x", "out": None, "report_only": False, "dry_run": False, "pilot": False}
        with pytest.raises(ConfigError, match=message):
            next(command.run(given | {"redo": None, "reason": None} | options, ProcessInfo()))


SEARCH = {
    "recipes": {"plain": None, "fast": {"optim.momentum": 0.5}},
    "seeds": [0],
    "confirm_seeds": [10, 11, 12, 13, 14],
}


class TestSearch:
    def plan(self, search: dict[str, Any] = SEARCH, **changes: Any) -> Plan:
        return plan(seeds=[], search=search, **changes)

    def test_comes_before_trials_and_comparison(self, behaviour: Path, tmp_path: Path) -> None:
        compare(self.plan(tuning={"rates": [0.1, 0.2], "max_extensions": 0}), tmp_path / "out")
        phases = Results(tmp_path / "out").rows["phase"].tolist()
        # 2 recipes, 3 arms, 2 rates; then 2 arms, 2 rates, 2 seeds
        assert phases == ["search"] * 12 + ["tuning"] * 8 + ["comparison"] * 10

    def test_is_not_retried_after_its_regime_was_tested(
        self, behaviour: Path, tmp_path: Path
    ) -> None:
        broken = next(
            r for r in study_state(self.plan()).search_runs if r.arm.name == "graft, fast"
        )
        (behaviour / folder_of(broken)).write_text("fail")
        with pytest.raises(FailedRunsError, match=r"1 of .* runs failed"):
            compare(self.plan(), tmp_path / "out")
        (behaviour / folder_of(broken)).unlink()
        before = starts(behaviour)
        with pytest.raises(FailedRunsError, match=r"1 of .* runs failed"):
            compare(self.plan(), tmp_path / "out")
        assert starts(behaviour) == before

    def test_must_not_grow_after_its_regime_was_tested(
        self, behaviour: Path, tmp_path: Path
    ) -> None:
        compare(self.plan(), tmp_path / "out")
        before = starts(behaviour)
        with pytest.raises(ConfigError, match="search must not grow after its result"):
            compare(self.plan(SEARCH | {"seeds": [0, 1]}), tmp_path / "out")
        assert starts(behaviour) == before


class TestSignal:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_stops_the_run_and_the_next_call_resumes(
        self,
        behaviour: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        number: signal.Signals,
    ) -> None:
        runs = study_state(plan()).comparison_runs
        (behaviour / folder_of(runs[1])).write_text("sleep")
        count = execution.finished_epochs

        def stop_in_the_second_run(folder: Path) -> int:
            if folder.name == folder_of(runs[1]) and count(folder):
                os.kill(os.getpid(), number)
            return count(folder)

        monkeypatch.setattr(execution, "finished_epochs", stop_in_the_second_run)
        with pytest.raises(
            StoppedError, match=r"seed 0, after 1 of 4 runs.*rerun the command to resume"
        ):
            compare(plan(), tmp_path / "out")
        assert Results(tmp_path / "out").rows.index.tolist() == [runs[0].key]
        spent = json.loads((tmp_path / "out/runs" / folder_of(runs[1]) / "cost.json").read_text())
        assert spent["wall_seconds"] > 0

        monkeypatch.setattr(execution, "finished_epochs", count)
        (behaviour / folder_of(runs[1])).unlink()
        compare(plan(), tmp_path / "out")
        assert starts(behaviour) == [folder_of(runs[n]) for n in (0, 1, 1, 2, 3)]
        rows = Results(tmp_path / "out").rows
        assert rows.loc[runs[1].key, "wall_seconds"] > spent["wall_seconds"]


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
    ("", 7, "exit status 7 without output"),
]


@pytest.mark.parametrize(("output", "status", "line"), LINES)
def test_error_line(output: str, status: int, line: str) -> None:
    assert error_line(output, status) == line


def test_training_uses_torchrun() -> None:
    run = study_state(plan()).comparison_runs[0]
    (words,) = train_commands(run, Path("out/runs/x"))
    assert words[1:3] == ["-m", "torch.distributed.run"]
    assert "--nproc-per-node=2" in words
    assert words[words.index("-m", 3) + 1 :][:2] == ["dist_graft", "train"]
    assert words[words.index("--config") + 1] == "out/runs/x/options.yaml"
    assert words[words.index("--run_dir") + 1] == "out/runs/x"


def test_jobs_are_trained_by_a_command_for_each_network() -> None:
    state = study_state(plan(methods={"graft-files": None}))
    run = next(run for run in state.comparison_runs if run.arm.name == "graft-files")
    assert run.config.population.size == 2
    commands = train_commands(run, Path("out/runs/x"))
    assert [words[-2:] for words in commands] == [["--population.network", n] for n in "01"]
    assert all(words[1:4] == ["-m", "dist_graft", "train"] for words in commands)
    others = [run.config for run in state.comparison_runs if run.arm.name != "graft-files"]
    assert others
    assert not any(config.callbacks for config in others), "controls are not slowed down"


def test_a_job_that_fails_ends_the_others(tmp_path: Path) -> None:
    forever = [sys.executable, "-c", "import time; time.sleep(1000)"]
    failing = [sys.executable, "-c", "print('dist-graft: error: no space', flush=True); exit(3)"]
    with pytest.raises(RunFailedError, match="no space"):
        execution._execute([forever, failing], tmp_path / "output.txt", lambda: None)


@pytest.mark.parametrize(
    ("missing", "names"), [(["pandas"], "pandas"), (command.EXTRA, ", ".join(command.EXTRA))]
)
def test_missing_extra_names_the_package_to_install(
    missing: list[str], names: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in missing else find_spec(name)
    )
    with pytest.raises(StartError) as error:
        next(command.run({"plan": str(tmp_path / "plan.yaml")}, ProcessInfo()))
    assert str(error.value) == f"compare needs {names}: pip install 'dist_graft[studies]'"


def test_the_package_runs_without_the_extra() -> None:
    """Only studies may import the extra's packages; the command line works without them."""
    blocked = f"import sys; sys.modules.update(dict.fromkeys({command.EXTRA!r}))"
    code = f"{blocked}; from dist_graft.cli import run; sys.exit(run(['compare', 'plan.yaml']))"
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    (line,) = ended.stderr.splitlines()
    assert line.endswith("pip install 'dist_graft[studies]'")
    assert ended.returncode == 1


# Results of a run directory

RATES = [0.05, 0.1]
EVALUATION = {
    "members": [
        {"test_accuracy": 8.0, "test_accuracy_reestimated": test, "val_accuracy_reestimated": val}
        for test, val in ((80.0, 70.0), (84.0, 75.0))
    ],
    "ensemble_test_accuracy": 9.0,
    "ensemble_test_accuracy_reestimated": 86.0,
    "uniform_soup": {"batch_norm_as_is": 60.0, "batch_norm_reestimated": 82.0},
    "greedy_soup": {"members": [1], "batch_norm_as_is": 83.0, "batch_norm_reestimated": 83.5},
}


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content))


def write_metrics(run: Path, name: str, *accuracies: list[float | None]) -> None:
    """Write metrics.jsonl of each network with one accuracy per epoch."""
    for network, values in enumerate(accuracies):
        folder = run / f"network{network:02d}"
        folder.mkdir(parents=True)
        lines = [json.dumps({name: value}) + "\n" for value in values]
        (folder / "metrics.jsonl").write_text("".join(lines))


class TestReading:
    def test_test_accuracies(self, tmp_path: Path) -> None:
        trained = {"members": [80.0, 84.0], "ensemble": 86.0}
        write_json(tmp_path / "evaluation.json", EVALUATION)
        soups = {"uniform_soup": 82.0, "uniform_soup_as_is": 60.0, "greedy_soup": 83.5}
        assert read_test(tmp_path) == trained | soups

    @pytest.mark.parametrize(
        ("rates", "network"),
        [
            ([0.05, 0.1], 1),
            ([0.1, 0.05], 0),
            ([0.1, 0.1], 1),
            ([0.1], 0),
            ([0.1, 0.2, 0.2, 0.1], 2),
        ],
    )
    def test_largest_rate_is_the_last_of_equal_ones(self, rates: list[float], network: int) -> None:
        assert largest(rates) == network

    def test_summary_of_the_members(self) -> None:
        assert summarize([80.0, 84.0], RATES) == {
            "largest_lr_member": 84.0,
            "mean_of_members": 82.0,
        }

    def test_validation_does_not_need_test_accuracies(self, tmp_path: Path) -> None:
        write_json(tmp_path / "evaluation.json", {"members": EVALUATION["members"]})
        assert read_validation(tmp_path) == {"members": [70.0, 75.0]}

    def test_curve_of_a_single_network_on_the_validation_split(self, tmp_path: Path) -> None:
        write_metrics(tmp_path, "val_accuracy", [50.0, 61.0])
        curve = read_curve(tmp_path, [0.1], "validation")
        assert curve["largest_lr_member"].tolist() == [50.0, 61.0]

    def test_validation_needs_a_split(self, tmp_path: Path) -> None:
        write_json(tmp_path / "evaluation.json", {"members": [{"val_accuracy_reestimated": None}]})
        with pytest.raises(RunDirectoryError, match="has no validation accuracies"):
            read_validation(tmp_path)

    @pytest.mark.parametrize(
        ("method", "accuracy"),
        [
            ({"method": "graft"}, 82.0),
            ({"method": "papa"}, 61.0),
            ({"method": "graft", "optim.ema_decay": 0.9}, 71.0),
            ({"method": "graft", "delivers": "checkpoints"}, 72.0),
        ],
    )
    def test_delivered_model(self, method: dict[str, Any], accuracy: float, tmp_path: Path) -> None:
        kinds = {"soup": 61.0, "ema": 71.0, "checkpoints": 72.0}
        averages = {
            kind: {"test_accuracy": value, "val_accuracy": None} for kind, value in kinds.items()
        }
        write_json(tmp_path / "evaluation.json", {"averages": averages})
        run = study_state(plan(methods={"own": method})).comparison_runs[0]
        outcomes = {"mean_of_members": 82.0}
        assert read_delivered(run, tmp_path, outcomes) == accuracy
        trial = replace(run, phase="tuning")
        if accuracy == 82.0:
            assert read_delivered(trial, tmp_path, outcomes) == accuracy
        else:
            with pytest.raises(RunDirectoryError, match="has no validation accuracies"):
                read_delivered(trial, tmp_path, outcomes)

    def test_curve(self, tmp_path: Path) -> None:
        write_metrics(tmp_path, "test_accuracy", [10.0, 20.0], [30.0, 50.0])
        assert read_curve(tmp_path, RATES, "test").to_dict("list") == {
            "epoch": [0, 1],
            "largest_lr_member": [30.0, 50.0],
            "mean_of_members": [20.0, 35.0],
        }
        assert finished_epochs(tmp_path) == 2

    def test_curve_of_a_run_that_branches(self, tmp_path: Path) -> None:
        write_metrics(tmp_path / "before_epoch_0002", "test_accuracy", [5.0, 8.0])
        write_metrics(tmp_path, "test_accuracy", [10.0], [30.0])
        assert read_curve(tmp_path, RATES, "test").to_dict("list") == {
            "epoch": [0, 1, 2],
            "largest_lr_member": [5.0, 8.0, 30.0],
            "mean_of_members": [5.0, 8.0, 20.0],
        }
        assert finished_epochs(tmp_path) == 3

    def test_images_of_all_stages(self, tmp_path: Path) -> None:
        recipe = {"epochs": 4, "data.batch_size": 32}
        state = study_state(plan(recipe=recipe, baselines=["branches", "distilled"]))
        branches, student = (
            next(run for run in state.comparison_runs if name in run.arm.name)
            for name in ("branches", "distilled")
        )
        assert student.teachers
        for name in ("a", "b"):
            (tmp_path / name / "network00").mkdir(parents=True)
            status = {"steps_per_epoch": 2, "train_samples": 60}  # the last batch has 28
            write_json(tmp_path / name / "network00" / "status.json", status)
        images = {"steps": 4 * 2, "images_seen": (2 + 2 * 2) * 60}
        assert count_images({tmp_path / "a": branches}) == images
        stages = {tmp_path / "a": student.teachers, tmp_path / "b": student}
        assert count_images(stages) == images | {"images_seen": (2 * 4 + 4) * 60}
        write_json(tmp_path / "a/network00/status.json", {"steps_per_epoch": 2})
        assert count_images(stages) == {}, "an earlier version did not write train_samples"
        (tmp_path / "a/network00/status.json").unlink()
        assert count_images(stages) == {}

    def test_filters_of_all_networks(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        config = build_config({"model": {"name": "resnet8"}}, 1)
        model = build_model(config.model, num_classes=10, channels=1)
        states = [deepcopy(model.state_dict()) for _ in range(2)]
        for state, invalid in zip(states, (1, 3), strict=True):
            next(tensor for tensor in state.values() if tensor.dim() == 4)[:invalid] = 0.001
        stored = SimpleNamespace(states=lambda: iter(states), config=config, shape=(10, 1))
        monkeypatch.setattr(stored_weights, "open_run", lambda folder: stored)
        counts = {"filters": 2 * 240, "invalid_0.1": 4, "invalid_0.01": 4}
        assert count_filters(tmp_path) == counts

    def test_a_run_that_branches_is_finished_with_all_networks(self, tmp_path: Path) -> None:
        assert not is_finished(tmp_path, 2)
        write_json(tmp_path / "summary.json", {"networks": [{}]})
        assert not is_finished(tmp_path, 2)
        write_json(tmp_path / "summary.json", {"networks": [{}, {}]})
        assert is_finished(tmp_path, 2)

    def test_run_that_has_not_started(self, tmp_path: Path) -> None:
        assert finished_epochs(tmp_path) == 0
        with pytest.raises(RunDirectoryError, match=r"evaluation\.json cannot be read"):
            read_test(tmp_path)
