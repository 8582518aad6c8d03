from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from stored_runs import network

from dist_graft import cli

PREFIX = "dist-graft: error: "
DOCUMENT = (Path(__file__).parents[3] / "docs/after_training.md").read_text()
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", DOCUMENT, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("dist-graft")
]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert cli.run(argv) != 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1, captured.err
    assert captured.err.startswith(PREFIX)
    return captured.err.removeprefix(PREFIX)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["evaluate"], "run"),
        (["evaluate", "nowhere"], "nowhere is no run directory: it has no config.yaml"),
        (["evaluate", "x", "--batch_size", "0"], "batch_size must be at least 1, got 0"),
        (["evaluate", "x", "--batch_norm_batches", "-1"], "batch_norm_batches must be at least 1"),
        (["evaluate", "x", "--precision", "fp8"], "'fp32', 'bf16', 'fp16'"),
        (["evaluate", "x", "--batchsize", "3"], "dist-graft evaluate --help lists all options"),
        (["inspect"], "sources"),
        (["inspect", "nowhere"], "nowhere does not exist"),
        (["inspect", "x", "--thresholds", "0.1", "0"], "thresholds must be above 0, got 0.0"),
        (["inspect", "x", "--thresholds", ".inf"], "thresholds must be above 0, got inf"),
        (["inspect", "x", "--num_bins", "0"], "num_bins must be at least 1, got 0"),
        (["inspect", "x", "--graft.lead", "linear"], "'conv', 'conv+linear'"),
        (["export"], "run"),
        (["export", "nowhere"], "nowhere is no run directory"),
    ],
)
def test_what_is_refused(capsys: pytest.CaptureFixture[str], argv: list[str], says: str) -> None:
    assert says in refused(capsys, *argv)


@pytest.mark.parametrize("command", ["evaluate", "inspect", "export"])
def test_one_process_only(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    environment = {"RANK": "0", "WORLD_SIZE": "2"}
    done = subprocess.run(
        [sys.executable, "-m", "dist_graft", command, "x"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={"PATH": "/usr/bin:/bin", **environment},
    )
    assert done.returncode == 1
    assert f"{command} runs in one process: start it without torchrun" in done.stderr


def test_help_and_mistakes_load_no_torch() -> None:
    program = (
        "import sys\n"
        "from dist_graft.cli import run\n"
        "assert run(['inspect', 'x', '--num_bins', '0']) == 2\n"
        "for command in ('evaluate', 'inspect', 'export'):\n"
        "    try:\n"
        "        run([command, '--help'])\n"
        "    except SystemExit:\n"
        "        pass\n"
        "assert not {'torch', 'matplotlib', 'numpy', 'tensorboard'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    for option in ("--data.root", "--batch_norm_batches", "--thresholds", "--model.name", "--out"):
        assert option in done.stdout


def test_a_file_in_the_way(capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(network(0).state_dict(), "weights.pt")
    Path("taken").write_text("")
    line = refused(
        capsys, *("inspect", "weights.pt", "--model.name", "resnet20", "--out", "taken/inspect")
    )
    assert "taken" in line
    assert "cannot be written" in line


def test_a_reader_that_has_seen_enough(tmp_path: Path) -> None:
    torch.save(network(0).state_dict(), tmp_path / "weights.pt")
    command = (
        f"{shlex.quote(sys.executable)} -m dist_graft inspect weights.pt --model.name resnet20"
    )
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} | true"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=tmp_path,
    )
    assert done.stderr == ""
    assert done.returncode == 0
    assert (tmp_path / "inspect/inspect.csv").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_the_documented_commands_parse(command: str) -> None:
    words = shlex.split(command.partition("#")[0])[1:]
    assert cli._parse(words)[0] == words[0]


def test_the_documented_commands_are_all() -> None:
    assert {command.split()[1] for command in COMMANDS} == {"evaluate", "inspect", "export"}
