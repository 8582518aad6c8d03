"""launch/gpu_check.sh without a GPU, and its parts on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from documents import ROOT
from launching import environment

PARTS = {"train resnet8 false", "round 2", "papa", "launches 2", "share 2"}
REPORT = """<testsuites><testsuite>
<testcase classname="a" name="passes" />
<testcase classname="a" name="fails">
<failure message="assert 1 == 2&#10;more">trace</failure></testcase>
<testcase classname="b" name="breaks"><error message="no fixture">trace</error></testcase>
<testcase classname="b" name="is left out"><skipped message="why" /></testcase>
</testsuite></testsuites>"""


def run(*command: str | Path, timeout: float = 150) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command],
        cwd=ROOT,
        env=environment() | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def test_one_line_without_a_gpu(tmp_path: Path) -> None:
    done = run("launch/gpu_check.sh", tmp_path / "out")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("gpu_check: error: torch sees no GPU")
    assert not (tmp_path / "out").exists()


def test_the_benchmark_needs_a_gpu_unless_told_otherwise() -> None:
    done = run(sys.executable, "benchmarks/gpu.py")
    assert (done.returncode, done.stdout.count("\n")) == (2, 1)
    assert "torch sees no GPU" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_benchmark_on_the_cpu(tmp_path: Path) -> None:
    """All its parts give figures; their size means nothing here."""
    file = tmp_path / "figures.json"
    done = run(
        *(sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--tiny", "--json", file),
        timeout=850,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    parts = json.loads(file.read_text())["parts"]
    assert set(parts) == PARTS
    train, share = parts["train resnet8 false"], parts["share 2"]
    for figures in (
        *(train["trainer_images_per_second"], train["bare_images_per_second"]),
        *(parts["papa"]["papa"], parts["papa"]["none"], share["images_per_second"]),
    ):
        assert figures
        assert min(figures) > 0
    rules = {"graft, all_gather", "graft, p2p", "average", "papa", "wash"}
    assert set(parts["launches 2"]["profiled"]) == {f"resnet8, {rule}" for rule in rules}
    for rule in rules:
        times = parts["round 2"][rule]
        assert {what: len(each) for what, each in times.items()} == {
            "round": 2,
            "collective": 2,
            "copy": 2,
        }
        assert min(times["round"]) > 0


def test_a_part_that_fails_does_not_end_the_others(tmp_path: Path) -> None:
    """No part has enough time."""
    file = tmp_path / "figures.json"
    done = run(
        *(sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--tiny", "--json", file),
        *("--seconds", "1"),
    )
    assert done.returncode == 1
    parts = json.loads(file.read_text())["parts"]
    assert set(parts) == PARTS
    assert all(part["error"].startswith("not run:") for part in parts.values())


def test_the_summary_has_the_failures(tmp_path: Path) -> None:
    (tmp_path / "tests.xml").write_text(REPORT)
    (tmp_path / "tests.log").write_text("!!! KeyboardInterrupt !!!\n")
    figures = {"machine": "any", "parts": {"papa": {"papa": [2.0]}}}
    (tmp_path / "benchmarks.json").write_text(json.dumps(figures))
    (tmp_path / "benchmarks.log").write_text("papa: 2 images/s\n")
    done = run(sys.executable, "tools/gpu_summary.py", tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert result["tests"] == {
        "outcomes": {"passed": 1, "failure": 1, "error": 1, "skipped": 1},
        "failures": {"a::fails": "assert 1 == 2\nmore", "b::breaks": "no fixture"},
    }
    assert result["benchmarks"] == figures
    assert (tmp_path / "summary.txt").read_text() == done.stdout
    for text in (
        "1 passed, 1 skipped, then out of time",
        "a::fails: assert 1 == 2 more",
        "papa: 2 images/s",
    ):
        assert text in done.stdout


def test_a_missing_package_is_reported(tmp_path: Path) -> None:
    """With a torch that sees a GPU, but without jsonargparse."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$2" in *device_count*) echo 1;; *) exit 1;; esac\n')
    python.chmod(0o755)
    done = subprocess.run(
        ["launch/gpu_check.sh", tmp_path / "out"],
        cwd=ROOT,
        env=os.environ | {"PYTHON": str(python)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "gpu_check: error: a Python package is missing: see docs/gpu.md for how to install it"
    ]
