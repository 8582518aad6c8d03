"""Run a comparison: searches, training runs, report."""

from __future__ import annotations

import fcntl
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from dist_graft.errors import ConfigError, DistGraftError, RunDirectoryError, StoppedError
from dist_graft.population.runtime.process import stop_on_signals
from dist_graft.studies.controls import Run, build_design
from dist_graft.studies.execution import Row, execute_run
from dist_graft.studies.plan import PILOT_SEEDS, Plan
from dist_graft.studies.records import (
    COUNTED,
    Results,
    awaits_repetition,
    plan_sha256,
    read_starts,
    record_start,
    repetitions,
)
from dist_graft.studies.report import build_report, write_report
from dist_graft.studies.selection import StudyState, study_state
from dist_graft.studies.statistics import (
    ALPHA,
    arm_result,
    paired_test,
    seeds_needed,
    upper_limit,
)


class FailedRunsError(DistGraftError):
    """The comparison has finished, but some of its runs failed."""


def compare(
    plan: Plan,
    folder: Path,
    *,
    report_only: bool = False,
    pilot: bool = False,
    redo: str = "",
    reason: str = "",
) -> str:
    """Run a plan, resuming where an earlier call stopped, and write its report.

    Args:
        plan: as `load_plan` returns it.
        folder: output directory.
        report_only: report on the existing rows without running anything. Allowed while another
            process runs the comparison.
        pilot: train only the first seeds of the first primary pair, and return the number of seeds
            that the plan needs instead of a report.
        redo: name of an arm whose runs on the test set are repeated. The new rows supersede the old
            ones, which are kept, as are the run directories.
        reason: why they are repeated; required with `redo`.

    Returns: the conclusions and the path of the report.

    Raises: StoppedError on a signal; the next call resumes. FailedRunsError if runs failed; the
    report is written first. ConfigError if a part of the plan changed that must stay fixed, for an
    unknown arm, or if only one of `redo` and `reason` is given.
    """
    reason = " ".join(reason.split())
    require_reason(redo, reason)
    if report_only:
        _require_same_plan(plan, folder)
        return _report(plan, Results(folder), folder)
    folder.mkdir(parents=True, exist_ok=True)
    stop_on_signals()
    with _lock(folder):
        results = Results(folder)
        rows = results.rows
        done = rows[rows["phase"] == "comparison"]
        tested = not done.empty
        state = study_state(plan, rows)
        if tested and any(run.key not in rows.index for run in state.search_runs):
            raise ConfigError(
                f"search must not grow after its result in {folder} was tested: choose new seeds "
                "and another directory with --out"
            )
        if redo:
            _require_arm(redo, state)
        record_start(
            plan,
            folder,
            runs_before=len(rows),
            tests_before=len(done),
            command=["dist-graft", *sys.argv[1:]],
            pilot=pilot,
            redo=redo,
            reason=reason,
        )
        study = _Study(plan, folder, results, pilot=pilot)

        # Choose the regime, then the learning rates, then run what is measured on the test set.
        study.run_all("search", lambda state: state.search_runs, retry=not tested)
        judged = set(zip(done["arm"], done["networks"], strict=True))
        for _ in range(2):  # a second chance for a failed trial: none is repeated after a test
            study.run_all("tuning", lambda state: state.trial_runs(exclude=judged))
        study.run_all("tuning", lambda state: state.tuning_runs, retry=False)
        if study.state.design is None:
            raise FailedRunsError(
                "every regime of the search, or every trial of each method, has failed runs, see "
                f"{folder / 'results.csv'}: rerun the command to retry them"
            )
        if pilot:
            study.run_all("pilot", lambda state: state.pilot_runs)
            runs = [*study.state.tuning_runs, *study.state.pilot_runs]
            text = pilot_text(study.state, results)
        else:
            study.run_all("comparison", lambda state: state.comparison_runs)
            runs = study.state.all_runs
            text = _report(plan, results, folder)

    rows = results.rows.loc[[run.key for run in runs]]
    failed = rows[rows["status"] == "failed"]
    if len(failed):
        print(text)
        what = "rerun the command to retry them"
        if (failed["phase"] != "comparison").any() and not pilot:
            what += ", except those on a validation split whose result has been used in a test"
        raise FailedRunsError(
            f"{len(failed)} of {len(rows)} runs failed, the first with: {failed['error'].iloc[0]}; "
            f"see {folder / 'results.csv'}, and {what}"
        )
    return text


