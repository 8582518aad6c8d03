"""The report: what was asked, what came out, how it was done; the answer first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dist_graft.run_directory import write_atomically
from dist_graft.studies import plots
from dist_graft.studies.appendix import appendix, chosen_beforehand
from dist_graft.studies.history import Entry
from dist_graft.studies.lines import (
    ArmLine,
    ContrastLine,
    arm_lines,
    contrast_lines,
)
from dist_graft.studies.render import (
    Block,
    Heading,
    Items,
    Paragraph,
    Picture,
    Table,
    markdown,
    page,
)
from dist_graft.studies.results import Results
from dist_graft.studies.state import State
from dist_graft.studies.tables import arm_table, contrast_table, spread_text
from dist_graft.studies.verdict import (
    answer,
    reservations,
    verdict,
)

PRIMARY_TEXTS = {
    "largest_lr_member": "test accuracy of the member with the largest learning rate",
    "mean_of_members": "mean test accuracy of the members",
    "ensemble": "test accuracy of the members' ensemble",
    "uniform_soup": "test accuracy of the members' uniform soup",
}
_AXES = {
    "largest_lr_member": "test accuracy, member with the largest learning rate (%)",
    "mean_of_members": "test accuracy, mean of members (%)",
    "ensemble": "test accuracy, ensemble (%)",
    "uniform_soup": "test accuracy, uniform soup (%)",
}
_SECONDARY = {
    "largest_lr_member": "largest lr",
    "mean_of_members": "mean of members",
    "ensemble": "ensemble",
    "uniform_soup": "uniform soup",
    "uniform_soup_as_is": "uniform soup, batch norm averaged",
    "greedy_soup": "greedy soup",
}
_FILTERS = {"invalid_0.1": "L1 norm below 0.1", "invalid_0.01": "L1 norm below 0.01"}


def write_report(state: State, results: Results, history: Sequence[Entry], out: Path) -> list[str]:
    """Write report.html, report.md and pictures/; returns the verdict's sentences."""
    blocks, sentences = build(state, results, history)
    for block in blocks:
        if isinstance(block, Picture):
            write_atomically(out / "pictures" / f"{block.name}.png", block.png)
    write_atomically(out / "report.md", markdown(blocks, "pictures").encode())
    write_atomically(out / "report.html", page(f"Comparison {state.plan.name}", blocks).encode())
    return sentences


def build(
    state: State, results: Results, history: Sequence[Entry]
) -> tuple[list[Block], list[str]]:
    """The report's blocks, and the verdict's sentences."""
    plan, rows = state.confirmed, results.rows
    blocks: list[Block] = [Heading(1, f"Comparison: {plan.name}")]
    if state.design is None:
        sentence = "The search for a regime is not over: there is no answer yet."
        blocks += [Paragraph(sentence, "verdict"), *chosen_beforehand(state, rows)]
        return blocks + appendix(state, results, history), [sentence]
    seeds = plan.test_seeds
    lines = arm_lines(state.design, seeds, rows)
    main = contrast_lines(state.design.main, seeds, rows)
    further = contrast_lines(state.design.further, seeds, rows)
    sentences = [*map(verdict, main), *reservations(main, further)]
    blocks += [Paragraph(answer(main), "verdict"), Items(sentences)]
    blocks += _standing(lines)
    blocks += _primary(state, lines, main)
    blocks += _further(further)
    blocks += _learning_curves(state, lines, results)
    blocks += _secondary(lines)
    blocks += _invalid_filters(lines)
    blocks += _costs(lines)
    blocks += chosen_beforehand(state, rows)
    return blocks + appendix(state, results, history), [answer(main), *sentences]


def _standing(lines: Sequence[ArmLine]) -> list[Block]:
    """Whether all runs are there."""
    wanted = sum(len(line.rows) + len(line.failed) + len(line.missing) for line in lines)
    there, failed = (
        sum(len(x) for x in xs) for xs in ([i.rows for i in lines], [i.failed for i in lines])
    )
    if there == wanted:
        return []
    text = f"{there} of {wanted} runs ended well"
    if failed:
        text += f", {failed} failed (listed below; their seeds are missing from the comparisons)"
    if there + failed < wanted:
        text += f", {wanted - there - failed} are still to be run"
    return [Paragraph(f"This report is not complete: {text}.")]


