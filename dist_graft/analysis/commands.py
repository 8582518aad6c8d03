"""The commands of this room: their options, and the function that each one calls.

Importing this imports no torch, so that help and mistakes are answered at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser

from dist_graft.analysis.planning.options import PlanOptions, plan_parser
from dist_graft.config import TrainConfig
from dist_graft.config.validation import above_zero
from dist_graft.errors import ConfigError, StartError
from dist_graft.population.runtime.process_info import ProcessInfo

Options = Mapping[str, Any]
Precision = Literal["fp32", "bf16", "fp16"]


def add_parsers(commands: Any, settings: Mapping[str, Any]) -> None:
    """Add the commands to what the command line's parser offers, made with its settings."""
    for name, build in (
        ("evaluate", _evaluate),
        ("inspect", _inspect),
        ("export", _export),
        ("compare", _compare),
        ("status", _status),
        ("doctor", _doctor),
        ("plan", _plan),
    ):
        parser, text = build(settings)
        commands.add_subcommand(name, parser, help=text)


def _evaluate(settings: Mapping[str, Any]) -> tuple[ArgumentParser, str]:
    parser = ArgumentParser(
        description="Test the networks of a run, their ensemble and their soups; writes "
        "RUN/evaluation.json.",
        **settings,
    )
    _add_run(parser)
    add = parser.add_argument
    add("--data.root", type=str | None, default=None, help="folder of the data; unset: the run's")
    add("--device", type=str | None, default=None, help="auto, cpu, cuda, cuda:N; unset: the run's")
    add(
        "--precision", type=Precision | None, default=None, help="of the networks; unset: the run's"
    )
    add("--batch_size", type=int | None, default=None, help="images at once; unset: the run's")
    add(
        "--batch_norm_batches",
        type=int | None,
        default=None,
        help="training batches that batch norm is re-estimated on; unset: an epoch's",
    )
    return parser, "test a run's networks, ensemble and soups"


def _inspect(settings: Mapping[str, Any]) -> tuple[ArgumentParser, str]:
    parser = ArgumentParser(
        description="Count and draw what the filters hold; writes inspect.csv and three PNG plots.",
        **settings,
    )
    add = parser.add_argument
    add(
        "sources",
        type=str,
        nargs="+",
        help="run directories, checkpoint sets, exported folders or .pt files, side by side",
    )
    add(
        "--thresholds",
        type=float,
        nargs="+",
        default=[0.1, 0.01, 0.001],
        help="L1 norms below which a filter counts as invalid",
    )
    add("--num_bins", type=int, default=10, help="bins of the histogram that entropy is taken of")
    add("--out", type=str, default="inspect", help="folder that is written to")
    add(
        "--model.name",
        type=str | None,
        default=None,
        help="architecture of .pt files that lie in no run and no exported folder",
    )
    add(
        "--graft.lead",
        type=Literal["conv", "conv+linear"] | None,
        default=None,
        help="layers that are looked at; unset: those that the run grafts",
    )
    return parser, "count and draw invalid filters, entropy and L1 norms"


def _export(settings: Mapping[str, Any]) -> tuple[ArgumentParser, str]:
    parser = ArgumentParser(
        description="Write plain state dicts: networkNN.pt, and uniform_soup.pt, their mean.",
        **settings,
    )
    _add_run(parser)
    parser.add_argument(
        "--out", type=str | None, default=None, help="folder that is written to; unset: RUN/export"
    )
    return parser, "write the networks as plain state dicts"


def _compare(settings: Mapping[str, Any]) -> tuple[ArgumentParser, str]:
    from dist_graft.studies.command import build_parser

    return build_parser(settings), "compare methods with their controls over several seeds"


def _status(settings: Mapping[str, Any]) -> tuple[ArgumentParser, str]:
    parser = ArgumentParser(
        description="How a run is doing, or what became of it, from the files that it leaves.",
        **settings,
    )
    add = parser.add_argument
    add("run", type=str, help="run directory")
    add("--watch", action="store_true", help="look again and again until the run has ended")
    add("--every", type=float, default=5.0, help="seconds between two looks")
    add("--json", action="store_true", help="one JSON object a look, for scripts")
    return parser, "how a run is doing"


