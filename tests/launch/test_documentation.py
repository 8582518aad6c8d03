"""Commands in the documentation parse, its code runs, and its links resolve.

The links between the pages of the site are checked by Sphinx.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
import yaml
from documents import (
    DOCUMENTS,
    ROOT,
    arguments,
    blocks,
    commands,
    in_two_processes,
    links,
    prose_of,
    text_of,
)
from launching import (
    checkpoint_is_complete,
    environment,
    run_programs,
    running,
    wait_for_end,
    wait_until,
)
from PIL import Image
from reading import assert_same_bits, checkpoint, metrics, scalars, summary
from torchvision.models import get_model, get_model_weights

import dist_graft
from dist_graft.cli import _parse, command_parsers
from dist_graft.studies.plan import read_plan
from dist_graft.studies.selection import study_state

NOT_PARSED = {
    "dist-graft COMMAND --help": "placeholder",
    "dist-graft --version": "tests/unit/analysis/test_doctor.py",
    ".venv/bin/python -m pytest tests/unit -k entropy": "pytest",
    "pip download --no-deps --only-binary=:all: --python-version 3.12 -d wheels jsonargparse "
    "docstring-parser typeshed-client": "pip, needs a network",
    "pip install --no-index --no-deps --target site wheels/*.whl": "pip, needs the wheels",
    'pip install ".[lightning]"': "pip, needs a network",
    'pip install ".[transformers]"': "pip, needs a network",
    "pip install .": "tests/launch/test_packaging.py",
    "pip install 'dist_graft[loggers]'": "pip, needs a network",
    "pip install 'dist_graft[studies]'": "pip, needs a network",
    "pip install '.[completion]'": "pip, needs a network",
    "sphinx-build -W --keep-going -b html docs docs/_build/html": "run by launch/test.sh",
    "tensorboard --logdir runs/first": "TensorBoard",
    "tensorboard --logdir runs/segmentation": "TensorBoard",
    "touch runs/segmentation/STOP": "test_the_segmentation_page",
    "touch runs/first/STOP": "tests/integration/test_status_of_a_run.py",
}
"""Commands that this module does not check, and why."""
INTERPRETERS = ("python", "torchrun", "bash", "sbatch", "srun", "source", "kubectl")
"""Programs whose arguments name a file of the repository."""
COMMANDS = [(document, command) for document in DOCUMENTS for command in commands(document)]
PYTHON = [block for document in DOCUMENTS for block in blocks(document, "python")]


@pytest.mark.parametrize(
    ("document", "command"), COMMANDS, ids=[f"{found[0]}: {found[1]}" for found in COMMANDS]
)
def test_commands_parse(document: Path, command: str) -> None:
    """Commands of dist_graft parse; others name a file of the repository."""
    if command in NOT_PARSED:
        return
    words = arguments(command)
    if words is not None and len(words) == 1 and not words[0].startswith("-"):
        assert words[0] in command_parsers()  # prose that names a command
        return
    if words is not None:
        with contextlib.suppress(SystemExit):  # of --help and --print_config
            assert _parse(words)[0] == words[0]
        return
    program, *rest = command.split()
    named = [program, *rest] if "/" in program else rest if program in INTERPRETERS else []
    files = [ROOT / word for word in named if re.search(r"\.(sh|py|sbatch|yaml)$", word)]
    assert files, f"{command!r} is neither a command of dist_graft nor listed in NOT_PARSED"
    assert files[0].is_file(), f"{command!r}: there is no {files[0]}"
    if files[0] == ROOT / program:
        assert os.access(files[0], os.X_OK), f"{files[0]} is not executable"


def test_every_exception_is_used() -> None:
    assert set(NOT_PARSED) <= {command for _, command in COMMANDS}


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_links_and_paths_resolve(document: Path) -> None:
    """Links in documents outside the site, and files named in inline code."""
    for link in links(document) if document.parts[0] != "docs" else ():
        assert (ROOT / document).parent.joinpath(link).exists(), f"{document}: there is no {link}"
    code = re.findall(r"`([^`]+)`", prose_of(document))
    folders = "benchmarks|dist_graft|docs|launch|tests|tools"
    for path in re.findall(rf"(?<![\w/])(?:{folders})/[\w/]+\.\w+", " ".join(code)):
        assert (ROOT / path).exists(), f"{document}: there is no {path}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_code_blocks_are_valid(document: Path) -> None:
    for block in blocks(document, "python"):
        compile(block.text, str(document), "exec")
    for block in blocks(document, "yaml"):
        assert yaml.safe_load(block.text)
    assert not re.findall(r"\n\n {4}\S.*", prose_of(document)), "indented code escapes these tests"


def test_readme_is_short_and_names_both_scripts() -> None:
    readme = Path("README.md")
    assert len(text_of(readme).splitlines()) <= 130
    assert {"launch/quickstart.sh", "launch/test.sh"} <= set(commands(readme))


def test_the_citation_names_this_version() -> None:
    assert yaml.safe_load(text_of(Path("CITATION.cff")))["version"] == dist_graft.__version__


def test_option_pages_are_up_to_date() -> None:
    pages = runpy.run_path(str(ROOT / "tools/make_options_page.py"))["pages"]()
    for path, text in pages.items():
        assert path.read_text() == text, "run: python tools/make_options_page.py"


def test_the_api_reference_has_every_public_name() -> None:
    pages = "".join(text_of(path) for path in DOCUMENTS if path.parent == Path("docs/api"))
    documented = set(re.findall(r"^\.\. auto\w+:: dist_graft\.(\w+)$", pages, re.MULTILINE))
    assert documented == set(dist_graft.__all__) - {"__version__"}


def test_the_run_directory_page_has_the_keys_of_status_json() -> None:
    from dist_graft.monitoring.status_file import Status

    page = text_of(Path("docs/run_directory.md"))
    section = page.partition("## status.json")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    documented = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert documented == set(json.loads(json.dumps(vars(Status(network=0)))))


@pytest.mark.parametrize(
    "config", sorted((ROOT / "launch/configs").glob("*.yaml")), ids=lambda path: path.stem
)
def test_shipped_configurations_parse(config: Path) -> None:
    assert _parse(["train", "--config", str(config)])[1]["epochs"] >= 1


@pytest.mark.parametrize(
    "plan", sorted((ROOT / "launch/plans").glob("*.yaml")), ids=lambda path: path.stem
)
def test_shipped_plans_can_be_run(plan: Path) -> None:
    assert study_state(read_plan(plan)).all_runs


# Files that the documentation tells its readers to write, used by the command that follows them.

FILES = {block.first_line[2:]: block for block in PYTHON if block.first_line.endswith(".py")}
SMALL = ("--data.train_samples", "96", "--data.test_samples", "64", "--runtime.threads", "1")


def check_stripes(run: Path) -> None:
    assert metrics(run, 0)[-1]["test_accuracy"] > 80


def check_tiny(run: Path) -> None:
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["name"] == "tiny:network"
    assert (run / "summary.json").exists()


def check_recipe(run: Path) -> None:
    rates = [line["lr"] for line in metrics(run, 0)]
    assert rates == pytest.approx([0, 0.001 * (2 / 3) / 0.7, 0.001 * (1 / 3) / 0.7])


def check_noise(run: Path) -> None:
    data = yaml.safe_load((run / "config.yaml").read_text())["data"]
    assert (data["transform"], data["transform_kwargs"]) == ("noise:add", {"std": 0.05})
    assert (run / "summary.json").exists()


def check_spread(run: Path) -> None:
    for network in (0, 1):
        information = metrics(run, network)[0]["graft"]["information"]
        assert all(0 < value < 1 for value in information.values()), information


def check_two_back(run: Path) -> None:
    assert [metrics(run, network)[0]["graft"]["donor"] for network in range(3)] == [1, 2, 0]


def check_best(run: Path) -> None:
    kept = [set(metrics(run, k)[0]["graft"]["coefficient"].values()) for k in (0, 1)]
    assert sorted(kept, key=min) == [{0.5}, {1.0}]


def check_best_so_far(run: Path) -> None:
    for network in (0, 1):
        best = max(line["test_accuracy"] for line in metrics(run, network))
        assert float((run / f"best{network:02d}.txt").read_text()) == pytest.approx(best, abs=0.01)


def check_my_logger(run: Path) -> None:
    for name in ("network00", "network01", "population"):
        (path,) = run.glob(f"my_logger-*-{name}.csv")
        rows = list(csv.reader(path.read_text().splitlines()))
        assert {epoch for epoch, _, _ in rows} == {"0"}
        if name != "population":
            accuracy = metrics(run, int(name[-2:]))[0]["test_accuracy"]
            assert ["0", "accuracy/test", str(accuracy)] in rows


CHECKS = {
    "spread.py": (check_spread, ("--model.name", "resnet8", *SMALL)),
    "two_back.py": (check_two_back, ("--model.name", "resnet8", *SMALL)),
    "best.py": (check_best, ("--model.name", "resnet8", *SMALL)),
    "my_logger.py": (check_my_logger, ("--model.name", "resnet8", *SMALL)),
    "best_so_far.py": (check_best_so_far, ("--model.name", "resnet8", *SMALL)),
}


def run_python(folder: Path, *words: str, status: int = 0, limit: float = 280, **more: str) -> str:
    """Run Python in the folder, with the package from this checkout; returns standard output."""
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=environment(PYTHONPATH=str(ROOT), **more),
        capture_output=True,
        text=True,
        timeout=limit,
        check=False,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


def test_every_file_of_the_documentation_is_checked() -> None:
    pages = [Path(page) for page in PAGES]
    followed = {name for name, block in FILES.items() if block.document in pages}
    assert set(FILES) == set(CHECKS) | followed


@pytest.mark.parametrize("name", CHECKS)
def test_a_file_of_the_documentation(name: str, tmp_path: Path) -> None:
    """The block, saved under its name, works with the command after it."""
    block, (check, options) = FILES[name], CHECKS[name]
    assert len(block.text.splitlines()) < 30
    (tmp_path / name).write_text(block.text)
    module = name.removesuffix(".py")
    command = next(line for line in commands(block.document) if f" {module}:" in line)
    networks, words = words_of(command)
    train(tmp_path, networks, *words, *options)
    check(tmp_path / "runs" / module)


# Pages about a task: all their commands, in order, in one folder. Each run is interrupted.


def write_images(root: Path) -> None:
    """Two classes of images, in the folders that the page describes."""
    for split in ("train", "val"):
        for color in ("red", "blue"):
            folder = root / split / color
            folder.mkdir(parents=True)
            for number in range(12):
                Image.new("RGB", (36 + number, 40), color).save(folder / f"{number}.png")


def write_pretrained(folder: Path) -> None:
    """A file in torch's cache, in place of the downloaded weights."""
    weights = get_model_weights("resnet18").DEFAULT
    path = folder / "hub/checkpoints" / Path(weights.url).name
    path.parent.mkdir(parents=True)
    torch.save(get_model("resnet18").state_dict(), path)


