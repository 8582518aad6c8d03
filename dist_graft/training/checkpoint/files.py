"""Sets of per-network files that are complete or invisible."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_graft.errors import RunDirectoryError

_NAME = re.compile(r"epoch_(\d{4,})(?:_round_(\d{4,})(?:_again_(\d+))?)?")
COMPLETE = "COMPLETE.json"


@dataclass(frozen=True)
class Checkpoint:
    """A complete set: what COMPLETE.json says."""

    path: Path
    epoch: int
    """Epochs finished."""
    round: int
    """Rounds finished."""
    networks: int
    sha256: dict[str, str]
    """Of each file, by name."""


def set_path(folder: Path, epoch: int, round_: int | None = None, *, again: int = 0) -> Path:
    """Where a set lies.

    Args:
        folder: of the sets.
        epoch: epochs finished.
        round_: rounds finished, for a set inside the epoch after them.
        again: counts further sets between the same two rounds.
    """
    inside = "" if round_ is None else f"_round_{round_:04d}"
    return folder / f"epoch_{epoch:04d}{inside}{f'_again_{again}' if again else ''}"


def path_after(folder: Path, epoch: int, round_: int, newest: str | None) -> Path:
    """Where a set inside an epoch lies that follows the set `newest`, which it must not replace."""
    match = _NAME.fullmatch(newest or "")
    same = match and match[2] and (int(match[1]), int(match[2])) == (epoch, round_)
    return set_path(folder, epoch, round_, again=int(match[3] or 0) + 1 if match and same else 0)


def _order(name: str) -> tuple[int, int, int]:
    """Sorts the names of sets from old to new."""
    match = _NAME.fullmatch(name)
    assert match
    return int(match[1]), int(match[2] or -1), int(match[3] or 0)


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write a file that is there whole and durable, or not at all.

    Raises: RunDirectoryError naming the file, when the disk refuses.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise RunDirectoryError(
            f"{path} cannot be written: {error.strerror}; free space or choose another run_dir"
        ) from error


def save_network(path: Path, state: Mapping[str, Any]) -> str:
    """Save one network's state and return the sha256 of the file."""
    import torch

    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    content = buffer.getbuffer()
    write_atomically(path, content)
    return hashlib.sha256(content).hexdigest()


def load_network(path: Path, sha256: str) -> dict[str, Any]:
    """Load one network's state to the CPU; nothing but tensors and plain values is unpickled.

    Raises: RunDirectoryError when the file is not the one that was saved.
    """
    import torch

    content = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(content).hexdigest() != sha256:
        raise RunDirectoryError(f"{path} is missing or damaged: delete its folder and start again")
    state: dict[str, Any] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    return state


def complete_set(
    path: Path,
    *,
    epoch: int,
    round_: int,
    sha256: list[str],
    positions: Sequence[tuple[int, int]] | None = None,
) -> None:
    """Declare a set complete, once every network's file is durable.

    Args:
        path: of the set.
        epoch: epochs that all networks finished.
        round_: rounds that all networks finished.
        sha256: of each network's file.
        positions: epochs and steps that each network finished; None: no step of another epoch.
    """
    files = {f"network{k:02d}.pt": digest for k, digest in enumerate(sha256)}
    places = positions or [(epoch, 0)] * len(sha256)
    content = {
        "epoch": epoch,
        "round": round_,
        "networks": len(sha256),
        "positions": [{"epoch": finished, "step": step} for finished, step in places],
        "sha256": files,
    }
    write_atomically(path / COMPLETE, (json.dumps(content, indent=1) + "\n").encode())


def complete_sets(folder: Path) -> list[Checkpoint]:
    """All complete sets, the newest last; the networks' files are not read."""
    return [checkpoint for checkpoint in declared_sets(folder) if checkpoint.networks]


def declared_sets(folder: Path) -> list[Checkpoint]:
    """As `complete_sets`, with those whose COMPLETE.json is damaged: they have no networks."""
    paths = [path for path in _folders(folder) if _NAME.fullmatch(path.name)]
    found = [_read_set(path) for path in paths if (path / COMPLETE).is_file()]
    return sorted(found, key=lambda checkpoint: _order(checkpoint.path.name))


def damage(checkpoint: Checkpoint) -> Path | None:
    """The first file of a set that is missing or not as it was saved; None when all are well."""
    if not checkpoint.networks:
        return checkpoint.path / COMPLETE
    for name, digest in checkpoint.sha256.items():
        path = checkpoint.path / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            return path
    return None


def clear_after(folder: Path, chosen: Checkpoint | None) -> None:
    """Make room for newer sets than the chosen one: damaged ones are renamed, not deleted."""
    for path in _folders(folder):
        newer = chosen is None or (
            _NAME.fullmatch(path.name) and _order(path.name) > _order(chosen.path.name)
        )
        if not _NAME.fullmatch(path.name) or not newer:
            continue
        if not (path / COMPLETE).exists():
            shutil.rmtree(path)
            continue
        aside = path.with_name(f"{path.name}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)


def prune(folder: Path, keep: int) -> None:
    """Remove all complete sets but the newest `keep`, and what was left of incomplete ones."""
    complete = complete_sets(folder)
    for checkpoint in complete[:-keep]:
        (checkpoint.path / COMPLETE).unlink()
        shutil.rmtree(checkpoint.path)
    newest = complete[-1].path.name if complete else ""
    for path in _folders(folder):
        if newest and _NAME.fullmatch(path.name) and _order(path.name) < _order(newest):
            discard(path)


def discard(path: Path) -> None:
    """Remove what was written of a set that is not complete."""
    if not (path / COMPLETE).exists():
        shutil.rmtree(path, ignore_errors=True)


def _folders(folder: Path) -> list[Path]:
    return list(folder.glob("epoch_*")) if folder.is_dir() else []


def _read_set(path: Path) -> Checkpoint:
    """What COMPLETE.json says, if that can be: it must fit the folder's name and itself."""
    try:
        content = json.loads((path / COMPLETE).read_text())
        epoch, round_, networks = (int(content[key]) for key in ("epoch", "round", "networks"))
        sha256 = {str(name): str(digest) for name, digest in content["sha256"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Checkpoint(path=path, epoch=0, round=0, networks=0, sha256={})
    fits = set(sha256) == {f"network{k:02d}.pt" for k in range(networks)} and path.name.startswith(
        (set_path(path.parent, epoch).name, set_path(path.parent, epoch, round_).name)
    )
    return Checkpoint(
        path=path, epoch=epoch, round=round_, networks=networks if fits else 0, sha256=sha256
    )