def _doctor(settings: Mapping[str, Any]) -> tuple[ArgumentParser, str]:
    parser = ArgumentParser(
        description="See whether this machine can train: GPUs, ports, shared memory, disk, and a "
        "round between two processes. Says what to do, and fails if something is broken.",
        **settings,
    )
    add = parser.add_argument
    add("--run_dir", type=str, default=TrainConfig.run_dir, help="folder whose disk is tried")
    add(
        "--timeout_seconds",
        type=float,
        default=120.0,
        help="within which the two processes must have started and grafted",
    )
    return parser, "see whether this machine can train"


def _plan(settings: Mapping[str, Any]) -> tuple[ArgumentParser, str]:
    return plan_parser(settings), "what rounds will cost on a cluster"


def _add_run(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=str, help="run directory")
    parser.add_argument(
        "--checkpoint",
        type=str | None,
        default=None,
        help="name of the checkpoint set, e.g. epoch_0003; unset: the newest complete one",
    )


def _run_evaluate(options: Options, process: ProcessInfo) -> str:
    _alone(process, "evaluate")
    for name in ("batch_size", "batch_norm_batches"):
        _at_least_one(name, options[name])
    from dist_graft.analysis.evaluate import evaluate_run

    return evaluate_run(
        options["run"],
        checkpoint=options["checkpoint"],
        data_root=options["data"]["root"],
        device=options["device"],
        precision=options["precision"],
        batch_size=options["batch_size"],
        batch_norm_batches=options["batch_norm_batches"],
    )


def _run_inspect(options: Options, process: ProcessInfo) -> str:
    _alone(process, "inspect")
    _at_least_one("num_bins", options["num_bins"])
    for threshold in options["thresholds"]:
        if not (threshold > 0 and math.isfinite(threshold)):
            raise ConfigError(f"thresholds must be above 0, got {threshold!r}")
    from dist_graft.analysis.inspect_filters import inspect_sources

    return inspect_sources(
        [Path(source) for source in options["sources"]],
        thresholds=sorted(set(options["thresholds"]), reverse=True),
        num_bins=options["num_bins"],
        out=Path(options["out"]),
        model_name=options["model"]["name"],
        lead=options["graft"]["lead"],
    )


def _run_export(options: Options, process: ProcessInfo) -> str:
    _alone(process, "export")
    from dist_graft.analysis.export import export_run

    out = options["out"]
    return export_run(
        options["run"], checkpoint=options["checkpoint"], out=Path(out) if out else None
    )


def _run_compare(options: Options, process: ProcessInfo) -> Iterator[str]:
    from dist_graft.studies.command import run

    yield from run(options, process)


def _run_status(options: Options, process: ProcessInfo) -> Iterator[str]:
    _alone(process, "status")
    above_zero("every", options["every"])
    from dist_graft.analysis.status.watching import look

    yield from look(
        Path(options["run"]),
        as_numbers=options["json"],
        watch=options["watch"],
        every=options["every"],
    )


def _run_doctor(options: Options, process: ProcessInfo) -> Iterator[str]:
    _alone(process, "doctor")
    above_zero("timeout_seconds", options["timeout_seconds"])
    from dist_graft.analysis.doctor import examine

    yield from examine(options["run_dir"], seconds=options["timeout_seconds"])


def _run_plan(options: Options, process: ProcessInfo) -> Iterator[str]:
    _alone(process, "plan")
    asked = PlanOptions(**options)
    from dist_graft.analysis.planning.page import plan

    yield from plan(asked)


def _alone(process: ProcessInfo, command: str) -> None:
    if process.networks > 1:
        raise StartError(f"{command} runs in one process: start it without torchrun")


def _at_least_one(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise ConfigError(f"{name} must be at least 1, got {value!r}")


COMMANDS: dict[str, Callable[[Options, ProcessInfo], str | Iterator[str]]] = {
    "evaluate": _run_evaluate,
    "inspect": _run_inspect,
    "export": _run_export,
    "compare": _run_compare,
    "status": _run_status,
    "doctor": _run_doctor,
    "plan": _run_plan,
}
"""By name: runs a command and returns what is to be printed, at once or bit by bit."""
