"""``dist-graft compare``: compare methods with their controls over several seeds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from dist_graft.command import Command, Options
from dist_graft.population.runtime.process_info import ProcessInfo


def build_parser(settings: Mapping[str, Any]) -> ArgumentParser:
    """Build the parser of the command's options."""
    parser = ArgumentParser(
        description="Train the runs of a plan that are still missing, and write a report.",
        **settings,
    )
    add = parser.add_argument
    add("plan", type=str, help="YAML file: recipe, methods, networks, seeds (docs/compare.md)")
    add(
        "--out",
        type=str | None,
        default=None,
        help="folder of the results; default: the plan's, or comparisons/NAME",
    )
    add(
        "--report_only",
        type=bool,
        default=False,
        help="report on the existing runs, also while the comparison is running",
    )
    return parser


def run(options: Options, process: ProcessInfo) -> Iterator[str]:
    """Run the comparison and print its verdict."""
    del process
    from dist_graft.studies.state import load_plan

    plan = load_plan(Path(options["plan"]))
    from dist_graft.studies.comparison import compare

    out = options["out"] or plan.out or f"comparisons/{plan.name}"
    yield compare(plan, Path(out), report_only=options["report_only"])


COMMAND = Command(
    name="compare",
    help="compare methods with their controls over several seeds",
    build_parser=build_parser,
    run=run,
)
