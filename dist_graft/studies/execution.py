"""One run of a comparison: a population trained by torchrun, evaluated, and told in one row."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import yaml

from dist_graft.config import TrainConfig
from dist_graft.errors import DistGraftError, RunDirectoryError
from dist_graft.population.runtime.process import die_with_launcher
from dist_graft.studies.arms import Arm
from dist_graft.studies.outcomes import (
    CurvePoint,
    Outcome,
    count_invalid,
    epochs_done,
    is_finished,
    largest,
    read_curve,
    read_test,
    read_validation,
    read_versions,
)
from dist_graft.studies.overrides import key_of
from dist_graft.studies.results import Phase, Row
from dist_graft.training.learning_rates import learning_rates

_ERROR = re.compile(r"dist-graft: error: (.*)")
_KILLED = re.compile(r"Root Cause.*?Signal \d+ \((SIG\w+)\)", re.DOTALL)  # torchrun's table
_POLL_SECONDS = 0.5
_GRACE_SECONDS = 40.0  # torchrun itself waits 30 s for its workers
_ONLY_OF_THE_FOLDER = ("run_dir", "resume")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training of a comparison."""

    phase: Phase
    arm: Arm
    seed: int

    @property
    def config(self) -> TrainConfig:
        """What it is trained with."""
        return self.arm.config(self.seed)

    @property
    def key(self) -> str:
        """Hash of all that its numbers follow from."""
        return key_of(self.config, self.arm.networks)

    @property
    def split(self) -> Literal["test", "validation"]:
        """Where its accuracy is read."""
        return "test" if self.phase == "comparison" else "validation"

    @property
    def cost(self) -> int:
        """Epochs of all its networks together."""
        return self.arm.networks * self.config.epochs

    def __str__(self) -> str:
        return f"{self.arm.label}, seed {self.seed}"


def carry_out(
    run: Run, out: Path, *, keep_checkpoints: int, on_epochs: Callable[[int], None]
) -> tuple[Row, list[CurvePoint]]:
    """Train, or go on training, and evaluate; a run that fails is a row that says why.

    Args:
        run: what is trained.
        out: folder of the comparison; the run gets one of its own below runs/.
        keep_checkpoints: complete sets that are kept once it has ended.
        on_epochs: called with the number of finished epochs, now and then.

    Raises: StoppedError when a signal arrived; what was trained is gone on with the next time.
    """
    folder = out / "runs" / f"k{run.arm.networks}-seed{run.seed}-{run.key}"
    try:
        if not is_finished(folder):
            _train(run, folder, on_epochs)
        remarks = _evaluate(run, folder)
        outcome = _outcome(run, folder)
        filters: dict[str, int] = {}
        try:
            filters = count_invalid(folder, largest(outcome.learning_rates))
        except (DistGraftError, ValueError) as error:
            remarks.append(f"filters not counted: {error}")
        curve = read_curve(folder, outcome.learning_rates, run.split)
    except _RunError as error:
        return _row(run, folder, status="failed", error=str(error)), []
    except (KeyError, TypeError, RunDirectoryError) as error:
        message = f"{folder} does not hold a run's results: {error}"
        return _row(run, folder, status="failed", error=message), []
    _prune(folder / "checkpoints", keep_checkpoints)
    row = _row(run, folder, status="ok", error="; ".join(remarks))
    versions = read_versions(folder)
    return replace(
        row,
        outcomes=outcome.values(),
        members=outcome.members,
        learning_rates=outcome.learning_rates,
        filters=filters,
        commit=versions.pop("commit"),
        versions=" ".join(f"{name} {version}" for name, version in versions.items()),
    ), curve


class _RunError(Exception):
    """A run came to a bad end; the text is the one line that it left."""


def train_command(run: Run, folder: Path) -> list[str]:
    """The command that trains the run, as a list of words."""
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        f"--nproc-per-node={run.arm.networks * run.arm.config(run.seed).runtime.replicas}",
        *("-m", "dist_graft", "train", "--config", str(folder / "options.yaml")),
        *("--run_dir", str(folder), "--resume", "auto", "--monitor.progress", "lines"),
    ]


