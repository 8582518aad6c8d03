"""Runs of two networks that report to real services, offline, read back with the services' code."""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from launching import (
    environment,
    error_line,
    program,
    run_program,
    run_programs,
    running,
    torchrun,
    wait_for_end,
    wait_until,
)
from reading import metrics

SERVICES = ("wandb", "mlflow", "trackio")
OPTIONS = (
    *("--epochs", "3", "--data.train_samples", "512", "--data.batch_size", "16"),
    *("--model.name", "resnet8", "--checkpoint.grace_seconds", "240"),
)


@dataclass
class Found:
    """A run as its service has it."""

    group: str
    tags: dict[str, str]
    learning_rate: float
    ends: list[str]
    """State after each process that reported it, or the last one only."""
    epochs: dict[int, dict[str, float]] = field(default_factory=dict)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that all installed services watch: stopped by SIGTERM after an epoch, and resumed."""
    names = [name for name in SERVICES if importlib.util.find_spec(name)]
    if not names:
        pytest.skip("needs wandb, mlflow or trackio")
    run = tmp_path_factory.mktemp("stopped") / "run"
    command = torchrun(2, run, *OPTIONS, "--monitor.loggers", ",".join(names))
    first = run / "network00/metrics.jsonl"
    offline = {"WANDB_MODE": "offline"}
    with running([command], cwd=run.parent, **offline) as (launcher,):
        wait_until(
            lambda: first.exists() and "\n" in first.read_text(), "epoch 1", meanwhile=[launcher]
        )
        launcher.terminate()
        done = wait_for_end(launcher, 120)
    assert "stopped early by " in done.errors
    again = run_program(command, timeout=240, cwd=run.parent, **offline)
    assert again.status == 0, again
    assert "resumed from" in again.output
    for output in (done, again):
        assert "monitor.loggers" not in output.output + output.errors, output
    assert list(run.parent.iterdir()) == [run]  # nothing litters the working directory
    return run


def records(path: Path) -> Iterator[Any]:
    """Records of an offline run of W&B: protocol buffers in a LevelDB log with its own header."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, content = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        _, size, kind = struct.unpack("<IHB", data[position : position + 7])
        content += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            yield Record.FromString(content)
            content = b""


def read_wandb(run: Path) -> dict[str, Found]:
    found: dict[str, Found] = {}
    for path in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        for record in records(path):
            if record.HasField("run"):
                values = {
                    item.key: json.loads(item.value_json) for item in record.run.config.update
                }
                tags = dict(tag.split("=") for tag in record.run.tags)
                item = found.setdefault(
                    record.run.run_id,
                    Found(record.run.run_group, tags, values["optim.lr"], ends=[]),
                )
            elif record.HasField("history"):
                parts = record.history.item
                scalars = {"/".join(part.nested_key): json.loads(part.value_json) for part in parts}
                item.epochs.setdefault(record.history.step.num, {}).update(scalars)
            elif record.HasField("preempting"):
                item.ends.append("stopped")
            elif record.HasField("exit") and not record.exit.exit_code:
                item.ends.append("finished")
    return found


def read_mlflow(run: Path) -> dict[str, Found]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{run}/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("dist_graft")
    assert experiment
    found = {}
    for entry in client.search_runs([experiment.experiment_id]):
        tags = dict(entry.data.tags)
        assert tags.pop("dist_graft.run") == tags.pop("mlflow.runName") == entry.info.run_name
        ends = {"FINISHED": ["finished"]}.get(entry.info.status, [])
        item = Found(tags.pop("group"), tags, float(entry.data.params["optim.lr"]), ends)
        for name in entry.data.metrics:
            for value in client.get_metric_history(entry.info.run_id, name):
                assert name not in item.epochs.setdefault(value.step, {}), "an epoch twice"
                item.epochs[value.step][name] = value.value
        found[entry.info.run_name] = item
    return found


