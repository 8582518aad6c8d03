"""``dist-graft push``: publish exported networks on the Hugging Face Hub."""

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
        description="Upload an export to the Hugging Face Hub: safetensors, export.json, and a "
        "model card. Log in with hf auth login, or set HF_TOKEN.",
        **settings,
    )
    add = parser.add_argument
    add("export", type=str, help="exported folder (--format safetensors or pt)")
    add("--repo", type=str, required=True, help="repository, such as USER/NAME")
    add("--private", action="store_true", help="create a private repository")
    add(
        "--control",
        type=str | None,
        default=None,
        help="finished run with the same data, model, optimizer and epochs, but without exchange, "
        "whose results the model card shows",
    )
    add(
        "--out",
        type=str | None,
        default=None,
        help="write the repository's files to this folder and upload nothing",
    )
    return parser


def run(options: Options, process: ProcessInfo) -> Iterator[str]:
    """Upload an export, or write what would be uploaded. Yields its location.

    Raises: RunDirectoryError; ConfigError if the control does not match the export,
        huggingface_hub is missing, or the Hub refuses.
    """
    del process
    from dist_graft.analysis.hub import repository_files, upload
    from dist_graft.run_directory import write_atomically

    control = options["control"] and Path(options["control"])
    files = repository_files(Path(options["export"]), options["repo"], control=control)
    if options["out"] is not None:
        for name, content in files.items():
            write_atomically(Path(options["out"], name), content)
        yield f"written: {', '.join(str(Path(options['out'], name)) for name in files)}"
        return
    yield upload(files, options["repo"], private=options["private"])


COMMAND = Command(
    name="push",
    help="publish exported networks on the Hugging Face Hub",
    build_parser=build_parser,
    run=run,
)
