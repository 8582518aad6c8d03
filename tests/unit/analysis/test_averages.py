"""Scores of soups, moving averages, and means of checkpoints, as `evaluate` writes them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stored_runs import evaluate_run, network, write_run
from test_evaluation import Reference, mean_of, reference_calibration_error, surprise
from torch import Tensor

from dist_graft.analysis.averages import last_checkpoints
from dist_graft.analysis.evaluate import evaluation_text
from dist_graft.analysis.stored_weights import open_run
from dist_graft.config import GraftConfig, PopulationConfig
from dist_graft.errors import ConfigError
from dist_graft.run_directory import RunDirectory
from dist_graft.training.checkpoint.files import checkpoint_path, mark_complete, save_network

EPOCHS = (1, 2, 3)


def weights(number: int, epoch: int) -> dict[str, Tensor]:
    """Weights of a network after an epoch: those of one network with noise."""
    state = {key: tensor.clone() for key, tensor in network(0).state_dict().items()}
    generator = torch.Generator().manual_seed(10 * number + epoch)
    for tensor in state.values():
        if tensor.dim() > 1:
            tensor.add_(torch.randn(tensor.shape, generator=generator) * tensor.std() * 0.4)
    return state


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run of two networks with moving averages and three checkpoints."""
    states = [weights(number, 3) for number in range(2)]
    run = write_run(tmp_path_factory.mktemp("averages") / "run", states, val_fraction=0.4)
    for epoch in EPOCHS:
        path = checkpoint_path(RunDirectory(run).checkpoints, epoch)
        sums = [
            save_network(
                path / f"network{number:02d}.pt",
                {
                    "network": number,
                    "model": weights(number, epoch),
                    "ema": {f"module.{key}": t for key, t in weights(number, 100 + epoch).items()},
                },
            )
            for number in range(2)
        ]
        mark_complete(path, epoch=epoch, round_=epoch, sha256=sums)
    return run


@pytest.fixture(scope="module")
def evaluated(pair: Path) -> dict[str, Any]:
    """Content of evaluation.json."""
    return evaluate_run(pair, last_checkpoints=2)


def expected(run: Path, states: list[dict[str, Tensor]]) -> Any:
    """Mean scores of models, with re-estimated batch norm."""
    reference = Reference(run)
    scores = {
        f"{split}_accuracy": [reference.accuracy(s, split, reestimated=True) for s in states]
        for split in ("test", "val")
    }
    tested = [reference.probabilities(s, reestimated=True) for s in states]
    scores["test_loss"] = [surprise(p, labels) for p, labels in tested]
    scores["test_calibration_error"] = [reference_calibration_error(*found) for found in tested]
    return {name: pytest.approx(np.mean(values), rel=1e-3) for name, values in scores.items()}


def test_soup(pair: Path, evaluated: dict[str, Any]) -> None:
    soup = mean_of([weights(number, 3) for number in range(2)])
    assert evaluated["averages"]["soup"] == expected(pair, [soup])


def test_moving_averages(pair: Path, evaluated: dict[str, Any]) -> None:
    states = [weights(number, 103) for number in range(2)]
    assert evaluated["averages"]["ema"] == expected(pair, states)


def test_means_of_the_last_checkpoints(pair: Path, evaluated: dict[str, Any]) -> None:
    means = [mean_of([weights(number, epoch) for epoch in (2, 3)]) for number in range(2)]
    found = evaluated["averages"]["checkpoints"]
    assert found == expected(pair, means)
    line = next(s for s in evaluation_text(evaluated).splitlines() if "last checkpoints" in s)
    assert f"{found['test_accuracy']:.2f}" in line
    assert f" {found['test_loss']:.4f} " in line


def test_ensemble_of_the_last_checkpoints(pair: Path, evaluated: dict[str, Any]) -> None:
    reference = Reference(pair)
    scores: dict[str, list[float]] = {"test": [], "val": [], "loss": [], "error": []}
    for number in range(2):
        for split in ("test", "val"):
            found = [
                reference.probabilities(weights(number, epoch), split, reestimated=True)
                for epoch in (2, 3)
            ]
            labels = found[0][1]
            mean = (found[0][0] + found[1][0]) / 2
            scores[split].append(100 * float((mean.argmax(1) == labels).mean()))
            if split == "test":
                smallest = np.finfo(np.float32).tiny
                scores["loss"].append(surprise(np.maximum(mean, smallest), labels))
                scores["error"].append(reference_calibration_error(mean, labels))
    expected = {name: float(np.mean(values)) for name, values in scores.items()}
    assert evaluated["averages"]["snapshots"] == {
        "test_accuracy": pytest.approx(expected["test"]),
        "val_accuracy": pytest.approx(expected["val"]),
        "test_loss": pytest.approx(expected["loss"], rel=1e-4),
        "test_calibration_error": pytest.approx(expected["error"], rel=1e-3),
    }
    line = next(s for s in evaluation_text(evaluated).splitlines() if "ensemble of the last" in s)
    assert f"{evaluated['averages']['snapshots']['test_accuracy']:.2f}" in line


def test_without_them(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [network(0).state_dict()])
    result = evaluate_run(run, batch_norm_batches=1)
    assert list(result["averages"]) == ["soup"]
    soup = result["averages"]["soup"]
    assert soup["test_accuracy"] == result["uniform_soup"]["batch_norm_reestimated"]
    assert soup["val_accuracy"] is None
    (run / "evaluation.json").unlink()
    with pytest.raises(
        ConfigError, match="has 1 checkpoints of all networks up to epoch_0002, few"
    ):
        evaluate_run(run, batch_norm_batches=1, last_checkpoints=2)


def test_the_last_checkpoints_end_with_the_chosen_one(pair: Path) -> None:
    found = last_checkpoints(open_run(pair, "epoch_0002"), 2)
    assert [checkpoint.epoch for checkpoint in found] == [1, 2]
    assert [checkpoint.epoch for checkpoint in last_checkpoints(open_run(pair), 2)] == [2, 3]
    assert last_checkpoints(open_run(pair), 0) == []
    with pytest.raises(ConfigError, match="has 2 checkpoints of all networks up to epoch_0002"):
        last_checkpoints(open_run(pair, "epoch_0002"), 3)


def test_independent_jobs_have_no_last_checkpoints(pair: Path) -> None:
    stored = open_run(pair)
    files = replace(
        stored.config,
        graft=GraftConfig(exchange="files"),
        population=PopulationConfig(size=2),
    )
    with pytest.raises(ConfigError, match="independent jobs"):
        last_checkpoints(replace(stored, config=files), 2)
