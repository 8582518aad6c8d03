"""The story of a comparison: plan, search, trials, runs, report."""

from __future__ import annotations

import fcntl
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dist_graft.errors import ConfigError, DistGraftError, RunDirectoryError, StoppedError
from dist_graft.population.runtime.process import stop_on_signals
from dist_graft.studies.execution import Run, carry_out
from dist_graft.studies.history import command_line, read_history, register, sha_of
from dist_graft.studies.plan import Plan
from dist_graft.studies.report import write_report
from dist_graft.studies.results import Results, Row
from dist_graft.studies.state import State, state_of


class FailedRunsError(DistGraftError):
    """The comparison came to its end, but some of its runs did not."""


def compare(plan: Plan, folder: Path, *, report_only: bool = False) -> str:
    """Carry out a plan, or what is left of it, and write its report.

    Args:
        plan: as load_plan reads it.
        folder: of the results.
        report_only: write the report of the runs that there are, and run nothing; this may be done
            while the comparison is going on.

    Returns: the verdict, and where the report is.

    Raises: StoppedError when a signal arrived: the same command goes on; FailedRunsError when runs
    failed, after the report is written; ConfigError when the plan has become another one in what
    must not change.
    """
    if report_only:
        _refuse_another(plan, folder)
        return _report(plan, Results(folder), folder)
    folder.mkdir(parents=True, exist_ok=True)
    stop_on_signals()
    with _alone_in(folder):
        results = Results(folder)
        state = state_of(plan, results.rows)
        tested = any(row.phase == "comparison" for row in results.rows.values())
        if tested and any(run.key not in results.rows for run in state.search_runs):
            raise ConfigError(
                f"the search in {folder} is over, and what it found was tested: a wider one needs "
                "unseen seeds and another folder (--out)"
            )
        register(plan, folder, runs_before=len(results.rows), command=command_line())
        _run_all("search", state.search_runs, plan, results, folder, retry=not tested)
        state = state_of(plan, results.rows)
        if state.design is None:
            raise FailedRunsError(
                f"no regime of the search has all of its runs; {folder / 'results.csv'} says what "
                "failed, and the same command tries again"
            )
        _run_all("best lr", state.lr_runs, plan, results, folder, retry=not tested)
        state = state_of(plan, results.rows)
        _run_all("comparison", state.comparison_runs, plan, results, folder)
        text = _report(plan, results, folder)
    rows = [results.rows[run.key] for run in state_of(plan, results.rows).all_runs]
    failed = [row for row in rows if row.status == "failed"]
    if failed:
        print(text)
        raise FailedRunsError(
            f"{len(failed)} of {len(rows)} runs failed, the first with: {failed[0].error}; "
            f"{folder / 'report.html'} lists them, and the same command tries them again"
        )
    return text


def _run_all(
    title: str,
    runs: Sequence[Run],
    plan: Plan,
    results: Results,
    folder: Path,
    *,
    retry: bool = True,
) -> None:
    """Carry out the runs that are not there yet, one after the other; rows come as they end.

    Args: retry: those that failed, too. What was chosen before a test must not change after it.
    """
    left = [
        run for run in runs if not results.has(run.key) and (retry or run.key not in results.rows)
    ]
    if not left:
        return
    done, began = len(runs) - len(left), time.monotonic()
    total = sum(run.cost for run in left)
    spent = 0
    bar: tqdm[Any]
    with tqdm(total=total, desc=title, unit="epoch", disable=None, dynamic_ncols=True) as bar:
        for number, run in enumerate(left, start=done + 1):
            bar.set_postfix_str(f"run {number} of {len(runs)}: {run}")

            def show(epochs: int, run: Run = run, spent: int = spent) -> None:
                bar.n = spent + min(epochs * run.arm.networks, run.cost)
                bar.refresh()

            try:
                row, curve = carry_out(
                    run, folder, keep_checkpoints=plan.keep_checkpoints, on_epochs=show
                )
            except StoppedError as error:
                cause = str(error).partition(";")[0]  # "stopped by SIGTERM"
                raise StoppedError(
                    f"{cause} in {run}, after {number - 1} of {len(runs)} runs ({title}); the same "
                    "command goes on from there"
                ) from error
            results.add(row, curve)
            spent += run.cost
            bar.n = spent
            line = f"{title} {number}/{len(runs)}: {run}: {_told(row)}"
            if number < len(runs):
                remaining = (time.monotonic() - began) * (total / spent - 1)
                line += f"; about {tqdm.format_interval(remaining)} left"
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()


def _told(row: Row) -> str:
    if row.status == "failed":
        return f"failed: {row.error}"
    return f"{row.outcomes['largest_lr_member']:.2f} % ({row.split}), {row.wall_seconds:.0f} s"


def _report(plan: Plan, results: Results, folder: Path) -> str:
    state: State = state_of(plan, results.rows)
    sentences = write_report(state, results, read_history(folder), folder)
    return "\n".join([*sentences, f"report: {folder / 'report.html'}"])


def _refuse_another(plan: Plan, folder: Path) -> None:
    history = read_history(folder)
    if not history:
        raise RunDirectoryError(f"{folder} holds no comparison to report on")
    if history[-1].plan_sha256 != sha_of(plan):
        raise ConfigError(
            f"{folder} holds a comparison of another plan (see {folder / 'plan.yaml'}): run this "
            "one first, without --report_only"
        )


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Refuse to work in a folder that another process is working in."""
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunDirectoryError(
                f"another comparison is running in {folder}: wait for it, or choose another --out"
            ) from error
        yield
