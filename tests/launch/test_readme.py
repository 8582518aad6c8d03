"""What the README says to type works, and what it links to is there."""

from __future__ import annotations

import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dist_graft.analysis.compare.plan import read_plan
from dist_graft.analysis.compare.state import state_of
from dist_graft.cli import _parse

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


def arguments(command: str) -> list[str] | None:
    """What reaches our command line; None for a command that is not ours."""
    words = shlex.split(command)
    for ours in ("dist_graft", "dist-graft"):
        if ours in words:
            return words[words.index(ours) + 1 :]
    return None


@pytest.mark.parametrize("command", [c for c in COMMANDS if arguments(c)])
def test_commands_parse(command: str) -> None:
    words = arguments(command)
    assert words is not None
    assert _parse(words)[0] == words[0]


@pytest.mark.parametrize("script", [c for c in COMMANDS if c.startswith("launch/")])
def test_scripts_are_there(script: str) -> None:
    path = ROOT / script.split(maxsplit=1)[0]
    assert path.stat().st_mode & 0o100, f"{path} is not executable"


def test_the_readme_has_commands_of_both_kinds() -> None:
    assert any(arguments(command) for command in COMMANDS)
    assert "launch/quickstart.sh" in COMMANDS
    assert "launch/test.sh" in COMMANDS


@pytest.mark.parametrize(
    "document",
    sorted(
        p.relative_to(ROOT)
        for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("launch/**/*.md")]
    ),
    ids=str,
)
def test_links_inside_the_repository(document: Path) -> None:
    text = (ROOT / document).read_text()
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" not in target and not target.startswith("mailto:"):
            assert (ROOT / document).parent.joinpath(target).exists(), f"{document}: {target}"


@pytest.mark.parametrize(
    "config", sorted((ROOT / "launch/configs").glob("*.yaml")), ids=lambda p: p.stem
)
def test_shipped_configurations_parse(config: Path) -> None:
    command, options = _parse(["train", "--config", str(config)])
    assert command == "train"
    assert options["epochs"] >= 1


def in_two_processes(
    folder: Path, before: list[str], lines: list[str], after: list[str], *, prints: dict[str, int]
) -> None:
    """Run documentation's lines between ours; expects so many prints of each text."""
    program = folder / "example.py"
    program.write_text(
        "\n".join(
            [
                "import os, torch, torch.distributed as dist",
                "dist.init_process_group('gloo')",
                "torch.manual_seed(dist.get_rank())",
                *before,
                *lines,
                *after,
                "dist.destroy_process_group()",
            ]
        )
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"),
            *(f"--master-port={port}", "--master-addr=127.0.0.1", str(program)),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    for text, times in prints.items():
        assert done.stdout.count(text) == times


def test_library_example(tmp_path: Path) -> None:
    """The README's own lines, in two processes that differ before and agree after the round."""
    in_two_processes(
        tmp_path,
        [
            "model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))",
            "epochs, train_one_epoch = 2, lambda model: model(torch.randn(4, 3, 8, 8))",
        ],
        LIBRARY_EXAMPLE.splitlines(),
        [
            "assert record.round == 1 and record.donor == 1 - dist.get_rank(), record",
            "assert 0.3 <= record.coefficient['0'] <= 0.7, record",
            "os.write(1, f'round {record.round}\\n'.encode())",
        ],
        prints={"round 1": 2},
    )


def test_the_rule_of_the_documentation(tmp_path: Path) -> None:
    """The page's own lines, in two processes: the one with less entropy follows the other."""
    text = (ROOT / "docs/adding_a_rule.md").read_text()
    example = next(iter(re.findall(r"```python\n(.*?)```", text, re.DOTALL)))
    assert len(example.splitlines()) < 30
    in_two_processes(
        tmp_path,
        ["model = torch.nn.Conv2d(3, 8, 3)", "before = model.weight.detach().clone()"],
        example.splitlines(),
        [
            "record = grafter.graft()",
            "moved = not torch.equal(before, model.weight)",
            "assert moved == (record.coefficient['weight'] == 0.5), record",
            "os.write(1, f'moved {moved}\\n'.encode())",
        ],
        prints={"moved True": 1, "moved False": 1},
    )


@pytest.mark.parametrize(
    "plan", sorted((ROOT / "launch/plans").glob("*.yaml")), ids=lambda p: p.stem
)
def test_shipped_plans_are_legal_and_ready_to_run(plan: Path) -> None:
    state = state_of(read_plan(plan), {})
    assert state.search_runs or state.lr_runs or state.comparison_runs
