"""The notebook of the documentation runs in a new kernel, with the stored kinds of output."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
from documents import ROOT

PATH = ROOT / "docs/notebooks/quickstart.ipynb"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def outputs(notebook: Any) -> list[list[str]]:
    """Kinds of output of each cell with code, without standard error."""
    return [
        [
            "picture" if "image/png" in output.get("data", {}) else output.get("name", "value")
            for output in cell.outputs
            if output.get("name") != "stderr"
        ]
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def test_the_notebook(tmp_path: Path) -> None:
    pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    shorter = PATH.read_text().replace("train_samples=1500", "train_samples=500")
    assert shorter != PATH.read_text()
    (tmp_path / PATH.name).write_text(shorter)
    run = runpy.run_path(str(ROOT / "tools/run_notebook.py"))["run"]
    notebook = run(tmp_path / PATH.name, tmp_path)
    stored = nbformat.read(PATH, as_version=4)
    assert outputs(notebook) == outputs(stored)
    assert sum("picture" in kinds for kinds in outputs(stored)) == 2
    assert PATH.stat().st_size < 300_000
    assert str(Path.home()) not in PATH.read_text()
    by_rule = printed(notebook, "rules = ").splitlines()
    assert [line.split()[0] for line in by_rule] == ["before", "graft", "average"]
    at_chance = float(printed(notebook, "stranger = ").rstrip("%\n"))
    assert at_chance < 30, "the mean of two networks that never exchanged weights"


def printed(notebook: Any, source: str) -> str:
    """What the cell with this text in its source printed."""
    (cell,) = (cell for cell in notebook.cells if source in cell.source)
    text: str = cell.outputs[0].text
    return text
