"""The report's second half: what was chosen beforehand, every run, and how it was all done."""

from __future__ import annotations

from collections.abc import Sequence

from dist_graft.studies.history import Entry, sha_of
from dist_graft.studies.lines import Rows
from dist_graft.studies.overrides import Options, flat, population_part, short
from dist_graft.studies.plan import plan_text
from dist_graft.studies.render import (
    Block,
    Code,
    Heading,
    Items,
    Paragraph,
    Table,
)
from dist_graft.studies.results import Results, Row
from dist_graft.studies.selection import gain, mean_outcome
from dist_graft.studies.state import State
from dist_graft.studies.statistics import ALPHA, POWER
from dist_graft.studies.verdict import signed

STATISTICS_TEXT = (
    "The unit is the seed: networks of one population are not independent of each other. A "
    "difference is taken between two runs of one seed, which share first weights, data orders and "
    "augmentation; p is that of the two-sided paired t-test, corrected after Holm over its table, "
    f"so that the chance of any false difference in a table is at most {ALPHA:.0%}. The interval "
    "of a line is the t-interval at the level that Holm's procedure held the line against: it "
    "excludes zero exactly when the difference is shown. The difference that could have been shown "
    "is the true difference that as many seeds with the observed spread would have shown with a "
    f"chance of {POWER:.0%}. There is no bootstrap: with few seeds it claims too much."
)


def chosen_beforehand(state: State, rows: Rows) -> list[Block]:
    """Every regime and every learning rate that was tried, on validation images."""
    return _regimes(state, rows) + _learning_rates(state, rows)


def _regimes(state: State, rows: Rows) -> list[Block]:
    if not state.regimes:
        return []
    lines = []
    for regime in state.regimes:
        result = gain(regime, rows, state.plan.primary)
        means = [
            mean_outcome(runs, rows, state.plan.primary)
            for runs in (regime.runs, regime.control_runs)
        ]
        spread = "" if result.deviation is None else f" ± {result.deviation:.2f}"
        lines.append(
            (
                regime.recipe,
                short(state.plan.search.recipes[regime.recipe] or {}),
                str(regime.networks),
                regime.method,
                *("–" if mean is None else f"{mean:.2f}" for mean in means),
                f"{signed(result.mean)}{spread}" if result.n else "–",
                str(result.n),
                "chosen" if regime is state.chosen else "",
            )
        )
    header = (
        *("regime", "options", "networks", "method", "with exchange, %", "without, %"),
        *("gain ± std", "n", ""),
    )
    return [
        Heading(2, "Regimes that were tried"),
        Paragraph(
            f"All of them, on a validation split, with seeds {_numbers(state.plan.search.seeds)}; "
            "test accuracies of these runs were not read. The one with the largest mean gain was "
            f"trained anew with seeds {_numbers(state.plan.search.confirm_seeds)}, and only that "
            "was tested. A gain that was picked out of many is too large by chance: what counts is "
            "the confirmation above."
        ),
        Table(header, lines),
    ]


def _learning_rates(state: State, rows: Rows) -> list[Block]:
    if not state.design:
        return []
    heading = Heading(2, "Best learning rate of a single network")
    if not state.candidates:
        rates = sorted({f"{rate:.4g}" for rate in state.best_lr.values() if rate})
        named = state.plan.best_lr.value is not None
        why = "as the plan names it" if named else "the only one that a network of the plan has"
        return [heading, Paragraph(f"{', '.join(rates)}: {why}. Nothing was tried.")]
    lines = []
    for candidate in state.candidates:
        mean = mean_outcome(candidate.runs, rows, "largest_lr_member")
        best = state.best_lr[candidate.trial.key] == candidate.lr
        lines.append(
            (
                short(_beyond(population_part(candidate.trial.options), state)),
                f"{candidate.lr:.4g}",
                "–" if mean is None else f"{mean:.2f}",
                "chosen" if best else "",
            )
        )
    return [
        heading,
        Paragraph(
            "Chosen by the mean validation accuracy after the last epoch, with seeds "
            f"{_numbers(state.plan.lr_seeds)}; test accuracies of these runs were not read."
        ),
        Table(("one network, trained with", "learning rate", "validation accuracy, %", ""), lines),
    ]


