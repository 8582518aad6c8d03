"""Lines of processes that share a pipe."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from launching import SMALL


@pytest.mark.parametrize("stream", ["stderr", "stdout"])
def test_a_line_and_its_end_are_one_write(stream: str) -> None:
    """In packet mode, a pipe keeps writes apart: each read returns one of them."""
    reader, writer = os.pipe2(os.O_DIRECT)
    program = (
        "import sys; from dist_graft.printing import print_line; "
        f"print_line('first', sys.{stream}); print_line('second', sys.{stream})"
    )
    subprocess.run([sys.executable, "-c", program], check=True, **{stream: writer})
    os.close(writer)
    assert [os.read(reader, 4096) for _ in range(3)] == [b"first\n", b"second\n", b""]
    os.close(reader)


@pytest.mark.parametrize(("closed", "says"), [("2>&-", "out"), (">&-", "err"), (">&- 2>&-", "")])
def test_commands_started_without_a_stream(closed: str, says: str, tmp_path: Path) -> None:
    """The error is on standard output if standard error is closed."""
    done = subprocess.run(
        ["sh", "-c", f'"$0" -m dist_graft status "$1" {closed}', sys.executable, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    for name, output in (("out", done.stdout), ("err", done.stderr)):
        assert ("is not a run directory" in output) == (says == name)


@pytest.mark.parametrize(("closed", "networks"), [("2>&-", 1), (">&-", 2)])
def test_training_without_a_stream(closed: str, networks: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dist_graft", "train", "--run_dir", str(tmp_path / "run")]
    command += ["--networks", str(networks)]
    options = [*SMALL, "--epochs", "1", "--model.name", "resnet8", "--monitor.tensorboard", "false"]
    shell = ["sh", "-c", f'exec "$@" {closed}', "sh", *command, *options]
    done = subprocess.run(shell, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done
    assert ("epoch 1/1" in done.stdout) == (closed == "2>&-")
    assert (tmp_path / "run" / "summary.json").exists()
