"""Report of a comparison: conclusions, tables and plots, as Markdown and HTML."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from dist_graft.plot_style import png
from dist_graft.run_directory import flatten, git_commit, write_atomically
from dist_graft.studies import measured_sections as sections
from dist_graft.studies import plots
from dist_graft.studies.checks import check_arms
from dist_graft.studies.conclusions import (
    conclusion,
    digits_for,
    format_cell,
    format_interval,
    format_p,
    format_signed,
    format_spread,
    is_equivalent,
    overall_conclusions,
    qualified_verdict,
    under_trained_sizes,
)
from dist_graft.studies.controls import Design
from dist_graft.studies.plan import plan_text
from dist_graft.studies.records import Results, Start, awaits_repetition, plan_sha256
from dist_graft.studies.rendering import (
    Block,
    Code,
    Heading,
    Items,
    Paragraph,
    Picture,
    Table,
    to_html,
    to_markdown,
)
from dist_graft.studies.selection import StudyState, Trial, gain, mean_outcome
from dist_graft.studies.statistics import (
    ALPHA,
    POWER,
    ArmResult,
    ContrastResult,
    arm_result,
    contrast_results,
)
from dist_graft.studies.train_options import TrainOptions, format_options

PRIMARY_TEXTS = {
    "delivered": "test accuracy of the delivered model",
    "mean_of_members": "mean test accuracy of the members",
    "ensemble": "test accuracy of the members' ensemble",
    "uniform_soup": "test accuracy of the members' uniform soup",
}
_OUTCOME_HEADERS = {
    "delivered": "delivered",
    "largest_lr_member": "largest lr",
    "mean_of_members": "mean of members",
    "ensemble": "ensemble",
    "uniform_soup": "uniform soup",
    "uniform_soup_as_is": "uniform soup, batch norm averaged",
    "greedy_soup": "greedy soup",
}
_FILTER_HEADERS = {"invalid_0.1": "L1 norm below 0.1", "invalid_0.01": "L1 norm below 0.01"}

STATISTICS_TEXT = (
    "The sampling unit is the seed, because the networks of a population are not independent. Each "
    "difference is between two runs with the same seed. Intervals are unadjusted 95% t-intervals "
    "of the mean difference. p is the p-value of a two-sided paired t-test with Holm's correction "
    "within its table, so the probability of any false difference in a table is at most "
    f"{ALPHA:.0%}, if seeds and arms were not changed after results were seen. A difference is "
    f"shown if p is below {ALPHA:g}; an interval that excludes zero is not enough. Arms that were "
    "not tested stay in the correction. Two arms are equivalent if "
    "two one-sided t-tests show, each at 5% and unadjusted, that their difference is within "
    "the smallest effect of interest, which the plan fixes. The minimum detectable difference is "
    "the true difference that this number of seeds would show, after the correction, with a "
    f"probability of {POWER:.0%}, given the observed spread. Runs that diverged count as chance "
    "accuracy."
)

_CHOSEN_RATES_TEXT = (
    " The learning rates were chosen once, before the test runs: intervals and p-values do not "
    "cover that choice."
)


def write_report(name: str, blocks: Sequence[Block], out: Path) -> None:
    """Write report.html, report.md and pictures/ from the blocks of `build_report`."""
    for block in blocks:
        if isinstance(block, Picture):
            write_atomically(out / "pictures" / f"{block.name}.png", block.png)
    write_atomically(out / "report.md", to_markdown(blocks).encode())
    write_atomically(out / "report.html", to_html(f"Comparison {name}", blocks).encode())


def build_report(
    state: StudyState, results: Results, starts: Sequence[Start]
) -> tuple[list[Block], list[str]]:
    """Return the blocks of the report and its conclusions."""
    plan, rows = state.confirmed, results.rows
    title = Heading(1, f"Comparison: {plan.name}")
    changes, unused = sections.of_earlier_plans(state, results, starts, plan.primary)
    if state.design is None:
        text = "No conclusion yet: the trials on the validation split have not finished, or failed."
        blocks = [title, Paragraph(text, "summary"), *_items(changes), *unused]
        blocks += sections.superseded(results, plan.primary)
        blocks += [*_regime_search(state, rows), *_learning_rate_search(state)]
        return [*blocks, *_details(state, results, starts)], [text, *changes]

    arms = [arm_result(arm, plan.test_seeds, rows) for arm in state.design.arms]
    checks = check_arms(state.design, arms, results.curves, plan.primary, state.at_edge)
    margin = plan.smallest_effect
    failed = {arm.key: check.not_tested for arm, check in checks if check.not_tested}
    weak = [arm.key for arm, check in checks if check.weak]
    primary, secondary = (
        contrast_results(contrasts, plan.test_seeds, rows, margin=margin, failed=failed, weak=weak)
        for contrasts in (state.design.primary, state.design.secondary)
    )
    first, *others = overall_conclusions(primary, secondary)
    short = under_trained_sizes([*primary, *secondary])
    sentences = [
        conclusion(result, under_trained=result.contrast.method.group in short)
        for result in primary
    ]
    missing = _completeness(state, arms, results, starts)
    blocks = [
        title,
        *(Paragraph(text) for text in missing),
        Paragraph(first, "summary"),
        *_items([*others, *changes]),
        Heading(2, "Setting"),
        *sections.setting(state, arms, starts),
        Heading(2, "Comparisons with the plan's control"),
        Items([*sentences, *state.warnings]),
        *sections.check_section(checks),
        *_primary_outcome(plan.primary, state.design, arms, primary),
        *_other_controls(state, secondary),
        *_shared_runs(primary, secondary),
        *unused,
        *sections.superseded(results, plan.primary),
        *_learning_curves(state, arms, results),
        *_other_outcomes(arms),
        *sections.calibration(arms),
        *sections.differences_between_networks(arms),
        *sections.coefficients(arms),
        *_invalid_filters(arms),
        *sections.costs(arms),
        *sections.beside_published(primary),
        *_regime_search(state, rows),
        *_learning_rate_search(state),
        *_details(state, results, starts),
    ]
    return blocks, [*missing, first, *others, *changes, *sentences]


def _items(texts: Sequence[str]) -> list[Block]:
    return [Items(texts)] if texts else []


def _join(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


# Results


def _completeness(
    state: StudyState, arms: Sequence[ArmResult], results: Results, starts: Sequence[Start]
) -> list[str]:
    """What is missing, in one sentence or two; [] if nothing is."""
    succeeded, failed, missing = (
        sum(len(getattr(arm, kind)) for arm in arms) for kind in ("rows", "failed", "missing")
    )
    repeated = [run for run in state.comparison_runs if awaits_repetition(run, results, starts)]
    assert state.design is not None
    unknown = list(dict.fromkeys(state.design.without_rate))
    if not (failed or missing or unknown or repeated):
        return []
    text = f"{succeeded} of {succeeded + failed + missing} runs succeeded"
    if failed:
        text += f", {failed} failed (listed below, their seeds are excluded)"
    if missing:
        text += f", {missing} have not finished"
    if repeated:
        names = "; ".join(dict.fromkeys(run.arm.label for run in repeated))
        text += f", {len(repeated)} are still to be repeated, and count as they were ({names})"
    if unknown:
        text += f", arms without a learning rate are missing ({'; '.join(unknown)})"
    return [
        f"This report is incomplete: {text}. Its conclusions are interim: p-values hold for a "
        "number of seeds, and of arms, that does not depend on results."
    ]


def _contrast_table(results: Sequence[ContrastResult]) -> Table:
    rows = []
    for result in results:
        digits = 2 if result.half_width is None else digits_for(result.half_width)
        equivalent = "–"
        if result.equivalence_p is not None and not result.not_tested:
            word = "shown" if is_equivalent(result) else "not shown"
            equivalent = f"{word} ({format_p(result.equivalence_p)})"
        rows.append(
            (
                result.contrast.method.label,
                result.contrast.control_name,
                format_interval(result) if result.test.n else "–",
                str(result.test.n),
                "–" if result.test.p is None else format_p(result.decision.adjusted_p),
                equivalent,
                format_cell(result.detectable, digits),
                qualified_verdict(result),
            )
        )
    margin = f"within ±{results[0].margin:g} (p)" if results else "equivalent (p)"
    header = ("method", "control", "difference", "n", "p (Holm)", margin)
    return Table((*header, "min. detectable", "conclusion"), rows)


def _shared_runs(
    primary: Sequence[ContrastResult], secondary: Sequence[ContrastResult]
) -> list[Block]:
    """Name the arms whose runs are in both tables."""
    first, second = (
        {arm.label for r in results for arm in (r.contrast.method, r.contrast.control)}
        for results in (primary, secondary)
    )
    if not (shared := sorted(first & second)):
        return []
    text = f"Both tables use the same runs of: {'; '.join(shared)}. Their rows are not independent."
    return [Paragraph(text, "small")]


def _primary_outcome(
    outcome: str, design: Design, arms: Sequence[ArmResult], primary: Sequence[ContrastResult]
) -> list[Block]:
    text = PRIMARY_TEXTS[outcome]
    if outcome != "ensemble":
        arms = [arm for arm in arms if arm.arm.delivers != "snapshots"]
    names = [design.outcome_of(arm.arm, outcome) for arm in arms]
    values = [(arm, arm.values(name)) for arm, name in zip(arms, names, strict=True)]
    others = [arm.arm.label for arm, name in zip(arms, names, strict=True) if name != outcome]
    table = Table(
        ("arm", "role", "mean ± std", "n", "each seed"),
        [
            (
                arm.arm.label,
                arm.arm.role,
                format_spread(by_seed),
                str(len(by_seed)),
                " ".join(f"{value:.2f}" for value in by_seed),
            )
            for arm, by_seed in values
        ],
    )
    blocks: list[Block] = [
        Heading(2, "Primary outcome"),
        Paragraph(
            f"Fixed before the first run: {text}, in percent, after the last epoch and the last "
            "round. Differences are between runs with the same seed, in percentage points, with "
            "the half-width of their unadjusted 95% interval."
        ),
        _contrast_table(primary),
        Picture(
            "differences", png(plots.differences(primary)), f"Difference to the control, {text}."
        ),
        table,
        Picture(
            "primary",
            png(plots.seeds(arms, names, f"{text} (%)")),
            f"{text.capitalize()}, after the last round.",
        ),
    ]
    if others:
        note = f"Judged, and shown here, by the model that they deliver: {'; '.join(others)}."
        blocks.append(Paragraph(note, "small"))
    aliases = [
        f"{arm.label} is also {', '.join(design.aliases[arm.key])}"
        for arm in design.arms
        if arm.key in design.aliases
    ]
    if aliases:
        text = f"Arms that train identically are run once: {'; '.join(aliases)}."
        blocks.append(Paragraph(text, "small"))
    if design.omitted:
        blocks += [Paragraph("Controls that were not run:"), Items(design.omitted)]
    return blocks


def _other_controls(state: StudyState, secondary: Sequence[ContrastResult]) -> list[Block]:
    if not secondary:
        return []
    tuned = " Learning rates were chosen for the delivered model." if state.trials else ""
    return [
        Heading(2, "Other controls"),
        Paragraph(
            "The same outcome compared with the other controls, such as K times the epochs, or "
            "coefficients that ignore the layer (constant: 1/2; shuffled: those of other layers). "
            "An ensemble averages the predictions of its K networks, at K times the inference "
            f"cost.{tuned} Holm's correction is over this table, separately from the table above."
        ),
        _contrast_table(secondary),
    ]


def _learning_curves(state: StudyState, arms: Sequence[ArmResult], results: Results) -> list[Block]:
    primary = state.confirmed.primary
    outcome = primary if primary in results.curves else "mean_of_members"
    label = "test accuracy (%)"
    pictures: list[Block] = []
    for networks in state.confirmed.networks:
        group = [arm for arm in arms if arm.arm.group == networks and len(arm.rows)]
        shown = [
            arm
            for arm in group
            if arm.arm.networks == networks
            and arm.arm.config(0).epochs == arms[0].arm.config(0).epochs
        ]
        if shown:
            figure = plots.learning_curves(shown, results.curves, outcome, label)
            name = f"curves_{networks}_networks"
            caption = f"Learning curves, population size {networks}."
            pictures.append(Picture(name, png(figure), caption))
        if group:
            figure = plots.accuracy_by_cost(group, results.curves, outcome, label)
            name = f"cost_curves_{networks}_networks"
            caption = (
                f"Accuracy by images seen and by wall time, population size {networks}, with the "
                "controls that train longer. The epochs of all networks of an arm are taken to be "
                "equally long."
            )
            if any(arm.arm.teachers for arm in group):
                caption += " A distilled network begins at the cost of its teachers."
            pictures.append(Picture(name, png(figure), caption))
    if not pictures:
        return []
    what = "Accuracy" if outcome == primary else "Mean accuracy of the members"
    return [
        Heading(2, "Learning curves"),
        Paragraph(
            f"{what} at the end of each epoch, before its round: mean over the seeds, with a band "
            "of one standard deviation."
            f"{sections.without_average([arm for arm in arms if len(arm.rows)])}"
        ),
        *pictures,
    ]


def _other_outcomes(arms: Sequence[ArmResult]) -> list[Block]:
    populations = [
        arm
        for arm in arms
        if len(arm.rows) and (arm.arm.networks > 1 or arm.arm.delivers == "snapshots")
    ]
    headers = dict(_OUTCOME_HEADERS)
    rates = [set(cell.split()) for arm in populations for cell in arm.rows["learning_rates"]]
    if all(len(of_run) < 2 for of_run in rates):
        del headers["largest_lr_member"]  # any of the members
    measured = [name for name in headers if any(len(arm.values(name)) for arm in populations)]
    if not measured:
        return []
    plotted = [name for name in plots.OUTCOME_STYLES if name in measured]
    picture = (
        Picture(
            "outcomes",
            png(plots.outcomes(populations, plotted, "test accuracy (%)")),
            "Single networks, ensembles and soups; bars are one standard deviation. A number at "
            "the left edge is the accuracy of a soup far below the axis.",
        )
        if any("soup" not in name for name in plotted)
        else None
    )
    return [
        Heading(2, "Members, ensembles and soups"),
        Paragraph(
            "Secondary outcomes: test accuracy in percent, mean ± standard deviation over the "
            "seeds. An ensemble averages the members' predicted probabilities; a snapshot "
            "ensemble, those of one network's checkpoints. A soup is one "
            "network with the average of the members' weights; its batch norm statistics are "
            "re-estimated on training images unless noted otherwise."
        ),
        Table(
            ("arm", *(headers[name] for name in measured)),
            [
                (arm.arm.label, *(format_spread(arm.values(name)) for name in measured))
                for arm in populations
            ],
        ),
        *([picture] if picture else []),
    ]


def _invalid_filters(arms: Sequence[ArmResult]) -> list[Block]:
    arms, left_out = sections.without_diverged(arms)
    counted = [(arm, rows) for arm in arms if len(rows := arm.rows[arm.rows["filters"] > 0])]
    if not counted:
        return []
    table = [
        (
            arm.arm.label,
            *(format_spread(100 * rows[name] / rows["filters"], 1) for name in _FILTER_HEADERS),
            _join(sorted(set(rows["filters"]))),
        )
        for arm, rows in counted
    ]
    headers = [f"{text}, %" for text in _FILTER_HEADERS.values()]
    return [
        Heading(2, "Invalid filters"),
        Paragraph(
            "Percentage of filters whose L1 norm is below a threshold after the training: mean ± "
            "standard deviation over the seeds. The filters of all members are counted; in rows "
            "of an earlier version, those of the member with the largest learning rate."
            f"{left_out}"
        ),
        Table(("arm", *headers, "filters counted"), table),
        Picture(
            "filters",
            png(plots.invalid_filters([arm for arm, _ in counted], _FILTER_HEADERS)),
            "Share of invalid filters.",
        ),
    ]


# Choices made on a validation split


def _regime_search(state: StudyState, rows: pd.DataFrame) -> list[Block]:
    if not state.regimes:
        return []
    search, primary = state.plan.search, state.plan.primary
    table = []
    for regime in state.regimes:
        test = gain(regime, rows, primary)
        spread = "" if test.deviation is None else f" ± {test.deviation:.2f}"
        table.append(
            (
                regime.recipe,
                format_options(search.recipes[regime.recipe] or {}),
                str(regime.networks),
                regime.method,
                format_cell(mean_outcome(regime.trial.best_runs, rows, primary)),
                format_cell(mean_outcome(regime.reference.best_runs, rows, primary)),
                f"{format_signed(test.mean)}{spread}" if test.n else "–",
                str(test.n),
                "chosen" if regime is state.chosen else "",
            )
        )
    header = (
        *("regime", "options", "networks", "method", "method, %", "best reference, %"),
        *("gain ± std", "n", ""),
    )
    return [
        Heading(2, "Regime search"),
        Paragraph(
            f"All regimes of the search, on a validation split, with seeds {_join(search.seeds)}. "
            "The gain is over the better of independent networks and, for methods that exchange, "
            "constant coefficients, all at their best learning rates. "
            "Test accuracies of these runs were not read. The regime with the largest mean gain "
            f"was trained again with seeds {_join(search.confirm_seeds)} and evaluated on the test "
            "set. The largest of many gains is biased upward, so only the results on the test set "
            "count."
        ),
        Table(header, table),
    ]


def _learning_rate_search(state: StudyState) -> list[Block]:
    if not state.trials:
        return []
    rates = sorted({rate for trial in state.trials for rate in trial.runs})
    table = [
        (
            trial.arm.label,
            *(_score(trial, rate) for rate in rates),
            f"{trial.best:.4g}" if trial.finished and trial.best is not None else "–",
        )
        for trial in state.trials
    ]
    seeds = state.plan.tuning_seeds
    word = "seed" if len(seeds) == 1 else "seeds"
    alone = [
        trial.arm.label
        for trial in state.trials
        if trial.arm.group > 1 and all(run.arm.networks == 1 for run in trial.all_runs)
    ]
    text = (
        "Every method and control tried the same learning rates, at its own length, with "
        f"{word} {_join(seeds)} (n = {len(seeds)}). The table has the mean accuracy of the "
        "delivered model in percent, on validation images that all arms of a seed share. A control "
        "of one network was tried with as many networks as the population has, all trained in "
        "the same way. While the best rate was the smallest or the largest, another one was added, "
        f"up to {state.plan.tuning.max_extensions} times. Test accuracies of these runs were not "
        "read."
    )
    if alone:
        text += f" Tried with one network only: {'; '.join(alone)}."
    return [
        Heading(2, "Learning rates"),
        Paragraph(text),
        Table(("arm", *(f"{rate:.4g}" for rate in rates), "chosen"), table),
    ]


def _score(trial: Trial, rate: float) -> str:
    if rate in trial.runs and trial.finished and rate not in trial.scores:
        return "failed"
    return format_cell(trial.scores.get(rate))


# Runs, statistics and provenance


def _details(state: StudyState, results: Results, starts: Sequence[Start]) -> list[Block]:
    keys = [run.key for run in state.all_runs if run.key in results.rows.index]
    rows = results.rows.loc[keys]
    blocks: list[Block] = []
    failed = rows[rows["status"] == "failed"]
    if len(failed):
        texts = [
            f"{row['arm']}, K = {row['networks']}, seed {row['seed']}: {row['error']}"
            for _, row in failed.iterrows()
        ]
        blocks += [Heading(2, "Failed runs"), Items(texts)]
    blocks += [
        Heading(2, "All runs"),
        Paragraph(
            "Accuracies are in percent; the column 'on' names the split, or says why there is no "
            "accuracy, and 'outcome' is the primary one. results.csv has the same runs with more "
            "columns, and curves.csv has their learning curves."
        ),
        Table(
            ("arm", "K", "seed", "on", "outcome", "each member", "ensemble", "core-s", "run"),
            [
                (
                    row["arm"],
                    str(row["networks"]),
                    str(row["seed"]),
                    row["split"] if row["status"] == "ok" else row["status"],
                    format_cell(row.get(state.plan.primary)),
                    " ".join(f"{float(member):.2f}" for member in row["members"].split()) or "–",
                    format_cell(row["ensemble"]),
                    f"{row['core_seconds']:.1f}",
                    str(key),
                )
                for key, row in rows.iterrows()
            ],
            dense=True,
        ),
        Heading(2, "Statistics"),
        Paragraph(STATISTICS_TEXT + (_CHOSEN_RATES_TEXT if state.trials else "")),
    ]
    if state.design:
        options = [
            (arm.label, format_options(_beyond_recipe(arm.options, state)))
            for arm in state.design.arms
        ]
        blocks += [Heading(2, "Options on top of the recipe"), Table(("arm", "options"), options)]
    return blocks + _provenance(state, rows, starts)


def _beyond_recipe(options: TrainOptions, state: StudyState) -> TrainOptions:
    recipe = dict(flatten(state.confirmed.recipe))
    return {name: value for name, value in flatten(options) if recipe.get(name, ...) != value}


def _provenance(state: StudyState, rows: pd.DataFrame, starts: Sequence[Start]) -> list[Block]:
    sha256 = plan_sha256(state.plan)
    lines = [f"plan: sha256 {sha256} of plan.yaml"]
    first = next((start for start in starts if start.plan_sha256 == sha256), None)
    if first:
        before = "the first run"
        if first.runs_before:
            before = f"the remaining runs, {first.runs_before} existed"
        lines.append(f"plan fixed: {first.time}, before {before}")
    own = max((n for n, start in enumerate(starts) if start.plan_sha256 == sha256), default=-1)
    others = {start.plan_sha256: n for n, start in enumerate(starts) if start.plan_sha256 != sha256}
    lines += [
        f"{'earlier' if n < own else 'later'} plan: sha256 {other}, last started {starts[n].time}"
        for other, n in others.items()
    ]
    for name, values in (
        ("command", [start.command for start in starts]),
        ("hardware", [start.hardware for start in starts]),
        (
            "versions of the comparison",
            [" ".join(f"{n} {v}" for n, v in start.versions.items()) for start in starts],
        ),
        ("commit of the report", [git_commit()]),
        ("commit of the comparison", [start.commit for start in starts]),
        ("versions of the runs", rows["versions"]),
        ("commit of the runs", rows["commit"]),
    ):
        lines += [f"{name}: {value}" for value in dict.fromkeys(values) if value]
    wall, cores = rows["wall_seconds"].sum() / 3600, rows["core_seconds"].sum() / 3600
    lines.append(f"total training time: {wall:.2f} h, {cores:.2f} core-hours")
    return [Heading(2, "Provenance"), Items(lines), Code(plan_text(state.plan))]
