from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dist_graft.errors import RunDirectoryError
from dist_graft.monitoring.run_events import Event, Kind, RunEventsFile


def event(epoch: int, round_: int, kind: Kind = "slow", network: int | None = 1) -> Event:
    return Event(kind=kind, epoch=epoch, round=round_, network=network, text=f"{epoch} {round_}")


def stored(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_one_line_an_event(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    story = RunEventsFile(path, start_epoch=0, start_round=0)
    story.write(event(0, 1, "healed"))
    story.write(event(2, 3, "resumed", None))
    assert stored(path) == story.events
    first, second = story.events
    assert {key: first[key] for key in ("kind", "epoch", "round", "network", "text")} == {
        "kind": "healed",
        "epoch": 0,
        "round": 1,
        "network": 1,
        "text": "0 1",
    }
    assert first["time"].endswith("+00:00")
    assert second["network"] is None


@pytest.mark.parametrize(
    ("start", "stay"),
    [
        ((0, 0), []),
        ((1, 2), ["0 0", "0 1"]),
        ((1, 3), ["0 0", "0 1", "1 2"]),
        ((1, 4), ["0 0", "0 1", "1 2", "1 3"]),
        ((2, 4), ["0 0", "0 1", "1 2", "1 3", "1 4"]),
        ((9, 9), ["0 0", "0 1", "1 2", "1 3", "1 4", "2 4"]),
    ],
)
def test_a_resumed_run_forgets_what_it_will_live_through_again(
    tmp_path: Path, start: tuple[int, int], stay: list[str]
) -> None:
    """What happened before the checkpoint set, and that the run was resumed, stays."""
    path = tmp_path / "events.jsonl"
    story = RunEventsFile(path, start_epoch=0, start_round=0)
    for epoch, round_ in ((0, 0), (0, 1), (1, 2), (1, 3), (1, 4), (2, 4)):
        story.write(event(epoch, round_))
    story.write(event(5, 6, "resumed", None))
    again = RunEventsFile(path, start_epoch=start[0], start_round=start[1])
    assert [kept["text"] for kept in again.events] == [*stay, "5 6"]
    assert stored(path) == again.events
    again.write(event(7, 8))
    assert stored(path) == again.events
    assert again.events[-1]["text"] == "7 8"


def test_what_the_disk_refused_is_known_and_written_later(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    story = RunEventsFile(path, start_epoch=0, start_round=0)
    path.unlink()
    path.mkdir()
    with pytest.raises(RunDirectoryError, match=r"events\.jsonl cannot be written"):
        story.write(event(0, 0))
    assert [known["text"] for known in story.events] == ["0 0"]
    path.rmdir()
    story.write(event(0, 1))
    assert stored(path) == story.events
    assert len(story.events) == 2
