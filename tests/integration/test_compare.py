"""A comparison with real training runs that is interrupted and resumed, with one failed run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from reading import checkpoint, metrics

from dist_graft.run_directory import RunDirectory
from dist_graft.studies.controls import Run
from dist_graft.studies.execution import run_folder
from dist_graft.studies.plan import read_plan
from dist_graft.studies.records import Results
from dist_graft.studies.selection import study_state

PLAN = """
name: tiny
recipe:
  epochs: 2
  data: {name: fashion-mini, train_samples: 64, test_samples: 50, batch_size: 32}
  model: {name: resnet8}
  monitor: {tensorboard: false}
  runtime: {threads: 1}
methods: [graft, average]
networks: [2]
seeds: [0]
tuning: none
leave_out: [one_network, constant, shuffled]
baselines: [branches, snapshots, distilled]
"""
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def worker_commands(folder: Path) -> list[str]:
    """Command lines of the processes that train runs of this folder."""
    commands = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if f"{folder}/runs" in command:
            commands.append(command)
    return commands


def wait_for(condition, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"timed out after {seconds} s"
        time.sleep(0.1)


@dataclass
class Compared:
    """A finished comparison that was interrupted in its first run; the run of average failed."""

    out: Path
    results: Results
    runs: dict[str, Run]
    """By the name of the arm."""
    interrupted: subprocess.CompletedProcess[str]
    ended: subprocess.CompletedProcess[str]

    def row(self, name: str) -> Any:
        return self.results.rows.loc[self.runs[name].key]

    def folder(self, name: str) -> Path:
        return run_folder(self.runs[name], self.out)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Compared:
    path = tmp_path_factory.mktemp("compared") / "plan.yaml"
    path.write_text(PLAN)
    out = path.parent / "out"
    runs = {run.arm.name: run for run in study_state(read_plan(path)).comparison_runs}
    command = [sys.executable, "-m", "dist_graft", "compare", str(path), "--out", str(out)]

    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for((run_folder(runs["graft"], out) / "network01" / "metrics.jsonl").exists)
    os.kill(process.pid, signal.SIGTERM)
    output, errors = process.communicate(timeout=300)
    interrupted = subprocess.CompletedProcess(command, process.returncode, output, errors)
    wait_for(lambda: not worker_commands(out), 10)
    assert not (out / "results.csv").exists()
    assert (out / "plan.yaml").exists()

    broken = run_folder(runs["average"], out)
    broken.mkdir()
    (broken / "config.yaml").write_text("not a run")
    ended = subprocess.run(command, capture_output=True, text=True, timeout=850, check=False)
    return Compared(out, Results(out), runs, interrupted, ended)


def test_interrupted_comparison_resumes(compared: Compared) -> None:
    out, ended, count = compared.out, compared.ended, len(compared.runs)
    assert compared.interrupted.returncode == 143
    assert compared.interrupted.stderr.strip().splitlines() == [
        "dist-graft: error: stopped by SIGTERM in graft, 2 networks, seed 0, after 0 of "
        f"{count} runs (comparison): rerun the command to resume"
    ]
    assert ended.returncode == 1, ended.stdout + ended.stderr
    line = f"{compared.folder('average')}/config.yaml cannot be read"
    (error,) = ended.stderr.strip().splitlines()
    assert error.startswith(f"dist-graft: error: 1 of {count} runs failed, the first with: ")
    assert line in error

    rows = compared.results.rows
    statuses = {name: compared.row(name)["status"] for name in compared.runs}
    assert statuses == dict.fromkeys(compared.runs, "ok") | {"average": "failed"}
    assert line in compared.row("average")["error"]
    assert set(rows["error"][rows["status"] == "ok"]) == {""}
    for name in ("graft", "no exchange"):
        row, folder = compared.row(name), compared.folder(name)
        evaluation = json.loads((folder / "evaluation.json").read_text())
        last = evaluation["members"][-1]["test_accuracy_reestimated"]
        assert row["largest_lr_member"] == pytest.approx(last)
        mean = evaluation["mean_test_accuracy_reestimated"]
        assert row["delivered"] == pytest.approx(mean)
        assert row["images_seen"] == 2 * 2 * 64
        assert row["steps"] == 4
        assert row["ensemble"] == pytest.approx(evaluation["ensemble_test_accuracy_reestimated"])
        soup = evaluation["uniform_soup"]["batch_norm_reestimated"]
        assert row["uniform_soup"] == pytest.approx(soup)
        assert row["filters"] == 2 * 240  # of ResNet-8 without shortcut convolutions
        curves = compared.results.curves
        assert (curves["key"] == row.name).sum() == 2
        assert [path.name for path in (folder / "checkpoints").iterdir()] == ["epoch_0002"]
        assert row["core_seconds"] > 1
    log = (compared.folder("graft") / "network00" / "log.txt").read_text()
    assert log.count("epoch 2/2") == 1
    assert "graft, 2 networks, compared with no exchange: " in ended.stdout
    report = (out / "report.html").read_text()
    assert all(key in report for key in rows.index)
    assert (out / "pictures" / "primary.png").stat().st_size < 150_000


def test_branches_continue_one_network(compared: Compared) -> None:
    name = "2 branches of one network after 1 of 2 epochs"
    row, folder = compared.row(name), compared.folder(name)
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert row["delivered"] == pytest.approx(evaluation["averages"]["soup"]["test_accuracy"])
    assert row["images_seen"] == 64 * (1 + 2 * 1)
    curves = compared.results.curves
    assert curves.loc[curves["key"] == row.name, "epoch"].tolist() == [0, 1]
    start = folder / "before_epoch_0001"
    rates = [metrics(start, 0)[0]["lr"], *(metrics(folder, k)[0]["lr"] for k in (0, 1))]
    assert rates == pytest.approx([0.1, 0.05, 0.05])
    assert [len(metrics(folder, network)) for network in (0, 1)] == [1, 1]


def test_barrier_before_the_last_round(compared: Compared) -> None:
    graft, measured = compared.row("graft"), compared.results.rows["barrier_before"].notna()
    assert graft["barrier"] == pytest.approx(0, abs=1e-5), "both networks are equal"
    assert graft["barrier_before"] >= 0
    assert measured.sum() == 1, "the others have no rounds"
    folder = compared.folder("graft")
    before = [torch.load(RunDirectory(folder).before_last_round(k)) for k in (0, 1)]
    assert [saved["round"] for saved in before] == [1, 1]
    for unit, kept in metrics(folder, 1)[-1]["graft"]["coefficient"].items():
        own, donor = (saved["model"][f"{unit}.weight"] for saved in (before[1], before[0]))
        after = checkpoint(folder, 2, 1)["model"][f"{unit}.weight"]
        assert not torch.equal(own, donor)
        torch.testing.assert_close(after, kept * own + (1 - kept) * donor)


def test_snapshots_of_one_network(compared: Compared) -> None:
    name = "snapshot ensemble of one network, 2 x epochs in 2 cycles"
    row, folder = compared.row(name), compared.folder(name)
    snapshots = json.loads((folder / "evaluation.json").read_text())["averages"]["snapshots"]
    assert row["delivered"] == row["ensemble"] == pytest.approx(snapshots["test_accuracy"])
    assert row["ensemble_nll"] == pytest.approx(snapshots["test_loss"], rel=1e-5)
    assert row["images_seen"] == 4 * 64
    rates = [line["lr"] for line in metrics(folder, 0)]
    assert rates == pytest.approx([0.1, 0.05, 0.1, 0.05])
    report = (compared.out / "report.md").read_text()
    section = report.partition("## Primary outcome")[2].partition("\n## ")[0]
    assert "2 branches of one network" in section
    assert "snapshot ensemble" not in section


def test_a_network_distilled_from_the_members(compared: Compared) -> None:
    name, members = "distilled from 2 members into one network", compared.folder("no exchange")
    row, folder = compared.row(name), compared.folder(name)
    stored = yaml.safe_load((folder / "config.yaml").read_text())["distill"]["teachers"]
    last = members / "checkpoints" / "epoch_0002"
    assert stored == [str(last / f"network{network:02d}.pt") for network in (0, 1)]
    assert row["images_seen"] == 64 * (2 * 2 + 2)
    cost = json.loads((folder / "cost.json").read_text())["wall_seconds"]
    shared = compared.row("no exchange")["wall_seconds"]
    assert row["wall_seconds"] == pytest.approx(cost + shared, abs=0.02)
    log = (members / "network00" / "log.txt").read_text()
    assert log.count("epoch 2/2") == 1, "the members were trained once"
