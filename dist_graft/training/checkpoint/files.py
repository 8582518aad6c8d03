"""Checkpoint files on disk: one per network, and COMPLETE.json, which is written last."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_graft.errors import RunDirectoryError
from dist_graft.run_directory import network_name, write_atomically

_NAME = re.compile(r"epoch_(\d{4,})(?:_round_(\d{4,})(?:_again_(\d+))?)?")
_FILE = re.compile(r"network(\d{2,})\.pt")
_FOLDER = re.compile(r"network(\d{2,})")
COMPLETE = "COMPLETE.json"
_UNREADABLE = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError),
)
"""Errors of reading a COMPLETE.json that is damaged."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as its COMPLETE.json describes it."""

    path: Path
    epoch: int
    """Epochs finished."""
    round: int
    """Rounds finished."""
    networks: int
    """0 when COMPLETE.json is damaged."""
    sha256: dict[str, str]
    """Of each file, by name."""
    resumed_networks: list[int | str] | None = None
    """Value of the option `resume_networks` with which the run got its networks, if any."""

    @property
    def numbers(self) -> list[int]:
        """Numbers of its networks: all, or the one of a job."""
        return sorted(map(_number, self.sha256))


def network_file(network: int) -> str:
    """Name of the file that holds one network's state."""
    return f"{network_name(network)}.pt"


def _number(name: str) -> int:
    """Number of the network of a file; 0 for another name."""
    match = _FILE.fullmatch(name)
    return int(match[1]) if match else 0


def checkpoint_path(folder: Path, epoch: int, round_: int | None = None, *, again: int = 0) -> Path:
    """Folder of a checkpoint.

    Args:
        folder: folder of all checkpoints.
        epoch: epochs finished.
        round_: rounds finished; None for a checkpoint between two epochs.
        again: number of earlier checkpoints between the same two rounds.
    """
    inside = "" if round_ is None else f"_round_{round_:04d}"
    return folder / f"epoch_{epoch:04d}{inside}{f'_again_{again}' if again else ''}"


def path_after(folder: Path, epoch: int, round_: int, newest: str | None) -> Path:
    """Folder of a checkpoint inside an epoch that does not replace `newest`."""
    match = _NAME.fullmatch(newest or "")
    same = match and match[2] and (int(match[1]), int(match[2])) == (epoch, round_)
    again = int(match[3] or 0) + 1 if match and same else 0
    return checkpoint_path(folder, epoch, round_, again=again)


def save_network(path: Path, state: Mapping[str, Any]) -> str:
    """Save one network's state and return the sha256 of the file."""
    import torch

    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    content = buffer.getbuffer()
    write_atomically(path, content)
    return hashlib.sha256(content).hexdigest()


def load_network(path: Path, sha256: str) -> dict[str, Any]:
    """Load one network's state to the CPU. Only tensors and plain values are unpickled.

    Raises: RunDirectoryError when the file is missing or its checksum differs.
    """
    import torch

    content = _read_file(path)
    if content is None or hashlib.sha256(content).hexdigest() != sha256:
        raise RunDirectoryError(f"{path} is missing or damaged: delete its folder and start again")
    state: dict[str, Any] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    return state


def mark_complete(
    path: Path,
    *,
    epoch: int,
    round_: int,
    sha256: Sequence[str],
    first: int = 0,
    positions: Sequence[tuple[int, int]] | None = None,
    resumed_networks: Sequence[int | str] | None = None,
) -> None:
    """Write COMPLETE.json. Every network's file must be durable by then.

    Args:
        path: folder of the checkpoint.
        epoch: epochs that all networks have finished.
        round_: rounds that all networks have finished.
        sha256: checksum of each network's file.
        first: number of the first network.
        positions: epochs and steps that each network has finished; None: no steps after `epoch`.
        resumed_networks: as in `Checkpoint`.
    """
    content: dict[str, Any] = {
        "epoch": epoch,
        "round": round_,
        "networks": len(sha256),
        "positions": [
            {"epoch": finished, "step": step}
            for finished, step in positions or [(epoch, 0)] * len(sha256)
        ],
        "sha256": {network_file(k): digest for k, digest in enumerate(sha256, first)},
    }
    if resumed_networks is not None:
        content["resumed_networks"] = list(resumed_networks)
    write_atomically(path / COMPLETE, (json.dumps(content, indent=1) + "\n").encode())


def complete_checkpoints(folder: Path) -> list[Checkpoint]:
    """All complete checkpoints, the newest last. The networks' files are not read."""
    return [checkpoint for checkpoint in all_checkpoints(folder) if checkpoint.networks]


def job_checkpoints(run: Path) -> dict[int, list[Checkpoint]]:
    """Complete checkpoints of each network that is an independent job, the newest last.

    Empty for a run whose networks run together: its checkpoints are in RUN/checkpoints.
    """
    found: dict[int, list[Checkpoint]] = {}
    for folder in sorted(run.glob("network*")):
        if match := _FOLDER.fullmatch(folder.name):
            network = int(match[1])
            checkpoints = complete_checkpoints(folder / "checkpoints")
            if own := [each for each in checkpoints if each.numbers == [network]]:
                found[network] = own
    return found


def run_of_checkpoint(folder: Path) -> Path:
    """Run directory of a checkpoint's folder: RUN/checkpoints/NAME or RUN/networkNN/..."""
    parent = folder.parents[1]
    return parent.parent if _FOLDER.fullmatch(parent.name) else parent


