from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_trainer import FakeTrainer

from dist_graft.config import MonitorConfig, TrainConfig
from dist_graft.errors import ConfigError
from dist_graft.monitoring.chart_layout import PHASES
from dist_graft.monitoring.profiler import Profiler
from dist_graft.phase_timer import PhaseTimer, profiler_label
from dist_graft.population.runtime.process_info import ProcessInfo


@pytest.mark.parametrize(
    "value",
    ["", "5", "5:", ":5", "5:5", "6:5", "-1:5", "1:-5", "1.5:3", "a:b", "1:2:3", " 1:2", "¹:²"],
)
def test_invalid_ranges_of_steps(value: str) -> None:
    with pytest.raises(ConfigError, match=r"monitor\.profile_steps must be A:B .*, got ") as error:
        MonitorConfig(profile_steps=value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", ["0:1", "7:12", None])
def test_valid_ranges_of_steps(value: str | None) -> None:
    assert MonitorConfig(profile_steps=value).profile_steps == value


def trace(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt") as file:
        events: list[dict[str, Any]] = json.load(file)["traceEvents"]
    return events


def calls(path: Path, name: str) -> int:
    """Number of blocks of this name in the trace."""
    return sum(event.get("name") == name and event.get("ph") == "X" for event in trace(path))


def profiled(
    run_dir: Path, first: int, last: int, *, start: int = 0, process: ProcessInfo | None = None
) -> None:
    """Profile two epochs of four steps, with an evaluation after each of them."""
    fake = FakeTrainer(run_dir, config=TrainConfig(epochs=2), process=process or ProcessInfo())
    profile_steps(fake, first, last, start=start)


def profile_steps(fake: FakeTrainer, first: int, last: int, *, start: int = 0) -> None:
    profiler, timer = Profiler(f"{first}:{last}"), PhaseTimer(PHASES)
    fake.epoch, fake.step = divmod(start, 4)
    profiler.on_fit_start(fake.trainer)
    while fake.epoch < 2:
        profiler.on_epoch_start(fake.trainer)
        while fake.step < 4:
            with profiler_label("step"):
                torch.ones(4).exp()
            fake.step += 1
            profiler.on_step_end(fake.trainer)
        with timer.phase("evaluation"):
            torch.ones(4).log()
        fake.epoch, fake.step = fake.epoch + 1, 0
    profiler.teardown(fake.trainer)


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
def test_the_profiled_steps(
    tmp_path: Path, first: int, last: int, steps: int, evaluations: int
) -> None:
    path = tmp_path / "network00" / "trace.json.gz"
    profiled(tmp_path, first, last)
    assert calls(path, "step") == calls(path, "aten::exp") == steps
    assert calls(path, "evaluation") == calls(path, "aten::log") == evaluations


def test_a_resumed_run_profiles_the_remaining_steps(tmp_path: Path) -> None:
    profiled(tmp_path, 2, 6, start=4)
    assert calls(tmp_path / "network00/trace.json.gz", "step") == 2


def test_a_run_past_these_steps_profiles_nothing(tmp_path: Path) -> None:
    profiled(tmp_path, 2, 4, start=4)
    assert not list(tmp_path.rglob("trace*"))


def test_the_table_of_times(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        profiled(tmp_path, 3, 6)
    (message,) = caplog.messages
    first, header, *rows = message.splitlines()
    assert "steps 3 to 5" in first
    assert str(tmp_path / "network00/trace.json.gz") in first
    assert header.split()[-5:] == ["calls", "ms", "%", "of", "time"]
    shown = {row.split()[0]: row.split()[1:] for row in rows}
    assert shown["step"][0] == "3"
    assert shown["evaluation"][0] == "1"
    assert float(shown["step"][2]) > 0  # the milliseconds may round to 0
    assert shown["aten::exp"][0] == "3"


def test_a_disk_error_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fake = FakeTrainer(tmp_path, config=TrainConfig(epochs=2))
    fake.directory.network(0).rmdir()
    fake.directory.network(0).write_text("a file")
    profile_steps(fake, 0, 2)
    assert "cannot be written" in caplog.messages[0]


def test_only_the_leader_of_a_network_profiles(tmp_path: Path) -> None:
    profiled(tmp_path, 0, 8, process=ProcessInfo(1, 2, 1, 2).with_replicas(2))
    assert not list(tmp_path.rglob("trace*"))


def test_steps_past_the_run_are_an_error(tmp_path: Path) -> None:
    fake = FakeTrainer(tmp_path, config=TrainConfig(epochs=2))
    Profiler("7:99").on_fit_start(fake.trainer)
    with pytest.raises(ConfigError, match="starts at step 8, but the run has steps 0 to 7"):
        Profiler("8:9").on_fit_start(fake.trainer)


def test_the_phase_timer_accounts_for_all_time() -> None:
    timer = PhaseTimer(PHASES)
    timer.reset()
    with timer.phase("round"):
        sum(range(200_000))
    timer.add("step", 1e-9)
    sum(range(200_000))
    seconds = timer.reset()
    assert seconds["round"] > 0
    assert seconds["step"] == 1e-9
    assert seconds["other"] > 0
    assert seconds["data"] == seconds["evaluation"] == seconds["checkpoint"] == 0
    assert timer.reset()["round"] == 0


def test_phases_on_an_accelerator_are_timed_by_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without waiting for the device before the seconds are read."""
    waited: list[int] = []

    class Event:
        clock = 0

        def __init__(self, device: torch.device, *, enable_timing: bool) -> None:
            assert device.type == "cuda"
            assert enable_timing

        def record(self) -> None:
            Event.clock += 250
            self.milliseconds = Event.clock

        def synchronize(self) -> None:
            waited.append(self.milliseconds)

        def elapsed_time(self, end: Event) -> float:
            return end.milliseconds - self.milliseconds

    monkeypatch.setattr(torch, "Event", Event)
    timer = PhaseTimer(("pack", "blend"), torch.device("cuda"))
    for phase in ("pack", "blend", "pack"):
        with timer.phase(phase):
            pass
    assert waited == []
    assert timer.seconds == {"pack": 0.5, "blend": 0.25}
    assert waited == [500, 1000, 1500]
    assert timer.seconds == {"pack": 0.5, "blend": 0.25}
