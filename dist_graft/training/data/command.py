"""``dist-graft prepare``: put a dataset in data.root, where training looks for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from jsonargparse import ArgumentParser

from dist_graft.command import Command, Options
from dist_graft.population.runtime.process_info import ProcessInfo


def build_parser(settings: Mapping[str, Any]) -> ArgumentParser:
    """Build the parser of the command's options."""
    parser = ArgumentParser(
        description="Put a dataset in data.root, where training looks for it.", **settings
    )
    parser.add_argument("name", type=str, help="fashion-mnist, cifar10 or cifar100")
    parser.add_argument("--root", type=str, default="data", help="folder of the datasets")
    parser.add_argument(
        "--source", type=str | None, default=None, help="folder with the original files"
    )
    return parser


def run(options: Options, process: ProcessInfo) -> Iterator[str]:
    """Prepare the dataset and report its location."""
    del process
    from dist_graft.training.data.prepare import prepare

    yield prepare(options["name"], root=options["root"], source=options["source"])


COMMAND = Command(
    name="prepare",
    help="put a dataset in data.root, where training looks for it",
    build_parser=build_parser,
    run=run,
)