def read_trackio(run: Path) -> dict[str, Found]:
    """In a process of its own: trackio reads the name of its folder when it is imported."""
    program = (
        "import json, trackio\n"
        "from trackio.sqlite_storage import SQLiteStorage\n"
        "runs = trackio.Api().runs('dist_graft')\n"
        "print(json.dumps([[r.name, r.config, SQLiteStorage.get_logs('dist_graft', r.name)]"
        " for r in runs]))"
    )
    folder = {"TRACKIO_DIR": str(run / "trackio")}
    output = subprocess.run(
        [sys.executable, "-c", program],
        env=environment(**folder),
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found = {}
    for name, config, lines in json.loads(output.splitlines()[-1]):
        item = Found(config["_Group"], config["tags"], config["optim.lr"], ends=[])
        for line in lines:
            item.epochs.setdefault(line["step"], {}).update(line)
        found[name] = item
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's use of SQLAlchemy 2.1
@pytest.mark.parametrize(
    ("name", "read", "ends"),
    [
        ("wandb", read_wandb, ["stopped", "finished"]),
        ("mlflow", read_mlflow, ["finished"]),
        ("trackio", read_trackio, []),
    ],
)
def test_a_resumed_run_is_one_run_for_each_network(
    name: str, read: Callable[[Path], dict[str, Found]], ends: list[str], stopped: Path
) -> None:
    pytest.importorskip(name)
    found = read(stopped)
    group = json.loads((stopped / "loggers.json").read_text())["group"]
    members = ("network00", "network01", "population")
    assert set(found) == {f"{group}-{member}" for member in members}
    tags = {"method": "graft", "K": "2", "data": "fashion-mini", "model": "resnet8"}
    lines = [metrics(stopped, network) for network in (0, 1)]
    for run in found.values():
        assert (run.group, run.tags, run.learning_rate, run.ends) == (group, tags, 0.1, ends)
        assert list(run.epochs) == [0, 1, 2]
    for epoch in (0, 1, 2):
        accuracies = [lines[network][epoch]["test_accuracy"] for network in (0, 1)]
        for network in (0, 1):
            scalars = found[f"{group}-network{network:02d}"].epochs[epoch]
            assert scalars["accuracy/test"] == accuracies[network]
            for unit, coefficient in lines[network][epoch]["graft"]["coefficient"].items():
                assert scalars[f"coefficient/{unit}"] == pytest.approx(coefficient)
        scalars = found[f"{group}-population"].epochs[epoch]
        assert scalars["population/test_accuracy_mean"] == statistics.fmean(accuracies)
    assert "final/ensemble_test_accuracy_after_last_round" in scalars


def hidden(folder: Path, *packages: str) -> dict[str, str]:
    """Environment in which packages cannot be imported."""
    lines = [f"sys.modules[{package!r}] = None" for package in packages]
    (folder / "sitecustomize.py").write_text("\n".join(["import sys", *lines]))
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths)}


@pytest.mark.parametrize(
    ("name", "package"), [("wandb", "wandb"), ("mlflow", "sqlalchemy"), ("trackio", "trackio")]
)
def test_a_missing_package_is_one_line(name: str, package: str, tmp_path: Path) -> None:
    if name != package:
        pytest.importorskip(name)
    run = tmp_path / "run"
    without = hidden(tmp_path, package)
    done = run_program(program(run, "--monitor.loggers", name), timeout=60, **without)
    assert done.status == 2
    assert error_line(done, "pip install 'dist_graft[loggers]'").endswith(
        f"monitor.loggers {name} needs the package {package}: pip install 'dist_graft[loggers]'"
    )
    assert not run.exists()


def test_a_missing_package_is_reported_by_every_rank(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = program(run, "--monitor.loggers", "trackio")
    for done in run_programs([command] * 2, timeout=60, **hidden(tmp_path, "trackio")):
        assert done.status == 2
        error_line(done, "monitor.loggers trackio needs the package trackio")
    assert not run.exists()


def test_an_api_key_is_not_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    run, home = tmp_path / "run", {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")}
    without = {"WANDB_API_KEY": "", "WANDB_MODE": "online", **home}
    command = program(run, "--epochs", "1", "--monitor.loggers", "wandb")
    done = run_program(command, timeout=120, **without)
    assert done.status == 0, done
    (line,) = [line for line in done.output.splitlines() if "monitor.loggers" in line]
    assert "it needs an API key: run wandb login, or set WANDB_MODE=offline" in line
    assert not list(run.glob("wandb/*/*.wandb"))
