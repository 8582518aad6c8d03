"""All processes of a run need the same options."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from launching import error_line, program, run_programs
from reading import contents

from dist_graft.config import DataConfig, OptimConfig, RuntimeConfig, TrainConfig
from dist_graft.population.runtime.process_group import different_options
from dist_graft.training.opening import options_text


@pytest.mark.parametrize(
    "differing",
    [
        {"optim.lr": ("0.1", "0.2"), "epochs": ("1", "2"), "graft.every": ("1", "2")},
        {"runtime.replicas": ("1", "2")},
    ],
)
def test_different_options_end_the_run_before_it_starts(
    differing: dict[str, tuple[str, str]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    commands = [
        program(
            run, *(word for name, values in differing.items() for word in (f"--{name}", values[k]))
        )
        for k in (0, 1)
    ]
    for done in run_programs(commands, timeout=60):
        line = error_line(done, "different options: ", "start all with the same options")
        for name in differing:
            assert f"{name} is " in line
        host = socket.gethostname()
        if "epochs" in differing:
            assert f"epochs is 1 in network 0 (rank 0 on {host}), 2 in network 1 (rank 1" in line
        else:
            assert f"rank 0 on {host}), 2 in network " in line
    assert not (run / "config.yaml").exists()
    assert not any("lease" in name for name in contents(run))


def test_options_of_a_process_may_differ() -> None:
    one = TrainConfig(run_dir="a", data=DataConfig(root="b", workers=2))
    other = TrainConfig(runtime=RuntimeConfig(threads=3, device="cuda:1"))
    assert options_text(one) == options_text(other) == options_text(TrainConfig())


def test_options_values_and_processes_are_named() -> None:
    configs = [TrainConfig(), TrainConfig(), TrainConfig(optim=OptimConfig(lr=0.5))]
    texts = [options_text(config) for config in configs]
    line = str(different_options(texts, ["a", "b", "c"]))
    assert "options: optim.lr is 0.1 in a and 1 more, 0.5 in c; start all with" in line
    many = [json.dumps(dict.fromkeys("vwxyz", k)) for k in (0, 1)]
    line = str(different_options(many, ["a", "b"]))
    assert "x is 0 in a, 1 in b; and 2 more options; start all with" in line
