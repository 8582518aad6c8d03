"""Train and evaluate one run of a comparison with torchrun, and read its results."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import yaml

from dist_graft.analysis.evaluate import EVALUATION_FORMAT
from dist_graft.analysis.run_files import read_json
from dist_graft.config import TrainConfig
from dist_graft.errors import DistGraftError, NonFiniteError, RunDirectoryError
from dist_graft.population.runtime.process import die_with_launcher
from dist_graft.run_directory import RunDirectory, as_plain, git_commit, write_atomically
from dist_graft.studies.controls import Run
from dist_graft.studies.measurements import events_of_run, measure
from dist_graft.studies.records import FILTER_COUNTS, OUTCOMES, THRESHOLDS
from dist_graft.studies.train_options import has_exchange
from dist_graft.training.learning_rates import initial_rates
from dist_graft.version import versions

_ERROR = re.compile(r"dist-graft: error: (.*)")
_KILLED = re.compile(r"Root Cause.*?Signal \d+ \((SIG\w+)\)", re.DOTALL)  # table of torchrun
_POLL_SECONDS = 0.5
_GRACE_SECONDS = 40.0  # torchrun itself waits 30 s for its workers
_SET_PER_RUN = ("run_dir", "resume")
_TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]

Row = dict[str, Any]
"""A row of results.csv by column; outcomes and filter counts that were not measured are absent."""


class RunFailedError(Exception):
    """A run failed; the text is one line that says why."""


def run_folder(run: Run, out: Path, repetition: int = 0) -> Path:
    """Return the directory of a run, or of its n-th repetition."""
    suffix = f"-redo{repetition}" if repetition else ""
    return out / "runs" / f"k{run.arm.networks}-seed{run.seed}-{run.key}{suffix}"


def execute_run(
    run: Run,
    out: Path,
    *,
    keep_checkpoints: int,
    on_progress: Callable[[int], None],
    repetition: int = 0,
) -> tuple[Row, pd.DataFrame | None]:
    """Train, or resume training, and evaluate.

    Args:
        run: the run.
        out: directory of the comparison; the run's own directory is created in its runs/.
        keep_checkpoints: number of checkpoints to keep after the run.
        on_progress: called repeatedly with the finished part of `run.cost`.
        repetition: number of earlier attempts that this one supersedes; they keep their
            directories.

    Returns: the run's row and learning curve (columns epoch, largest_lr_member, mean_of_members).
    A failed run has a row with the error, and no curve. A run in which a network diverged has
    chance accuracy in every outcome, whether it was stopped, or the network was healed or excluded.

    The teachers of a run are trained first, in the directory of their own run, unless they exist.
    The cost of the run includes theirs.

    Raises: StoppedError on a signal. The next call resumes the training.
    """
    folder = run_folder(run, out, repetition)
    stages = {folder: run}
    if run.teachers:
        stages = {run_folder(run.teachers, out, repetition): run.teachers} | stages
    remarks: list[str] = []
    try:
        _train_and_evaluate(run, folder, stages, on_progress)
        rates = initial_rates(run.config, run.arm.networks)
        outcomes = read_test(folder) if run.split == "test" else read_validation(folder)
        outcomes |= summarize(outcomes["members"], rates)
        outcomes["delivered"] = read_delivered(run, folder, outcomes)
        if run.arm.delivers == "snapshots" and run.split == "test":
            outcomes["ensemble"] = outcomes["delivered"]
        outcomes |= count_images(stages)
        try:
            outcomes |= measure(folder, run)
        except (DistGraftError, KeyError, TypeError, ValueError) as error:
            remarks.append(f"not measured: {error}")
        try:
            outcomes |= count_filters(folder)
        except (DistGraftError, ValueError) as error:
            remarks.append(f"filters not counted: {error}")
        curve = read_curve(folder, rates, run.split)
        outcomes["learning_rates"] = rates
        divergence = read_divergence(folder)
    except RunFailedError as error:
        if not NonFiniteError.is_reported_in(str(error)):
            return _row(run, folder, stages, status="failed", error=str(error)), None
        outcomes, divergence = {}, str(error)
        curve = _chance_curve(run)
    except (KeyError, TypeError, RunDirectoryError) as error:
        message = f"{folder} has no results: {error}"
        return _row(run, folder, stages, status="failed", error=message), None
    if divergence:
        outcomes |= _chance(run, outcomes)
    for trained in stages:
        _prune(trained, keep_checkpoints)
    row = _row(
        run,
        folder,
        stages,
        status="diverged" if divergence else "ok",
        error="; ".join([divergence, *remarks] if divergence else remarks),
    )
    return row | outcomes, curve


def _chance(run: Run, outcomes: Row) -> Row:
    """Accuracies of a run that diverged, in percent: those of guessing, measured or not."""
    names = ["delivered", "largest_lr_member", "mean_of_members", "ensemble"]
    if run.arm.networks > 1:
        names += ["uniform_soup", "uniform_soup_as_is"]
        names += ["greedy_soup"] if run.config.data.val_fraction else []
    names += [name for name in OUTCOMES if name in outcomes]
    return dict.fromkeys(names, 100.0 / count_classes(run.config))


def _chance_curve(run: Run) -> pd.DataFrame:
    """Learning curve of a run that diverged and stopped: chance accuracy in each epoch."""
    chance = 100.0 / count_classes(run.config)
    columns = dict.fromkeys(("largest_lr_member", "mean_of_members"), chance)
    return pd.DataFrame({"epoch": range(run.config.epochs)} | columns)


# Processes


def train_commands(run: Run, folder: Path) -> list[list[str]]:
    """Return the commands that train the run: one, or one for each job (graft.exchange files).

    With `start_epochs`, they train all networks after the branch.
    """
    networks, replicas = run.arm.networks, run.config.runtime.replicas
    train, torchrun = _train_arguments(folder), _TORCHRUN
    if run.arm.start_epochs:
        train += ["--resume_networks", "[0]"]
    if run.config.graft.exchange != "files":
        return [[*torchrun, f"--nproc-per-node={networks * replicas}", *train]]
    launcher = [*torchrun, f"--nproc-per-node={replicas}"] if replicas > 1 else [sys.executable]
    return [
        [*launcher, *train, "--population.network", str(network)] for network in range(networks)
    ]


def start_command(run: Run, folder: Path) -> list[str]:
    """Return the command that trains the first network for `start_epochs`."""
    processes = f"--nproc-per-node={run.config.runtime.replicas}"
    epochs = ("--epochs", str(run.arm.start_epochs))
    return [*_TORCHRUN, processes, *_train_arguments(folder), *epochs]


def _train_arguments(folder: Path) -> list[str]:
    return [
        *("-m", "dist_graft", "train", "--config", str(folder / "options.yaml")),
        *("--run_dir", str(folder), "--resume", "auto", "--monitor.progress", "lines"),
    ]


def evaluate_command(run: Run, folder: Path) -> list[str]:
    """Return the command that evaluates a finished run."""
    command = [sys.executable, "-m", "dist_graft", "evaluate", str(folder)]
    if run.arm.delivers in ("checkpoints", "snapshots"):
        command += ["--last_checkpoints", str(run.config.checkpoint.keep)]
    return command


def _train_and_evaluate(
    run: Run, folder: Path, stages: Mapping[Path, Run], on_progress: Callable[[int], None]
) -> None:
    """Train and evaluate what is left of a run, and check that its last epoch was evaluated.

    A run that was killed between summary.json and its last checkpoint trains its last epochs again.

    Args:
        run: the run.
        folder: its directory.
        stages: runs to train, in order, by directory: the teachers, if any, and `run`.
        on_progress: as in `execute_run`.
    """
    for _ in range(2):
        done, teachers = 0, list[Path]()
        for path, stage in stages.items():

            def on_epochs(trained: int, before: int = done) -> None:
                on_progress(before + trained)

            if not is_finished(path, stage.arm.networks):
                _train(stage, path, teachers, on_epochs)
            done += stage.cost
            teachers = _networks_of(path, stage) if stage is not run else []
        _evaluate(run, folder)
        evaluated = _evaluated_epochs(folder)
        if evaluated <= {run.config.epochs}:
            return
        for name in ("evaluation.json", "summary.json"):
            (folder / name).unlink()
    epochs = ", ".join(map(str, sorted(evaluated)))
    raise RunFailedError(
        f"its last checkpoint is of epoch {epochs}, but it trained {run.config.epochs}"
    )


def _networks_of(folder: Path, run: Run) -> list[Path]:
    """Files of a finished run's networks, in its last checkpoint.

    Raises: RunFailedError if that is not complete; the next attempt then trains it again.
    """
    from dist_graft.analysis.stored_weights import open_run
    from dist_graft.training.checkpoint.files import network_file

    try:
        members = open_run(folder).members
    except RunDirectoryError:  # no checkpoint was kept
        members = {}
    if len(members) < run.arm.networks or any(
        checkpoint.epoch < run.config.epochs for checkpoint in members.values()
    ):
        (folder / "summary.json").unlink()
        raise RunFailedError(f"{folder} has no checkpoint of its last epoch")
    return [members[network].path / network_file(network) for network in sorted(members)]


def _evaluated_epochs(folder: Path) -> set[int]:
    """Epochs of the checkpoints that were evaluated; empty if none was."""
    path = folder / "evaluation.json"
    if not path.is_file():
        return set()
    evaluation = read_json(path)
    return {part["epoch"] for part in (evaluation, *evaluation["members"]) if "epoch" in part}


def _train(
    run: Run, folder: Path, teachers: Sequence[Path], on_progress: Callable[[int], None]
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    plain = as_plain(run.config)
    options = {name: value for name, value in plain.items() if name not in _SET_PER_RUN}
    if teachers:
        options["distill"] |= {"teachers": [str(path.absolute()) for path in teachers]}
    if run.split == "test" and has_exchange(run.config, run.arm.networks):
        options["checkpoint"] |= {"before_last_round": True}
    (folder / "options.yaml").write_text(yaml.safe_dump(options, sort_keys=False))
    before, wall, cores = _cost([folder]), time.monotonic(), _children_seconds()
    output = folder / "output.txt"

    def on_wait() -> None:
        on_progress(run.trained(finished_epochs(folder)))

    try:
        if run.arm.start_epochs and not _has_branched(run, folder):
            _execute([start_command(run, folder)], output, on_wait)
        _execute(train_commands(run, folder), output, on_wait)
    finally:
        cost = {
            "wall_seconds": before["wall_seconds"] + time.monotonic() - wall,
            "core_seconds": before["core_seconds"] + _children_seconds() - cores,
        }
        write_atomically(folder / "cost.json", (json.dumps(cost) + "\n").encode())
    if not is_finished(folder, run.arm.networks):
        raise RunFailedError("the training exited without writing summary.json")


def _has_branched(run: Run, folder: Path) -> bool:
    """Whether the first network has trained for `start_epochs`, or all networks have started."""
    from dist_graft.training.checkpoint.files import newest_usable

    newest, _ = newest_usable(folder / "checkpoints")
    if newest is None:
        return False
    return newest.networks == run.arm.networks or newest.epoch >= run.arm.start_epochs


def _evaluate(run: Run, folder: Path) -> None:
    """Evaluate the run unless this version has done so."""
    path = folder / "evaluation.json"
    if not path.is_file() or read_json(path).get("protocol") != EVALUATION_FORMAT:
        _execute([evaluate_command(run, folder)], folder / "output.txt", lambda: None)


def _execute(commands: Sequence[Sequence[str]], output: Path, on_wait: Callable[[], None]) -> None:
    """Run commands at the same time; when one fails, the others are terminated.

    Each has a process group of its own, so that only this process forwards signals to it.

    Raises: RunFailedError with the line that explains the failure.
    """
    processes: list[subprocess.Popen[bytes]] = []
    with output.open("ab") as file:
        start = file.tell()
        try:
            for command in commands:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=die_with_launcher,  # noqa: PLW1509  no orphans if this one is killed
                )
                processes.append(process)
            while not (failed := [p.returncode for p in processes if p.poll()]):
                running = [process for process in processes if process.poll() is None]
                if not running:
                    return
                on_wait()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    running[0].wait(_POLL_SECONDS)
        finally:
            _stop(processes)
    with output.open("rb") as file:
        file.seek(start)
        raise RunFailedError(error_line(file.read().decode(errors="replace"), failed[0]))


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Terminate the commands that are running, and kill them after a grace period."""
    running = [process for process in processes if process.poll() is None]
    for process in running:
        process.terminate()
    deadline = time.monotonic() + _GRACE_SECONDS
    for process in running:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def error_line(output: str, status: int) -> str:
    """Return the line of a command's output that explains its failure."""
    errors = [match.group(1) for match in _ERROR.finditer(output)]
    causes = [line for line in errors if "stopped by SIG" not in line]
    if causes or errors:
        return (causes or errors)[0].strip()
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    if killed := _KILLED.search(output):
        return f"a process of the run was killed by {killed.group(1)}"
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1] if lines else f"exit status {status} without output"