class _Study:
    """Executes the runs of a plan that have no results yet, and records them."""

    def __init__(self, plan: Plan, folder: Path, results: Results, *, pilot: bool) -> None:
        self._plan = plan
        self._folder = folder
        self._results = results
        self._pilot = pilot
        self._starts = read_starts(folder)

    @property
    def state(self) -> StudyState:
        """Choices so far, and the runs that the plan needs."""
        return study_state(self._plan, self._results.rows, pilot=self._pilot)

    def run_all(
        self, title: str, runs_of: Callable[[StudyState], Sequence[Run]], *, retry: bool = True
    ) -> None:
        """Execute the runs one at a time, and those that their results make necessary.

        Args:
            title: of the phase.
            runs_of: the runs of the phase.
            retry: also retry failed runs. Choices for an arm must not change after its test.
        """
        attempted: set[str] = set()
        while runs := [
            run
            for run in runs_of(self.state)
            if run.key not in attempted and self._is_due(run, retry=retry)
        ]:
            self._execute(title, runs, len(runs_of(self.state)))
            attempted |= {run.key for run in runs}

    def _is_due(self, run: Run, *, retry: bool) -> bool:
        if run.key not in self._results.rows.index:
            return True
        if awaits_repetition(run, self._results, self._starts):
            return True
        return retry and not self._results.succeeded(run.key)

    def _execute(self, title: str, runs: Sequence[Run], count: int) -> None:
        """Execute runs and record each as it ends."""
        done, start = count - len(runs), time.monotonic()
        total = sum(run.cost for run in runs)
        finished = 0
        bar: tqdm[Any]
        with tqdm(total=total, desc=title, unit="epoch", disable=None, dynamic_ncols=True) as bar:
            for number, run in enumerate(runs, start=done + 1):
                bar.set_postfix_str(f"run {number} of {count}: {run}")
                if number == done + 1:
                    _print(f"{title} {number}/{count}: {run}: started")

                def show(done: int, run: Run = run, finished: int = finished) -> None:
                    bar.n = finished + min(done, run.cost)
                    bar.refresh()

                repeated = repetitions(run, self._starts)
                try:
                    row, curve = execute_run(
                        run,
                        self._folder,
                        keep_checkpoints=self._plan.keep_checkpoints,
                        on_progress=show,
                        repetition=len(repeated),
                    )
                except StoppedError as error:
                    cause = str(error).partition(";")[0]  # "stopped by SIGTERM"
                    raise StoppedError(
                        f"{cause} in {run}, after {number - 1} of {count} runs ({title}): rerun "
                        "the command to resume"
                    ) from error
                self._record(run, row, curve, repeated[-1].reason if repeated else "")
                finished += run.cost
                bar.n = finished
                line = (
                    f"{title} {number}/{count}: {run}: {_describe(row, accuracy=not self._pilot)}"
                )
                if finished < total:
                    seconds = (time.monotonic() - start) * (total / finished - 1)
                    line += f"; about {tqdm.format_interval(seconds)} left"
                _print(line)

    def _record(self, run: Run, row: Row, curve: pd.DataFrame | None, reason: str) -> None:
        """Append a row with its provenance, and why it supersedes another one if it does."""
        row |= {"plan_sha256": plan_sha256(self._plan), "reason": reason}
        rows = self._results.rows
        if run.key in rows.index:
            row["supersedes"] = rows.loc[run.key, "finished"]
            row["reason"] = reason or "the earlier attempt failed"
        self._results.add(row, curve)


def dry_run(plan: Plan, folder: Path) -> str:
    """Return the runs that a comparison would still train, in order, and the estimated hours.

    The estimate is from the finished runs of the folder. Runs that depend on results are not
    listed: those on the test set before the learning rates are chosen, for example.
    """
    results = Results(folder)
    state = study_state(plan, results.rows)
    starts = read_starts(folder)
    runs = [
        run
        for run in state.all_runs
        if not results.succeeded(run.key) or awaits_repetition(run, results, starts)
    ]
    seconds = _seconds_per_cost(state, results)
    lines = [f"{number}. {run.phase}: {run}" for number, run in enumerate(runs, start=1)]
    if not all(trial.finished for trial in state.trials):
        count = len(build_design(state.confirmed).arms) * len(plan.test_seeds)
        lines.append(f"then up to {count} runs on the test set, once the trials have finished")
    hours = "unknown, no run has finished"
    if seconds is not None:
        hours = f"{seconds * sum(run.cost for run in runs) / 3600:.2f} h"
    return "\n".join([*lines, f"{len(runs)} runs, estimated time: {hours}", *state.warnings])


