"""The harness itself: a rank that fails, hangs or ends must fail the test that ran it."""

from __future__ import annotations

import os
import threading

import pytest
import torch
import torch.distributed as dist
from harness import Place, run


def add_up(place: Place, start: int):
    total = torch.tensor([start + place.rank])
    dist.all_reduce(total)
    return place.rank, os.getpid(), total.item()


def fail_in_rank_1(place: Place):
    if place.rank == 1:
        raise LookupError("what rank 1 says")


def end_in_rank_1(place: Place):
    if place.rank == 1:
        os._exit(7)


def hang_in_rank_1(place: Place):
    if place.rank == 1:
        threading.Event().wait()


def test_each_rank_is_a_process_and_returns_its_result():
    results = run(add_up, 3, 10)
    assert [(rank, total) for rank, _, total in results] == [(0, 33), (1, 33), (2, 33)]
    assert len({os.getpid(), *(process for _, process, _ in results)}) == 4


def test_a_rank_that_raises_is_reported_with_its_text():
    with pytest.raises(AssertionError, match=r"rank 1:\n(.|\n)*LookupError: what rank 1 says"):
        run(fail_in_rank_1, 2)


def test_a_rank_that_ends_is_reported_with_its_exit_code():
    with pytest.raises(AssertionError, match="rank 1 ended with exit code 7"):
        run(end_in_rank_1, 2)
    assert run(end_in_rank_1, 2, ending={1}) == [None, None]


def test_a_rank_that_was_to_end_and_did_not_is_reported():
    with pytest.raises(AssertionError, match="rank 0 was to end"):
        run(add_up, 2, 0, ending={0})


def test_a_rank_that_hangs_is_ended_and_named():
    with pytest.raises(AssertionError, match="rank 1 still ran after 1 s"):
        run(hang_in_rank_1, 2, limit=1)
