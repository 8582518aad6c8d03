"""Run a comparison: searches, training runs, report."""

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
from dist_graft.studies.controls import Run
from dist_graft.studies.execution import Row, execute_run
from dist_graft.studies.plan import Plan
from dist_graft.studies.records import Results, plan_sha256, read_starts, record_start
from dist_graft.studies.report import build_report, write_report
from dist_graft.studies.selection import study_state


class FailedRunsError(DistGraftError):
    """The comparison has finished, but some of its runs failed."""


def compare(plan: Plan, folder: Path, *, report_only: bool = False) -> str:
    """Run a plan, resuming where an earlier call stopped, and write its report.

    Args:
        plan: as `load_plan` returns it.
        folder: output directory.
        report_only: report on the existing rows without running anything. Allowed while another
            process runs the comparison.

    Returns: the conclusions and the path of the report.

    Raises: StoppedError on a signal; the next call resumes. FailedRunsError if runs failed; the
    report is written first. ConfigError if a part of the plan changed that must stay fixed.
    """
    if report_only:
        _require_same_plan(plan, folder)
        return _report(plan, Results(folder), folder)
    folder.mkdir(parents=True, exist_ok=True)
    stop_on_signals()
    with _lock(folder):
        results = Results(folder)
        rows = results.rows
        tested = bool((rows["phase"] == "comparison").any())
        if tested and any(run.key not in rows.index for run in study_state(plan, rows).search_runs):
            raise ConfigError(
                f"search must not grow after its result in {folder} was tested: choose new seeds "
                "and another directory with --out"
            )
        record_start(plan, folder, runs_before=len(rows), command=["dist-graft", *sys.argv[1:]])

        # Choose the regime, then the learning rate, then run what is measured on the test set.
        runs = study_state(plan, results.rows).search_runs
        _run_all("search", runs, plan, results, folder, retry=not tested)
        state = study_state(plan, results.rows)
        if state.design is None:
            raise FailedRunsError(
                f"every regime of the search has failed runs, see {folder / 'results.csv'}: rerun "
                "the command to retry them"
            )
        _run_all("best lr", state.lr_runs, plan, results, folder, retry=not tested)
        runs = study_state(plan, results.rows).comparison_runs
        _run_all("comparison", runs, plan, results, folder)
        text = _report(plan, results, folder)

    rows = results.rows.loc[[run.key for run in study_state(plan, results.rows).all_runs]]
    failed = rows[rows["status"] == "failed"]
    if len(failed):
        print(text)
        raise FailedRunsError(
            f"{len(failed)} of {len(rows)} runs failed, the first with: {failed['error'].iloc[0]}; "
            f"see {folder / 'report.html'}, and rerun the command to retry them"
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
    """Execute the runs that have no results yet, one at a time, and record each as it ends.

    Args: retry: also retry failed runs. Choices made before a test must not change after it.
    """
    remaining = [
        run
        for run in runs
        if not results.succeeded(run.key) and (retry or run.key not in results.rows.index)
    ]
    if not remaining:
        return
    done, start = len(runs) - len(remaining), time.monotonic()
    total = sum(run.cost for run in remaining)
    finished = 0
    bar: tqdm[Any]
    with tqdm(total=total, desc=title, unit="epoch", disable=None, dynamic_ncols=True) as bar:
        for number, run in enumerate(remaining, start=done + 1):
            bar.set_postfix_str(f"run {number} of {len(runs)}: {run}")

            def show(epochs: int, run: Run = run, finished: int = finished) -> None:
                bar.n = finished + min(epochs * run.arm.networks, run.cost)
                bar.refresh()

            try:
                row, curve = execute_run(
                    run, folder, keep_checkpoints=plan.keep_checkpoints, on_epochs=show
                )
            except StoppedError as error:
                cause = str(error).partition(";")[0]  # "stopped by SIGTERM"
                raise StoppedError(
                    f"{cause} in {run}, after {number - 1} of {len(runs)} runs ({title}): rerun "
                    "the command to resume"
                ) from error
            results.add(row, curve)
            finished += run.cost
            bar.n = finished
            line = f"{title} {number}/{len(runs)}: {run}: {_describe(row)}"
            if number < len(runs):
                seconds = (time.monotonic() - start) * (total / finished - 1)
                line += f"; about {tqdm.format_interval(seconds)} left"
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()


def _describe(row: Row) -> str:
    if row["status"] == "failed":
        return f"failed: {row['error']}"
    return f"{row['largest_lr_member']:.2f} % ({row['split']}), {row['wall_seconds']:.0f} s"


def _report(plan: Plan, results: Results, folder: Path) -> str:
    state = study_state(plan, results.rows)
    blocks, conclusions = build_report(state, results, read_starts(folder))
    write_report(plan.name, blocks, folder)
    return "\n".join([*conclusions, f"report: {folder / 'report.html'}"])


def _require_same_plan(plan: Plan, folder: Path) -> None:
    starts = read_starts(folder)
    if not starts:
        raise RunDirectoryError(f"{folder} has no comparison to report on")
    if starts[-1].plan_sha256 != plan_sha256(plan):
        raise ConfigError(
            f"{folder} has the comparison of another plan, see {folder / 'plan.yaml'}: run this "
            "plan first, without --report_only"
        )


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Allow one process at a time to run a comparison in the directory."""
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunDirectoryError(
                f"another comparison is running in {folder}: wait for it, or choose another "
                "directory with --out"
            ) from error
        yield
