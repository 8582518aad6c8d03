"""What the plan says of bytes and buffers against real rounds."""

from __future__ import annotations

import pytest
from architectures import build
from harness import Place, run

from dist_graft import Graft, Grafter
from dist_graft.analysis.planning.estimate import Rates, estimate
from dist_graft.analysis.planning.layout import Layout
from dist_graft.analysis.planning.sizes import sizes_of

NETWORKS, ROUNDS = 3, 2
CASES = [
    (architecture, exchange, topology, bucket_bytes)
    for architecture in ("mixed_types", "tied")
    for exchange in ("all_gather", "p2p")
    for topology in ("ring", "exponential")
    for bucket_bytes in (252, 1 << 20)
]


def play(place: Place) -> list[list[tuple[int, int]]]:
    """Of every case and round: bytes received, and bytes of the buffers that are held after it."""
    return [[*_rounds(place, *case)] for case in CASES]


def _rounds(place: Place, architecture: str, exchange: str, topology: str, bucket_bytes: int):
    grafter = Grafter(
        build(architecture, place.rank),
        exchange=exchange,
        bucket_mb=bucket_bytes / 2**20,
        rule=Graft(topology=topology),
    )
    for _ in range(ROUNDS):
        record = grafter.graft()
        yield record.bytes_received, sum(kept.nbytes for kept in grafter._pool._kept.values())


@pytest.fixture(scope="module")
def seen() -> list[list[list[tuple[int, int]]]]:
    return run(play, NETWORKS)


@pytest.mark.parametrize(
    "number", range(len(CASES)), ids=lambda number: "-".join(map(str, CASES[number]))
)
def test_bytes_and_buffers_are_those_of_real_rounds(seen, number: int) -> None:
    architecture, exchange, topology, bucket_bytes = CASES[number]
    planned = estimate(
        Layout(NETWORKS, 1, NETWORKS),
        sizes_of(build(architecture, 0)),
        Rates(1.0, 1.0, 1.0, 0.0),
        exchange=exchange,
        topology=topology,
        on_host=True,
        bucket_bytes=bucket_bytes,
    )
    for process in seen:
        assert process[number] == [(planned.received, planned.buffers)] * ROUNDS
