"""A whole comparison with real trainings: interrupted, gone on with, and one run that fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dist_graft.studies.plan import read_plan
from dist_graft.studies.results import Results
from dist_graft.studies.state import state_of

PLAN = """
name: tiny
recipe:
  epochs: 2
  data: {train_samples: 64, test_samples: 50, batch_size: 32}
  monitor: {tensorboard: false}
methods: [graft]
networks: [2]
seeds: [0, 1]
leave_out: [one_network, constant, shuffled]
"""


def workers_of(folder: Path) -> list[str]:
    """Command lines of processes that work in the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if f"{folder}/runs" in command:
            found.append(command)
    return found


def wait_for(condition, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_comparison_is_interrupted_and_goes_on(tmp_path: Path) -> None:
    plan_path, out = tmp_path / "plan.yaml", tmp_path / "out"
    plan_path.write_text(PLAN)
    plan = read_plan(plan_path)
    runs = state_of(plan, {}).comparison_runs
    folders = [out / "runs" / f"k2-seed{run.seed}-{run.key}" for run in runs]
    command = [sys.executable, "-m", "dist_graft", "compare", str(plan_path), "--out", str(out)]

    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for((folders[0] / "network01" / "metrics.jsonl").exists)
    os.kill(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 143
    assert errors.strip().splitlines() == [
        "dist-graft: error: stopped by SIGTERM in graft, 2 networks, seed 0, after 0 of 4 runs "
        "(comparison); the same command goes on from there"
    ]
    wait_for(lambda: not workers_of(out), 10)
    assert not (out / "results.csv").exists()
    assert (out / "plan.yaml").exists()

    folders[3].mkdir()
    (folders[3] / "config.yaml").write_text("no run of ours")
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert ended.returncode == 1, ended.stderr
    line = f"{folders[3]}/config.yaml cannot be read"
    (error,) = ended.stderr.strip().splitlines()
    assert error.startswith("dist-graft: error: 1 of 4 runs failed, the first with: ")
    assert line in error

    rows = Results(out).rows
    assert [rows[run.key].status for run in runs] == ["ok", "ok", "ok", "failed"]
    assert line in rows[runs[3].key].error
    for run, folder in zip(runs[:3], folders, strict=False):
        summary = json.loads((folder / "summary.json").read_text())
        evaluation = json.loads((folder / "evaluation.json").read_text())
        outcomes = rows[run.key].outcomes
        last = summary["networks"][-1]["accuracy_after_last_round"]
        assert outcomes["largest_lr_member"] == pytest.approx(last)
        assert outcomes["ensemble"] == pytest.approx(evaluation["ensemble_test_accuracy"])
        soup = evaluation["uniform_soup"]["batch_norm_reestimated"]
        assert outcomes["uniform_soup"] == pytest.approx(soup)
        assert rows[run.key].filters["filters"] == 688  # of ResNet-20 without shortcut convolutions
        assert rows[run.key].error == ""
        assert len(Results(out).curves[run.key]) == 2
        assert [path.name for path in (folder / "checkpoints").iterdir()] == ["epoch_0002"]
        assert rows[run.key].core_seconds > 1
    log = (folders[0] / "network00" / "log.txt").read_text()
    assert log.count("epoch 2/2") == 1
    assert "graft, 2 networks, against no exchange: " in ended.stdout
    report = (out / "report.html").read_text()
    assert all(key in report for key in rows)
    assert (out / "pictures" / "primary.png").stat().st_size < 150_000
