"""Bytes and buffers of `dist-graft plan`, compared with real rounds."""

from __future__ import annotations

import pytest
from architectures import build
from harness import RankContext, run

from dist_graft import Graft, Grafter
from dist_graft.analysis.plan import PlanOptions, plan_round
from dist_graft.analysis.planned_memory import bucket_bytes
from dist_graft.grafting.units import graft_tensors

NETWORKS, ROUNDS = 3, 2
CASES = [
    (architecture, exchange, topology, limit)
    for architecture in ("mixed_types", "tied")
    for exchange in ("all_gather", "p2p")
    for topology in ("ring", "exponential")
    for limit in (252, 1 << 20)
]


def play(context: RankContext) -> list[list[tuple[int, int]]]:
    """Bytes received, and bytes of the buffers held afterwards, in each round of each case."""
    return [[*_rounds(context, *case)] for case in CASES]


def _rounds(context: RankContext, architecture: str, exchange: str, topology: str, limit: int):
    grafter = Grafter(
        build(architecture, context.rank),
        exchange=exchange,
        bucket_mb=limit / 2**20,
        rule=Graft(topology=topology),
    )
    for _ in range(ROUNDS):
        record = grafter.graft()
        yield record.bytes_received, sum(kept.nbytes for kept in grafter._pool._kept.values())


@pytest.fixture(scope="module")
def measured() -> list[list[list[tuple[int, int]]]]:
    return run(play, NETWORKS)


@pytest.mark.parametrize(
    "number", range(len(CASES)), ids=lambda number: "-".join(map(str, CASES[number]))
)
def test_bytes_and_buffers_equal_real_rounds(measured, number: int) -> None:
    architecture, exchange, topology, limit = CASES[number]
    options = PlanOptions(
        networks=NETWORKS, model=architecture, backend="gloo", bucket_mb=limit / 2**20
    )
    tensors = list(graft_tensors(build(architecture, 0)).values())
    size = sum(tensor.nbytes for tensor in tensors)
    name = f"p2p {topology}" if exchange == "p2p" else exchange
    received = plan_round(options, size, name).received
    buffers = bucket_bytes(options, tensors, exchange)
    for process in measured:
        assert process[number] == [(received, buffers)] * ROUNDS
