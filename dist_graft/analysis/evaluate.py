"""``dist-graft evaluate``: test the networks of a run, their ensemble and their soups."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser

from dist_graft.command import Command, Options, add_run_arguments
from dist_graft.config.validation import at_least
from dist_graft.population.runtime.process_info import ProcessInfo
from dist_graft.printing import format_table

Precision = Literal["fp32", "bf16", "fp16"]

EVALUATION_FORMAT = 3
"""Version of evaluation.json. Version 2 has fewer values with re-estimated batch norm; version 1
also has no calibration errors, disagreement and barrier. Neither has the barrier before the last
round and averages.snapshots."""


def build_parser(settings: Mapping[str, Any]) -> ArgumentParser:
    """Build the parser of the command's options."""
    parser = ArgumentParser(
        description="Test the networks of a run, their ensemble and their soups. Writes "
        "RUN/evaluation.json.",
        **settings,
    )
    add_run_arguments(parser)
    add = parser.add_argument
    add("--data.root", type=str | None, default=None, help="folder of the data; unset: the run's")
    add("--device", type=str | None, default=None, help="auto, cpu, cuda, cuda:N; unset: the run's")
    add(
        "--precision",
        type=Precision | None,
        default=None,
        help="of forward passes; unset: the run's",
    )
    add("--batch_size", type=int | None, default=None, help="images per batch; unset: the run's")
    add(
        "--batch_norm_batches",
        type=int | None,
        default=None,
        help="training batches for re-estimating batch norm; unset: one epoch",
    )
    add(
        "--last_checkpoints",
        type=int,
        default=0,
        help="also test the mean and the ensemble of this many latest checkpoints of each network; "
        "0: none",
    )
    return parser


def run(options: Options, process: ProcessInfo) -> Iterator[str]:
    """Evaluate a run and print the results as a table."""
    del process
    for name in ("batch_size", "batch_norm_batches"):
        at_least(name, options[name], 1)
    at_least("last_checkpoints", options["last_checkpoints"], 0)
    from dist_graft.analysis.evaluation import evaluate_run

    yield evaluation_text(evaluate_run(options))
    yield f"written: {Path(options['run']) / 'evaluation.json'}"


COMMAND = Command(
    name="evaluate",
    help="test the networks of a run, their ensemble and their soups",
    build_parser=build_parser,
    run=run,
)


def evaluation_text(result: dict[str, Any]) -> str:
    """Format the content of evaluation.json as a table."""
    header = (
        f"{result['run_dir']}, epoch {result['epoch']}",
        *("test %", "batch norm re-estimated %", "test loss", "calibration error %"),
        "validation %",
    )
    rows = [
        (
            f"network {member['network']} (lr {member['lr']:.4g})",
            f"{member['test_accuracy']:.2f}",
            f"{member['test_accuracy_reestimated']:.2f}",
            _format(member["test_loss"], 4),
            _format(member["test_calibration_error"]),
            _format(member["val_accuracy"]),
        )
        for member in result["members"]
    ]
    means = ("mean_test_accuracy", "mean_test_accuracy_reestimated")
    first, second = (f"{result[name]:.2f}" for name in means)
    rows.append(("mean", first, second, "", "", ""))
    ensemble = [result[f"ensemble_test_{name}"] for name in ("loss", "calibration_error")]
    soups, greedy = {"uniform soup": result["uniform_soup"]}, result["greedy_soup"]
    rows.append(
        (
            "ensemble",
            f"{result['ensemble_test_accuracy']:.2f}",
            f"{result['ensemble_test_accuracy_reestimated']:.2f}",
            _format(ensemble[0], 4),
            _format(ensemble[1]),
            "",
        )
    )
    if greedy:
        soups[f"greedy soup of {'+'.join(map(str, greedy['members']))}"] = greedy
    rows += [
        (
            name,
            f"{soup['batch_norm_as_is']:.2f}",
            f"{soup['batch_norm_reestimated']:.2f}",
            _format(soup["test_loss"], 4),
            _format(soup["test_calibration_error"]),
            "",
        )
        for name, soup in soups.items()
    ]
    names = {"ema": "moving averages of the weights", "checkpoints": "mean of the last checkpoints"}
    names["snapshots"] = "ensemble of the last checkpoints"
    for kind, name in names.items():
        if found := result["averages"].get(kind):
            accuracy = f"{found['test_accuracy']:.2f}"
            rows.append((name, accuracy, "", "", "", _format(found["val_accuracy"])))
    lines = [format_table(header, rows)]
    if result["disagreement"] is not None:
        lines.append(
            f"two networks predict different classes for {result['disagreement']:.2f} % of the "
            f"test images; loss barrier between neighbors: {_format(result['barrier']['mean'], 4)}"
        )
    if before := result["barrier_before_last_round"]:
        lines.append(f"loss barrier before the last round: {_format(before['mean'], 4)}")
    if not greedy:
        lines.append(
            "no greedy soup: the run has no validation split (data.val_fraction is 0), and the "
            "test set must not be used for selection"
        )
    return "\n".join(lines)


def _format(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
