"""Baselines of a comparison that train in one stage, and divergence, with real training runs.

Branches, snapshots and distilled networks: test_compare.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from reading import checkpoint

from dist_graft.studies.controls import Run
from dist_graft.studies.execution import Row, execute_run, run_folder
from dist_graft.studies.plan import Plan, parse_plan
from dist_graft.studies.selection import study_state

IMAGES, EPOCHS, STEPS = 64, 2, 4
RECIPE: dict[str, Any] = {
    "epochs": EPOCHS,
    "data": {
        **{"name": "fashion-mini", "train_samples": IMAGES, "test_samples": 50},
        "batch_size": IMAGES * EPOCHS // STEPS,
    },
    "model": {"name": "resnet8"},
    "monitor": {"tensorboard": False},
    "runtime": {"device": "cpu", "threads": 1},
}
PLAN = parse_plan(
    {
        "name": "baselines",
        "recipe": RECIPE,
        "methods": ["graft"],
        "networks": [2],
        "seeds": [0],
        "tuning": "none",
        "baselines": {
            "ema": {"optim.ema_decay": 0.9, "lengths": [1]},
            "checkpoint_average": {"checkpoint.keep": EPOCHS, "lengths": [1]},
            "data_parallel": None,
            "local_sgd": {"graft.every_steps": STEPS // 2},
        },
    }
)
DIVERGING = parse_plan(
    {
        "name": "diverging",
        "recipe": {**RECIPE, "optim": {"lr": 1e30}},
        "methods": ["graft", "papa"],
        "networks": [2],
        "seeds": [0],
        "tuning": "none",
    }
)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def run_of(plan: Plan, name: str) -> Run:
    (run,) = (run for run in study_state(plan).comparison_runs if run.arm.name == name)
    return run


def execute(name: str, out: Path) -> tuple[Row, Path, dict[str, Any]]:
    """Train and evaluate an arm; returns its row, its directory and evaluation.json."""
    run = run_of(PLAN, name)
    row, curve = execute_run(run, out, keep_checkpoints=EPOCHS, on_progress=lambda done: None)
    assert (row["status"], row["error"]) == ("ok", "")
    assert curve is not None
    assert len(curve) == run.config.epochs
    assert row["steps"] == STEPS, "as many as a member"
    folder = run_folder(run, out)
    state = checkpoint(folder, run.config.epochs, 0)
    assert state["scheduler"]["last_epoch"] == STEPS
    return row, folder, json.loads((folder / "evaluation.json").read_text())


@pytest.mark.parametrize(
    ("name", "kind"),
    [("EMA of one network", "ema"), ("mean of checkpoints of one network", "checkpoints")],
)
def test_averages_of_one_network(name: str, kind: str, tmp_path: Path) -> None:
    row, _, evaluation = execute(name, tmp_path)
    assert row["images_seen"] == EPOCHS * IMAGES
    average, (network,) = evaluation["averages"][kind], evaluation["members"]
    assert row["delivers"] == kind
    assert row["delivered"] == average["test_accuracy"]
    assert row["mean_of_members"] == network["test_accuracy_reestimated"]
    assert average["test_loss"] != pytest.approx(network["test_loss_reestimated"], rel=1e-3)


def test_data_parallel_training_has_larger_batches(tmp_path: Path) -> None:
    row, folder, evaluation = execute("data parallel, one network on 2 processes", tmp_path)
    trained = yaml.safe_load((folder / "config.yaml").read_text())
    assert trained["runtime"]["replicas"] == 2
    assert trained["data"]["batch_size"] == 2 * PLAN.recipe["data"]["batch_size"]
    assert row["images_seen"] == 2 * EPOCHS * IMAGES, "as many as the population"
    assert row["delivers"] == "network"
    assert row["delivered"] == evaluation["members"][0]["test_accuracy_reestimated"]


def test_local_sgd_averages_the_networks(tmp_path: Path) -> None:
    row, folder, evaluation = execute("local SGD", tmp_path)
    assert row["images_seen"] == 2 * EPOCHS * IMAGES
    assert row["delivers"] == "member"
    assert row["delivered"] == evaluation["mean_test_accuracy_reestimated"]
    first, second = (checkpoint(folder, EPOCHS, network) for network in (0, 1))
    assert first["round"] == second["round"] == 2
    for key, value in first["model"].items():
        torch.testing.assert_close(value, second["model"][key], msg=key)


@pytest.mark.parametrize("name", ["graft", "papa", "no exchange", "one network, 2 x epochs"])
def test_divergence_counts_as_chance_in_every_arm(name: str, tmp_path: Path) -> None:
    run = run_of(DIVERGING, name)
    row, _ = execute_run(run, tmp_path, keep_checkpoints=1, on_progress=lambda done: None)
    assert (row["status"], row["delivered"]) == ("diverged", 10.0)
    assert "that is not finite" in row["error"]
