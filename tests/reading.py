"""What a run left behind, read with other programs than those that wrote it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """TensorBoard's values by tag and step; an assertion fails when a step is there twice."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    found = {}
    for tag in events.Tags()["scalars"]:
        steps = [event.step for event in events.Scalars(tag)]
        assert len(steps) == len(set(steps)), f"{folder}: {tag} has steps {steps}"
        found[tag] = {event.step: event.value for event in events.Scalars(tag)}
    return found


def metrics(run: Path, network: int) -> list[dict[str, Any]]:
    """The lines of a network's metrics.jsonl."""
    text = (run / f"network{network:02d}" / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def checkpoint(run: Path, epoch: int, network: int) -> dict[str, Any]:
    """One network's file of the set of so many finished epochs."""
    path = run / "checkpoints" / f"epoch_{epoch:04d}" / f"network{network:02d}.pt"
    return torch.load(path, weights_only=True)


def contents(folder: Path, *, without: tuple[str, ...] = ()) -> dict[str, str]:
    """sha256 of every file below a folder, by path; those of some names left out."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in without
    }


def assert_same_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    """Two state dicts hold the same keys and the same bits."""
    assert list(first) == list(second)
    differing = [key for key in first if not torch.equal(first[key], second[key])]
    assert not differing, f"{len(differing)} tensors differ, the first is {differing[0]}"
