from __future__ import annotations

import logging
from pathlib import Path

import pytest
from dist_graft.training.boards import Boards, session_options
from reading import layout, texts

from dist_graft.config import GraftConfig, MonitorConfig, TrainConfig
from dist_graft.population.runtime.process_info import ProcessInfo
from dist_graft.run_directory import RunDirectory


def opened(folder: Path, config: TrainConfig, place: ProcessInfo) -> Boards:
    directory = RunDirectory(str(folder))
    directory.describe(config, place.networks)
    boards = Boards(
        config,
        directory,
        place,
        start_epoch=0,
        lines=[],
        hosts=[f"host{network}" for network in range(place.networks)],
        log=logging.getLogger("boards"),
    )
    boards.close()
    return boards


@pytest.mark.parametrize(
    ("config", "networks", "rounds"),
    [
        (TrainConfig(), 2, True),
        (TrainConfig(), 1, False),
        (TrainConfig(method="none"), 2, False),
        (TrainConfig(method="average"), 2, True),
        (TrainConfig(graft=GraftConfig(every=0)), 2, False),
        (TrainConfig(graft=GraftConfig(every=0, every_steps=5)), 2, True),
        (TrainConfig(graft=GraftConfig(source="internal")), 2, False),
    ],
)
def test_only_networks_that_meet_have_charts_of_rounds(
    tmp_path: Path, config: TrainConfig, networks: int, rounds: bool
) -> None:
    opened(tmp_path, config, ProcessInfo(0, networks, 0, networks))
    categories = " ".join(layout(tmp_path / "population"))
    assert ("coefficient" in categories) == ("distance" in categories) == rounds


def test_the_first_process_writes_for_the_population(tmp_path: Path) -> None:
    for rank in range(2):
        opened(tmp_path / str(rank), TrainConfig(), ProcessInfo(rank, 2, rank, 2))
    assert texts(tmp_path / "0/population")["run/hosts"][0].endswith("| 0 | host0 |\n| 1 | host1 |")
    assert not (tmp_path / "1/population").exists()


def test_without_tensorboard_nothing_is_written(tmp_path: Path) -> None:
    opened(tmp_path, TrainConfig(monitor=MonitorConfig(tensorboard=False)), ProcessInfo())
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_the_options_of_a_session() -> None:
    config = TrainConfig(seed=7, method="papa")
    options = session_options(config, ProcessInfo(1, 2, 1, 2))
    assert (options["lr"], options["seed"], options["method"]) == (0.1, 7, "papa")
    assert "amplitude" not in options
    assert session_options(TrainConfig(), ProcessInfo())["amplitude"] == 0.4
