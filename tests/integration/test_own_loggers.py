"""Loggers of `monitor.loggers`, in this process: what they receive, and how they fail."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import Train, run_population
from own_loggers import calls
from reading import metrics

from dist_graft.monitoring import run_loggers

STEADY = ("--optim.schedule", "constant", "--model.name", "resnet8")
FILES = ("--monitor.loggers", "own_loggers:FileLogger")


def logged(run: Path, name: str) -> list[dict[str, float]]:
    return [value for call, value in calls(run, name) if call == "log"]


def warnings_of(output: str) -> list[str]:
    return [line for line in output.splitlines() if "monitor.loggers" in line]


def test_a_network_and_the_population_are_two_runs_of_one_group(
    train: Train, tmp_path: Path
) -> None:
    run = tmp_path / "a run"
    done = train(run, "--epochs", "2", *STEADY, *FILES, "--optim.lr", "0.05")
    assert done.status == 0, done
    assert not list(run.rglob("events.out*"))
    group = json.loads((run / "loggers.json").read_text())["group"]
    assert group.startswith("a-run-")
    for name in ("network00", "population"):
        (_, opened), *_, last = calls(run, name)
        assert last == ("finish", "finished")
        assert opened["group"] == group
        assert opened["tags"] == {
            **{"method": "graft", "K": "1", "data": "fashion-mini", "model": "resnet8"}
        }
        assert opened["config"]["optim.lr"] == 0.05
        assert (run / "own" / f"{group}-{name}.jsonl").exists()
    network, population = (logged(run, name) for name in ("network00", "population"))
    assert [values["epoch"] for values in network] == [0, 1, 1]
    summary = json.loads((run / "summary.json").read_text())["networks"][0]
    for line, values in zip(metrics(run, 0), network, strict=False):
        assert values["accuracy/test"] == line["test_accuracy"]
        for unit, information in line["information"].items():
            assert values[f"entropy/{unit}"] == information
    assert (
        network[-1]["final/test_accuracy_after_last_round"]
        == (summary["accuracy_after_last_round"])
    )
    assert [values["population/test_accuracy_mean"] for values in population[:2]] == [
        line["test_accuracy"] for line in metrics(run, 0)
    ]


def test_a_resumed_run_continues_with_the_same_ids(train: Train, tmp_path: Path) -> None:
    """Also after the run was moved, and resumed without loggers in between."""
    run, moved = tmp_path / "run", tmp_path / "moved"
    assert train(run, "--epochs", "1", *STEADY, *FILES).status == 0
    run.rename(moved)
    assert train(moved, "--epochs", "2", *STEADY).status == 0
    done = train(moved, "--epochs", "3", *STEADY, *FILES)
    assert done.status == 0, done
    found = calls(moved, "network00")
    assert [call for call, _ in found] == 2 * ["open", "log", "log", "finish"]
    assert [values["epoch"] for values in logged(moved, "network00")] == [0, 0, 2, 2]


def test_a_failing_logger_is_one_warning(train: Train, tmp_path: Path) -> None:
    names = "tensorboard,own_loggers:FailingLogger,own_loggers:NotCreated"
    run = tmp_path / "run"
    done = train(run, "--epochs", "3", *STEADY, "--monitor.loggers", names)
    assert done.status == 0, done
    failing, not_created = sorted(warnings_of(done.output))
    assert "own_loggers:FailingLogger failed and is now off (OSError: [Errno 28] No" in failing
    assert "own_loggers:NotCreated failed and is now off (ConnectionError: no route" in not_created
    assert [values["epoch"] for values in logged(run, "network00")] == [0]
    assert len(metrics(run, 0)) == 3
    assert list(run.rglob("network00/events.out*"))


def test_a_hanging_logger_delays_no_training(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_loggers, "_FINISH_SECONDS", 3.0)
    run = tmp_path / "run"
    names = "[own_loggers:HangingLogger, own_loggers:FileLogger]"
    done = train(run, "--epochs", "2", *STEADY, "--monitor.loggers", names)
    assert done.status == 0, done
    (line,) = warnings_of(done.output)
    assert "own_loggers:HangingLogger did not finish in time" in line
    assert len(metrics(run, 0)) == 2


def test_a_disk_error_before_training_is_one_warning(train: Train, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "loggers.json").mkdir(parents=True)
    done = train(run, "--epochs", "1", *STEADY, *FILES)
    assert done.status == 0, done
    (line,) = warnings_of(done.output)
    assert "training continues without monitor.loggers" in line


def test_a_run_that_diverges_has_failed(train: Train, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = train(run, "--epochs", "1", *STEADY, *FILES, "--optim.lr", "1e30")
    assert done.status == 1, done
    assert calls(run, "network00")[-1] == ("finish", "failed")
    assert calls(run, "population")[-1] == ("finish", "failed")


def test_a_job_reports_its_own_network(train: Train, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = ("--graft.exchange", "files", "--population.size", "2", "--population.network")
    for network in ("0", "1"):
        assert train(run, "--epochs", "1", *STEADY, *FILES, *job, network).status == 0
    names = [path.stem for path in sorted((run / "own").iterdir())]
    group = json.loads((run / "loggers.json").read_text())["group"]
    assert names == [f"{group}-network00", f"{group}-network01"]
    for network in (0, 1):
        values = logged(run, f"network{network:02d}")[0]
        assert values["accuracy/test"] == metrics(run, network)[0]["test_accuracy"]


def test_other_networks_are_other_runs(tmp_path: Path) -> None:
    """With --resume_networks, network 0 is the former network 1."""
    run = tmp_path / "run"
    run_population(2, run, "--epochs", "1", *STEADY, *FILES)
    run_population(1, run, "--epochs", "2", *STEADY, *FILES, "--resume_networks", "[1]")
    names = ("network00", "network01", "population")
    assert [len(logged(run, name)) for name in names] == [2, 2, 2]
    assert [values["epoch"] for values in logged(run, "network00-2")] == [1, 1]
    assert [values["epoch"] for values in logged(run, "population-2")] == [1, 1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tensorbord", "monitor.loggers must be one of tensorboard, wandb, mlflow, trackio, or"),
        ("own_loggers:Missing", "own_loggers has no function or class 'Missing'"),
    ],
)
def test_unknown_names_are_refused(train: Train, tmp_path: Path, name: str, message: str) -> None:
    run = tmp_path / "run"
    done = train(run, "--monitor.loggers", name)
    assert done.status == 2
    (line,) = done.errors.splitlines()
    assert message in line
    assert not run.exists()
