"""Installs Debian packages that a test needs, or skips the test."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from typing import NoReturn

import pytest


def need(programs: Sequence[str], packages: Sequence[str]) -> None:
    """Install the packages if one of their programs is missing and apt-get is available."""
    if all(map(shutil.which, programs)):
        return
    if os.geteuid() or not shutil.which("apt-get"):
        cannot(f"{' '.join(packages)} must be installed as root with apt-get")
    for words in (["update"], ["install", "--yes", "--no-install-recommends", *packages]):
        done = subprocess.run(
            ["apt-get", "--quiet", "-o", "DPkg::Lock::Timeout=200", *words],
            env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
    if done.returncode:
        cannot(f"apt-get could not install {' '.join(packages)}: {done.stderr.strip()[-300:]}")


def cannot(why: str) -> NoReturn:
    """Fail in CI, where everything must be installed; skip elsewhere."""
    if os.environ.get("CI"):
        pytest.fail(why)
    pytest.skip(why)
