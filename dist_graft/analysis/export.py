"""Final weights as plain state dicts, for programs that know nothing of this package."""

from __future__ import annotations

import json
from pathlib import Path

from dist_graft.analysis.soups import uniform_soup
from dist_graft.analysis.stored_run import State, architecture, open_run
from dist_graft.training.checkpoint.files import save_network, write_atomically
from dist_graft.version import VERSION

DESCRIPTION = "export.json"
"""Beside the exported files: what they are, and the names of the files."""


def export_run(run: str, *, checkpoint: str | None = None, out: Path | None = None) -> str:
    """Write networkNN.pt for each network of a run, and uniform_soup.pt, the mean of their weights.

    Each file holds a plain state dict of contiguous tensors on the CPU:
    `model.load_state_dict(torch.load(path, weights_only=True))`. Of the soup, batch norm's running
    statistics are means too. export.json says what the files are.

    Args:
        run: the run directory.
        checkpoint: name of a set; None: the newest complete one.
        out: folder that is written to; None: RUN/export.

    Returns: the files, and the line that loads one.

    Raises: RunDirectoryError or ConfigError whose text says what to do.
    """
    stored = open_run(Path(run), checkpoint)
    folder = out or stored.path / "export"
    states = list(stored.states())
    for state in states:  # before anything is written
        architecture(stored.config.model, state, stored.checkpoint.path)
    files = {f"network{network:02d}.pt": state for network, state in enumerate(states)}
    files["uniform_soup.pt"] = uniform_soup(states)
    description = {
        "run_dir": str(stored.path),
        "epoch": stored.checkpoint.epoch,
        "round": stored.checkpoint.round,
        "model": stored.config.model.name,
        "lead": stored.config.graft.lead,
        "sha256": {
            name: save_network(folder / name, _plain(state)) for name, state in files.items()
        },
        "dist_graft": VERSION,
    }
    write_atomically(folder / DESCRIPTION, (json.dumps(description, indent=1) + "\n").encode())
    names = "\n".join(str(folder / name) for name in files)
    return (
        f"{names}\n{stored.config.model.name} of {stored.checkpoint.epoch} epochs; to load one: "
        "model.load_state_dict(torch.load(path, weights_only=True))"
    )


def _plain(state: State) -> State:
    return {key: tensor.contiguous() for key, tensor in state.items()}