def pilot_text(state: StudyState, results: Results) -> str:
    """Return what a pilot shows about the size of the comparison.

    The difference itself is not reported: the number of seeds must not depend on it.
    """
    assert state.design is not None
    if not state.design.primary:
        return f"no pair to compare: {'; '.join(state.design.omitted)}"
    contrast, plan = state.design.primary[0], state.plan
    seeds = plan.test_seeds[:PILOT_SEEDS]
    method = arm_result(contrast.method, seeds, results.rows).values(contrast.outcome)
    control = arm_result(contrast.control, seeds, results.rows).values(contrast.control_outcome)
    test = paired_test((method - control).dropna())
    names = f"{contrast.method.label}, compared with {contrast.control_name}"
    if test.deviation is None or test.n < 2:
        return f"{names}: no deviation, {test.n} seeds have both runs"
    declared = build_design(state.confirmed)
    arms, pairs = declared.arms, len(declared.primary)
    upper = upper_limit(test.n, test.deviation)
    needed, careful = (
        seeds_needed(deviation, plan.smallest_effect, alpha=ALPHA / pairs)
        for deviation in (test.deviation, upper)
    )
    cost = sum(Run(phase="comparison", arm=arm, seed=0).cost for arm in arms)
    lines = [
        f"{names}: the difference has a standard deviation of {test.deviation:.2f} points "
        f"over {test.n} seeds",
        f"seeds needed to show {plan.smallest_effect:g} points with a power of 80%, at "
        f"{ALPHA:g} / {pairs} (Holm's correction over the primary table): {needed} (the plan has "
        f"{len(plan.test_seeds)})",
        f"{test.n} seeds say little about the deviation: at its upper 80% confidence limit, "
        f"{upper:.2f} points, it takes {careful} seeds",
    ]
    if (seconds := _seconds_per_cost(state, results)) is not None:
        lines.append(
            f"estimated time of {needed} seeds of {len(arms)} arms, without trials: "
            f"{needed * cost * seconds / 3600:.2f} h"
        )
        if any(arm.networks == 1 for arm in arms):
            lines.append("epochs of one network alone may take longer than this estimate assumes")
    return "\n".join(lines)


def _seconds_per_cost(state: StudyState, results: Results) -> float | None:
    """Mean wall time of an epoch of a network over the plan's finished runs."""
    costs = {run.key: run.cost for run in (*state.all_runs, *state.pilot_runs)}
    rows = results.rows[results.rows["status"].isin(COUNTED) & results.rows.index.isin(list(costs))]
    cost = sum(costs[key] for key in rows.index)
    return float(rows["wall_seconds"].sum()) / cost if cost else None


def _print(line: str) -> None:
    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()


def _describe(row: Row, *, accuracy: bool) -> str:
    """Outcome of a run; without `accuracy` only its duration, as `pilot_text` explains."""
    if row["status"] == "failed":
        return f"failed: {row['error']}"
    seconds = f"{row['wall_seconds']:.0f} s"
    if not accuracy:
        return f"trained in {seconds}"
    diverged = ", diverged" if row["status"] == "diverged" else ""
    return f"{row['delivered']:.2f} % ({row['split']}{diverged}), {seconds}"


def _report(plan: Plan, results: Results, folder: Path) -> str:
    state = study_state(plan, results.rows)
    blocks, conclusions = build_report(state, results, read_starts(folder))
    write_report(plan.name, blocks, folder)
    return "\n".join([*conclusions, *state.warnings, f"report: {folder / 'report.html'}"])


def require_reason(redo: str, reason: str) -> None:
    """Raise ConfigError if only one of the two is given."""
    if bool(redo) != bool(reason):
        raise ConfigError("--redo and --reason belong together: name an arm, and give the reason")


def _require_arm(name: str, state: StudyState) -> None:
    arms = state.design.arms if state.design else []
    if not any(name in (arm.name, arm.label) for arm in arms):
        known = "; ".join(arm.label for arm in arms) or "none yet"
        raise ConfigError(f"--redo {name!r} is not an arm of the comparison, which has: {known}")


def _require_same_plan(plan: Plan, folder: Path) -> None:
    starts = read_starts(folder)
    if not starts:
        raise RunDirectoryError(f"{folder} has no comparison to report on")
    if all(start.is_pilot for start in starts):
        raise ConfigError(
            f"{folder} has a pilot only, whose accuracies must not be known before the number of "
            "seeds is fixed: fix it in the plan, and run the plan without --report_only"
        )
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
