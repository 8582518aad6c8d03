from __future__ import annotations

import torch
from small import MakeRuntime

from dist_graft.training.loop import EvalResult, accuracy
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
    assert summarise(make_runtime(), 0.1, before, after, 12.5) == {
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
        "wall_seconds": 12.5,
    }
