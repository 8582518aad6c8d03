"""``dist-graft export``: write the networks of a run as plain state dicts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from dist_graft.command import Command, Options, add_run_arguments
from dist_graft.population.runtime.process_info import ProcessInfo
from dist_graft.version import VERSION


def build_parser(settings: Mapping[str, Any]) -> ArgumentParser:
    """Build the parser of the command's options."""
    parser = ArgumentParser(
        description="Write plain state dicts: networkNN.pt for each network, networkNN_ema.pt with "
        "the moving average of its weights if the run has one, and uniform_soup.pt, the average of "
        "the networks' weights.",
        **settings,
    )
    add_run_arguments(parser)
    parser.add_argument(
        "--out", type=str | None, default=None, help="output folder; unset: RUN/export"
    )
    return parser


def run(options: Options, process: ProcessInfo) -> Iterator[str]:
    """Export a run. Yields the files and how to load them.

    Each file holds a plain state dict of contiguous CPU tensors:
    ``model.load_state_dict(torch.load(path, weights_only=True))``. The batch norm statistics of the
    soup are averaged, too. export.json describes the files.

    Raises: RunDirectoryError; ConfigError if the weights do not fit the run's architecture.
    """
    del process
    from dist_graft.analysis.soups import uniform_soup
    from dist_graft.analysis.stored_weights import EXPORT_DESCRIPTION, architecture, open_run
    from dist_graft.run_directory import write_atomically
    from dist_graft.training.checkpoint.files import network_file, save_network

    stored = open_run(Path(options["run"]), options["checkpoint"])
    folder = Path(options["out"] or stored.path / "export")
    model = None if "model" in stored.custom else stored.config.model
    states = list(stored.states())
    if model:
        for state in states:  # refuse before anything is written
            architecture(model, state, stored.checkpoint.path)
    files = dict(zip(map(network_file, stored.networks), states, strict=True))
    for network in stored.networks:
        if averaged := stored.averaged_state(network):
            files[network_file(network).replace(".pt", "_ema.pt")] = averaged
    files["uniform_soup.pt"] = uniform_soup(states)
    sha256 = {}
    for name, state in files.items():
        contiguous = {key: tensor.contiguous() for key, tensor in state.items()}
        sha256[name] = save_network(folder / name, contiguous)
        yield str(folder / name)
    description = {
        "run_dir": str(stored.path),
        "epoch": stored.checkpoint.epoch,
        "round": stored.checkpoint.round,
        "model": model.name if model else None,
        "lead": stored.config.graft.lead,
        "sha256": sha256,
        "dist_graft": VERSION,
    }
    content = (json.dumps(description, indent=1) + "\n").encode()
    write_atomically(folder / EXPORT_DESCRIPTION, content)
    name = model.name if model else "custom model"
    yield (
        f"{name} after {stored.checkpoint.epoch} epochs; load it with "
        "model.load_state_dict(torch.load(path, weights_only=True))"
    )


COMMAND = Command(
    name="export",
    help="write the networks of a run as plain state dicts",
    build_parser=build_parser,
    run=run,
)