def evaluate_command(folder: Path) -> list[str]:
    """The command that evaluates a finished run."""
    return [sys.executable, "-m", "dist_graft", "evaluate", str(folder)]


def _train(run: Run, folder: Path, on_epochs: Callable[[int], None]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    plain = json.loads(json.dumps(asdict(run.config)))  # tuples become lists
    options = {name: value for name, value in plain.items() if name not in _ONLY_OF_THE_FOLDER}
    (folder / "options.yaml").write_text(yaml.safe_dump(options, sort_keys=False))
    before, wall, cores = _cost(folder), time.monotonic(), _children_seconds()
    try:
        _execute(
            train_command(run, folder),
            folder / "output.txt",
            lambda: on_epochs(epochs_done(folder)),
        )
    finally:
        spent = {
            "wall_seconds": before["wall_seconds"] + time.monotonic() - wall,
            "core_seconds": before["core_seconds"] + _children_seconds() - cores,
        }
        (folder / "cost.json").write_text(json.dumps(spent) + "\n")
    if not is_finished(folder):
        raise _RunError("the training ended without a summary")


def _evaluate(run: Run, folder: Path) -> list[str]:
    """Evaluate, unless a network alone has said all; returns remarks."""
    alone = run.split == "validation" and run.arm.networks == 1
    if alone or (folder / "evaluation.json").is_file():
        return []
    try:
        _execute(evaluate_command(folder), folder / "output.txt", lambda: None)
    except _RunError as error:
        if run.split == "validation":  # there is no other source
            raise
        return [f"not evaluated: {error}"]
    return []


def _outcome(run: Run, folder: Path) -> Outcome:
    if run.split == "test":
        return read_test(folder)
    return read_validation(folder, learning_rates(run.config.optim, run.arm.networks))


def _execute(command: Sequence[str], output: Path, on_wait: Callable[[], None]) -> None:
    """Run a command to its end, in a session of its own, so that only we pass signals on to it.

    Raises: _RunError with the line that the command left, when it fails.
    """
    with output.open("ab") as file:
        start = file.tell()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_launcher,  # noqa: PLW1509  no orphan when we are killed
        )
        try:
            while process.poll() is None:
                on_wait()
                try:
                    process.wait(_POLL_SECONDS)
                except subprocess.TimeoutExpired:
                    continue
        finally:
            _stop(process)
    if process.returncode != 0:
        with output.open("rb") as file:
            file.seek(start)
            raise _RunError(error_line(file.read().decode(errors="replace"), process.returncode))


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a command that is still running: politely first, so that workers can leave."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def error_line(output: str, status: int) -> str:
    """The one line of a command's output that says why it failed."""
    found = [match.group(1) for match in _ERROR.finditer(output)]
    causes = [line for line in found if "stopped by SIG" not in line]
    if causes or found:
        return (causes or found)[0].strip()
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    if killed := _KILLED.search(output):
        return f"a process of the run was killed by {killed.group(1)}"
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1] if lines else f"exit status {status}, and not a word"


def _row(run: Run, folder: Path, *, status: Literal["ok", "failed"], error: str) -> Row:
    cost = _cost(folder)
    return Row(
        key=run.key,
        phase=run.phase,
        arm=run.arm.name,
        role=run.arm.role,
        networks=run.arm.networks,
        seed=run.seed,
        status=status,
        split=run.split,
        epochs=run.config.epochs,
        finished=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        error=" ".join(error.split()),
        wall_seconds=cost["wall_seconds"],
        core_seconds=cost["core_seconds"],
    )


def _cost(folder: Path) -> dict[str, float]:
    path = folder / "cost.json"
    if not path.is_file():
        return {"wall_seconds": 0.0, "core_seconds": 0.0}
    cost: dict[str, float] = json.loads(path.read_text())
    return cost


def _children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _prune(checkpoints: Path, keep: int) -> None:
    if keep:
        from dist_graft.training.checkpoint.files import prune

        prune(checkpoints, keep)
    elif checkpoints.is_dir():
        shutil.rmtree(checkpoints)
