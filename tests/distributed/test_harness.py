"""A rank that fails, hangs or exits fails the test that started it."""

from __future__ import annotations

import os
import threading

import pytest
import torch
import torch.distributed as dist
from harness import RankContext, run


def add_up(context: RankContext, start: int):
    total = torch.tensor([start + context.rank])
    dist.all_reduce(total)
    return context.rank, os.getpid(), total.item()


def fail_in_rank_1(context: RankContext):
    if context.rank == 1:
        raise LookupError("text of rank 1")


def end_in_rank_1(context: RankContext):
    dist.barrier()  # both are connected
    if context.rank == 1:
        os._exit(7)


def hang_in_rank_1(context: RankContext):
    if context.rank == 1:
        threading.Event().wait()


def test_each_rank_is_a_process_and_returns_its_result():
    results = run(add_up, 3, 10)
    assert [(rank, total) for rank, _, total in results] == [(0, 33), (1, 33), (2, 33)]
    assert len({os.getpid(), *(process for _, process, _ in results)}) == 4


def test_an_exception_is_reported_with_its_text():
    with pytest.raises(AssertionError, match=r"rank 1:\n(.|\n)*LookupError: text of rank 1"):
        run(fail_in_rank_1, 2)


def test_an_exit_is_reported_with_its_exit_code():
    with pytest.raises(AssertionError, match="rank 1 ended with exit code 7"):
        run(end_in_rank_1, 2)
    assert run(end_in_rank_1, 2, ending={1}) == [None, None]


def test_a_rank_that_should_have_exited_is_reported():
    with pytest.raises(AssertionError, match="rank 0 should have exited"):
        run(add_up, 2, 0, ending={0})


def test_a_hanging_rank_is_killed_and_named():
    with pytest.raises(AssertionError, match="rank 1 still ran after 8 s"):
        run(hang_in_rank_1, 2, limit=8)
