"""Sections of a report about what was measured besides accuracy, and about where it comes from."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from typing import Any

import yaml

from dist_graft.config import DataConfig, TrainConfig
from dist_graft.plot_style import png
from dist_graft.run_directory import flatten
from dist_graft.studies import plots
from dist_graft.studies.checks import (
    FEW_DONORS,
    FEW_INVALID,
    MOSTLY_HALF,
    SATURATION_MARGIN,
    SOUP_MARGIN,
    Check,
    delivered_model,
)
from dist_graft.studies.conclusions import format_cell, format_spread
from dist_graft.studies.controls import Arm
from dist_graft.studies.measurements import NEAR_HALF
from dist_graft.studies.plan import BUILT_IN
from dist_graft.studies.records import Results, Start, plan_sha256
from dist_graft.studies.rendering import Block, Heading, Items, Paragraph, Picture, Table
from dist_graft.studies.selection import StudyState
from dist_graft.studies.statistics import ArmResult, ContrastResult
from dist_graft.studies.train_options import HALF_SLOW, parse

_CALIBRATION_HEADERS = {
    "nll": "NLL, members",
    "soup_nll": "NLL, soup",
    "ensemble_nll": "NLL, ensemble",
    "calibration_error": "calibration error, members, %",
    "soup_calibration_error": "soup, %",
    "ensemble_calibration_error": "ensemble, %",
    "average_nll": "NLL, average",
    "average_calibration_error": "average, %",
}
_NLL_OF = {
    "soup": "soup_nll",
    "ema": "average_nll",
    "checkpoints": "average_nll",
    "snapshots": "ensemble_nll",
}
"""Columns with the NLL of the delivered model, where that is not a network as trained."""
_DIFFERENCE_HEADERS = {
    "disagreement": "disagreement, %",
    "barrier_before": "loss barrier before the last round, nats",
    "barrier": "loss barrier, nats",
}
_NAMED_IN_SETTING = (
    *("data.name", "data.train_samples", "data.test_samples", "data.batch_size", "data.root"),
    *("model.name", "optim.lr", "optim.weight_decay"),
)
"""Options that the section Setting shows in lines of their own; rates have a section."""
_DIGITS = dict.fromkeys(
    ("nll", "soup_nll", "ensemble_nll", "average_nll", "barrier_before", "barrier"), 3
)


# Setting and checks


def setting(state: StudyState, arms: Sequence[ArmResult], starts: Sequence[Start]) -> list[Block]:
    """Data, model, length and hardware: the head of the report."""
    config = arms[0].arm.config(state.confirmed.test_seeds[0])
    data, epochs = config.data, sorted({arm.arm.config(0).epochs for arm in arms})
    tested = "all test images"
    if data.test_samples is not None:
        tested = f"only the first {data.test_samples:,} test images, set by the plan"
    lines = [
        f"data: {data.name}, {training_images(data)}, {tested}",
        f"model: {config.model.name}",
        f"training: {' to '.join(map(str, sorted({epochs[0], epochs[-1]})))} epochs, batch size "
        f"{data.batch_size}, weight decay {config.optim.weight_decay:g}",
    ]
    if others := _other_options(parse(state.confirmed.recipe)):
        lines.append(f"other options of the recipe: {', '.join(others)}")
    for column, text in (
        ("steps", "optimizer steps of a network"),
        ("images_seen", "images seen by an arm"),
    ):
        values = [value for arm in arms for value in arm.values(column)]
        if values:
            low, high = min(values), max(values)
            lines.append(f"{text}: {low:,.0f}" + (f" to {high:,.0f}" if high > low else ""))
    hardware = dict.fromkeys(start.hardware for start in starts)
    lines += [f"hardware: {'; '.join(hardware)}"] if hardware else []
    lines += [slow] if (slow := _simulated_speed(arms)) else []
    if state.trials and state.design:
        chosen = "; ".join(
            f"{arm.config(0).optim.lr:.4g} ({arm.label})"
            for arm in state.design.arms
            if arm.tunable
        )
        lines.append(f"learning rates, chosen on validation images: {chosen}")
    lines.append(f"seeds: {len(state.confirmed.test_seeds)}. {image_sampling(config.data)}")
    return [Items(lines)]


def training_images(data: DataConfig) -> str:
    """Say how many images a network trains on, and of which ones."""
    total = None if data.train_samples is None else f"the first {data.train_samples:,}"
    if not data.val_fraction:
        return f"{total or 'all'} training images"
    if data.train_samples is None:
        share = f"{100 * data.val_fraction:.3g} %"
        return f"all training images, of which {share} are held out in each run"
    held_out = round(data.train_samples * data.val_fraction)
    return (
        f"{data.train_samples - held_out:,} of {total} training images; the other {held_out:,} are "
        "held out in each run"
    )


def _other_options(recipe: TrainConfig) -> list[str]:
    """Options of data, model and optimizer that have no default value and no line of their own."""
    defaults = dict(flatten(asdict(TrainConfig())))
    return [
        f"{name} {value}"
        for name, value in flatten(asdict(recipe))
        if name.startswith(("data.", "model.", "optim."))
        and name not in _NAMED_IN_SETTING
        and value != defaults[name]
    ]


def _simulated_speed(arms: Sequence[ArmResult]) -> str:
    """Say whose times include pauses that simulate slow networks; empty if none do."""
    slow = [arm.arm.label for arm in arms if HALF_SLOW in arm.arm.config(0).callbacks]
    text = f"times include the pauses of simulated slow networks: {'; '.join(slow)}"
    return text if slow else ""


def image_sampling(data: DataConfig) -> str:
    """Say which images the seeds share, and so what the intervals do not cover."""
    varied = "initial weights, data order and augmentation (if there is any)"
    if data.val_fraction > 0:
        return (
            f"They share their test images, and differ in {varied} and in the training images that "
            f"are held out. Two seeds have about {100 * (1 - data.val_fraction):.0f} % of their "
            "training images in common: the intervals cover the choice of training images only in "
            "part, and not that of the test images"
        )
    return (
        f"They share their training and test images and differ in {varied}: the intervals do not "
        "cover the choice of images"
    )


def check_section(checks: Sequence[tuple[Arm, Check]]) -> list[Block]:
    """Whether each arm was tested, with the numbers."""
    if not checks:
        return []
    rows = [
        (arm.label, word, text)
        for arm, check in checks
        for word, texts in (
            ("not tested", check.failures),
            ("warning", check.warnings),
            ("passed", check.facts),
        )
        for text in texts
    ]
    return [
        Heading(2, "Was it tested?"),
        Paragraph(
            "An arm that fails its check has no verdict, but a method can still be worse than an "
            "under-trained long training. An arm with an exchange needs at least one round. PAPA, "
            "WASH, and all arms that deliver a soup must form one within "
            f"{SOUP_MARGIN:g} point of the mean member. Grafting needs invalid filters in the "
            "population without exchange (a warning "
            f"below {FEW_INVALID:g} %) and coefficients that leave 1/2 by more than {NEAR_HALF:g} "
            f"(a warning if at least {MOSTLY_HALF:g} % do not), in rounds that had a donor (a "
            f"warning if fewer than {FEW_DONORS:g} % had one). The last quarter of the long "
            f"training must add less than {SATURATION_MARGIN:g} points; otherwise every run is "
            "under-trained. A learning rate that decays until the end raises the accuracy, so this "
            "check is strict; within the last stage of a step schedule, it shows little. The gain "
            "of the long training over the recipe's length, both at the end of their schedules, "
            "shows what a doubling of the epochs is worth (a warning from "
            f"{SATURATION_MARGIN:g} points of gain per doubling; if it is a loss, the control is "
            "weak). An arm whose best learning rate is at the edge of the rates whose "
            "trials succeeded gets a warning; a control is then weak."
        ),
        Table(("arm", "result", "numbers"), rows),
    ]


# Measurements


def calibration(arms: Sequence[ArmResult]) -> list[Block]:
    """Likelihood and calibration of members, soups and ensembles."""
    arms, left_out = without_diverged(arms)
    headers = _measured(_CALIBRATION_HEADERS, arms)
    if not headers:
        return []
    return [
        Heading(2, "Likelihood and calibration"),
        Paragraph(
            "Negative log-likelihood (NLL) in nats and expected calibration error (15 equal-width "
            "bins, arXiv 1706.04599) on the test set, mean ± standard deviation over the seeds. "
            "Lower is better. Soups have re-estimated batch norm statistics."
            f"{_on_averages(arms)}{left_out}"
        ),
        _spreads(headers, arms),
    ]


def _on_averages(arms: Sequence[ArmResult]) -> str:
    """Sentences on delivered averages, and on arms whose delivered model was not measured."""
    measured = [arm for arm in arms if len(arm.values("average_nll"))]
    text = " Average: the average over the training that an arm delivers." if measured else ""
    return text + without_average(
        [
            arm
            for arm in arms
            if len(arm.values("nll")) and not len(arm.values(_NLL_OF.get(arm.arm.delivers, "nll")))
        ]
    )


def without_average(arms: Sequence[ArmResult]) -> str:
    """Sentence on arms that deliver an average or an ensemble; empty if there are none."""
    labels = [arm.arm.label for arm in arms if arm.arm.delivers in _NLL_OF]
    if not labels:
        return ""
    return (
        " These are shown as trained, not as the average or ensemble that they deliver: "
        f"{'; '.join(labels)}."
    )


def without_diverged(arms: Sequence[ArmResult]) -> tuple[list[ArmResult], str]:
    """The arms without runs that count as chance accuracy, and a sentence that names these runs."""
    kept = [replace(arm, rows=arm.rows[arm.rows["status"] != "diverged"]) for arm in arms]
    diverged = [
        f"{arm.arm.label} (seed {', '.join(map(str, arm.diverged))})"
        for arm in arms
        if arm.diverged
    ]
    if not diverged:
        return kept, ""
    return kept, f" Runs that count as chance accuracy are left out: {'; '.join(diverged)}."


def differences_between_networks(arms: Sequence[ArmResult]) -> list[Block]:
    """How far the members of a population are apart."""
    arms, left_out = without_diverged([arm for arm in arms if arm.arm.networks > 1])
    headers = _measured(_DIFFERENCE_HEADERS, arms)
    if not headers:
        return []
    return [
        Heading(2, "Differences between the members"),
        Paragraph(
            "After the last round, unless noted. Disagreement: percentage of test images for which "
            "two members predict different classes, mean over all pairs. Loss barrier (arXiv "
            "1912.05671): how far the training loss on the line between two neighbors on the ring "
            "exceeds the line between their losses, with re-estimated batch norm statistics, mean "
            "over the neighbors. Without a barrier, weights can be averaged. A round brings the "
            "networks together, so the barrier before it shows whether training kept them in one "
            f"basin since the round before, at the learning rate of the last epoch.{left_out}"
        ),
        _spreads(headers, arms),
    ]


def _spreads(headers: Mapping[str, str], arms: Sequence[ArmResult]) -> Table:
    """Mean ± standard deviation of columns, for each arm that has one of them."""
    rows = [
        (
            arm.arm.label,
            delivered_model(arm),
            *(format_spread(arm.values(name), _DIGITS.get(name, 2)) for name in headers),
        )
        for arm in arms
        if any(len(arm.values(name)) for name in headers)
    ]
    return Table(("arm", "delivers", *headers.values()), rows)


def coefficients(arms: Sequence[ArmResult]) -> list[Block]:
    """Coefficients of the grafting arms: their spread, and their course over the epochs."""
    shown = [arm for arm in arms if len(arm.values("coefficient_median"))]
    if not shown:
        return []
    names = ("min", "5", "median", "95", "max")
    rows = [
        (
            arm.arm.label,
            *(f"{arm.mean(f'coefficient_{name}'):.3f}" for name in names),
            f"{arm.mean('coefficient_near_half'):.0f} %",
        )
        for arm in shown
    ]
    header = ("arm", "min", "5%", "median", "95%", "max", f"within {NEAR_HALF:g} of 1/2")
    blocks: list[Block] = [
        Heading(2, "Coefficients"),
        Paragraph(
            "Share of its weights that a network keeps in the last round of each epoch, over all "
            "networks, graft units and epochs; mean over the seeds."
        ),
        Table(header, rows),
    ]
    if any(any(arm.rows["coefficients_median"]) for arm in shown):
        caption = "Coefficients by epoch: median, and a band from 5% to 95%."
        blocks.append(Picture("coefficients", png(plots.coefficients(shown)), caption))
    return blocks


def costs(arms: Sequence[ArmResult]) -> list[Block]:
    """Time, images, rounds, bytes and heals of each arm."""
    trained = [arm for arm in arms if len(arm.rows)]
    if not trained:
        return []
    columns = {
        "wall_seconds": ("wall time, s", 1.0, 1),
        "core_seconds": ("CPU time, core-s", 1.0, 1),
        "images_seen": ("images seen, million", 1e-6, 2),
        "steps": ("steps", 1.0, 0),
        "rounds": ("rounds", 1.0, 0),
        "bytes_moved": ("moved, MB", 1e-6, 1),
    }
    columns = {
        name: column
        for name, column in columns.items()
        if any(len(arm.values(name)) for arm in trained)
    }
    healed = any(len(arm.values("heals")) for arm in trained)
    replicated = any(arm.arm.config(0).runtime.replicas > 1 for arm in trained)
    gradients = ", without the gradients of runtime.replicas" if replicated else ""
    rows = [
        (
            arm.arm.label,
            *(
                format_spread(arm.values(name) * factor, digits)
                if name.endswith("seconds")
                else format_cell(arm.mean(name) * factor, digits)
                for name, (_, factor, digits) in columns.items()
            ),
            *((str(int(arm.values("heals").sum())),) if healed else ()),
            str(len(arm.diverged)),
        )
        for arm in trained
    ]
    header = (
        "arm",
        *(text for text, _, _ in columns.values()),
        *(("heals",) if healed else ()),
        "diverged runs",
    )
    return [
        Heading(2, "Cost"),
        Paragraph(
            "To train the whole population once, startup and evaluation during training included: "
            "mean (± standard deviation) over the seeds. Wall time depends on the load of the "
            f"machine. Moved: bytes that the networks received in all rounds{gradients}. Heals: "
            "how often a network that was not finite copied another one, sum over the seeds. "
            f"Diverged runs count as chance accuracy.{_of_stages(trained)}"
        ),
        *([Paragraph(f"Note: {slow}.")] if (slow := _simulated_speed(trained)) else []),
        Table(header, rows),
        Picture("cost", png(plots.costs(trained)), "Time to train the whole population once."),
    ]


def _of_stages(arms: Sequence[ArmResult]) -> str:
    """Sentence on arms whose cost includes a second training; empty if there are none."""
    texts = []
    for arm in (result.arm for result in arms):
        if arm.teachers:
            texts.append(f"{arm.label}: the {arm.teachers.networks} members are included")
        if start := arm.start_epochs:
            rest = arm.config(0).epochs - start
            texts.append(
                f"{arm.label}: {start} + {arm.networks} x {rest} epochs of a network, instead of "
                f"{arm.networks} x {start + rest}"
            )
    return f" {'; '.join(texts)}." if texts else ""


# Other sources


@dataclass(frozen=True)
class PublishedGain:
    """A published gain of a method over its authors' baseline."""

    method: str
    setting: str
    """Data, model and number of networks."""
    networks: int | None
    different_rates: bool
    """Whether the authors say that the networks had different learning rates."""
    gain: float
    """Percentage points."""
    source: str


