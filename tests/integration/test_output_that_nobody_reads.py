"""Whoever watched a run has gone (a closed pipe): the run goes on, and ends as it would have."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from launching import environment, program


def unread(command: list[str], *streams: str) -> tuple[int, str]:
    """The status of a program whose streams have no reader, and what it says on standard error."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=environment(), text=True, **pipes) as process:
        try:
            for stream in streams:
                getattr(process, stream).close()
            said = "" if "stderr" in streams else process.communicate(timeout=120)[1]
            return process.wait(120), said
        finally:
            process.kill()


@pytest.mark.parametrize("streams", [("stdout",), ("stdout", "stderr")])
def test_a_run_is_finished(streams: tuple[str, ...], tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = program(run, "--epochs", "1", "--monitor.progress", "bar")
    status, said = unread(command, *streams)
    assert status == 0
    assert "Error" not in said
    assert (run / "summary.json").is_file()
    assert "results in" in (run / "network00/log.txt").read_text()


def test_an_error_keeps_its_status_and_its_line_in_the_log(tmp_path: Path) -> None:
    run = tmp_path / "run"
    status, _ = unread(program(run, "--runtime.precision", "fp16"), "stdout", "stderr")
    assert status == 2
    assert "ERROR runtime.precision fp16 needs a GPU" in (run / "network00/log.txt").read_text()
