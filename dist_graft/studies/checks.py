"""Checks whether the training regime let an arm of a comparison act at all.

An arm that fails its check was not tested: its contrasts have no other verdict.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import pandas as pd

from dist_graft.config import TrainConfig
from dist_graft.studies.controls import ONE_NETWORK, Arm, Design
from dist_graft.studies.measurements import NEAR_HALF
from dist_graft.studies.statistics import (
    ALPHA,
    UNDER_TRAINED,
    ArmResult,
    half_width,
    paired_test,
)
from dist_graft.studies.train_options import delivery, has_exchange
from dist_graft.training.data.sources import DATASET_INFO
from dist_graft.training.learning_rates import initial_rates

SOUP_MARGIN = 1.0
"""Percentage points by which a soup may be below the mean of its members."""
SATURATION_MARGIN = 0.3
"""Percentage points that the last quarter of a long training, or a doubling of the epochs, may
add."""
FEW_DONORS = 50.0
"""Percentage of rounds with a donor below which grafting was rare."""
FEW_INVALID = 3.0
"""Percentage of invalid filters below which there is little to reactivate."""
MOSTLY_HALF = 90.0
"""Percentage of coefficients near 1/2 from which grafting is nearly a plain average."""
NEAR_CHANCE = 2.0
"""An arm is near chance below this many times chance accuracy."""
_ROUNDING = 1e-6  # results.csv has six digits


@dataclass(frozen=True, kw_only=True)
class Check:
    """Result of one or several checks of an arm."""

    failures: Sequence[str] = ()
    """Why the arm was not tested, with numbers; empty if it counts."""
    warnings: Sequence[str] = ()
    facts: Sequence[str] = ()
    """Measurements to report if there is no failure or warning."""
    weak: bool = False
    """Whether the arm is a control that is no evidence for what is better than it."""

    @property
    def not_tested(self) -> str | None:
        """The failures as one text; None if the arm counts."""
        return "; ".join(self.failures) or None


def check_arms(
    design: Design,
    arms: Sequence[ArmResult],
    curves: pd.DataFrame,
    outcome: str,
    at_edge: Collection[str] = (),
) -> list[tuple[Arm, Check]]:
    """Check every arm that has runs.

    Args:
        design: of the comparison.
        arms: results of its arms, in order.
        curves: learning curves, as `Results.curves`.
        outcome: primary outcome.
        at_edge: keys of the arms whose best learning rate is the smallest or the largest whose
            trials succeeded.

    Returns: each arm with a finding, and its checks.
    """
    without = {
        contrast.method.key: contrast.control
        for contrast in (*design.primary, *design.secondary)
        if not has_exchange(contrast.control.config(0), contrast.control.networks)
        and contrast.control_name.startswith("no exchange")
    }
    results = {result.arm.key: result for result in arms}
    checks = []
    for result in arms:
        if result.rows.empty:
            continue
        config, networks = result.arm.config(0), result.arm.networks
        parts = [check_chance(result, outcome)]
        if result.arm.key in at_edge:
            parts.append(check_edge(result))
        if has_exchange(config, networks):
            parts.append(check_rounds(result))
        if result.arm.name.startswith(ONE_NETWORK) and result.arm.role == "control":
            parts.append(check_saturation(result, curves))
        short, factor = design.lengthened.get(result.arm.key, (None, 0))
        if short and short.key in results:
            parts.append(check_doubling(result, results[short.key], factor))
        # PAPA and WASH must form a soup even if the plan changes what they deliver
        if networks > 1 and "soup" in (delivered_model(result), delivery(config, networks)):
            parts.append(check_soup(result))
        if result.arm.role == "method" and _reactivates(config, networks):
            control = without.get(result.arm.key)
            parts.append(check_reactivation(result, results.get(control.key) if control else None))
            if config.graft.source == "external":
                parts.append(check_coefficients(result))
        merged = Check(
            failures=[text for part in parts for text in part.failures],
            warnings=[text for part in parts for text in part.warnings],
            facts=[text for part in parts for text in part.facts],
            weak=any(part.weak for part in parts),
        )
        if merged != Check(failures=[], warnings=[], facts=[]):
            checks.append((result.arm, merged))
    return checks


def delivered_model(result: ArmResult) -> str:
    """What the arm delivers: member, soup, or another word of its rows."""
    return str(result.rows["delivers"].iloc[0])


def check_edge(result: ArmResult) -> Check:
    """An arm whose best learning rate is at the edge may be better at another one."""
    text = (
        f"its best learning rate, {_rates(result)}, is at the edge of those whose trials succeeded"
    )
    return Check(warnings=[text], weak=result.arm.role == "control")


def check_rounds(result: ArmResult) -> Check:
    """An exchange needs a round, or the arm equals one without exchange."""
    rounds = result.values("rounds")
    if len(rounds) and not rounds.any():
        return Check(failures=["no round took place"])
    return Check()


def check_soup(result: ArmResult) -> Check:
    """An arm that delivers a soup, or whose rule does, must form one near the mean member.

    Runs that diverged have no soup; if all did, the arm has its verdict from chance accuracy.
    """
    result = replace(result, rows=result.rows[result.rows["status"] != "diverged"])
    if result.rows.empty:
        return Check()
    strength = _strength(result)
    behind = (result.values("mean_of_members") - result.values("uniform_soup")).dropna()
    if behind.empty:
        return Check(failures=["its soup was not evaluated", *strength])
    gap = float(behind.mean())
    if gap > SOUP_MARGIN:
        text = (
            f"its soup is {gap:.1f} points below the mean member (margin {SOUP_MARGIN:g}), so the "
            "networks did not come together"
        )
        return Check(failures=[", ".join([text, *strength])])
    where = "above" if gap < 0 else "below"
    text = f"soup {abs(gap):.2f} points {where} the mean member"
    return Check(facts=[", ".join([text, *strength])])


def _strength(result: ArmResult) -> list[str]:
    """How much PAPA pulled, or WASH moved."""
    return [
        f"{text} {result.mean(column):.3g}{unit}"
        for column, text, unit in (
            ("cumulative_pull", "cumulative pull", " e-folds"),
            ("moves_per_scalar", "moves per scalar (mean over the layers)", ""),
        )
        if len(result.values(column))
    ]


def check_reactivation(result: ArmResult, without_exchange: ArmResult | None) -> Check:
    """Grafting needs invalid filters in the same population without exchange."""
    shares = pd.Series(dtype="float64")
    if without_exchange:
        rows = without_exchange.rows[without_exchange.rows["status"] != "diverged"]
        shares = (100 * rows["invalid_0.1"] / rows["filters"]).dropna()
    if without_exchange is None or shares.empty:
        return Check(warnings=["invalid filters without exchange were not counted"])
    share = float(shares.mean())
    other = ""
    if (rates := _rates(without_exchange)) != _rates(result):
        other = f", at other learning rates ({rates})"
    if share == 0 and not other:
        text = "no filter is invalid without exchange (L1 norm below 0.1): nothing to reactivate"
        return Check(failures=[text])
    text = f"{share:.2g} % of the filters are invalid without exchange (L1 norm below 0.1){other}"
    if share < FEW_INVALID:
        return Check(warnings=[f"{text}: there is little to reactivate"])
    return Check(facts=[text])


def _rates(result: ArmResult) -> str:
    """Initial learning rates of an arm's networks."""
    rates = initial_rates(result.arm.config(0), result.arm.networks)
    return ", ".join(f"{rate:.4g}" for rate in dict.fromkeys(rates))


