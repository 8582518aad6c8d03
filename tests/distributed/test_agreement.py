"""Differences between the networks are the same error on every rank."""

from __future__ import annotations

import pytest
import torch
from architectures import State, build, same_bits, snapshot
from harness import RankContext, result_or_error, run
from torch import nn

from dist_graft import Graft, Grafter
from dist_graft.grafting.rules.base import Rule
from dist_graft.population.runtime.framework_processes import gather_texts


class OtherRule(Graft):
    """Another class with the same fields."""


def narrow() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def wide() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5))


def longer() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, bias=False))


def renamed() -> nn.Module:
    return nn.ModuleDict({"stem": nn.Conv2d(3, 4, 3), "norm": nn.BatchNorm2d(4)})


def bfloat16() -> nn.Module:
    return narrow().to(torch.bfloat16)


def channels_last() -> nn.Module:
    return narrow().to(memory_format=torch.channels_last)


def led_by_linear_too() -> nn.Module:
    return nn.Sequential(nn.Conv2d(8, 8, 3), nn.Linear(4, 4))


ARCHITECTURES = {
    function.__name__: function
    for function in (narrow, wide, longer, renamed, bfloat16, channels_last, led_by_linear_too)
}


def graft_with_difference(
    context: RankContext, odd: int, name: str, other: str, options: dict, others: dict
):
    """Run a round in which the rank `odd` has another architecture or other options."""
    model = ARCHITECTURES[other if context.rank == odd else name]()
    grafter = Grafter(model, **(others if context.rank == odd else options))
    return fail(grafter, model)


def fail(grafter: Grafter, model: nn.Module) -> tuple[tuple[str, str], bool]:
    """The error of a round, and whether weights and round number are unchanged."""
    before, number = _visible(model), grafter.round
    outcome = result_or_error(grafter.graft)
    after = _visible(model)
    untouched = all(same_bits(before[key], after[key]) for key in before)
    return outcome, untouched and grafter.round == number


def _visible(model: nn.Module) -> State:
    """Snapshot with NaN replaced, so that it compares equal."""
    return {key: value.nan_to_num(7.0) for key, value in snapshot(model).items()}


def assert_same_error(results, kind: str, *words: str) -> None:
    texts = {outcome for outcome, _ in results}
    assert len(texts) == 1, texts
    ((found, text),) = texts
    assert found == kind
    for word in words:
        assert word in text
    assert all(untouched for _, untouched in results)


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ("wide", "tensors number 0 is 0.weight float32 [4, 3, 3, 3]"),
        ("longer", "tensors number 6 is missing in network 0 and 2.weight float32 [4, 4, 3, 3]"),
        ("renamed", "stem.weight"),
        ("bfloat16", "0.weight bfloat16 [4, 3, 3, 3]"),
        ("channels_last", "in memory order [0, 2, 3, 1]"),
    ],
)
@pytest.mark.parametrize("odd", [1, 2])
def test_different_architecture(other, difference, odd):
    results = run(graft_with_difference, 3, odd, "narrow", other, {}, {})
    assert_same_error(results, "DisagreementError", f"ranks 0 and {odd}", difference, "same model")


def test_different_architecture_on_rank_0():
    results = run(graft_with_difference, 3, 0, "narrow", "wide", {}, {})
    assert_same_error(results, "DisagreementError", "ranks 0 and 1", "[5, 3, 3, 3]", "[4, 3, 3, 3]")