def _row(
    run: Run,
    folder: Path,
    stages: Mapping[Path, Run],
    *,
    status: Literal["ok", "diverged", "failed"],
    error: str,
) -> Row:
    return {
        "key": run.key,
        "phase": run.phase,
        "arm": run.arm.name,
        "role": run.arm.role,
        "networks": run.arm.networks,
        "seed": run.seed,
        "status": status,
        "split": run.split,
        "delivers": run.arm.delivers,
        "epochs": run.config.epochs,
        "finished": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "error": " ".join(error.split()),
        **_cost(stages),
        **read_versions(folder),
    }


def _cost(folders: Iterable[Path]) -> dict[str, float]:
    """Wall and CPU time of training in these directories, over all attempts."""
    total = {"wall_seconds": 0.0, "core_seconds": 0.0}
    for folder in folders:
        path = folder / "cost.json"
        cost: dict[str, float] = json.loads(path.read_text()) if path.is_file() else {}
        total = {name: seconds + cost.get(name, 0.0) for name, seconds in total.items()}
    return total


def _children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _prune(run: Path, keep: int) -> None:
    """Delete old checkpoints of a run; if none are kept, also the weights before its last round."""
    from dist_graft.training.checkpoint.files import prune

    for checkpoints in (run / "checkpoints", *run.glob("network*/checkpoints")):
        if keep:
            prune(checkpoints, keep)
        elif checkpoints.is_dir():
            shutil.rmtree(checkpoints)
    if not keep:
        for path in run.glob("network*/before_last_round.pt"):
            path.unlink()