def check_coefficients(result: ArmResult) -> Check:
    """Coefficients must leave 1/2, or the method is an average of neighbors.

    With graft.level filter, means over the channels of a layer are measured. They can be near 1/2
    although the channels differ, so only the donors are checked.
    """
    low, high = result.values("coefficient_min"), result.values("coefficient_max")
    with_donor = result.values("rounds_with_donor")
    if low.empty:
        if len(with_donor) and not with_donor.any():
            return Check(failures=["no round had a donor: nothing was grafted"])
        rounds = result.values("rounds")
        if rounds.any():
            return Check(failures=["its rounds have no coefficients"])
        return Check(warnings=["its coefficients were not measured"] if rounds.empty else [])
    warnings = []
    if len(with_donor) and with_donor.mean() < FEW_DONORS:
        warnings.append(f"only {with_donor.mean():.0f} % of its rounds had a donor")
    if result.arm.config(0).graft.level == "filter":
        return Check(warnings=[*warnings, "coefficients of channels are not checked"])
    middle = ", ".join(
        f"{result.mean(f'coefficient_{name}'):.3f} ({text})"
        for name, text in (("5", "5%"), ("median", "median"), ("95", "95%"))
    )
    near_half = result.mean("coefficient_near_half")
    text = (
        f"coefficients {low.min():.3f} to {high.max():.3f}, {middle}; "
        f"{near_half:.0f} % within {NEAR_HALF:g} of 1/2"
    )
    if max(0.5 - low.min(), high.max() - 0.5) < NEAR_HALF + _ROUNDING:
        return Check(failures=[f"{text}: the layers' information has no effect"], warnings=warnings)
    if near_half >= MOSTLY_HALF:
        warnings.append(
            f"{near_half:.0f} % of the coefficients are within {NEAR_HALF:g} of 1/2: nearly a "
            "plain average"
        )
    return Check(facts=[text], warnings=warnings)