STOP_ONCE = """
import os
import signal

import dist_graft


class StopOnce(dist_graft.Callback):
    def on_epoch_end(self, trainer, report):
        if trainer.epoch == 0 and trainer.process.is_main:
            os.kill(os.getpid(), signal.SIGTERM)
"""
IMAGES = ("--data.image_size", "32", "--data.workers", "0")
PAGES: dict[str, dict[str, tuple[str, ...]]] = {
    "docs/your_data.md": {"flowers": IMAGES, "stripes": (), "noise": SMALL},
    "docs/your_model.md": {
        **{"timm": SMALL, "tiny": SMALL, "recipe": SMALL, "more": SMALL},
        "fine_tuned": IMAGES,
    },
}
"""Runs of each page, and options that make them small."""
RUN_CHECKS = {
    "stripes": check_stripes,
    "noise": check_noise,
    "tiny": check_tiny,
    "recipe": check_recipe,
}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page(page: str, tmp_path: Path) -> None:
    document = Path(page)
    if "timm" in PAGES[page]:
        pytest.importorskip("timm")
    for root in re.findall(r"--data\.root (\w\S*)", "\n".join(commands(document))):
        write_images(tmp_path / root)
    write_pretrained(tmp_path / "cache")
    for name, block in FILES.items():
        if block.document == document:
            (tmp_path / name).write_text(block.text)
    if "--init_from runs/first" in text_of(document):  # the run of docs/getting_started.md
        train(tmp_path, 1, "--run_dir", "runs/first", "--model.name", "resnet20", *SMALL)
    (tmp_path / "stop_once.py").write_text(STOP_ONCE)
    followed = []
    for command in commands(document):
        words = arguments(command)
        if words is None or words[0] != "train" or "--run_dir" not in words:
            continue
        run = tmp_path / words[words.index("--run_dir") + 1]
        networks, options = words_of(command)
        options += [*PAGES[page][run.name], "--epochs", "3", "--callbacks", "stop_once:StopOnce"]
        train(tmp_path, networks, *options, status=75)
        assert not (run / "summary.json").exists()
        train(tmp_path, networks, *options)
        followed.append(run.name)
        assert len(list(run.glob("network??"))) == networks
        for network in range(networks):
            assert [line["epoch"] for line in metrics(run, network)] == [0, 1, 2]
            assert scalars(run / f"network{network:02d}")["accuracy/test"].keys() == {0, 1, 2}
        assert (run / "checkpoints/epoch_0003/COMPLETE.json").exists()
        if run.name in RUN_CHECKS:
            RUN_CHECKS[run.name](run)
    assert followed == list(PAGES[page])


