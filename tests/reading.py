"""Reads the files of a run, independently of the code that wrote them."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.custom_scalar.metadata import CONFIG_SUMMARY_TAG
from tensorboard.plugins.hparams.metadata import SESSION_END_INFO_TAG, SESSION_START_INFO_TAG
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Return TensorBoard's scalars by tag and step; asserts that no step occurs twice."""
    events = _reloaded(folder)
    found = {}
    for tag in events.Tags()["scalars"]:
        steps = [event.step for event in events.Scalars(tag)]
        assert len(steps) == len(set(steps)), f"{folder}: {tag} has steps {steps}"
        found[tag] = {event.step: event.value for event in events.Scalars(tag)}
    return found


def texts(folder: Path) -> dict[str, dict[int, str]]:
    """Return TensorBoard's texts by tag and step."""
    events = _reloaded(folder)
    suffix = "/text_summary"
    return {
        tag.removesuffix(suffix): {
            event.step: event.tensor_proto.string_val[0].decode() for event in events.Tensors(tag)
        }
        for tag in events.Tags()["tensors"]
        if tag.endswith(suffix)
    }


def pictures(folder: Path) -> dict[str, dict[int, Image.Image]]:
    """Return TensorBoard's images by tag and step; asserts that no step occurs twice."""
    events = _reloaded(folder)
    found = {}
    for tag in events.Tags()["images"]:
        steps = [event.step for event in events.Images(tag)]
        assert len(steps) == len(set(steps)), f"{folder}: {tag} has steps {steps}"
        found[tag] = {
            event.step: Image.open(io.BytesIO(event.encoded_image_string))
            for event in events.Images(tag)
        }
    return found


def layout(folder: Path) -> dict[str, dict[str, list[str]]]:
    """Return the tags of the custom scalars by category and title."""
    (event,) = _reloaded(folder).Tensors(CONFIG_SUMMARY_TAG)
    read = Layout.FromString(event.tensor_proto.string_val[0])
    return {
        category.title: {
            chart.title: [
                *chart.multiline.tag,
                *(tag for s in chart.margin.series for tag in (s.value, s.lower, s.upper)),
            ]
            for chart in category.chart
        }
        for category in read.category
    }


def session(folder: Path) -> tuple[dict[str, Any], bool]:
    """Return a network's hyperparameters, and whether its run has ended."""
    events = _reloaded(folder)
    known = events.Tags()["tensors"] + list(events.summary_metadata)

    def content(tag: str) -> HParamsPluginData:
        return HParamsPluginData.FromString(events.SummaryMetadata(tag).plugin_data.content)

    columns = content(SESSION_START_INFO_TAG).session_start_info.hparams
    row = {name: getattr(value, value.WhichOneof("kind")) for name, value in columns.items()}
    return row, SESSION_END_INFO_TAG in known


def _reloaded(folder: Path) -> EventAccumulator:
    everything = {"scalars": 0, "images": 0, "tensors": 0}
    return EventAccumulator(str(folder), size_guidance=everything).Reload()


def metrics(run: Path, network: int) -> list[dict[str, Any]]:
    """Return the lines of a network's metrics.jsonl, without one that is being written."""
    text = (run / f"network{network:02d}" / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.split("\n")[:-1]]


def checkpoint(run: Path, epoch: int, network: int) -> dict[str, Any]:
    """Load one network's file of the checkpoint after an epoch."""
    path = run / "checkpoints" / f"epoch_{epoch:04d}" / f"network{network:02d}.pt"
    return torch.load(path, weights_only=True)


def optimizer_tensors(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the optimizer's tensors in a checkpoint, as NUMBER.NAME."""
    return {
        f"{number}.{name}": value
        for number, part in state["optimizer"]["state"].items()
        for name, value in part.items()
    }


def summary(run: Path) -> dict[str, Any]:
    """Return summary.json."""
    content: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return content


def events(run: Path) -> list[dict[str, Any]]:
    """Events in summary.json, except for slow networks, which depend on the load."""
    return [event for event in summary(run)["events"] if event["kind"] != "slow"]


def event_rows(run: Path) -> list[str]:
    """Rows of TensorBoard's last table of events, except for slow networks."""
    tables = texts(run / "population").get("run/events")
    rows = tables[max(tables)].splitlines()[2:] if tables else []
    return [row for row in rows if "| slow |" not in row]


def contents(folder: Path, *, without: tuple[str, ...] = ()) -> dict[str, str]:
    """Return the sha256 of every file below a folder by path, except for the names in `without`."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in without
    }


def assert_same_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    """Assert that two state dicts have the same keys and are bitwise equal."""
    assert list(first) == list(second)
    differing = [key for key in first if not torch.equal(first[key], second[key])]
    assert not differing, f"{len(differing)} tensors differ, first {differing[0]}"
