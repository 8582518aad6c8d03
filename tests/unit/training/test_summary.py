from __future__ import annotations

import math

import torch
from dist_graft.training.loop import EvalResult, accuracy
from small import MakeRuntime

from dist_graft.training.summary import summarise


def result(scores: list[list[float]]) -> EvalResult:
    labels = torch.zeros(len(scores), dtype=torch.int64)
    guess = torch.tensor(scores)
    return EvalResult(
        loss=0.0, accuracy=accuracy(guess, labels), probabilities=guess, labels=labels
    )


def test_a_network_alone_is_its_own_mean_and_ensemble(make_runtime: MakeRuntime) -> None:
    before = result([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7], [0.4, 0.6]])
    after = result([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.4, 0.6]])
    assert summarise(make_runtime(), 0.1, before, after, 12.5, sound=True) == {
        "networks": [
            {
                "network": 0,
                "lr": 0.1,
                "accuracy_before_last_round": 25.0,
                "accuracy_after_last_round": 50.0,
            }
        ],
        "mean_accuracy_before_last_round": 25.0,
        "ensemble_accuracy_before_last_round": 25.0,
        "mean_accuracy_after_last_round": 50.0,
        "ensemble_accuracy_after_last_round": 50.0,
        "diverged": [],
        "wall_seconds": 12.5,
    }


def test_a_network_that_ended_diverged_is_named_and_has_no_say_in_the_ensemble(
    make_runtime: MakeRuntime,
) -> None:
    sound, lost = result([[0.9, 0.1], [0.8, 0.2]]), result([[math.nan] * 2] * 2)
    summary = summarise(make_runtime(), 0.1, sound, lost, 1.0, sound=False)
    assert summary["diverged"] == [0]
    assert summary["ensemble_accuracy_before_last_round"] == 100.0
    assert math.isfinite(summary["ensemble_accuracy_after_last_round"])
