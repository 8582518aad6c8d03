"""``dist-graft evaluate``: test the networks of a run, their ensemble and their soups."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser

from dist_graft.command import Command, Options, add_run_arguments
from dist_graft.config.validation import at_least
from dist_graft.population.runtime.process_info import ProcessInfo
from dist_graft.printing import format_metric, format_number, format_table

Precision = Literal["fp32", "bf16", "fp16"]

EVALUATION_FORMAT = 4
"""Version of evaluation.json. Version 3 has only accuracies of averages. Version 2 also has fewer
values with re-estimated batch norm, and version 1 no calibration errors, disagreement and barrier;
neither has the barrier before the last round and averages.snapshots."""


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
    names = ("accuracy", "accuracy_reestimated", "loss", "calibration_error")

    def row(name: str, *values: float | str | None) -> tuple[str, ...]:
        """Cells of a row, from a number or a text for each column."""
        digits = (2, 2, 4, 2, 2)
        cells = (
            value if isinstance(value, str) else format_number(value, count)
            for value, count in zip(values, digits, strict=True)
        )
        return (name, *cells)

    rows = [
        row(
            f"network {member['network']} (lr {format_metric(member['lr'], 'lr')})",
            *(member[f"test_{name}"] for name in names),
            member["val_accuracy"],
        )
        for member in result["members"]
    ]
    means = (result[f"mean_test_{name}"] for name in names[:2])
    rows.append(row("mean", *means, "", "", ""))
    rows.append(row("ensemble", *(result[f"ensemble_test_{name}"] for name in names), ""))
    soups, greedy = {"uniform soup": result["uniform_soup"]}, result["greedy_soup"]
    if greedy:
        soups[f"greedy soup of {'+'.join(map(str, greedy['members']))}"] = greedy
    of_soup = ("batch_norm_as_is", "batch_norm_reestimated", "test_loss", "test_calibration_error")
    rows += [row(title, *(soup[name] for name in of_soup), "") for title, soup in soups.items()]
    titles = {
        "ema": "moving averages of the weights",
        "checkpoints": "mean of the last checkpoints",
        "snapshots": "ensemble of the last checkpoints",
    }
    for kind, title in titles.items():
        if found := result["averages"].get(kind):
            scores = (found[f"test_{name}"] for name in ("accuracy", "loss", "calibration_error"))
            rows.append(row(title, "", *scores, found["val_accuracy"]))
    lines = [format_table(header, rows)]
    if result["disagreement"] is not None:
        lines.append(
            f"two networks predict different classes for {result['disagreement']:.2f} % of the "
            "test images; loss barrier between neighbors: "
            f"{format_number(result['barrier']['mean'], 4)}"
        )
    if before := result["barrier_before_last_round"]:
        lines.append(f"loss barrier before the last round: {format_number(before['mean'], 4)}")
    if not greedy:
        lines.append(
            "no greedy soup: the run has no validation split (data.val_fraction is 0), and the "
            "test set must not be used for selection"
        )
    return "\n".join(lines)
