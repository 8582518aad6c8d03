"""Run a notebook of the documentation in an empty folder, and store its output in the file.

python tools/run_notebook.py docs/notebooks/quickstart.ipynb
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def run(path: Path, folder: Path, *, timeout: int = 600) -> nbformat.NotebookNode:
    """Run all cells in a new kernel of this Python, in a folder.

    Raises: nbclient.exceptions.CellExecutionError if a cell does.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        coalesce_streams=True,
    )
    client.execute()
    return notebook


def main() -> None:
    """Run the notebook that the command line names."""
    path = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        notebook = run(path, Path(folder))
    notebook.metadata.pop("language_info", None)  # has the version of this Python
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
    print(f"{path}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
