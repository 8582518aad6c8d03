"""``dist-graft compare``: compare methods with their controls over several seeds."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from dist_graft.command import Command, Options
from dist_graft.errors import ConfigError, StartError
from dist_graft.population.runtime.process_info import ProcessInfo

EXTRA = ("jinja2", "pandas", "scipy", "statsmodels")
"""Packages of the extra ``studies``."""
_FLAGS = {
    "report_only": "report on the existing results without training, also during a comparison",
    "dry_run": "list the runs that remain and estimate their time, without training",
    "pilot": "train three seeds of the first primary pair, and print how many seeds and hours the "
    "comparison needs",
}


def build_parser(settings: Mapping[str, Any]) -> ArgumentParser:
    """Build the parser of the command's options."""
    parser = ArgumentParser(
        description="Train the runs of a plan that have no results yet, and write a report.",
        **settings,
    )
    add = parser.add_argument
    add("plan", type=str, help="YAML file: recipe, methods, networks, seeds (docs/compare.md)")
    add(
        "--out",
        type=str | None,
        default=None,
        help="output directory; default: the plan's, or comparisons/NAME",
    )
    for name, text in _FLAGS.items():
        add(f"--{name}", action="store_true", help=text)
    add(
        "--redo",
        type=str | None,
        default=None,
        help="repeat the test runs of this arm; the new rows supersede the old ones, which are "
        "kept",
    )
    add("--reason", type=str | None, default=None, help="why to repeat them (with --redo)")
    return parser


def run(options: Options, process: ProcessInfo) -> Iterator[str]:
    """Run the comparison and yield its conclusions.

    Raises: StartError if the extra ``studies`` is not installed.
    """
    del process
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise StartError(f"compare needs {', '.join(missing)}: pip install 'dist_graft[studies]'")
    from dist_graft.studies.comparison import compare, dry_run, require_reason
    from dist_graft.studies.selection import load_plan

    redo, reason = options["redo"] or "", (options["reason"] or "").strip()
    require_reason(redo, reason)
    given = [f"--{mode}" for mode in (*_FLAGS, "redo") if options[mode]]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} are mutually exclusive: give one")
    plan = load_plan(Path(options["plan"]))
    out = Path(options["out"] or plan.out or f"comparisons/{plan.name}")
    if options["dry_run"]:
        yield dry_run(plan, out)
        return
    yield compare(
        plan,
        out,
        report_only=options["report_only"],
        pilot=options["pilot"],
        redo=redo,
        reason=reason,
    )


COMMAND = Command(
    name="compare",
    help="compare methods with their controls over several seeds",
    build_parser=build_parser,
    run=run,
)
