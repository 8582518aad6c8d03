"""launch/quickstart.sh with fewer images."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from reading import summary

ROOT = Path(__file__).parents[2]


def test_quickstart(tmp_path: Path) -> None:
    small = ["--epochs", "1", "--data.train_samples", "128", "--data.test_samples", "50"]
    done = subprocess.run(
        [ROOT / "launch/quickstart.sh", *small],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env=os.environ | {"VENV": sys.prefix, "RUN_DIR": str(tmp_path / "run")},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(summary(tmp_path / "run")["networks"]) == 2
    assert f"tensorboard --logdir {tmp_path}/run" in done.stdout
    assert "OMP_NUM_THREADS" not in done.stderr, "torchrun's notice comes before all else"