def read_published() -> list[PublishedGain]:
    """Return the published gains, method by method, from published.yaml."""
    content = yaml.safe_load(files("dist_graft.studies").joinpath("published.yaml").read_text())
    found = []
    for method, entry in content.items():
        for result in entry["results"]:
            gain = result.get("gain")
            if gain is None:
                gain = round(result["accuracy"] - result["baseline"], 2)
            text, networks = f"{result['data']}, {result['model']}", result.get("networks")
            if networks:
                text += f", {networks} network{'s' if networks > 1 else ''}"
            different = result.get("different_rates", False)
            found.append(PublishedGain(method, text, networks, different, gain, entry["source"]))
    return found


def beside_published(primary: Sequence[ContrastResult]) -> list[Block]:
    """Differences of this comparison beside the published gains of the same built-in methods."""
    built_in = {
        result.contrast.method.label: built_in_method(result.contrast.method) for result in primary
    }
    names = set(built_in.values())
    shown = [result for result in primary if result.test.n]
    sizes = {None, 1, 2, *(result.contrast.method.networks for result in shown)}
    published = [g for g in read_published() if g.method in names and g.networks in sizes]
    if not published or not shown:
        return []
    known = {gain.method for gain in published}
    absent = [label for label, name in built_in.items() if name not in known]
    text = (
        "Published gains are over the authors' own baselines, on other data and models, at other "
        "lengths, and most without an interval. They do not predict this comparison. Populations "
        "of more than two networks are shown if this comparison has as many."
    )
    if absent:
        text += f" No published gain is on file for the method of: {'; '.join(absent)}."
    return [
        Heading(2, "Published gains"),
        Paragraph(text),
        Picture(
            "published",
            png(
                plots.forest(
                    shown, [(g.method, g.setting, g.gain, g.different_rates) for g in published]
                )
            ),
            "Differences of this comparison with 95% intervals (diamonds), and published gains of "
            "the same methods (squares; open: published as different learning rates), whatever "
            "their options.",
        ),
        Items(list(dict.fromkeys(f"{gain.method}: {gain.source}" for gain in published))),
    ]


