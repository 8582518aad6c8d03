"""Files of a comparison: rows of results, learning curves, the plan and the log of starts."""

from __future__ import annotations

import csv
import hashlib
import importlib.metadata
import io
import itertools
import json
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from dist_graft.analysis.run_files import read_json
from dist_graft.errors import ConfigError, RunDirectoryError
from dist_graft.run_directory import git_commit, write_atomically
from dist_graft.studies.controls import Run
from dist_graft.studies.measurements import MEASURED
from dist_graft.studies.plan import Plan, plan_text
from dist_graft.version import VERSION

COUNTED = ("ok", "diverged")
"""Status of runs that have a result; a diverged run delivers chance accuracy."""
OUTCOMES = (
    "delivered",
    "largest_lr_member",
    "mean_of_members",
    "ensemble",
    "uniform_soup",
    "uniform_soup_as_is",
    "greedy_soup",
)
"""Accuracies of a run after the last round, in percent of the split; empty: not measured."""
THRESHOLDS = (0.1, 0.01)
"""L1 norms below which a filter counts as invalid."""
FILTER_COUNTS = ("filters", *(f"invalid_{threshold:g}" for threshold in THRESHOLDS))
"""Filters of all members: their number, and that of the invalid ones. Rows of an earlier version
count those of the member with the largest learning rate."""

COLUMNS: Mapping[str, str] = {
    "key": "str",
    **dict.fromkeys(("phase", "arm", "role"), "str"),
    **dict.fromkeys(("networks", "seed"), "int64"),
    **dict.fromkeys(("status", "split"), "str"),  # status: ok, diverged or failed
    "delivers": "str",  # see `train_options.Delivery`
    **dict.fromkeys(OUTCOMES, "float64"),
    **dict.fromkeys(("members", "learning_rates"), "str"),  # of each network, separated by spaces
    **dict.fromkeys(FILTER_COUNTS, "Int64"),
    **dict.fromkeys(("wall_seconds", "core_seconds"), "float64"),  # training, all attempts
    "epochs": "int64",
    "steps": "Int64",  # optimizer steps of one network
    "images_seen": "Int64",  # training images, summed over the networks
    **MEASURED,
    **dict.fromkeys(("finished", "versions", "commit", "error"), "str"),
    "dirty": "str",  # yes: the package had uncommitted changes; empty: without git
    "plan_sha256": "str",
    "supersedes": "str",  # `finished` of the row of the same key that this one replaces
    "reason": "str",  # why it was replaced
}
"""Columns of results.csv with their dtypes."""
CURVE_COLUMNS: Mapping[str, str] = {
    "key": "str",
    "epoch": "int64",
    **dict.fromkeys(("largest_lr_member", "mean_of_members"), "float64"),
}
"""Columns of curves.csv with their dtypes: accuracies of each epoch, before its round."""

PROTOCOL = 2
"""How accuracies are measured: 1 with the batch norm statistics of the training, except in soups; 2
with re-estimated statistics. Rows of different protocols must not be compared."""
_FORMATS = {"wall_seconds": ".2f", "core_seconds": ".2f"}
_PACKAGES = ("torch", "numpy", "scipy", "pandas", "statsmodels", "matplotlib")


