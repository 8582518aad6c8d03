"""Report of a comparison: conclusions, tables and plots, as Markdown and HTML."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from dist_graft.plot_style import png
from dist_graft.run_directory import flatten, write_atomically
from dist_graft.studies import plots
from dist_graft.studies.controls import Design
from dist_graft.studies.plan import plan_text
from dist_graft.studies.records import Results, Start, plan_sha256
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
from dist_graft.studies.selection import StudyState, gain, mean_outcome
from dist_graft.studies.statistics import (
    ALPHA,
    POWER,
    ArmResult,
    ContrastResult,
    arm_result,
    contrast_results,
    mean_and_deviation,
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
    "difference is between two runs with the same seed, which share initial weights, data order "
    "and augmentation. p is the p-value of a two-sided paired t-test with Holm's correction within "
    f"its table, so the probability of any false difference in a table is at most {ALPHA:.0%}. The "
    "confidence interval of a row is the t-interval at the level that Holm's procedure compared "
    "the row with: it excludes zero exactly if a difference is shown. The minimum detectable "
    "difference is the true difference that this number of seeds would show with a probability of "
    f"{POWER:.0%}, given the observed spread. There is no bootstrap, because its intervals are too "
    "narrow with few seeds."
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
    if state.design is None:
        text = "No conclusion yet: the trials on the validation split have not finished."
        blocks = [title, Paragraph(text, "summary"), *_regime_search(state, rows)]
        blocks += _learning_rate_search(state)
        return [*blocks, *_details(state, results, starts)], [text]

    arms = [arm_result(arm, plan.test_seeds, rows) for arm in state.design.arms]
    primary = contrast_results(state.design.primary, plan.test_seeds, rows)
    secondary = contrast_results(state.design.secondary, plan.test_seeds, rows)
    sentences = [*map(conclusion, primary), *caveats(primary, secondary)]
    blocks = [
        title,
        Paragraph(overall_conclusion(primary), "summary"),
        Items([*sentences, *state.warnings]),
        *_completeness(arms),
        *_primary_outcome(plan.primary, state.design, arms, primary),
        *_other_controls(secondary),
        *_learning_curves(state, arms, results),
        *_other_outcomes(arms),
        *_invalid_filters(arms),
        *_costs(arms),
        *_regime_search(state, rows),
        *_learning_rate_search(state),
        *_details(state, results, starts),
    ]
    return blocks, [overall_conclusion(primary), *sentences]


# Conclusions


def verdict(result: ContrastResult) -> str:
    """Return what a contrast shows, for a table cell."""
    if result.test.n < 2:
        return "no conclusion"
    if not result.decision.rejected:
        return "no difference shown"
    return "better" if result.test.mean > 0 else "worse"


def conclusion(result: ContrastResult) -> str:
    """Return what a contrast shows, as a sentence."""
    names = f"{result.contrast.method.label}, compared with {result.contrast.control_name}"
    return f"{names}: {findings(result)}."


def findings(result: ContrastResult) -> str:
    """Return the verdict with the numbers that it is based on."""
    test, word = result.test, verdict(result)
    seeds = f"{test.n} seed{'s' if result.planned > 1 else ''}"
    if test.n < result.planned:
        seeds = f"{test.n} of {result.planned} seeds"
    if test.n == 0:
        return f"{word}, no seed has both runs"
    if test.n == 1:
        return f"{word} from {seeds}, {format_signed(test.mean)}"
    if result.half_width is None or result.detectable is None:
        mean = format_signed(test.mean)
        undefined = "" if mean == "0.00" else "; without variation the t-test is undefined"
        return f"{word}, {mean} for each of {seeds}{undefined}"
    digits = digits_for(result.half_width)
    interval = f"{format_signed(test.mean, digits)} ± {result.half_width:.{digits}f}"
    text = f"{word}, {interval} percentage points over {seeds}"
    if result.decision.rejected:
        return text
    return f"{text}; the minimum detectable difference is {result.detectable:.{digits}f}"


def overall_conclusion(primary: Sequence[ContrastResult]) -> str:
    """Summarize the comparisons with the plan's control."""
    compared = [result for result in primary if result.test.n > 1]
    if not compared:
        return "No conclusion yet: no method shares two seeds with its control."
    sentences = []
    for word in ("better", "worse"):
        names = [r.contrast.method.label for r in compared if verdict(r) == word]
        if names:
            sentences.append(
                f"{word.capitalize()} than its control in {len(names)} of {len(compared)} "
                f"comparisons: {'; '.join(names)}."
            )
    if sentences:
        return " ".join(sentences)
    if len(compared) == 1:
        return "The comparison shows no difference."
    return f"None of the {len(compared)} comparisons shows a difference."


def caveats(primary: Sequence[ContrastResult], secondary: Sequence[ContrastResult]) -> list[str]:
    """Name the other controls that a better method is not better than."""
    sentences = []
    for result in primary:
        method = result.contrast.method
        if verdict(result) != "better":
            continue
        others = [other for other in secondary if other.contrast.method is method]
        for text, names in (
            (
                "not shown to differ from",
                [o.contrast.control_name for o in others if not o.decision.rejected],
            ),
            ("worse than", [o.contrast.control_name for o in others if verdict(o) == "worse"]),
        ):
            if names:
                sentences.append(f"{method.label} is {text}: {'; '.join(names)}.")
    return sentences


