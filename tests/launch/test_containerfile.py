"""The commands of launch/Containerfile, run in a folder instead of an image."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
from launching import run_program

from dist_graft.version import VERSION

ROOT = Path(__file__).parents[2]
SMALL = (
    *("--model.name", "resnet8", "--data.train_samples", "64", "--data.test_samples", "40"),
    *("--epochs", "1", "--runtime.device", "cpu", "--run_dir", "runs/one"),
)


def instructions() -> list[tuple[str, str]]:
    text = (ROOT / "launch/Containerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in lines]


@pytest.mark.slow
def test_the_image_is_built_and_has_the_program(tmp_path: Path) -> None:
    """The environment's packages are visible, so nothing is downloaded."""
    installed = {"PYTHONPATH": sysconfig.get_path("purelib"), "PIP_NO_INDEX": "1"}
    variables = os.environ | installed | {"PIP_NO_BUILD_ISOLATION": "0"}  # for pip that is "on"
    output = ""
    for name, rest in instructions():
        if name == "ARG":
            variables.setdefault(*rest.split("=", 1))
        elif name == "COPY":
            *sources, target = shlex.split(rest)
            for source in sources:
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, tmp_path / target)
                else:
                    shutil.copy(ROOT / source, tmp_path / target)
        elif name == "RUN":
            done = subprocess.run(
                ["/bin/sh", "-c", rest],
                cwd=tmp_path,
                env=variables,
                check=False,
                capture_output=True,
                text=True,
                timeout=200,
            )
            assert done.returncode == 0, done.stdout + done.stderr
            output += done.stdout
        elif name == "ENTRYPOINT":
            program = json.loads(rest)
        else:
            assert name in ("FROM", "WORKDIR", "ENV")
    assert f"dist_graft {VERSION}" in output.splitlines()
    done = run_program([*program, *SMALL], timeout=150, cwd=tmp_path, **installed, PROCESSES="1")
    assert done.status == 0, done
    assert (tmp_path / "runs/one/summary.json").is_file()
