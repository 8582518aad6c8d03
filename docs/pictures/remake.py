"""Update the pictures of TensorBoard from the screenshots of the browser tests.

python docs/pictures/remake.py
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

FOLDER = Path(__file__).parent
HEIGHTS = {"custom_scalars": 750, "images": 1417}
"""Visible part of each screenshot, in pixels from the top."""


def main() -> None:
    with tempfile.TemporaryDirectory() as screenshots:
        subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "tests/browser"],
            cwd=FOLDER.parents[1],
            env=os.environ | {"DIST_GRAFT_ARTEFACTS": screenshots, "CI": "1"},
            check=True,
        )
        for name, height in HEIGHTS.items():
            with Image.open(Path(screenshots) / f"{name}.png") as screenshot:
                path = FOLDER / f"tensorboard_{name}.png"
                visible = screenshot.crop((0, 0, screenshot.width, height))
                visible.convert("RGB").save(path, optimize=True)
                print(f"{path}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