# Numbers as text


def format_signed(value: float, digits: int = 2) -> str:
    """Format a number with its sign: +0.42, −0.10, 0.00."""
    text = f"{abs(value):.{digits}f}"
    if float(text) == 0:
        return text
    return f"{'+' if value > 0 else '−'}{text}"


def digits_for(spread: float) -> int:
    """Number of decimals, 1 to 4, that shows two significant figures of a spread."""
    digits = 1
    while digits < 4 and spread < 10 ** (1 - digits):
        digits += 1
    return digits


def format_spread(values: Iterable[float], digits: int = 2) -> str:
    """Format mean ± standard deviation; only the mean for a single value."""
    spread = mean_and_deviation(values)
    if spread is None:
        return "–"
    mean, deviation = spread
    return f"{mean:.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")


def _format(value: float | None, digits: int = 2) -> str:
    return "–" if value is None or pd.isna(value) else f"{value:.{digits}f}"


def _join(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


# Results


def _completeness(arms: Sequence[ArmResult]) -> list[Block]:
    succeeded, failed, missing = (
        sum(len(getattr(arm, kind)) for arm in arms) for kind in ("rows", "failed", "missing")
    )
    if not failed and not missing:
        return []
    text = f"{succeeded} of {succeeded + failed + missing} runs succeeded"
    if failed:
        text += f", {failed} failed (listed below, their seeds are excluded)"
    if missing:
        text += f", {missing} have not finished"
    return [Paragraph(f"This report is incomplete: {text}.")]


def _contrast_table(results: Sequence[ContrastResult]) -> Table:
    rows = []
    for result in results:
        width, p = result.half_width, result.decision.adjusted_p
        digits = 2 if width is None else digits_for(width)
        difference = format_signed(result.test.mean, digits) if result.test.n else "–"
        rows.append(
            (
                result.contrast.method.label,
                result.contrast.control_name,
                difference if width is None else f"{difference} ± {width:.{digits}f}",
                str(result.test.n),
                "–" if result.test.p is None else f"{p:.3f}" if p >= 0.001 else "<0.001",
                _format(result.detectable, digits),
                verdict(result),
            )
        )
    header = ("method", "control", "difference", "n", "p (Holm)", "min. detectable", "conclusion")
    return Table(header, rows)


def _primary_outcome(
    outcome: str, design: Design, arms: Sequence[ArmResult], primary: Sequence[ContrastResult]
) -> list[Block]:
    text = PRIMARY_TEXTS[outcome]
    values = [(arm, arm.values(outcome)) for arm in arms]
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
            "the half-width of their confidence interval."
        ),
        _contrast_table(primary),
        Picture(
            "differences", png(plots.differences(primary)), f"Difference to the control, {text}."
        ),
        table,
        Picture(
            "primary",
            png(plots.seeds(arms, outcome, f"{text} (%)")),
            f"{text.capitalize()}, after the last round.",
        ),
    ]
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


def _other_controls(secondary: Sequence[ContrastResult]) -> list[Block]:
    if not secondary:
        return []
    return [
        Heading(2, "Other controls"),
        Paragraph(
            "The same outcome compared with controls that replace the exchange: the best learning "
            "rate of a single network, K times the epochs, or coefficients that ignore the layer "
            "(constant: 1/2; shuffled: those of other layers). An ensemble averages the "
            "predictions of its K networks, at K times the inference cost. Holm's correction is "
            "over this table, separately from the table above."
        ),
        _contrast_table(secondary),
    ]


def _learning_curves(state: StudyState, arms: Sequence[ArmResult], results: Results) -> list[Block]:
    pictures: list[Block] = []
    for networks in state.confirmed.networks:
        shown = [
            arm
            for arm in arms
            if arm.arm.networks == networks
            and len(arm.rows)
            and arm.arm.config(0).epochs == arms[0].arm.config(0).epochs
        ]
        if shown:
            pictures.append(
                Picture(
                    f"curves_{networks}_networks",
                    png(plots.learning_curves(shown, results.curves, "test accuracy (%)")),
                    f"Learning curves, population size {networks}.",
                )
            )
    if not pictures:
        return []
    return [
        Heading(2, "Learning curves"),
        Paragraph(
            "Accuracy of the member with the largest learning rate at the end of each epoch, "
            "before its round: mean over the seeds, with a band of one standard deviation."
        ),
        *pictures,
    ]