def check_saturation(result: ArmResult, curves: pd.DataFrame) -> Check:
    """The last quarter of a long training must add little; otherwise every run is too short."""
    rows = result.rows[result.rows["status"] != "diverged"]
    points = curves[curves["key"].isin(rows["key"])]
    if points.empty:
        return Check(warnings=["its learning curve is missing"])
    accuracy = points.groupby("epoch")["mean_of_members"].mean()
    epochs = len(accuracy)
    if epochs < 4:
        return Check(failures=[f"{UNDER_TRAINED}: {epochs} epochs have no last quarter"])
    added = float(accuracy.iloc[-1] - accuracy.iloc[epochs - epochs // 4 - 1])
    text = f"the last quarter of its training {_gained(added, 'added')} points"
    optim = result.arm.config(0).optim
    if optim.schedule == "step" and (epochs - 1) // optim.step_epochs * optim.step_epochs <= (
        epochs - epochs // 4
    ):
        text += ", in the last stage of the step schedule"
    if added >= SATURATION_MARGIN:
        return Check(failures=[f"{UNDER_TRAINED}: {text} (margin {SATURATION_MARGIN:g})"])
    if added <= -SATURATION_MARGIN:
        return Check(warnings=[text])
    return Check(facts=[text])


def check_doubling(result: ArmResult, short: ArmResult, factor: int) -> Check:
    """Gain per doubling of the epochs: a training `factor` times as long, compared with `short`.

    Both end at the same fraction of the initial learning rate, so the decay alone adds nothing. A
    long training that is worse than the short one on average is a weak control.
    """
    gain = (result.values("delivered") - short.values("delivered")).dropna() / math.log2(factor)
    test = paired_test(gain)
    if not test.n:
        return Check()
    width = ""
    if test.deviation:
        width = f" ± {half_width(test.n, test.deviation, ALPHA):.2f}"
    text = (
        f"{factor} times the epochs {_gained(test.mean, 'gained')}{width} points per doubling "
        f"({test.n} seed{'s' if test.n > 1 else ''})"
    )
    if test.mean >= SATURATION_MARGIN:
        warning = f"{text}, at least {SATURATION_MARGIN:g}: longer training still helps"
        return Check(warnings=[warning])
    if test.mean < -_ROUNDING:
        warning = f"{text}: more training lowers accuracy, so beating it is no evidence"
        return Check(warnings=[warning], weak=True)
    return Check(facts=[f"{text}, less than {SATURATION_MARGIN:g}"])


def _gained(points: float, verb: str) -> str:
    return f"{verb if points >= 0 else 'lost'} {abs(points):.2f}"


def check_chance(result: ArmResult, outcome: str) -> Check:
    """Warn about an arm whose primary outcome is near chance, or that diverged."""
    warnings = []
    info = DATASET_INFO.get(result.arm.config(0).data.name)
    accuracy = result.mean(outcome)
    if info and accuracy < NEAR_CHANCE * 100 / info.num_classes:
        chance = 100 / info.num_classes
        warnings.append(f"accuracy {accuracy:.1f} % is near chance ({chance:g} %)")
    if diverged := result.diverged:
        seeds = ", ".join(map(str, diverged))
        warnings.append(f"diverged with seed {seeds}, which counts as chance accuracy")
    if heals := int(result.values("heals").sum()):
        warnings.append(f"{heals} times, a network that was not finite copied another one")
    return Check(warnings=warnings)


def _reactivates(config: TrainConfig, networks: int) -> bool:
    """Whether a method grafts by a criterion; constant coefficients are plain averages."""
    return (
        config.method == "graft"
        and config.graft.rule is None
        and config.graft.criterion != "constant"
        and has_exchange(config, networks)
    )
