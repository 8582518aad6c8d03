"""Optimizer, schedule, loss, transform and callbacks of the user's, on the command line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from launching import Train, end_population, error_line, run_population
from reading import assert_same_bits, checkpoint, metrics, optimizer_tensors

TESTS = str(Path(__file__).parents[1])
OWN = (
    *("--optim.name", "own_components:SignMomentum", "--optim.kwargs", "{beta: 0.8}"),
    *("--optim.lr", "0.002", "--optim.schedule", "own_components:triangle"),
    *("--optim.schedule_kwargs", "{peak: 0.25}", "--optim.schedule_unit", "step"),
    *("--optim.loss", "own_components:margin_loss", "--optim.loss_kwargs", "{margin: 0.5}"),
    *("--data.transform", "own_components:add_noise", "--data.transform_kwargs", "{std: 0.05}"),
    *("--callbacks", "{own_components:Counter: {every: 3}}", "--callbacks", "dying:EndAtStep"),
)
OPTIONS = (
    *("--epochs", "2", "--data.train_samples", "128", "--data.batch_size", "16"),
    *("--model.name", "tiny_network:TinyNetwork", "--graft.every_steps", "3"),
)


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch) -> None:
    found = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([TESTS, *([found] if found else [])]))


@pytest.mark.parametrize(
    "optimizer",
    [
        (),
        ("--optim.name", "Adagrad", "--optim.kwargs", "{lr_decay: 0.1}"),
        (
            "--optim.name",
            "rmsprop",
            "--optim.kwargs",
            "{momentum: 0.9}",
            "--optim.ema_decay",
            "0.9",
        ),
    ],
    ids=["own", "adagrad", "rmsprop"],
)
def test_two_networks_that_stop_inside_an_epoch_resume_exactly(
    tmp_path: Path, optimizer: tuple[str, ...]
) -> None:
    """Momentum is reset after each round, so the state starts again more than once."""
    options = (*OPTIONS, *OWN, *optimizer, "--graft.reset_momentum", "true")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_population(2, whole, *options)
    ends = end_population(2, parts, *options, END_AT="11:stop")
    assert all("stopped early" in end.errors for end in ends), ends
    run_population(2, parts, *options)
    for network in (0, 1):
        before, after = (checkpoint(run, 2, network) for run in (whole, parts))
        assert before["round"] == after["round"] == 5
        assert_same_bits(before["model"], after["model"])
        assert optimizer_tensors(before)
        assert_same_bits(optimizer_tensors(before), optimizer_tensors(after))
        assert before["scheduler"] == after["scheduler"]
        rates = [line["lr"] for line in metrics(parts, network)]
        assert rates == pytest.approx([0.0, 0.002 * 2 / 3])
        text = (parts / f"network{network:02d}/counter.txt").read_text()
        assert text == "{'every': 3}"


@pytest.mark.parametrize(
    "left_out",
    [
        None,
        "--optim.kwargs",
        "--optim.schedule_kwargs",
        "--optim.loss_kwargs",
        "--data.transform_kwargs",
    ],
)
def test_the_arguments_of_every_component_change_the_weights(
    train: Train, tmp_path: Path, left_out: str | None
) -> None:
    words = list(OWN[:-4])
    if left_out:
        place = words.index(left_out)
        del words[place : place + 2]
    for name, options in (("all", OWN[:-4]), ("fewer", words)):
        done = train(tmp_path / name, *OPTIONS, "--epochs", "1", *options)
        assert done.status == 0, done
    first, second = (checkpoint(tmp_path / name, 1, 0)["model"] for name in ("all", "fewer"))
    same = all(torch.equal(first[name], second[name]) for name in first)
    assert same == (left_out is None)


def test_other_arguments_do_not_resume_a_run(train: Train, tmp_path: Path) -> None:
    options = (*OPTIONS, "--epochs", "1", *OWN[:-4])
    assert train(tmp_path / "run", *options).status == 0
    done = train(tmp_path / "run", *options, "--optim.kwargs", "{beta: 0.7}")
    error_line(done, "optim.kwargs was {'beta': 0.8} and is now {'beta': 0.7}")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--model.name", "resnet19x"], ["'resnet19x'", "nearest: resnet18"]),
        (["--model.name", "own_components:none"], ["model.name", "has no function or class"]),
        (["--optim.name", "adamx"], ["optim.name 'adamx' is unknown; nearest: adamax"]),
        (["--optim.name", "LBFGS"], ["optim.name lbfgs", "closure"]),
        (["--optim.name", "sparseadam"], ["sparse gradients"]),
        (["--optim.name", "own_components:margin_loss"], ["missing a required argument: 'labels'"]),
        (["--optim.name", "rmsprop", "--optim.betas", "[0.8, 0.9]"], ["optim.betas", "adamw only"]),
        (["--optim.name", "rprop", "--optim.weight_decay", "0.1"], ["does not apply", "rprop"]),
        (["--optim.name", "rmsprop", "--optim.kwargs", "{bet: 1}"], ["unexpected", "'bet'"]),
        (["--optim.kwargs", "{momentum: 0.5}"], ["optim.kwargs", "set by optim.momentum"]),
        (["--optim.schedule", "own_components:rising"], ["factor in [0, 1], got 1.5 at 0.5"]),
        (["--optim.schedule", "own_components:margin_loss"], ["optim.schedule", "'labels'"]),
        (["--optim.loss", "own_components:triangle"], ["optim.loss", "too many positional"]),
        (
            ["--optim.loss", "torch.nn:MultiMarginLoss", "--data.mixup", "0.2"],
            ["class probabilities, but optim.loss torch.nn:MultiMarginLoss failed: ", "set both"],
        ),
        (["--data.transform", "own_components:none"], ["data.transform"]),
        (["--data.transform_kwargs", "{a: 1}"], ["data.transform_kwargs requires data.transform"]),
        (["--callbacks", "own_components:none"], ["callbacks"]),
        (["--method", "own_components:none"], ["method"]),
        (["--graft.criterion", "own_components:none"], ["graft.criterion"]),
    ],
)
def test_a_wrong_name_or_argument_ends_the_run_before_it_writes(
    train: Train, tmp_path: Path, options: list[str], says: list[str]
) -> None:
    done = train(tmp_path / "run", "--epochs", "1", *options)
    error_line(done, *says)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--optim.name", "muon"], ["optim.name muon: Muon only supports 2D parameters"]),
        (["--optim.name", "own_components:NeedsClosure"], ["requires the argument closure"]),
        (["--optim.name", "own_components:Unsaved"], ["keeps a PosixPath in its state"]),
        (["--optim.name", "builtins:sorted"], ["optim.name builtins:sorted"]),
        (["--data.transform", "own_components:drop_one"], ["must return 32 samples, got 31"]),
        (["--optim.loss", "own_components:losses"], ["must return a scalar tensor, got [32]"]),
    ],
)
def test_a_component_that_does_not_fit(
    train: Train, tmp_path: Path, options: list[str], says: list[str]
) -> None:
    done = train(tmp_path / "run", "--epochs", "1", *options)
    error_line(done, *says)
    assert not (tmp_path / "run/checkpoints").exists()


def test_a_learning_rate_out_of_proportion(train: Train, tmp_path: Path) -> None:
    """A warning where the first epoch ends with finite weights, and in the error otherwise."""
    options = (*OPTIONS, "--epochs", "1", "--optim.schedule", "constant")
    done = train(tmp_path / "large", *options, "--optim.lr", "1e5")
    (line,) = [line for line in done.output.splitlines() if "learning rate" in line]
    assert line.startswith("network 0: test loss ")
    assert line.endswith("use a lower learning rate (optim.lr is 100000)")
    assert train(tmp_path / "usual", *options).status == 0
    assert "learning rate" not in (tmp_path / "usual/network00/log.txt").read_text()
    done = train(tmp_path / "huge", *options, "--optim.lr", "1e30")
    error_line(done, "epoch 0: ", "(optim.lr is 1e+30)")
