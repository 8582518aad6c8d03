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
    add("--precision", type=Precision | None, default=None, help="forward passes; unset: the run's")
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
        help="also test the mean of the weights of so many last checkpoints; 0: none",
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
        *("test %", "batch norm re-estimated %", "test loss", "validation %"),
    )
    rows = [
        (
            f"network {member['network']} (lr {member['lr']:.4g})",
            f"{member['test_accuracy']:.2f}",
            f"{member['test_accuracy_reestimated']:.2f}",
            "-" if member["test_loss"] is None else f"{member['test_loss']:.4f}",
            "-" if member["val_accuracy"] is None else f"{member['val_accuracy']:.2f}",
        )
        for member in result["members"]
    ]
    pairs = {
        name: (result[f"{name}_test_accuracy"], result[f"{name}_test_accuracy_reestimated"])
        for name in ("mean", "ensemble")
    }
    soups, greedy = {"uniform soup": result["uniform_soup"]}, result["greedy_soup"]
    if greedy:
        soups[f"greedy soup of {'+'.join(map(str, greedy['members']))}"] = greedy
    for name, soup in soups.items():
        pairs[name] = (soup["batch_norm_as_is"], soup["batch_norm_reestimated"])
    rows += [
        (name, f"{as_is:.2f}", f"{reestimated:.2f}", "", "")
        for name, (as_is, reestimated) in pairs.items()
    ]
    names = {"ema": "moving averages of the weights", "checkpoints": "mean of the last checkpoints"}
    for kind, name in names.items():
        if found := result["averages"].get(kind):
            val = found["val_accuracy"]
            validation = "-" if val is None else f"{val:.2f}"
            rows.append((name, f"{found['test_accuracy']:.2f}", "", "", validation))
    text = format_table(header, rows)
    if greedy:
        return text
    return (
        f"{text}\nno greedy soup: the run has no validation split (data.val_fraction is 0), and "
        "the test set must not be used for selection"
    )
