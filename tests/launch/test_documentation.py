"""What the documentation says to type works, what it shows runs, what it links to is there."""

from __future__ import annotations

import contextlib
import json
import os
import re
import runpy
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml
from documents import (
    DOCUMENTS,
    ROOT,
    Block,
    arguments,
    blocks,
    commands,
    headings,
    in_two_processes,
    links,
    text_of,
)
from launching import environment
from reading import metrics

from dist_graft.cli import _parse, command_parsers

SOMEWHERE = {
    "dist-graft COMMAND --help": "stands for all commands",
    "dist-graft --version": "run by tests/unit/analysis/test_doctor.py",
    ".venv/bin/python -m pytest tests/unit -k entropy": "of pytest, on a folder of this one",
    "python3 -m venv .venv": "of Python",
    ".venv/bin/pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu": (
        "of pip; needs a network"
    ),
    "pip install -e .": "of pip; launch/test.sh does it",
    "tensorboard --logdir runs/first": "of TensorBoard",
    "cp launch/slurm.sbatch my_job.sbatch": "of the shell; tests/launch/test_slurm.py submits it",
    "sbatch my_job.sbatch": "the copy",
    "touch runs/first/STOP": "tests/integration/test_status_of_a_run.py does it",
}
"""Commands that no test here parses or finds a file for, and why."""
PROGRAMS = ("python", "torchrun", "bash", "sbatch", "srun", "source")
"""Run a file of the repository that is named after their options."""
COMMANDS = [(document, command) for document in DOCUMENTS for command in commands(document)]
PYTHON = [block for document in DOCUMENTS for block in blocks(document, "python")]


def its_name(command: tuple[Path, str]) -> str:
    return f"{command[0]}: {command[1]}"


@pytest.mark.parametrize("found", COMMANDS, ids=its_name)
def test_every_command_is_known(found: tuple[Path, str]) -> None:
    """Ours are parsed by our parser; of others the file is there, or they are listed above."""
    _, command = found
    if command in SOMEWHERE:
        return
    words = arguments(command)
    if words is not None and len(words) == 1 and not words[0].startswith("-"):
        assert words[0] in command_parsers()  # a text that names the command
        return
    if words is not None:
        with contextlib.suppress(SystemExit):  # of --help and --print_config
            assert _parse(words)[0] == words[0]
        return
    program, *rest = command.split()
    named = [program, *rest] if "/" in program else rest if program in PROGRAMS else []
    files = [ROOT / word for word in named if re.search(r"\.(sh|py|sbatch)$", word)]
    assert files, f"{command!r} is neither ours nor in the list of exceptions"
    assert files[0].is_file(), f"{command!r}: there is no {files[0]}"
    if files[0] == ROOT / program:
        assert os.access(files[0], os.X_OK), f"{files[0]} is not executable"


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_code_is_in_fenced_blocks(document: Path) -> None:
    """Indented code would escape the tests here."""
    prose = re.sub(r"^```.*?^```", "", text_of(document), flags=re.DOTALL | re.MULTILINE)
    assert not re.findall(r"\n\n {4}\S.*", prose)


def test_no_exception_is_left_over() -> None:
    assert set(SOMEWHERE) <= {command for _, command in COMMANDS}


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_every_link_leads_somewhere(document: Path) -> None:
    for link in links(document):
        path, _, anchor = link.partition("#")
        target = (ROOT / document).parent.joinpath(path).resolve() if path else ROOT / document
        assert target.exists(), f"{document}: there is no {link}"
        if anchor:
            assert anchor in headings(target.relative_to(ROOT)), f"{document}: {link}"


def test_every_page_is_in_the_index() -> None:
    pages = {path for path in DOCUMENTS if path.parent == Path("docs")} - {Path("docs/README.md")}
    linked = {Path("docs") / link.partition("#")[0] for link in links(Path("docs/README.md"))}
    assert pages <= linked


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: str(block.document))
def test_every_python_block_is_python(block: Block) -> None:
    compile(block.text, str(block.document), "exec")


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_every_yaml_block_is_yaml(document: Path) -> None:
    for block in blocks(document, "yaml"):
        assert yaml.safe_load(block.text)


@pytest.mark.parametrize(
    ("tool", "made", "name"),
    [
        ("make_options_page", "docs/options.md", "page"),
        ("make_architecture_picture", "docs/pictures/architecture.svg", "picture"),
    ],
)
def test_what_is_generated_is_fresh(tool: str, made: str, name: str) -> None:
    fresh = runpy.run_path(str(ROOT / "tools" / f"{tool}.py"))[name]()
    assert (ROOT / made).read_text() == fresh, f"run: python tools/{tool}.py"


EXTENDING = Path("docs/extending.md")
SMALL = ("--data.train_samples", "96", "--data.test_samples", "64", "--runtime.threads", "1")
SMALLER = {"stripes": ("--runtime.threads", "1"), "tiny": SMALL}
PARTS = [block for block in blocks(EXTENDING, "python") if block.text.startswith("# ")]


