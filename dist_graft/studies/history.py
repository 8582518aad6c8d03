"""When which plan was fixed, on what machine, by which command: written before anything runs."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from dist_graft.errors import ConfigError, RunDirectoryError
from dist_graft.run_directory import git_commit, write_atomically
from dist_graft.studies.plan import Plan, plan_text
from dist_graft.version import VERSION

_PACKAGES = ("torch", "numpy", "scipy", "matplotlib")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A start of the comparison."""

    time: str
    """UTC."""
    plan_sha256: str
    """Of plan.yaml."""
    primary: str
    against: str
    runs_before: int
    """Runs whose results were there already."""
    command: str
    hardware: str
    versions: dict[str, str] = field(default_factory=dict)
    commit: str = ""


def sha_of(plan: Plan) -> str:
    """sha256 of the plan as it is written down."""
    return hashlib.sha256(plan_text(plan).encode()).hexdigest()


def register(plan: Plan, out: Path, *, runs_before: int, command: Sequence[str]) -> None:
    """Write plan.yaml and a line of history.jsonl, before anything runs.

    A plan that takes another one's place leaves it as plan-SHA.yaml.

    Raises: ConfigError when runs are there and the primary outcome or its control has changed.
    """
    entries = read_history(out)
    if entries and runs_before:
        for name in ("primary", "against"):
            before, now = getattr(entries[-1], name), getattr(plan, name)
            if before != now:
                raise ConfigError(
                    f"{name} was {before} when the runs in {out} began and is now {now}: what is "
                    "compared is not changed afterwards; choose another folder with --out"
                )
    path = out / "plan.yaml"
    if path.exists() and entries and entries[-1].plan_sha256 != sha_of(plan):
        path.replace(out / f"plan-{entries[-1].plan_sha256[:8]}.yaml")
    write_atomically(path, plan_text(plan).encode())
    entry = Entry(
        time=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        plan_sha256=sha_of(plan),
        primary=plan.primary,
        against=plan.against,
        runs_before=runs_before,
        command=shlex.join(command),
        hardware=hardware(),
        versions={name: importlib.metadata.version(name) for name in _PACKAGES}
        | {"dist_graft": VERSION, "python": platform.python_version()},
        commit=git_commit() or "",
    )
    lines = [json.dumps(asdict(one)) + "\n" for one in (*entries, entry)]
    write_atomically(out / "history.jsonl", "".join(lines).encode())


def read_history(out: Path) -> list[Entry]:
    """All starts, the first one first."""
    path = out / "history.jsonl"
    if not path.exists():
        return []
    try:
        return [Entry(**json.loads(line)) for line in path.read_text().splitlines()]
    except (ValueError, TypeError) as error:
        raise RunDirectoryError(f"{path} cannot be read: {error}") from error


def hardware() -> str:
    """Processor, cores that may be used, and graphics cards."""
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


def command_line() -> list[str]:
    """The command that this process was started with."""
    return ["dist-graft", *sys.argv[1:]]