class Results:
    """Rows and learning curves of a directory: append-only, the last row of a key counts.

    Args:
        folder: directory of results.csv and curves.csv, which need not exist yet.

    A results.csv of an earlier version may lack measurements. They are empty in its rows, and the
    next row is written with a header that has them.

    Raises: RunDirectoryError if results.csv has other columns.
    """

    all_rows: pd.DataFrame
    """Every row of results.csv, superseded ones included."""
    rows: pd.DataFrame
    """The last row of each key, indexed by key."""
    curves: pd.DataFrame
    """Learning curves of the last attempt of each key."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "results.csv"
        self._curves_path = folder / "curves.csv"
        self._read()

    def _read(self) -> None:
        try:
            self.all_rows = _read_csv(self._path, COLUMNS)
            curves = _read_csv(self._curves_path, CURVE_COLUMNS)
        except ValueError as error:
            raise RunDirectoryError(
                f"{self._path} has an unknown format ({error}): choose another directory"
            ) from error
        self.rows = self.all_rows.drop_duplicates("key", keep="last").set_index("key")
        attempt = (curves["epoch"] == 0).groupby(curves["key"]).cumsum()
        self.curves = curves[attempt == attempt.groupby(curves["key"]).transform("max")]

    def add(self, row: Mapping[str, Any], curve: pd.DataFrame | None = None) -> None:
        """Append a row and its learning curve; both are on disk when this returns."""
        if curve is not None:
            points = curve.assign(key=row["key"]).to_dict("records")
            _append_csv(self._curves_path, CURVE_COLUMNS, points)
        _append_csv(self._path, COLUMNS, [row])
        self._read()

    def succeeded(self, key: str) -> bool:
        """Whether the run has a result. Diverging is a result."""
        return self.rows["status"].get(key) in COUNTED

    def superseded(self) -> list[tuple[dict[Any, Any], dict[Any, Any]]]:
        """Return each row that a later row of the same key replaced, with that row."""
        return [
            pair
            for _, attempts in self.all_rows.groupby("key", sort=False)
            for pair in itertools.pairwise(attempts.to_dict("records"))
        ]


def _read_csv(path: Path, columns: Mapping[str, str]) -> pd.DataFrame:
    """Read a CSV file, ignoring a last line that a crash truncated."""
    text = path.read_text() if path.exists() else ""
    text = text[: text.rfind("\n") + 1] or ",".join(columns) + "\n"
    found = text.partition("\n")[0].split(",")
    if found != [name for name in columns if name in found or name not in MEASURED]:
        raise ValueError("other columns")
    text = _with_columns(text, columns)
    return pd.read_csv(
        io.StringIO(text),
        dtype=dict(columns),
        keep_default_na=False,
        na_values={name: [""] for name, dtype in columns.items() if dtype != "str"},
    )


def _with_columns(text: str, columns: Iterable[str]) -> str:
    """Return the text of a CSV file with further columns, empty in each of its rows."""
    if text.partition("\n")[0].split(",") == list(columns):
        return text
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(columns), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(csv.DictReader(io.StringIO(text)))
    return buffer.getvalue()


def _append_csv(path: Path, columns: Mapping[str, str], rows: Iterable[Mapping[Any, Any]]) -> None:
    """Append rows with a single write, replacing a last line that a crash truncated."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    content = path.read_bytes() if path.exists() else b""
    complete = content[: content.rfind(b"\n") + 1]
    if not complete:
        writer.writerow(columns)
    elif (wider := _with_columns(complete.decode(), columns).encode()) != complete:
        write_atomically(path, wider)
        complete = wider
    writer.writerows([_format_cell(name, row.get(name, "")) for name in columns] for row in rows)
    try:
        with path.open("r+b" if path.exists() else "wb", buffering=0) as file:
            file.truncate(len(complete))
            file.seek(0, os.SEEK_END)
            file.write(buffer.getvalue().encode())
            os.fsync(file.fileno())
    except OSError as error:
        raise RunDirectoryError(f"{path} cannot be written: {error.strerror}") from error


def _format_cell(name: str, value: object) -> str:
    if isinstance(value, list):
        return " ".join(f"{number:.6g}" for number in value)
    return format(value, _FORMATS.get(name, ".6g")) if isinstance(value, float) else str(value)


@dataclass(frozen=True, kw_only=True)
class Start:
    """One start of the comparison, a line of history.jsonl."""

    time: str
    """UTC."""
    plan_sha256: str
    primary: str
    against: str
    runs_before: int
    """Number of runs that had results already."""
    tests_before: int | None = None
    """Those with results on the test set; None in lines of earlier versions."""
    smallest_effect: float
    tuning: dict[str, Any]
    protocol: int = 1
    """See `PROTOCOL`."""
    pilot: bool = False
    """Whether this start was a pilot; lines of earlier versions say so in `command` only."""
    redo: str = ""
    """Arm whose runs are repeated."""
    reason: str = ""
    """Why they are repeated."""
    command: str
    hardware: str
    versions: dict[str, str] = field(default_factory=dict)
    commit: str = ""

    @property
    def is_pilot(self) -> bool:
        """Whether this start was a pilot, which prints no test accuracies."""
        return self.pilot or "--pilot" in shlex.split(self.command)

    def repeats(self, run: Run) -> bool:
        """Whether this start asked to repeat a run."""
        return bool(self.redo) and self.redo in (run.arm.name, run.arm.label)


