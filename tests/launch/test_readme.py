"""What the README says to type works, and what is shipped to be typed is legal."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from documents import in_two_processes

from dist_graft.cli import _parse
from dist_graft.studies.plan import read_plan
from dist_graft.studies.selection import study_state

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.partition("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line.partition("#")[0].strip()
]
LIBRARY_EXAMPLE = next(
    block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "Grafter" in block
)


@pytest.mark.parametrize("script", [c for c in COMMANDS if c.startswith("launch/")])
def test_scripts_are_there(script: str) -> None:
    path = ROOT / script.split(maxsplit=1)[0]
    assert path.stat().st_mode & 0o100, f"{path} is not executable"


def test_the_readme_has_the_two_scripts() -> None:
    assert "launch/quickstart.sh" in COMMANDS
    assert "launch/test.sh" in COMMANDS


@pytest.mark.parametrize(
    "config", sorted((ROOT / "launch/configs").glob("*.yaml")), ids=lambda p: p.stem
)
def test_shipped_configurations_parse(config: Path) -> None:
    command, options = _parse(["train", "--config", str(config)])
    assert command == "train"
    assert options["epochs"] >= 1


def test_library_example(tmp_path: Path) -> None:
    """The README's own lines, in two processes that differ before and agree after the round."""
    rounds = in_two_processes(
        tmp_path,
        [
            "model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))",
            "epochs, train_one_epoch = 2, lambda model: model(torch.randn(4, 3, 8, 8))",
        ],
        LIBRARY_EXAMPLE.splitlines(),
        [
            "assert record.round == 1 and record.donor == 1 - dist.get_rank(), record",
            "assert 0.3 <= record.coefficient['0'] <= 0.7, record",
            "told = record.round",
        ],
    )
    assert rounds == [1, 1]


@pytest.mark.parametrize(
    "plan", sorted((ROOT / "launch/plans").glob("*.yaml")), ids=lambda p: p.stem
)
def test_shipped_plans_are_legal_and_ready_to_run(plan: Path) -> None:
    state = study_state(read_plan(plan))
    assert state.search_runs or state.lr_runs or state.comparison_runs