def train(folder: Path, networks: int, *options: str, status: int = 0) -> None:
    """Run `dist-graft train` in the folder, with a process for each network."""
    words = ("--runtime.device", "cpu", "--runtime.threads", "1")
    command = [sys.executable, "-m", "dist_graft", "train", *options, *words]
    place = {"PYTHONPATH": str(ROOT), "TORCH_HOME": str(folder / "cache")}
    for done in run_programs([command] * networks, timeout=600, cwd=folder, **place):
        assert done.status == status, done


def words_of(command: str) -> tuple[int, list[str]]:
    """Number of networks and options of a command that trains."""
    program, train, *options = shlex.split(command)
    assert (program, train) == ("dist-graft", "train")
    if "--networks" not in options:
        return 1, options
    at = options.index("--networks")
    return int(options[at + 1]), options[:at] + options[at + 2 :]


# Python code of the pages, in two processes.


def lines_of(document: str, *, containing: str = "") -> list[str]:
    """Lines of a document's Python blocks that contain a text, without whole files."""
    found = blocks(Path(document), "python")
    shown = [b for b in found if containing in b.text and not b.first_line.endswith(".py")]
    return [line for block in shown for line in block.text.splitlines()]


def test_the_loop_of_the_readme(tmp_path: Path) -> None:
    rounds = in_two_processes(
        tmp_path,
        [
            "model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))",
            "epochs, train_one_epoch = 2, lambda model: model(torch.randn(4, 3, 8, 8))",
        ],
        lines_of("README.md", containing="Grafter"),
        [
            "assert record.round == 1 and record.donor == 1 - dist.get_rank(), record",
            "assert 0.3 <= record.coefficient['0'] <= 0.7, record",
            "result = record.round",
        ],
    )
    assert rounds == [1, 1]


