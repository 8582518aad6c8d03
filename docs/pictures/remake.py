"""Recreates the documentation's screenshots of TensorBoard from the browser test.

python docs/pictures/remake.py
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

HERE = Path(__file__).parent
NAMES = ("custom_scalars", "images")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "tests/browser"],
            cwd=HERE.parents[1],
            env=os.environ | {"DIST_GRAFT_ARTEFACTS": folder, "CI": "1"},
            check=True,
        )
        for name in NAMES:
            with Image.open(Path(folder) / f"{name}.png") as screenshot:
                path = HERE / f"tensorboard_{name}.png"
                screenshot.convert("RGB").save(path, optimize=True)
                print(f"{path}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