def _primary(state: State, lines: Sequence[ArmLine], main: Sequence[ContrastLine]) -> list[Block]:
    plan = state.confirmed
    blocks: list[Block] = [
        Heading(2, "Primary outcome"),
        Paragraph(
            f"Fixed before anything ran: {PRIMARY_TEXTS[plan.primary]}, in percent, after the last "
            "epoch and the last round. Differences are those between runs of one seed; each is in "
            "percentage points, with the half-width of its t-interval."
        ),
        contrast_table(main),
        Picture(
            "differences",
            plots.differences(main),
            f"Difference to the control in {PRIMARY_TEXTS[plan.primary]}.",
        ),
        arm_table(lines, plan.primary),
        Picture(
            "primary",
            plots.dots(lines, plan.primary, _AXES[plan.primary]),
            f"{PRIMARY_TEXTS[plan.primary].capitalize()} after the last round.",
        ),
    ]
    also = [
        f"{line.arm.label}: also {', '.join(state.design.also[line.arm.key])}"
        for line in lines
        if state.design and line.arm.key in state.design.also
    ]
    if also:
        blocks.append(Paragraph(f"Trained once under several names: {'; '.join(also)}.", "small"))
    if state.design and state.design.absent:
        blocks.append(Paragraph("Controls that are not there:"))
        blocks.append(Items(state.design.absent))
    return blocks


def _further(further: Sequence[ContrastLine]) -> list[Block]:
    if not further:
        return []
    return [
        Heading(2, "Against the other controls"),
        Paragraph(
            "The same outcome against networks that had something else instead of the exchange: "
            "the best single learning rate, K times the epochs, coefficients that know nothing of "
            "the layers (constant: one half; shuffled: those of other layers). An ensemble answers "
            "with all its networks, and costs as much at inference. Holm's correction runs over "
            "this table, apart from the one above."
        ),
        contrast_table(further),
    ]


def _learning_curves(state: State, lines: Sequence[ArmLine], results: Results) -> list[Block]:
    blocks: list[Block] = [
        Heading(2, "Learning curves"),
        Paragraph(
            "Member with the largest learning rate, at the end of each epoch, before its round: "
            "mean over the seeds, with bands of one standard deviation."
        ),
    ]
    for networks in state.confirmed.networks:
        chosen = [
            line
            for line in lines
            if line.arm.networks == networks
            and line.rows
            and line.arm.config(0).epochs == lines[0].arm.config(0).epochs
        ]
        if chosen:
            blocks.append(
                Picture(
                    f"curves_{networks}_networks",
                    plots.curves(chosen, results.curves, "test accuracy (%)"),
                    f"Learning curves of populations of {networks}.",
                )
            )
    return blocks if len(blocks) > 2 else []


def _secondary(lines: Sequence[ArmLine]) -> list[Block]:
    populations = [line for line in lines if line.arm.networks > 1 and line.rows]
    known = [name for name in _SECONDARY if any(line.values(name) for line in populations)]
    if not known:
        return []
    table = Table(
        ("trained", *(_SECONDARY[name] for name in known)),
        [
            (line.arm.label, *(spread_text(list(line.values(name).values())) for name in known))
            for line in populations
        ],
    )
    return [
        Heading(2, "Members, ensembles and soups"),
        Paragraph(
            "Secondary outcomes: test accuracy in percent, mean ± standard deviation over the "
            "seeds. An ensemble answers with the members' mean probability; a soup is one network "
            "with the members' mean weights, its batch-norm statistics re-estimated on training "
            "images unless said otherwise."
        ),
        table,
        Picture(
            "outcomes",
            plots.outcomes(populations, "test accuracy (%)"),
            "Single networks, ensembles and soups; bars are one standard deviation. A number at "
            "the left end is the accuracy of a soup far below the axis.",
        ),
    ]


def _invalid_filters(lines: Sequence[ArmLine]) -> list[Block]:
    counted = [
        line for line in lines if any(row.filters.get("filters") for row in line.rows.values())
    ]
    if not counted:
        return []
    rows = []
    for line in counted:
        filters = [row.filters for row in line.rows.values() if row.filters.get("filters")]
        cells = [spread_text([float(f[name]) for f in filters], 1) for name in _FILTERS]
        rows.append((line.arm.label, *cells, str(filters[0]["filters"])))
    return [
        Heading(2, "Invalid filters"),
        Paragraph(
            "Filters of the trained member with the largest learning rate whose L1 norm is below a "
            "threshold, mean ± standard deviation over the seeds: without exchange (before "
            "grafting, so to say) and with it."
        ),
        Table(("trained", *_FILTERS.values(), "filters in all"), rows),
        Picture("filters", plots.filters(counted, _FILTERS), "Share of invalid filters."),
    ]


def _costs(lines: Sequence[ArmLine]) -> list[Block]:
    told = [line for line in lines if line.rows]
    if not told:
        return []
    rows = [
        (
            line.arm.label,
            spread_text([row.wall_seconds for row in line.rows.values()], 1),
            spread_text([row.core_seconds for row in line.rows.values()], 1),
        )
        for line in told
    ]
    return [
        Heading(2, "Cost"),
        Paragraph(
            "Of one training of the whole population, starting and testing included, in seconds; "
            "wall time depends on what else the machine did."
        ),
        Table(("trained", "wall time, s", "processor time, core-s"), rows),
        Picture(
            "cost",
            plots.cost(told),
            "What a training costs.",
        ),
    ]
