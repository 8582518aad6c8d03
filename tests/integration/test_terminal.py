"""What a run shows on a terminal, and what in a batch log."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import termios
from pathlib import Path

from documents import ROOT
from launching import environment, finish, torchrun

SHORT = ("--epochs", "2", "--model.name", "resnet8")
WARNS = """
import warnings

from torch import nn


def network(num_classes, channels):
    warnings.warn("this network is odd", stacklevel=1)
    return nn.Sequential(
        nn.Conv2d(channels, 16, 5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)
    )
"""


def on_a_terminal(command: list[str]) -> str:
    """What a person at a terminal of 120 columns sees go by."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (40, 120))
    process = subprocess.Popen(
        command,
        env=environment(),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        close_fds=True,
    )
    os.close(theirs)
    seen = b""
    try:
        while part := _read(ours):
            seen += part
        assert process.wait(60) == 0, seen.decode()
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    return seen.decode()


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # Linux says so when the last process has left
        return b""


def test_one_bar_on_a_terminal(tmp_path: Path) -> None:
    seen = on_a_terminal(torchrun(2, tmp_path / "run", *SHORT))
    for epoch in (1, 2):
        assert seen.count(f"epoch {epoch}/2   0%") == 1, "a bar a machine, not a network"
        assert re.search(rf"epoch {epoch}/2 100% \|█+\| 2/2 steps, +\S+step/s, \d+ s left", seen)
    assert re.search(r"epoch 2/2 \(\d", seen), "the table of the epoch is there, too"


def test_plain_lines_and_one_warning_in_a_batch_log(tmp_path: Path) -> None:
    (tmp_path / "odd.py").write_text(WARNS)
    run = tmp_path / "run"
    command = torchrun(2, run, "--epochs", "1", "--model.name", "odd:network")
    done = finish(command, timeout=150, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert done.status == 0, done
    everything = done.output + done.errors
    assert "\r" not in everything
    assert "\x1b" not in everything
    assert everything.count("this network is odd") == 1
    for network in (0, 1):
        log = (run / f"network{network:02d}/log.txt").read_text()
        assert log.count("WARNING UserWarning: this network is odd") == 1


def test_the_first_lines_say_what_there_is_to_know(pair: Path) -> None:
    first, *lines = (pair.parent / "output.txt").read_text().splitlines()[:5]
    assert first.startswith("2 x resnet20 (")
    assert f"epochs 1 to 3, in {pair}" in first
    told = dict(re.match(r"(to stop|to look|\w+) +(.*)", line).groups() for line in lines)
    assert told["data"].startswith("fashion-mini: 64 images of 1 x 28 x 28, 10 classes")
    assert told["where"].startswith("2 of 2 networks on ")
    assert "cpu over gloo, fp32, 1 threads each" in told["where"]
    assert f"touch {pair}/STOP" in told["to stop"]
    assert told["to look"] == f"dist-graft status {pair}; tensorboard --logdir {pair}"