def all_checkpoints(folder: Path) -> list[Checkpoint]:
    """All checkpoints with a COMPLETE.json, including damaged ones, the newest last."""
    found = [_read(path) for path in _folders(folder) if (path / COMPLETE).is_file()]
    return sorted(found, key=lambda checkpoint: _order(checkpoint.path.name))


def newest_usable(folder: Path) -> tuple[Checkpoint | None, list[Path]]:
    """The newest checkpoint whose files are intact, and the damaged files of newer ones.

    Raises: RunDirectoryError when there are checkpoints and all are damaged.
    """
    damaged: list[Path] = []
    for checkpoint in reversed(all_checkpoints(folder)):
        path = damaged_file(checkpoint)
        if path is None:
            return checkpoint, damaged
        damaged.append(path)
    if damaged:
        raise RunDirectoryError(
            f"no checkpoint in {folder} is usable: {damaged[0]} is missing or damaged; restore "
            "it, or choose another run_dir"
        )
    return None, []


def damaged_file(checkpoint: Checkpoint) -> Path | None:
    """The first file that is missing or whose checksum differs; None when all are intact."""
    if not checkpoint.networks:
        return checkpoint.path / COMPLETE
    for name, digest in checkpoint.sha256.items():
        path = checkpoint.path / name
        try:
            with path.open("rb") as file:  # read in pieces: memory does not grow with the file
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    return path
        except OSError:
            return path
    return None


def clear_newer(folder: Path, chosen: Checkpoint | None) -> None:
    """Delete incomplete checkpoints newer than the chosen one, and rename damaged ones.

    Damaged checkpoints are kept as NAME.damaged. A file or a link in place of a folder is deleted.

    Raises: RunDirectoryError on a disk error.
    """
    for path in _folders(folder):
        if chosen is not None and _order(path.name) <= _order(chosen.path.name):
            continue
        try:
            if not (path / COMPLETE).exists():
                _remove(path)
                continue
            aside = path.with_name(f"{path.name}.damaged")
            _remove(aside)
            path.rename(aside)
        except OSError as error:
            raise RunDirectoryError(
                f"{path} cannot be removed: {error.strerror}; remove it, or choose another run_dir"
            ) from error


def prune(folder: Path, keep: int) -> None:
    """Delete old complete checkpoints beyond `keep`, and incomplete ones older than the newest.

    The last `keep` at the end of an epoch stay, so that a run that was interrupted ends with the
    same checkpoints as an uninterrupted one. Of those that are newer, inside an epoch, the last two
    stay (one, if `keep` is 1).
    """
    complete = complete_checkpoints(folder)
    ends = [checkpoint for checkpoint in complete if _order(checkpoint.path.name)[1] < 0]
    newer = complete[complete.index(ends[-1]) + 1 :] if ends else complete
    kept = (*ends[-keep:], *newer[-min(keep, 2) :])
    surplus = [checkpoint for checkpoint in complete if checkpoint not in kept]
    for checkpoint in surplus[: max(len(complete) - keep, 0)]:
        (checkpoint.path / COMPLETE).unlink()
        shutil.rmtree(checkpoint.path)
    for path in _folders(folder) if complete else ():
        if _order(path.name) < _order(complete[-1].path.name):
            discard_incomplete(path)


def discard_incomplete(path: Path) -> None:
    """Delete a checkpoint's folder unless the checkpoint is complete."""
    if not (path / COMPLETE).exists():
        shutil.rmtree(path, ignore_errors=True)


def _remove(path: Path) -> None:
    """Delete a folder, a file, or a link, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _read_file(path: Path) -> bytes | None:
    """Content of a file; None if it is not a file or cannot be read."""
    try:
        return path.read_bytes()
    except OSError:
        return None


def _folders(folder: Path) -> list[Path]:
    """Folders (or files, or links) that are named like a checkpoint."""
    paths = folder.glob("epoch_*") if folder.is_dir() else ()
    return [path for path in paths if _NAME.fullmatch(path.name)]


def _order(name: str) -> tuple[int, int, int]:
    """Sort key of checkpoint names, from old to new."""
    match = _NAME.fullmatch(name)
    assert match
    return int(match[1]), int(match[2] or -1), int(match[3] or 0)


def _read(path: Path) -> Checkpoint:
    """Read COMPLETE.json. Its content must be consistent and match the folder's name."""
    try:
        content = json.loads((path / COMPLETE).read_text())
        epoch, round_, networks = (int(content[key]) for key in ("epoch", "round", "networks"))
        sha256 = {str(name): str(digest) for name, digest in content["sha256"].items()}
        resumed = content.get("resumed_networks")
    except _UNREADABLE:
        return Checkpoint(path=path, epoch=0, round=0, networks=0, sha256={})
    names = (
        checkpoint_path(path.parent, epoch).name,
        checkpoint_path(path.parent, epoch, round_).name,
    )
    first = min(map(_number, sha256), default=0) if networks == 1 else 0  # 1: that of a job
    fits = networks == len(sha256) and set(sha256) == {
        network_file(k) for k in range(first, first + networks)
    }
    if not fits or not path.name.startswith(names):
        networks = 0
    return Checkpoint(
        path=path,
        epoch=epoch,
        round=round_,
        networks=networks,
        sha256=sha256,
        resumed_networks=resumed if isinstance(resumed, list) else None,
    )
