from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from small import CPU

from dist_graft.config import MonitorConfig
from dist_graft.errors import ConfigError
from dist_graft.monitoring.chart_layout import PHASES
from dist_graft.monitoring.profiler import StepProfile
from dist_graft.phase_timer import PhaseTimer, profiler_label


@pytest.mark.parametrize(
    "value",
    ["", "5", "5:", ":5", "5:5", "6:5", "-1:5", "1:-5", "1.5:3", "a:b", "1:2:3", " 1:2", "¹:²"],
)
def test_steps_that_are_none_are_named(value: str) -> None:
    with pytest.raises(ConfigError, match=r"monitor\.profile_steps must be A:B .*, got ") as error:
        MonitorConfig(profile_steps=value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", ["0:1", "7:12", None])
def test_steps_that_are_some(value: str | None) -> None:
    assert MonitorConfig(profile_steps=value).profile_steps == value


def trace(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt") as file:
        events: list[dict[str, Any]] = json.load(file)["traceEvents"]
    return events


def calls(path: Path, name: str) -> int:
    """How often a block of this name is in the trace."""
    return sum(event.get("name") == name and event.get("ph") == "X" for event in trace(path))


def profiled(path: Path, first: int, last: int, *, start: int = 0, epochs: int = 2) -> None:
    """Epochs of four steps, with an evaluation after each of them."""
    profile = StepProfile(first, last, path, CPU, logging.getLogger("profiled"))
    times = PhaseTimer(PHASES)
    for epoch in range(epochs):
        begins = max(start, 4 * epoch)
        if begins >= 4 * epoch + 4:
            continue
        profile.go_on(begins, 4 * epoch + 4)
        for _ in range(begins, 4 * epoch + 4):
            with profiler_label("step"):
                torch.ones(4).exp()
            profile.step()
        with times.phase("evaluation"):
            torch.ones(4).log()
    profile.finish()


@pytest.mark.parametrize(
    ("first", "last", "steps", "evaluations"),
    [
        (0, 1, 1, 0),
        (1, 3, 2, 0),
        (2, 4, 2, 0),
        (4, 6, 2, 0),
        (3, 5, 2, 1),
        (0, 8, 8, 1),
        (6, 99, 2, 1),
    ],
)
def test_the_steps_and_what_is_between_them(
    tmp_path: Path, first: int, last: int, steps: int, evaluations: int
) -> None:
    path = tmp_path / "network00" / "trace.json.gz"
    profiled(path, first, last)
    assert calls(path, "step") == calls(path, "aten::exp") == steps
    assert calls(path, "evaluation") == calls(path, "aten::log") == evaluations


def test_a_resumed_run_profiles_what_is_left(tmp_path: Path) -> None:
    profiled(tmp_path / "trace.json.gz", 2, 6, start=4)
    assert calls(tmp_path / "trace.json.gz", "step") == 2


def test_a_run_that_is_past_the_steps_profiles_nothing(tmp_path: Path) -> None:
    profiled(tmp_path / "trace.json.gz", 2, 4, start=4)
    assert not list(tmp_path.iterdir())


def test_the_table_says_where_the_time_went(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="profiled"):
        profiled(tmp_path / "trace.json.gz", 3, 6)
    (told,) = caplog.messages
    first, header, *rows = told.splitlines()
    assert "steps 3 to 5" in first
    assert str(tmp_path / "trace.json.gz") in first
    assert header.split() == [
        "phase,",
        "or",
        "operation",
        "by",
        "itself",
        "calls",
        "ms",
        "%",
        "of",
        "the",
        "time",
    ]
    shown = {row.split()[0]: row.split()[1:] for row in rows}
    assert shown["step"][0] == "3"
    assert shown["evaluation"][0] == "1"
    assert float(shown["step"][2]) > 0  # its milliseconds may be too few to be seen
    assert shown["aten::exp"][0] == "3"


def test_a_disk_that_refuses_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "network00").write_text("a file")
    with caplog.at_level(logging.INFO, logger="profiled"):
        profiled(tmp_path / "network00" / "trace.json.gz", 0, 2)
    assert "cannot be written" in caplog.messages[0]


def test_steps_past_the_run_are_named() -> None:
    profile = StepProfile(8, 9, Path("x"), CPU, logging.getLogger("profiled"))
    profile.check(9)
    with pytest.raises(ConfigError, match="begins at step 8, and the run has the steps 0 to 7"):
        profile.check(8)


def test_the_time_sheet_accounts_for_all_time() -> None:
    sheet = PhaseTimer(PHASES)
    sheet.reset()
    with sheet.phase("round"):
        sum(range(200_000))
    sheet.add("step", 1e-9)
    sum(range(200_000))
    handed = sheet.reset()
    assert handed["round"] > 0
    assert handed["step"] == 1e-9
    assert handed["other"] > 0
    assert handed["data"] == handed["evaluation"] == handed["checkpoint"] == 0
    assert sheet.reset()["round"] == 0
