"""Warnings about replicas that graft each other, and rounds of moving averages."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from architectures import build, same_bits, snapshot
from harness import RankContext, run
from torch.nn.parallel import DistributedDataParallel

from dist_graft import Grafter, Papa, Wash, graft_units, mix


def warnings_of_rounds(context: RankContext, ways: tuple[str, ...]) -> list[str]:
    """Log lines of two rounds, of a data-parallel model or of one network in all processes."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("dist_graft").addHandler(handler)
    model = build("plain", context.rank if "distinct" in ways else 0)
    if "ddp" in ways:
        model = DistributedDataParallel(model)
    if "compiled" in ways:
        model = torch.compile(model, backend="eager")
    grafter = Grafter(model)
    for _ in range(3):
        if "distinct" in ways:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(1 + context.rank)
        grafter.graft()
    return lines


@pytest.mark.parametrize("ways", [("ddp",), ("ddp", "compiled")])
def test_gradients_averaged_between_networks_are_a_warning(ways: tuple[str, ...]) -> None:
    first, second = run(warnings_of_rounds, 2, ways)
    assert "ranks 0, 1 average their gradients (DistributedDataParallel)" in first[0]
    assert "group and replica_group of a device mesh" in first[0]
    assert len(first) == 2
    assert len(second) == 1


def test_networks_that_stay_equal_are_a_warning_once() -> None:
    for network, lines in enumerate(run(warnings_of_rounds, 2, ())):
        (line,) = lines
        assert line.startswith(f"network {network} equaled its donor in the first 2 rounds")


def test_distinct_networks_are_no_warning() -> None:
    assert run(warnings_of_rounds, 2, ("distinct",)) == [[], []]


def warnings_without_donors(context: RankContext) -> list[str]:
    """Log lines of a network that takes nothing from the others."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("dist_graft").addHandler(handler)
    grafter = Grafter(build("plain", context.rank))
    for _ in range(3):
        grafter.graft()
    return lines


def test_a_network_without_donors_is_no_warning() -> None:
    assert run(warnings_without_donors, 1) == [[]]


def graft_with_average(context: RankContext, rule):
    model, average = build("plain", context.rank), build("plain", 10 + context.rank)
    before = snapshot(model), snapshot(average)
    with_average, alone = Grafter(model, rule=rule), Grafter(copy.deepcopy(model), rule=rule)
    record = with_average.graft(also=[average])
    received = alone.graft().bytes_received
    return before, (snapshot(model), snapshot(average)), record, received


def test_averages_are_mixed_like_their_networks() -> None:
    for rule in (None, Papa(), Wash(probability=0.3, seed=2)):
        results = run(graft_with_average, 3, rule)
        units = graft_units(build("plain", 0))
        for which in (0, 1):
            states = [before[which] for before, *_ in results]
            expected = mix(states, units, results[0][2].mixing)
            for (_, after, record, received), state in zip(results, expected, strict=True):
                assert all(same_bits(after[which][key], state[key]) for key in state)
                assert record.bytes_received == 2 * received