def test_the_blocks_of_the_loop_page(tmp_path: Path) -> None:
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
        lines_of("docs/your_loop.md"),
        [
            "record = grafter.graft()",
            "assert len(mixed) == 2 and set(mixed[0]) == set(states[0])",
            "result = record.round",
            "del grafter, mesh",
        ],
    )
    assert rounds == [0, 0]


def test_your_rule_in_your_loop(tmp_path: Path) -> None:
    (tmp_path / "best.py").write_text(FILES["best.py"].text)
    changed = in_two_processes(
        tmp_path,
        ["model = torch.nn.Conv2d(3, 8, 3)", "before = model.weight.detach().clone()"],
        lines_of("docs/extending.md"),
        [
            "record = grafter.graft()",
            "result = not torch.equal(before, model.weight)",
            "assert result == (record.coefficient['weight'] == 0.5), record",
        ],
    )
    assert sorted(changed) == [False, True]


# Examples.


def shares_kept(output: str) -> list[float]:
    """Share that each network kept in the last round, as an example prints it."""
    kept = dict(re.findall(r"network (\d) kept (0\.\d+) of its", output))
    assert set(kept) == {"0", "1"}, output
    return [float(kept[network]) for network in ("0", "1")]


def test_the_example_of_a_loop(tmp_path: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    output = run_python(tmp_path, *torchrun, str(ROOT / "docs/examples/own_loop.py"))
    assert sum(shares_kept(output)) == pytest.approx(1, abs=0.011)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("example", "log"),
    [
        ("lightning_callback", "lightning/{}/lightning_logs/version_1/metrics.csv"),
        ("transformers_callback", "transformers/{}/checkpoint-12/trainer_state.json"),
    ],
)
def test_the_example_of_a_framework(example: str, log: str, tmp_path: Path) -> None:
    """Run again with one more epoch, it resumes; run again after that, it ends at once."""
    text = (ROOT / f"docs/examples/{example}.py").read_text()
    longer = text.replace("epochs=2,", "epochs=3,")
    assert longer != text
    first_ended = 0
    for number, program in enumerate((text, longer, longer)):
        (tmp_path / "example.py").write_text(program)
        output = run_python(tmp_path, "example.py", limit=600)
        if number < 2 or example == "transformers_callback":
            assert sum(shares_kept(output)) == pytest.approx(1, abs=0.011)
        else:
            assert output.count("had already trained for all epochs") == 2
        if number == 1:
            for network in ("network00", "network01"):
                check_resumed(tmp_path / "runs" / log.format(network), first_ended)
        first_ended = first_ended or time.time_ns()