# Results of a run directory


def largest(rates: Sequence[float]) -> int:
    """Return the network with the largest learning rate, the last one in case of ties."""
    return max(range(len(rates)), key=lambda network: (rates[network], network))


def summarize(members: Sequence[float], rates: Sequence[float]) -> dict[str, float]:
    """Return the accuracy of the member with the largest learning rate, and the members' mean."""
    return {
        "largest_lr_member": members[largest(rates)],
        "mean_of_members": statistics.fmean(members),
    }


def is_finished(run: Path, networks: int) -> bool:
    """Whether the training of all networks has finished: summary.json is the last file written.

    With `start_epochs`, the first network alone also writes one.
    """
    path = run / "summary.json"
    return path.is_file() and len(read_json(path)["networks"]) == networks


def finished_epochs(run: Path) -> int:
    """Return the number of finished epochs of a run, which may be in progress."""
    return sum(
        path.read_bytes().count(b"\n")
        for path in (*_metrics_before_the_branch(run), RunDirectory(run).metrics(0))
        if path.is_file()
    )


def _metrics_before_the_branch(run: Path) -> list[Path]:
    """Metrics of the first network of a run with `start_epochs`, before the branch."""
    return sorted(run.glob("before_epoch_*/network00/metrics.jsonl"))


def read_test(run: Path) -> Row:
    """Read test accuracies in percent with batch norm re-estimated: members, ensemble, and soups.

    Raises: RunDirectoryError or KeyError if a file is missing or incomplete.
    """
    evaluation = read_json(run / "evaluation.json")
    row: Row = {
        "members": [member["test_accuracy_reestimated"] for member in evaluation["members"]],
        "ensemble": float(evaluation["ensemble_test_accuracy_reestimated"]),
        "uniform_soup": evaluation["uniform_soup"]["batch_norm_reestimated"],
        "uniform_soup_as_is": evaluation["uniform_soup"]["batch_norm_as_is"],
    }
    if evaluation["greedy_soup"]:
        row["greedy_soup"] = evaluation["greedy_soup"]["batch_norm_reestimated"]
    return row