def built_in_method(arm: Arm) -> str | None:
    """The built-in method whose options the arm has; the one with the most options if several."""
    options = dict(flatten(asdict(arm.config(0))))
    matching = [
        (len(own), name)
        for name, own in ((name, dict(flatten(own))) for name, own in BUILT_IN.items())
        if all(options.get(option) == value for option, value in own.items())
    ]
    return max(matching)[1] if matching else None


def superseded(results: Results, outcome: str) -> list[Block]:
    """Rows that later rows replaced, both with their outcome, and why.

    Runs of earlier plans are among them.
    """
    table = [
        (
            *(str(old[name]) for name in ("arm", "networks", "seed", "split")),
            _attempt(old, outcome),
            _attempt(new, outcome),
            new["reason"],
        )
        for old, new in results.superseded()
    ]
    if not table:
        return []
    return [
        Heading(2, "Superseded runs"),
        Paragraph(
            "Rows of results.csv that a later row of the same run replaced. Only the last row of a "
            "run counts. The primary outcome in percent, with finishing time and commit."
        ),
        Table(("arm", "K", "seed", "on", "before", "after", "reason"), table),
    ]


def of_earlier_plans(
    state: StudyState, results: Results, starts: Sequence[Start], outcome: str
) -> tuple[list[str], list[Block]]:
    """What the reader must know about changes of the plan: warnings, and the rows it left out.

    Test runs whose key the plan does not have are in no table and no test.
    """
    first = next((s for s in starts if s.plan_sha256 == plan_sha256(state.plan)), None)
    changes = [
        after
        for before, after in itertools.pairwise(starts)
        if after.plan_sha256 != before.plan_sha256
    ]
    changes = [first, *changes] if first and first not in changes else changes
    texts = [
        f"The plan was changed on {start.time}, when {_results_before(start, starts)}."
        for start in changes
        if start.runs_before
    ]
    unused = results.rows.drop([run.key for run in state.all_runs], errors="ignore")
    trials = unused[unused["phase"] != "comparison"]
    if len(trials):
        texts.append(
            f"{len(trials)} runs on a validation split are not used: the present plan, or this "
            "version, has other ones."
        )
    unused = unused[unused["phase"] == "comparison"]
    if unused.empty:
        return texts, []
    names = dict.fromkeys(f"{row['arm']}, K = {row['networks']}" for _, row in unused.iterrows())
    texts.append(f"{len(unused)} test runs of an earlier plan are not used: {'; '.join(names)}.")
    table = [
        (
            *(str(row[name]) for name in ("arm", "networks", "seed", "status")),
            format_cell(row.get(outcome)),
            str(row["finished"]),
        )
        for _, row in unused.iterrows()
    ]
    return texts, [
        Heading(2, "Runs of an earlier plan"),
        Paragraph(
            "Runs on the test set that the present plan does not have, because a seed, an arm, or "
            "an option was changed, or another learning rate was chosen. No other table or test "
            "uses them. The primary outcome in percent."
        ),
        Table(("arm", "K", "seed", "status", "unused outcome", "finished"), table),
    ]


def _results_before(start: Start, starts: Sequence[Start]) -> str:
    """How many runs had results before a start, and whether only a pilot had run."""
    text = f"{start.runs_before} runs had results"
    if start.tests_before is not None:
        text += f", {start.tests_before} of them on the test set"
    earlier = starts[: starts.index(start)]
    if earlier and all(other.is_pilot for other in earlier):
        text += " (of a pilot, which prints no test accuracies)"
    return text


def _attempt(row: Mapping[Any, Any], outcome: str) -> str:
    """Outcome of a row, and when and from which commit it came."""
    result = row["status"] if row["status"] == "failed" else format_cell(row.get(outcome))
    return f"{result} ({row['finished']}, {str(row['commit'])[:8] or 'no commit'})"


def _measured(headers: dict[str, str], arms: Sequence[ArmResult]) -> dict[str, str]:
    """The columns that at least one arm has."""
    return {
        name: text for name, text in headers.items() if any(len(arm.values(name)) for arm in arms)
    }
