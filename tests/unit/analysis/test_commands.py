from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from stored_runs import network

from dist_graft import cli

pytestmark = pytest.mark.usefixtures("empty_working_directory")
PREFIX = "dist-graft: error: "


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert cli.run(argv) != 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1, captured.err
    assert captured.err.startswith(PREFIX)
    return captured.err.removeprefix(PREFIX)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["evaluate"], "missing: RUN"),
        (["evaluate", "x", "--data.rot", "3"], "did you mean --data.root?"),
        (["evaluate", "nowhere"], "nowhere is not a run directory: it has no config.yaml"),
        (["evaluate", "x", "--batch_size", "0"], "batch_size must be at least 1, got 0"),
        (["evaluate", "x", "--batch_norm_batches", "-1"], "batch_norm_batches must be at least 1"),
        (["evaluate", "x", "--precision", "fp8"], "'fp32', 'bf16', 'fp16'"),
        (["evaluate", "x", "--batchsize", "3"], "dist-graft evaluate --help lists all options"),
        (["inspect"], "missing: SOURCES"),
        (["inspect", "nowhere"], "nowhere does not exist"),
        (["inspect", "x", "--thresholds", "0.1", "0"], "thresholds must be above 0, got 0.0"),
        (["inspect", "x", "--thresholds", ".inf"], "thresholds must be above 0, got inf"),
        (["inspect", "x", "--num_bins", "0"], "num_bins must be at least 1, got 0"),
        (["inspect", "x", "--graft.lead", "linear"], "'conv', 'conv+linear'"),
        (["export"], "missing: RUN"),
        (["export", "nowhere"], "nowhere is not a run directory"),
    ],
)
def test_invalid_options(capsys: pytest.CaptureFixture[str], argv: list[str], says: str) -> None:
    assert says in refused(capsys, *argv)


def test_output_folder_cannot_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(network(0).state_dict(), "weights.pt")
    Path("taken").write_text("")
    line = refused(
        capsys, *("inspect", "weights.pt", "--model.name", "resnet20", "--out", "taken/inspect")
    )
    assert "taken" in line
    assert "cannot be written" in line


def test_closed_pipe_is_ignored(tmp_path: Path) -> None:
    torch.save(network(0).state_dict(), tmp_path / "weights.pt")
    command = (
        f"{shlex.quote(sys.executable)} -m dist_graft inspect weights.pt --model.name resnet20"
    )
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} | true"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=tmp_path,
    )
    assert done.stderr == ""
    assert done.returncode == 0
    assert (tmp_path / "inspect/inspect.csv").exists()
