"""Networks must not write the same files."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from dist_graft.run_directory import network_name


def network_folder(root: str | Path, network: int) -> Path:
    """Folder of a network's files, ``ROOT/network03``."""
    return Path(root) / network_name(network)


def encode_paths(paths: Mapping[str, str | Path | None]) -> str:
    """Resolve the folders that a network writes to, as text for `refuse_shared_paths`."""
    return json.dumps({what: str(Path(path).resolve()) for what, path in paths.items() if path})


def refuse_shared_paths(texts: Sequence[str], advice: str) -> None:
    """Check that there are several networks, and that they write to different folders.

    Warns if there is only one network, which has no donor.

    Args:
        texts: by network, the result of `encode_paths`.
        advice: what to do, for the message.

    Raises: ValueError naming the folder and two networks that share it.
    """
    if len(texts) == 1:
        warnings.warn(
            "GraftCallback: a single process has no network to graft with; start one process for "
            "each network, with dist_graft.launch or torchrun",
            stacklevel=2,
        )
    owners: dict[str, int] = {}
    for network, text in enumerate(texts):
        for what, path in json.loads(text).items():
            other = owners.setdefault(path, network)
            if other != network:
                raise ValueError(
                    f"networks {other} and {network} would both write {what} to {path}, and lose "
                    f"each other's files: {advice}"
                )