def read_validation(run: Path) -> Row:
    """Read the members' validation accuracies in percent, with batch norm re-estimated.

    Test accuracies are not read.

    Raises: RunDirectoryError or KeyError if a file is missing or incomplete.
    """
    evaluation = read_json(run / "evaluation.json")
    members = [member["val_accuracy_reestimated"] for member in evaluation["members"]]
    if None in members:
        raise RunDirectoryError(f"{run} has no validation accuracies: data.val_fraction is 0")
    return {"members": members}


def read_delivered(run: Run, folder: Path, outcomes: Row) -> float:
    """Return the accuracy of the delivered model on the run's split, in percent.

    Args: outcomes: the other accuracies of the run.
    Raises: RunDirectoryError or KeyError if it was not measured.
    """
    kind = run.arm.delivers
    if kind in ("network", "member"):
        return float(outcomes["mean_of_members"])
    name = "test_accuracy" if run.split == "test" else "val_accuracy"
    accuracy = read_json(folder / "evaluation.json")["averages"][kind][name]
    if accuracy is None:
        raise RunDirectoryError(f"{folder} has no validation accuracies: data.val_fraction is 0")
    return float(accuracy)


def read_divergence(folder: Path) -> str:
    """Return how a network of a finished run diverged; empty if none did."""
    networks = read_json(folder / "summary.json").get("diverged", [])
    if networks:
        return f"network {networks[0]} diverged"
    found = (
        event["text"] for event in events_of_run(folder) if event["kind"] in ("diverged", "healed")
    )
    return str(next(found, ""))


