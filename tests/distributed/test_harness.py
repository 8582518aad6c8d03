"""The harness: a rank that fails, hangs, or exits must fail its test."""

from __future__ import annotations

import os
import threading

import pytest
import torch
import torch.distributed as dist
from harness import Place, run


def sum_ranks(place: Place, start: int):
    total = torch.tensor([start + place.rank])
    dist.all_reduce(total)
    return place.rank, os.getpid(), total.item()


def fail_in_rank_1(place: Place):
    if place.rank == 1:
        raise LookupError("error of rank 1")


def exit_in_rank_1(place: Place):
    if place.rank == 1:
        os._exit(7)


def hang_in_rank_1(place: Place):
    if place.rank == 1:
        threading.Event().wait()


def test_each_rank_is_a_process_and_returns_its_result():
    results = run(sum_ranks, 3, 10)
    assert [(rank, total) for rank, _, total in results] == [(0, 33), (1, 33), (2, 33)]
    assert len({os.getpid(), *(process for _, process, _ in results)}) == 4


def test_error_is_reported_with_its_traceback():
    with pytest.raises(AssertionError, match=r"rank 1:\n(.|\n)*LookupError: error of rank 1"):
        run(fail_in_rank_1, 2)


def test_exit_is_reported_with_its_code():
    with pytest.raises(AssertionError, match="rank 1 exited with code 7"):
        run(exit_in_rank_1, 2)
    assert run(exit_in_rank_1, 2, ending={1}) == [None, None]


def test_missing_exit_is_reported():
    with pytest.raises(AssertionError, match="rank 0 returned instead of exiting"):
        run(sum_ranks, 2, 0, ending={0})


def test_hanging_rank_is_killed_and_named():
    with pytest.raises(AssertionError, match="rank 1 was still running after 1 s"):
        run(hang_in_rank_1, 2, limit=1)