def file_of(block: Block) -> str:
    return block.text.splitlines()[0].removeprefix("# ")


@pytest.mark.parametrize("block", PARTS, ids=file_of)
def test_a_part_of_one_s_own(block: Block, tmp_path: Path) -> None:
    """The page's block, in a file of that name, is used by the command that follows it."""
    assert len(block.text.splitlines()) < 30
    (tmp_path / file_of(block)).write_text(block.text)
    name = Path(file_of(block)).stem
    following = (shown for shown in commands(EXTENDING) if f" {name}:" in shown)
    words = next(following).split()
    program = {"torchrun": ["-m", "torch.distributed.run"], "dist-graft": ["-m", "dist_graft"]}
    small = SMALLER.get(name, ("--model.name", "resnet8", *SMALL))
    done = subprocess.run(
        [sys.executable, *program[words[0]], *words[1:], *small, "--runtime.device", "cpu"],
        cwd=tmp_path,
        env=environment(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    CHECKS[name](tmp_path / "runs" / name)


def learns_stripes(run: Path) -> None:
    assert metrics(run, 0)[-1]["test_accuracy"] > 80


def has_two_units(run: Path) -> None:
    assert "network" in (run / "config.yaml").read_text()
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["name"] == "tiny:network"
    assert (run / "summary.json").exists()


def measures_deviations(run: Path) -> None:
    for network in (0, 1):
        information = metrics(run, network)[0]["graft"]["information"]
        assert all(0 < value < 1 for value in information.values()), information


def takes_from_two_back(run: Path) -> None:
    donors = [metrics(run, network)[0]["graft"]["donor"] for network in range(3)]
    assert donors == [1, 2, 0]


def one_follows_the_other(run: Path) -> None:
    kept = [set(metrics(run, k)[0]["graft"]["coefficient"].values()) for k in (0, 1)]
    assert sorted(kept, key=min) == [{0.5}, {1.0}]


CHECKS = {
    "stripes": learns_stripes,
    "tiny": has_two_units,
    "spread": measures_deviations,
    "two_back": takes_from_two_back,
    "best": one_follows_the_other,
}


def test_a_rule_of_one_s_own_in_a_loop(tmp_path: Path) -> None:
    rule = next(block for block in PARTS if file_of(block) == "best.py")
    (tmp_path / "best.py").write_text(rule.text)
    loop = next(block for block in blocks(EXTENDING, "python") if "Grafter(model" in block.text)
    moved = in_two_processes(
        tmp_path,
        ["model = torch.nn.Conv2d(3, 8, 3)", "before = model.weight.detach().clone()"],
        loop.text.splitlines(),
        [
            "record = grafter.graft()",
            "told = not torch.equal(before, model.weight)",
            "assert told == (record.coefficient['weight'] == 0.5), record",
        ],
    )
    assert sorted(moved) == [False, True]


LIBRARY = Path("docs/library.md")
EXAMPLES = sorted((ROOT / "docs/examples").glob("*.py"))


def test_what_the_library_page_shows_of_the_examples_is_in_them() -> None:
    shown = [b.text for b in blocks(LIBRARY, "python") if b.text.startswith("# docs/examples/")]
    assert len(shown) == len(EXAMPLES)
    for text in shown:
        first, _, rest = text.partition("\n")
        whole = (ROOT / first.removeprefix("# ")).read_text()
        assert rest in whole or textwrap.indent(rest, "    ") in whole, first


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_between_two_processes(example: Path, tmp_path: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [sys.executable, *launcher, str(example)],
        cwd=tmp_path,
        env=environment(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = re.findall(r"network (\d) kept (0\.\d+) of (?:itself|its first layer)", done.stdout)
    assert {network for network, _ in told} == {"0", "1"}
    last = dict(told)
    assert float(last["0"]) + float(last["1"]) == pytest.approx(1, abs=0.011)


def test_the_other_blocks_of_the_library_page(tmp_path: Path) -> None:
    """One after the other, in two processes."""
    others = [
        line
        for block in blocks(LIBRARY, "python")
        if not block.text.startswith("# docs/examples/")
        for line in block.text.splitlines()
    ]
    rounds = in_two_processes(
        tmp_path,
        [
            "import dist_graft",
            "rank = dist.get_rank()",
            "def build():",
            "    return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 8, 3))",
            "model, models = build(), [build(), build()]",
            "device, networks, replicas = 'cpu', 2, 1",
        ],
        others,
        [
            "record = grafter.graft()",
            "assert len(after) == 2 and set(after[0]) == set(states[0])",
            "told = record.round",
            "del grafter, mesh",
        ],
    )
    assert rounds == [0, 0]


def test_the_keys_that_the_run_directory_page_names() -> None:
    """Of status.json, as the code writes them."""
    from dist_graft.monitoring.status_file import Status

    page = text_of(Path("docs/run_directory.md"))
    section = page.partition("## status.json")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert named == set(json.loads(json.dumps(vars(Status(network=0)))))