def appendix(state: State, results: Results, history: Sequence[Entry]) -> list[Block]:
    """Failures, all runs, statistics, provenance, the plan."""
    rows = [results.rows[run.key] for run in state.all_runs if run.key in results.rows]
    failed = [row for row in rows if row.status == "failed"]
    blocks: list[Block] = []
    if failed:
        blocks += [
            Heading(2, "Runs that failed"),
            Items(
                [f"{row.arm}, K = {row.networks}, seed {row.seed}: {row.error}" for row in failed]
            ),
        ]
    blocks += [
        Heading(2, "Every run"),
        Paragraph(
            "Accuracies in percent, of the test set or, where it says so, of a validation split. "
            "The same with more columns is in results.csv, learning curves in curves.csv."
        ),
        Table(
            (
                "trained",
                "K",
                "seed",
                "on",
                "largest lr",
                "each member",
                "ensemble",
                "core-s",
                "run",
            ),
            [_run_cells(row) for row in rows],
            dense=True,
        ),
        Heading(2, "Statistics"),
        Paragraph(STATISTICS_TEXT),
    ]
    return blocks + _options(state) + _provenance(state, rows, history)


def _options(state: State) -> list[Block]:
    """What each arm sets beyond the recipe."""
    if not state.design:
        return []
    rows = [(arm.label, short(_beyond(arm.options, state))) for arm in state.design.arms]
    return [Heading(2, "Options beyond the recipe"), Table(("trained", "options"), rows)]


def _beyond(options: Options, state: State) -> Options:
    recipe = dict(flat(state.confirmed.recipe))
    return {name: value for name, value in flat(options) if recipe.get(name, ...) != value}


def _run_cells(row: Row) -> tuple[str, ...]:
    values = [row.outcomes.get(name) for name in ("largest_lr_member", "ensemble")]
    primary, ensemble = ("–" if value is None else f"{value:.2f}" for value in values)
    return (
        row.arm,
        str(row.networks),
        str(row.seed),
        row.split if row.status == "ok" else "failed",
        primary,
        " ".join(f"{member:.2f}" for member in row.members) or "–",
        ensemble,
        f"{row.core_seconds:.1f}",
        row.key,
    )


def _provenance(state: State, rows: Sequence[Row], history: Sequence[Entry]) -> list[Block]:
    facts = [f"plan: sha256 {sha_of(state.plan)} of plan.yaml"]
    begun = next((e for e in history if e.plan_sha256 == sha_of(state.plan)), None)
    if begun:
        facts.append(
            f"fixed: {begun.time}, before "
            + ("anything ran" if begun.runs_before == 0 else "the rest ran")
        )
    replaced = {e.plan_sha256: e for e in history if e.plan_sha256 != sha_of(state.plan)}
    facts += [
        f"an earlier plan, sha256 {entry.plan_sha256}, was fixed {entry.time} and replaced"
        for entry in replaced.values()
    ]
    if begun and begun.runs_before:
        facts.append(f"{begun.runs_before} runs were there when this plan took its place")
    facts += _several("command", [entry.command for entry in history])
    facts += _several("hardware", [entry.hardware for entry in history])
    facts += _several(
        "this program", [" ".join(f"{n} {v}" for n, v in e.versions.items()) for e in history]
    )
    facts += _several("runs made with", [row.versions for row in rows if row.versions])
    facts += _several("commit of the runs", [row.commit for row in rows if row.commit])
    hours = sum(row.wall_seconds for row in rows) / 3600
    cores = sum(row.core_seconds for row in rows) / 3600
    facts.append(f"time of all trainings: {hours:.2f} h, {cores:.2f} core-hours")
    return [
        Heading(2, "How this was made"),
        Items(facts),
        Code(plan_text(state.plan)),
    ]


def _several(name: str, values: Sequence[str]) -> list[str]:
    return [f"{name}: {value}" for value in dict.fromkeys(values)]


def _numbers(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))