def repetitions(run: Run, starts: Iterable[Start]) -> list[Start]:
    """Starts that asked to repeat a run, the first one first."""
    tested = run.phase == "comparison"
    return [start for start in starts if tested and start.repeats(run)]


def awaits_repetition(run: Run, results: Results, starts: Iterable[Start]) -> bool:
    """Whether a run has a result, and its last repetition has none yet."""
    if run.key not in results.rows.index:
        return False
    for start in repetitions(run, starts)[-1:]:
        rows = results.all_rows
        rows = rows[(rows["key"] == run.key) & (rows["reason"] == start.reason)]
        return not (rows["finished"] >= start.time).any()
    return False


def plan_sha256(plan: Plan) -> str:
    """Hash of the plan as plan.yaml contains it."""
    return hashlib.sha256(plan_text(plan).encode()).hexdigest()


def record_start(
    plan: Plan,
    folder: Path,
    *,
    runs_before: int,
    tests_before: int | None = None,
    command: Sequence[str],
    pilot: bool = False,
    redo: str = "",
    reason: str = "",
) -> None:
    """Write plan.yaml and append a line to history.jsonl. Called before anything runs.

    A plan that replaces another one renames the old file to plan-SHA.yaml.

    Raises: ConfigError if there are runs and the primary outcome, its control, the smallest effect
    or the tuning has changed, or an earlier version measured accuracies in another way.
    """
    starts = read_starts(folder)
    fixed = {name: getattr(plan, name) for name in ("primary", "against", "smallest_effect")}
    fixed["tuning"] = asdict(plan.tuning)
    if len(plan.rates) > 1:  # the default seeds depend on those of the test runs
        fixed["tuning"]["seeds"] = plan.tuning_seeds
    if starts and runs_before:
        if starts[-1].protocol != PROTOCOL:
            raise ConfigError(
                f"the runs in {folder} were evaluated by a version that did not re-estimate batch "
                "norm in all networks: choose another directory with --out"
            )
        for name, now in fixed.items():
            before = getattr(starts[-1], name)
            if name == "tuning" and not before["seeds"]:  # an earlier version
                before = before | {"seeds": now["seeds"]}
            if before != now:
                raise ConfigError(
                    f"{name} must not change once there are runs in {folder}: it was {before}, got "
                    f"{now}; choose another directory with --out"
                )
    path, sha256 = folder / "plan.yaml", plan_sha256(plan)
    if starts and path.exists():
        # Neither this plan nor one whose start was interrupted before history.jsonl had it
        before = hashlib.sha256(path.read_bytes()).hexdigest()
        if before != sha256 and before == starts[-1].plan_sha256:
            path.replace(folder / f"plan-{before[:8]}.yaml")
    write_atomically(path, plan_text(plan).encode())
    start = Start(
        time=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        plan_sha256=sha256,
        **fixed,
        protocol=PROTOCOL,
        runs_before=runs_before,
        tests_before=tests_before,
        pilot=pilot,
        redo=redo,
        reason=reason,
        command=shlex.join(command),
        hardware=_hardware(),
        versions={name: importlib.metadata.version(name) for name in _PACKAGES}
        | {"dist_graft": VERSION, "python": platform.python_version()},
        commit=git_commit() or "",
    )
    content = "".join(json.dumps(asdict(one)) + "\n" for one in (*starts, start))
    write_atomically(folder / "history.jsonl", content.encode())


def read_starts(folder: Path) -> list[Start]:
    """Read history.jsonl, the first start first."""
    path = folder / "history.jsonl"
    try:
        return [Start(**line) for line in read_json(path)] if path.exists() else []
    except TypeError as error:
        raise RunDirectoryError(f"{path} cannot be read: {error}") from error


def _hardware() -> str:
    """Processor, number of available cores, and GPUs."""
    cores = len(os.sched_getaffinity(0))
    parts = [f"{_processor()}, {cores} core{'s' if cores > 1 else ''}"]
    if shutil.which("nvidia-smi"):
        answer = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=False,
        )
        parts += [line.strip() for line in answer.stdout.splitlines() if answer.returncode == 0]
    return "; ".join(parts)


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