def _other_outcomes(arms: Sequence[ArmResult]) -> list[Block]:
    populations = [arm for arm in arms if arm.arm.networks > 1 and len(arm.rows)]
    measured = [name for name in _OUTCOME_HEADERS if any(len(a.values(name)) for a in populations)]
    if not measured:
        return []
    return [
        Heading(2, "Members, ensembles and soups"),
        Paragraph(
            "Secondary outcomes: test accuracy in percent, mean ± standard deviation over the "
            "seeds. An ensemble averages the members' predicted probabilities. A soup is one "
            "network with the average of the members' weights; its batch norm statistics are "
            "re-estimated on training images unless noted otherwise."
        ),
        Table(
            ("arm", *(_OUTCOME_HEADERS[name] for name in measured)),
            [
                (arm.arm.label, *(format_spread(arm.values(name)) for name in measured))
                for arm in populations
            ],
        ),
        Picture(
            "outcomes",
            png(plots.outcomes(populations, "test accuracy (%)")),
            "Single networks, ensembles and soups; bars are one standard deviation. A number at "
            "the left edge is the accuracy of a soup far below the axis.",
        ),
    ]


def _invalid_filters(arms: Sequence[ArmResult]) -> list[Block]:
    counted = [(arm, rows) for arm in arms if len(rows := arm.rows[arm.rows["filters"] > 0])]
    if not counted:
        return []
    table = [
        (
            arm.arm.label,
            *(format_spread(rows[name].astype(float), 1) for name in _FILTER_HEADERS),
            str(rows["filters"].iloc[0]),
        )
        for arm, rows in counted
    ]
    return [
        Heading(2, "Invalid filters"),
        Paragraph(
            "Filters of the member with the largest learning rate whose L1 norm is below a "
            "threshold after the training, mean ± standard deviation over the seeds."
        ),
        Table(("arm", *_FILTER_HEADERS.values(), "filters"), table),
        Picture(
            "filters",
            png(plots.invalid_filters([arm for arm, _ in counted], _FILTER_HEADERS)),
            "Share of invalid filters.",
        ),
    ]


def _costs(arms: Sequence[ArmResult]) -> list[Block]:
    trained = [arm for arm in arms if len(arm.rows)]
    if not trained:
        return []
    columns = ("wall_seconds", "core_seconds")
    return [
        Heading(2, "Cost"),
        Paragraph(
            "Time to train the whole population once, startup and evaluation included, in seconds. "
            "Wall time depends on the load of the machine."
        ),
        Table(
            ("arm", "wall time, s", "CPU time, core-s"),
            [
                (arm.arm.label, *(format_spread(arm.rows[name], 1) for name in columns))
                for arm in trained
            ],
        ),
        Picture("cost", png(plots.costs(trained)), "Time to train the whole population once."),
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
                _format(mean_outcome(regime.runs, rows, primary)),
                _format(mean_outcome(regime.control_runs, rows, primary)),
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
            "The gain is over the better of independent networks and constant coefficients, all at "
            "their best learning rates. "
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
            *(_format(trial.scores.get(rate)) for rate in rates),
            f"{trial.best:.4g}" if trial.finished and trial.best is not None else "–",
        )
        for trial in state.trials
    ]
    return [
        Heading(2, "Learning rates"),
        Paragraph(
            "Every method and control tried the same learning rates on a validation split, at its "
            f"own length, with seeds {_join(state.plan.tuning_seeds)}. The table has the mean "
            "accuracy of the delivered model in percent. While the best rate was the smallest or "
            "the largest, another one was added. Test accuracies of these runs were not read."
        ),
        Table(("arm", *(f"{rate:.4g}" for rate in rates), "chosen"), table),
    ]


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
            "Accuracies are in percent; the column 'on' names the split. results.csv has the same "
            "runs with more columns, and curves.csv has their learning curves."
        ),
        Table(
            ("arm", "K", "seed", "on", "largest lr", "each member", "ensemble", "core-s", "run"),
            [
                (
                    row["arm"],
                    str(row["networks"]),
                    str(row["seed"]),
                    row["split"] if row["status"] == "ok" else "failed",
                    _format(row["largest_lr_member"]),
                    " ".join(f"{float(member):.2f}" for member in row["members"].split()) or "–",
                    _format(row["ensemble"]),
                    f"{row['core_seconds']:.1f}",
                    str(key),
                )
                for key, row in rows.iterrows()
            ],
            dense=True,
        ),
        Heading(2, "Statistics"),
        Paragraph(STATISTICS_TEXT),
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
    replaced = {start.plan_sha256: start for start in starts if start.plan_sha256 != sha256}
    lines += [
        f"replaced plan: sha256 {start.plan_sha256}, fixed {start.time}"
        for start in replaced.values()
    ]
    for name, values in (
        ("command", [start.command for start in starts]),
        ("hardware", [start.hardware for start in starts]),
        (
            "versions of the comparison",
            [" ".join(f"{n} {v}" for n, v in start.versions.items()) for start in starts],
        ),
        ("versions of the runs", rows["versions"]),
        ("commit of the runs", rows["commit"]),
    ):
        lines += [f"{name}: {value}" for value in dict.fromkeys(values) if value]
    wall, cores = rows["wall_seconds"].sum() / 3600, rows["core_seconds"].sum() / 3600
    lines.append(f"total training time: {wall:.2f} h, {cores:.2f} core-hours")
    return [Heading(2, "Provenance"), Items(lines), Code(plan_text(state.plan))]
