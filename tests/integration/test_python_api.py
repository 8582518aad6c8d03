"""The examples of the documentation, run as a user runs them, interrupted and resumed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from launching import run_program, running, wait_for_end, wait_until
from reading import summary

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
METRIC = {"segmentation": "iou", "regression": "absolute_error"}


def newest_weights(run: Path, network: int) -> dict[str, torch.Tensor]:
    """Weights of a network in the newest checkpoint."""
    newest = sorted((run / "checkpoints").glob("epoch_*/COMPLETE.json"))[-1].parent
    state = torch.load(newest / f"network{network:02d}.pt", weights_only=True)
    weights: dict[str, torch.Tensor] = state["model"]
    return weights


@pytest.mark.slow
@pytest.mark.parametrize("name", METRIC)
def test_an_example_learns_and_resumes_exactly(name: str, tmp_path: Path) -> None:
    script = EXAMPLES / f"{name}.py"
    assert len(script.read_text().splitlines()) <= 60
    command = [sys.executable, str(script)]
    whole, interrupted = tmp_path / "whole", tmp_path / "interrupted"
    for folder in (whole, interrupted):
        folder.mkdir()

    done = run_program(command, timeout=200, cwd=whole)
    assert done.status == 0, done

    run = interrupted / "runs" / name
    with running([command], cwd=interrupted) as (process,):
        metrics = run / "network00" / "metrics.jsonl"
        wait_until(
            lambda: metrics.exists() and "\n" in metrics.read_text(),
            "the first epoch",
            meanwhile=[process],
        )
        (run / "STOP").touch()
        stopped = wait_for_end(process, 100)
    assert "stopped early by the file" in stopped.errors
    assert (run / "STOPPED_EARLY").exists()
    resumed = run_program(command, timeout=200, cwd=interrupted)
    assert resumed.status == 0, resumed
    assert "resumed from" in resumed.output

    lines = [
        json.loads(line)
        for line in (whole / "runs" / name / "network00" / "metrics.jsonl").read_text().splitlines()
    ]
    first, last = (line[f"test_{METRIC[name]}"] for line in (lines[0], lines[-1]))
    assert last > first if name == "segmentation" else last < first
    assert summary(whole / "runs" / name)["metric"] == METRIC[name]
    for network in range(2):
        expected = newest_weights(whole / "runs" / name, network)
        found = newest_weights(run, network)
        assert all(torch.equal(expected[key], found[key]) for key in expected)