def check_resumed(log: Path, first_ended: int) -> None:
    """The log of a framework has the third epoch from a resumed run."""
    if log.suffix == ".csv":
        with log.open() as file:
            assert {row["epoch"] for row in csv.DictReader(file)} == {"2"}
    else:
        history = json.loads(log.read_text())["log_history"]
        assert [row["epoch"] for row in history if "graft/coefficient" in row] == [1, 2, 3]
        assert (log.parents[1] / "checkpoint-4/trainer_state.json").stat().st_mtime_ns < first_ended


def test_the_regression_example(tmp_path: Path) -> None:
    path = ROOT / "docs/examples/regression.py"
    assert len(path.read_text().splitlines()) < 60
    run_python(tmp_path, str(path))
    run = tmp_path / "runs/regression"
    for network in (0, 1):
        errors = [line["test_absolute_error"] for line in metrics(run, network)]
        assert errors[-1] < min(0.2, errors[0])
    assert summary(run)["metric"] == "absolute_error"


def _with_status_of_a_stop(program: str) -> str:
    """The program with the code of the page about the Trainer that catches StoppedEarlyError."""
    (code,) = re.findall(r"```python\n(try:.*?)```", (ROOT / "docs/trainer.md").read_text(), re.S)
    call = "    dist_graft.launch(main, networks=2)\n"
    assert program.count(call) == 1
    return "import sys\n" + program.replace(call, textwrap.indent(code, "    "))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_segmentation_page(tmp_path: Path) -> None:
    """Stopped and resumed, the program gives the same weights; the page's code loads them."""
    text = (ROOT / "docs/examples/segmentation.py").read_text()
    assert len(text.splitlines()) < 60
    straight, stopped = (tmp_path / name / "runs/segmentation" for name in ("straight", "stopped"))
    for run in (straight, stopped):
        folder = run.parents[1]
        folder.mkdir()
        (folder / "segmentation.py").write_text(_with_status_of_a_stop(text))
    program = [sys.executable, "segmentation.py"]
    place = {"cwd": stopped.parents[1], "PYTHONPATH": str(ROOT)}
    with running([program], **place) as (process,):
        reached = checkpoint_is_complete(stopped, 1)
        wait_until(reached, "a checkpoint", seconds=600, meanwhile=[process])
        (stopped / "STOP").touch()
        done = wait_for_end(process, 300)
    assert done.status == 75
    (line,) = done.errors.splitlines()
    assert line.startswith("stopped early by the file")
    assert not (stopped / "summary.json").exists()
    assert "resumed from" in run_python(stopped.parents[1], "segmentation.py", limit=600)
    run_python(straight.parents[1], "segmentation.py", limit=600)
    assert summary(stopped)["metric"] == "iou"
    for network in (0, 1):
        one, other = (checkpoint(run, 4, network)["model"] for run in (straight, stopped))
        assert_same_bits(one, other)
        lines = metrics(stopped, network)
        assert [line["epoch"] for line in lines] == [0, 1, 2, 3]
        assert 0.3 <= lines[-1]["test_iou"] <= 1
        assert lines[-1]["test_iou"] > lines[0]["test_iou"]
        board = scalars(stopped / f"network{network:02d}")
        assert board["iou/test"] == {
            n: pytest.approx(line["test_iou"]) for n, line in enumerate(lines)
        }

    page = Path("docs/segmentation.md")
    (export,) = (command for command in commands(page) if command.startswith("dist-graft export"))
    run_python(stopped.parents[1], "-m", "dist_graft", *export.split()[1:])
    (block,) = blocks(page, "python")
    shown = "print((predicted == mask).float().mean().item())"
    agreement = run_python(stopped.parents[1], "-c", f"{block.text}\n{shown}")
    assert float(agreement) > 0.6
