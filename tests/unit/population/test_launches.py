"""Counts of a round's operations and host reads on an accelerator (benchmarks/launches.py)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dist_graft.config import ModelConfig
from dist_graft.training.models import build_model

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

from launches import READS_TARGET, RULES, TARGETS, count_round


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("rule", RULES)
def test_a_round_of_resnet50_is_few_operations(rule: str) -> None:
    model = build_model(ModelConfig(name="resnet50"), num_classes=1000, channels=3)
    counting, record = count_round(RULES[rule](), model, "conv", 4)
    counts = counting.counts()
    assert 20 < counts.operations <= TARGETS[rule]
    assert counts.reads <= READS_TARGET
    assert counts.syncs == counts.reads, counting.blocking
    assert len(record.coefficient) == 53
    assert ("allreduce_" in counting.operations) == (rule in ("average", "papa"))


@pytest.mark.parametrize("rule", ["average", "papa"])
@pytest.mark.usefixtures("deterministic")
def test_deterministic_algorithms_do_not_reduce(rule: str) -> None:
    """--runtime.deterministic: the exact path, equal to `mix` bit for bit."""
    model = build_model(ModelConfig(name="resnet20"), num_classes=10, channels=3)
    counting, _ = count_round(RULES[rule](), model, "conv", 4)
    assert "allreduce_" not in counting.operations
    assert counting.operations["_allgather_base_"] == 1
    assert counting.counts().reads <= READS_TARGET
