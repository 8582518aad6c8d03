"""No damaged or edited file of a run directory ends a reader with anything but one line."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dist_graft.analysis.run_files import read_json, read_run
from dist_graft.analysis.status import facts, judge, status_text
from dist_graft.analysis.stored_weights import open_run, read_source
from dist_graft.config import TrainConfig
from dist_graft.errors import DistGraftError
from dist_graft.monitoring.jsonl import JsonLinesFile
from dist_graft.monitoring.layer_history import LayerHistory, coefficients, informations
from dist_graft.monitoring.run_events import Event, events_file
from dist_graft.population.runtime.lease import Lease, read_lease, this_process
from dist_graft.population.runtime.process_info import ProcessInfo
from dist_graft.run_directory import RunDirectory
from dist_graft.training.checkpoint.files import mark_complete, save_network
from dist_graft.training.checkpoint.manager import CheckpointManager, Progress

CONFIG = TrainConfig(epochs=3)
FILES = (
    *("config.yaml", "classes.json", "summary.json", "lease.json", "STOPPED_EARLY"),
    "population/events.jsonl",
    *("network00/metrics.jsonl", "network00/status.json", "network00/log.txt"),
    *("checkpoints/epoch_0002/COMPLETE.json", "checkpoints/epoch_0002/network00.pt"),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with one of each file."""
    path = tmp_path_factory.mktemp("run")
    directory = RunDirectory(path)
    directory.write_config(CONFIG, 1)
    sizes = {"channels": 1, "resize": 28, "crop": 28, "image_size": 32}
    directory.write_classes(["cat", "dog"], {**sizes, "mean": [0.5], "std": [0.2]})
    for epoch in (1, 2):
        folder = directory.checkpoints / f"epoch_{epoch:04d}"
        state = {"network": 0, "model": nn.Linear(2, 2).state_dict(), **Progress().state_dict()}
        digest = save_network(folder / "network00.pt", state)
        mark_complete(folder, epoch=epoch, round_=epoch, sha256=[digest])
    for folder in (directory.network(0), directory.population):
        folder.mkdir()
    graft = {"round": 1, "donor": 0, "coefficient": {"a": 0.5}}
    line = {"epoch": 0, "lr": 0.1, "test_accuracy": 50.0, "graft": graft, "information": {"a": 1.0}}
    directory.metrics(0).write_text(f"{json.dumps(line)}\n{json.dumps(line | {'epoch': 1})}\n")
    event = Event(kind="slow", epoch=0, round=0, network=0, text="slow")
    directory.events.write_text(json.dumps(vars(event)) + "\n")
    status = {"network": 0, "host": "h", "pid": 7, "phase": "training", "epoch": 1, "step": 3}
    status |= {"steps_per_epoch": 9, "rounds": 1, "time": time.time(), "seconds_left": 7.5}
    directory.status(0).write_text(json.dumps(status))
    (directory.network(0) / "log.txt").write_text("INFO epoch 1\nERROR failed\n")
    directory.summary.write_text(json.dumps({"mean_accuracy_after_last_round": 61.0}))
    directory.stopped.write_text("stopped early\n")
    lease = Lease(directory.lease, holder=this_process())
    lease.acquire()
    lease._released.set()  # ends its thread; the file stays
    return path


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 2**63, 10**400, float("nan"), float("inf"), -1.5, "twenty", "", "é"]),
    st.integers(),
    st.text(max_size=5),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2)
    ),
    max_leaves=4,
)


@st.composite
def edits(draw: st.DrawFn) -> Callable[[Any], Any]:
    """A function that replaces or deletes one entry of nested lists and dictionaries."""
    steps, value, deletes = (
        draw(st.lists(st.integers(0, 30), max_size=3)),
        draw(VALUES),
        draw(st.booleans()),
    )

    def edit(content: Any) -> Any:
        place = content
        for depth, step in enumerate(steps):
            keys = list(place) if isinstance(place, dict) else range(len(place))
            if not keys:
                break
            key = keys[step % len(keys)]
            if depth + 1 < len(steps) and isinstance(place[key], dict | list):
                place = place[key]
            elif deletes:
                del place[key]
                break
            else:
                place[key] = value
                break
        return content if steps else value

    return edit


