"""A subcommand of the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jsonargparse import ArgumentParser

from dist_graft.population.runtime.process_info import ProcessInfo

Options = Mapping[str, Any]
"""Parsed options of a command; ``--section.name`` is ``options["section"]["name"]``."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """A subcommand of ``dist-graft``: its parser and the function that runs it.

    To add a command, define one in a new module and list it in `dist_graft.cli.COMMANDS`. The
    module is imported for every command line, so import torch, and everything that imports torch,
    inside `run`: ``--help`` and invalid options must be answered immediately.
    """

    name: str
    help: str
    """One line for ``dist-graft --help``."""
    build_parser: Callable[[Mapping[str, Any]], ArgumentParser]
    """Builds the parser of the command's options from the settings that all parsers share."""
    run: Callable[[Options, ProcessInfo], Iterable[str]]
    """Runs the command. Each string is printed as soon as it is yielded."""
    assign: Callable[[Options, ProcessInfo], ProcessInfo] | None = None
    """Assigns the process to a network of the population. None: the command runs in one process
    and is refused under torchrun."""
    only_prints: bool = False
    """Whether the command may end as soon as nobody reads its output, such as ``| head``."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Names that other programs use for the command's options, without dashes."""


def add_run_arguments(parser: ArgumentParser) -> None:
    """Add the run directory and ``--checkpoint`` to a command that reads a run's weights."""
    parser.add_argument("run", type=str, help="run directory")
    parser.add_argument(
        "--checkpoint",
        type=str | None,
        default=None,
        help="name of the checkpoint, such as epoch_0003; default: the latest complete one",
    )