@pytest.mark.parametrize(
    ("others", "difference"),
    [
        ({"amplitude": 0.2}, "amplitude is 0.4 in network 0 and 0.2 in network 1"),
        ({"sensitivity": 500.0}, "sensitivity is 5.0 in network 0 and 500.0 in network 1"),
        ({"num_bins": 20}, "num_bins is 10 in network 0 and 20 in network 1"),
        ({"criterion": "l1"}, "criterion is entropy in network 0 and l1 in network 1"),
        ({"exchange": "p2p"}, "exchange is all_gather in network 0 and p2p in network 1"),
        ({"bucket_mb": 1}, "bucket_bytes is 33554432 in network 0 and 1048576 in network 1"),
        ({"lead": "conv+linear"}, "lead is conv in network 0 and conv+linear in network 1"),
        ({"rule": OtherRule()}, "rule is Graft in network 0 and OtherRule in network 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_different_options(others: dict[str, Rule], difference):
    results = run(graft_with_difference, 2, 1, "led_by_linear_too", "led_by_linear_too", {}, others)
    assert_same_error(results, "DisagreementError", "ranks 0 and 1", difference, "same options")


def graft_in_different_rounds(context: RankContext):
    model = narrow()
    grafter = Grafter(model)
    grafter.round = 5 if context.rank == 2 else 4
    return fail(grafter, model)


def test_different_round():
    results = run(graft_in_different_rounds, 3)
    assert_same_error(results, "DisagreementError", "rank 0 is in round 4 and rank 2 in round 5")


def graft_with_nonfinite_weights(context: RankContext, nonfinite: dict[int, tuple[str, float]]):
    """Run a round with NaN or Inf in some networks, then repair them and run it again."""
    model = build("plain", context.rank)
    grafter = Grafter(model)
    if context.rank in nonfinite:
        key, value = nonfinite[context.rank]
        tensor = dict(model.state_dict(keep_vars=True))[key].data
        original = tensor.view(-1)[-1].clone()
        tensor.view(-1)[-1] = value
    outcome, untouched = fail(grafter, model)
    if context.rank in nonfinite:
        tensor.view(-1)[-1] = original
    assert grafter.graft().round == 0
    return outcome, untouched


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("key", ["3.weight", "4.running_var", "7.bias"])
def test_nonfinite_weight(key, value):
    results = run(graft_with_nonfinite_weights, 3, {1: (key, value)})
    assert_same_error(
        results, "NonFiniteError", f"network 1 has a weight that is not finite in {key}"
    )


def test_every_nonfinite_network_is_named():
    results = run(
        graft_with_nonfinite_weights,
        4,
        {0: ("0.weight", float("nan")), 3: ("1.bias", float("inf"))},
    )
    assert_same_error(
        results,
        "NonFiniteError",
        "network 0 has a weight that is not finite in 0.weight",
        "network 3 has a weight that is not finite in 1.bias",
        "round 0",
    )


def check(context: RankContext, other: str):
    """Run `check` with another architecture on rank 2."""
    model = ARCHITECTURES[other if context.rank == 2 else "narrow"]()
    with torch.no_grad():
        model[0].weight[0] = float("nan")  # check does not read weights
    grafter = Grafter(model)
    before = _visible(model)
    outcome = result_or_error(grafter.check)
    after = _visible(model)
    untouched = all(same_bits(before[key], after[key]) for key in before)
    return outcome, untouched and grafter.round == 0


def test_check_reports_a_difference_before_the_first_round():
    results = run(check, 3, "wide")
    assert_same_error(results, "DisagreementError", "ranks 0 and 2", "[5, 3, 3, 3]", "same model")


def test_check_passes_if_the_networks_agree():
    assert run(check, 3, "narrow") == [(None, True)] * 3


def check_in_different_rounds(context: RankContext):
    grafter = Grafter(narrow())
    grafter.round = context.rank
    return result_or_error(grafter.check), True


def test_check_reports_a_network_that_resumed_in_another_round():
    results = run(check_in_different_rounds, 2)
    assert_same_error(results, "DisagreementError", "rank 0 is in round 0 and rank 1 in round 1")


def graft_on_two_devices(context: RankContext) -> object:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3))
    model[1].to("meta")
    return result_or_error(Grafter(model).graft)


def test_tensors_on_several_devices_are_an_error() -> None:
    assert run(graft_on_two_devices, 1) == [
        ("ValueError", "1.weight is on meta and 0.weight on cpu: move the network to one device")
    ]


def gather_different_texts(context: RankContext) -> list[list[str]]:
    """Gather texts of different lengths, and only empty ones."""
    cpu = torch.device("cpu")
    return [gather_texts(text, cpu) for text in ("é" * 300 * context.rank + " ", "")]


def test_texts_of_any_length_are_gathered() -> None:
    expected = [[" ", "é" * 300 + " ", "é" * 600 + " "], ["", "", ""]]
    assert run(gather_different_texts, 3) == [expected] * 3