@st.composite
def damages(draw: st.DrawFn) -> Callable[[Path], None]:
    """A function that damages a file."""
    kind = draw(
        st.sampled_from(["edit", "truncate", "flip", "replace", "encode", "folder", "link"])
    )
    number, edit = draw(st.integers(0, 10**6)), draw(edits())
    junk = draw(
        st.sampled_from([b"", b"\0" * 9, b"\xff\xfe", b"[" * 1500, b"{a: &a [*a]}", b"null", b"7"])
    )

    def damage(path: Path) -> None:
        content = path.read_bytes()
        if kind == "truncate":
            path.write_bytes(content[: number % len(content)])
        elif kind == "flip":
            place = number % len(content)
            flipped = content[place] ^ (1 << number % 8)
            path.write_bytes(content[:place] + bytes([flipped]) + content[place + 1 :])
        elif kind == "replace" or (kind in ("edit", "encode") and path.suffix == ".pt"):
            path.write_bytes(junk)
        elif kind == "encode":
            path.write_bytes(content.decode().encode("utf-16"))
        elif kind in ("folder", "link"):
            path.unlink()
            path.mkdir() if kind == "folder" else path.symlink_to("nothing")
        elif path.suffix == ".yaml":
            path.write_text(yaml.safe_dump(edit(yaml.safe_load(content))))
        elif path.suffix in (".json", ".jsonl"):
            lines = content.decode().splitlines() if path.suffix == ".jsonl" else [content.decode()]
            path.write_text("".join(json.dumps(edit(json.loads(line))) + "\n" for line in lines))

    return damage


def readers(path: Path, file: str) -> list[Callable[[], object]]:
    """All that reads a file: status, evaluate and its kin, a resumed run."""
    directory = RunDirectory(path)

    def status() -> None:
        files = read_run(path)
        judged = judge(files, time.time())
        json.dumps(facts(files, judged, time.time()))
        status_text(files, judged, time.time())

    def resume() -> None:
        manager = CheckpointManager(
            CONFIG,
            SimpleNamespace(process=ProcessInfo(), peers=None, timeouts=None),  # type: ignore[arg-type]
            directory,
            SimpleNamespace(warning=lambda *_: None),  # type: ignore[arg-type]
        )
        if name := manager.choose():
            Progress.from_state_dict(manager.load(name)[1])

    def metrics() -> None:
        file = JsonLinesFile(directory.metrics(0), keep=lambda line: line["epoch"] < 1)
        for read in (coefficients, informations):
            LayerHistory(file.kept, read).numbers()

    def events() -> None:
        for event in events_file(directory.events, start_epoch=1, start_round=1).kept:
            Event(**{name: event[name] for name in Event.__dataclass_fields__})

    kinds = {
        "config.yaml": [status, lambda: open_run(path), lambda: directory.check(CONFIG, 1)],
        "classes.json": [lambda: open_run(path).inputs, directory.read_classes],
        "COMPLETE.json": [status, lambda: read_source(path), resume],
        "network00.pt": [lambda: open_run(path).state(0), resume],
        "checkpoints": [status, resume],
        "metrics.jsonl": [status, metrics],
        "events.jsonl": [status, events],
        "summary.json": [status, lambda: read_json(directory.summary)],
        "lease.json": [lambda: read_lease(directory.lease)],
    }
    return kinds.get(file.rpartition("/")[2], [status])


def check(path: Path, file: str) -> None:
    """Read a file in all ways, of which each may only succeed or end with one line."""
    for read in readers(path, file):
        with contextlib.suppress(DistGraftError):
            read()


def test_an_intact_run_is_read(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    for file in FILES:
        for read in readers(tmp_path / "run", file):
            read()


@settings(max_examples=120)
@given(st.sampled_from(FILES), damages())
def test_damaged_files(run: Path, file: str, damage: Callable[[Path], None]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        shutil.copytree(run, path)
        damage(path / file)
        check(path, file)


@pytest.mark.parametrize(
    "place", ["checkpoints", "checkpoints/epoch_0002", "checkpoints/epoch_0003"]
)
@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_file_or_a_link_in_place_of_a_folder(
    place: str, kind: str, run: Path, tmp_path: Path
) -> None:
    path = tmp_path / "run"
    shutil.copytree(run, path)
    if (path / place).exists():
        shutil.rmtree(path / place)
    if kind == "file":
        (path / place).write_text("here")
    else:
        (path / place).symlink_to("nothing")
    check(path, "checkpoints")