def count_images(stages: Mapping[Path, Run]) -> Row:
    """Count the optimizer steps of a network, and the training images of all networks.

    Args: stages: runs by directory. The steps are those of the last one, the images of all.
    """
    total = steps = 0
    for folder, run in stages.items():
        path = RunDirectory(folder).status(0)
        if not path.is_file():
            return {}
        status = read_json(path)
        if "train_samples" not in status:  # written by an earlier version
            return {}
        steps = int(status["steps_per_epoch"]) * run.config.epochs
        total += run.trained(run.config.epochs) * int(status["train_samples"])
    return {"steps": steps, "images_seen": total}


def count_classes(config: TrainConfig) -> int:
    """Number of classes of the dataset."""
    import torch

    from dist_graft.training.data import load_data

    device = torch.device("cpu")
    data = load_data(config.data, seed=0, network=0, device=device, channels_last=False)
    return data.num_classes


def read_curve(run: Path, rates: Sequence[float], split: str) -> pd.DataFrame:
    """Read accuracies of each epoch, before its round, on the split "test" or "validation"."""
    name = "test_accuracy" if split == "test" else "val_accuracy"
    alone = [line for path in _metrics_before_the_branch(run) for line in read_json(path)]
    epochs = [[float(line[name])] * len(rates) for line in alone]
    members = [
        [float(line[name]) for line in read_json(RunDirectory(run).metrics(network))]
        for network in range(len(rates))
    ]
    epochs += map(list, zip(*members, strict=True))
    return pd.DataFrame(
        [{"epoch": epoch} | summarize(values, rates) for epoch, values in enumerate(epochs)]
    )


def read_versions(run: Path) -> Row:
    """Read the versions and the commit that trained the run.

    Without a readable config.yaml, the run failed before it trained, and has those of this process.
    """
    try:
        stored = yaml.safe_load((run / "config.yaml").read_text())["run"]
        names, commit = stored["versions"].items(), stored["git_commit"] or ""
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        names, commit = versions().items(), git_commit() or ""
    return {
        "versions": " ".join(f"{name} {version}" for name, version in names),
        "commit": commit,
        "dirty": ("yes" if commit.endswith("-dirty") else "no") if commit else "",
    }


def count_filters(run: Path) -> Row:
    """Count the filters of all networks, and those whose L1 norm is below each threshold.

    Raises: RunDirectoryError without a checkpoint; ConfigError if it does not fit the model.
    """
    from dist_graft.analysis.stored_weights import architecture, open_run
    from dist_graft.grafting.information import invalid_filters
    from dist_graft.grafting.units import graft_units

    stored = open_run(run)
    counts = dict.fromkeys(FILTER_COUNTS, 0)
    for state in stored.states():
        model = architecture(stored.config.model, state, run, stored.shape)
        for unit in graft_units(model, lead=stored.config.graft.lead):
            filters = unit.filters(state[unit.lead])
            counts["filters"] += len(filters)
            for threshold in THRESHOLDS:
                counts[f"invalid_{threshold:g}"] += int(invalid_filters(filters, threshold))
    return dict(counts)
