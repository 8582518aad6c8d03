"""Console output of a run: on a terminal, in a batch log, and with closed pipes."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from documents import ROOT
from launching import environment, program, run_population, run_program, torchrun
from PIL import Image

SHORT = ("--epochs", "2", "--model.name", "resnet8")
MODEL_WITH_WARNING = """
import warnings

from torch import nn


def network(num_classes, channels):
    warnings.warn("this network is odd", stacklevel=1)
    return nn.Sequential(
        nn.Conv2d(channels, 16, 5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)
    )
"""


def run_on_terminal(command: list[str]) -> str:
    """Run a program on a terminal with 120 columns; returns its output."""
    controller, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (40, 120))
    process = subprocess.Popen(
        command,
        env=environment(),
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        close_fds=True,
    )
    os.close(terminal)
    output = b""
    try:
        while part := _read(controller):
            output += part
        assert process.wait(60) == 0, output.decode()
    finally:
        process.kill()
        process.wait()
        os.close(controller)
    return output.decode()


def _read(controller: int) -> bytes:
    try:
        return os.read(controller, 65536)
    except OSError:  # raised by Linux after the last process has exited
        return b""


def test_progress_bar_on_a_terminal(tmp_path: Path) -> None:
    output = run_on_terminal(torchrun(2, tmp_path / "run", *SHORT))
    for epoch in (1, 2):
        assert output.count(f"epoch {epoch}/2   0%") == 1, "one bar per machine, not per network"
        assert re.search(rf"epoch {epoch}/2 100% \|█+\| 2/2 steps, +\S+step/s, \d+ s left", output)
    assert re.search(r"epoch 2/2 \(\d", output), "the table of the epoch is missing"


def test_batch_log_has_plain_lines_and_each_warning_once(tmp_path: Path) -> None:
    (tmp_path / "odd.py").write_text(MODEL_WITH_WARNING)
    run = tmp_path / "run"
    options = ("--epochs", "1", "--model.name", "odd:network")
    ends = run_population(2, run, *options, PYTHONPATH=f"{tmp_path}:{ROOT}")
    output = "".join(done.output + done.errors for done in ends)
    assert "\r" not in output
    assert "\x1b" not in output
    assert output.count("this network is odd") == 1
    for network in (0, 1):
        log = (run / f"network{network:02d}/log.txt").read_text()
        assert log.count("WARNING UserWarning: this network is odd") == 1


def test_more_loader_workers_than_cores_are_one_warning(tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / split / "cat").mkdir(parents=True)
        Image.new("RGB", (20, 20)).save(tmp_path / split / "cat" / "0.jpg")
    data = ("--data.name", "imagefolder", "--data.root", str(tmp_path), "--data.image_size", "16")
    options = ("--epochs", "1", *SHORT[2:], *data, "--data.workers", "1")
    ends = run_population(2, tmp_path / "run", *options, SLURM_CPUS_ON_NODE="1")
    warning = "on this machine: 2 (data.workers 1 in each of 2 processes), cores: 1; lower"
    assert "".join(done.output + done.errors for done in ends).count(warning) == 1


def test_first_lines_describe_the_run(pair: Path) -> None:
    first, *lines = (pair.parent / "output.txt").read_text().splitlines()[:5]
    assert first.startswith("2 x resnet20 (")
    assert f"epochs 1 to 3, in {pair}" in first
    fields = dict(re.match(r"(to stop|to look|\w+) +(.*)", line).groups() for line in lines)
    assert fields["data"].startswith("fashion-mini: 64 images of 1 x 28 x 28, 10 classes")
    assert fields["where"].startswith("2 of 2 networks on ")
    assert "cpu over gloo, fp32, 1 thread each" in fields["where"]
    assert f"touch {pair}/STOP" in fields["to stop"]
    assert fields["to look"] == f"dist-graft status {pair}; tensorboard --logdir {pair}"


def run_with_closed_pipes(command: list[str], *streams: str) -> tuple[int, str]:
    """Run a program with closed output streams; returns exit status and standard error."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=environment(), text=True, **pipes) as process:
        try:
            for stream in streams:
                getattr(process, stream).close()
            errors = "" if "stderr" in streams else process.communicate(timeout=120)[1]
            return process.wait(120), errors
        finally:
            process.kill()


@pytest.mark.parametrize("streams", [("stdout",), ("stdout", "stderr")])
def test_run_completes_with_closed_pipes(streams: tuple[str, ...], tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = program(run, "--epochs", "1", "--monitor.progress", "bar")
    status, errors = run_with_closed_pipes(command, *streams)
    assert status == 0
    assert "Error" not in errors
    assert (run / "summary.json").is_file()
    assert "results in" in (run / "network00/log.txt").read_text()


def test_a_watch_ends_when_nobody_reads_it(pair: Path, tmp_path: Path) -> None:
    run = shutil.copytree(pair, tmp_path / "run")
    path = run / "network00/status.json"
    running = {"phase": "training", "time": time.time() + 3600}
    path.write_text(json.dumps(json.loads(path.read_text()) | running))
    watch = [sys.executable, "-m", "dist_graft", "status", str(run), "--watch", "--every", "0.1"]
    assert run_with_closed_pipes(watch, "stdout") == (0, "")


def test_tensorboard_is_not_recommended_if_it_is_off(tmp_path: Path) -> None:
    options = ("--epochs", "1", "--monitor.loggers", "[]")
    done = run_program(program(tmp_path / "run", *options), timeout=100)
    assert done.status == 0, done
    assert "results in " in done.output
    assert "logdir" not in done.output


def test_errors_with_closed_pipes_keep_status_and_log_line(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = program(run, "--model.kwargs", "{widht: 8}")
    status, _ = run_with_closed_pipes(command, "stdout", "stderr")
    assert status == 2
    assert "ERROR model.kwargs {'widht': 8} do not fit" in (run / "network00/log.txt").read_text()
