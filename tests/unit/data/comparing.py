"""Comparing lists of batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

Batch = tuple[Tensor, Tensor]


def same(one: Sequence[Batch], other: Sequence[Batch]) -> bool:
    """Whether two lists of batches are bitwise equal."""
    return len(one) == len(other) and all(
        torch.equal(a, b)
        for x, y in zip(one, other, strict=True)
        for a, b in zip(x, y, strict=True)
    )


def targets(batches: Iterable[Batch]) -> list[int]:
    """All targets in order."""
    return torch.cat([batch[1] for batch in batches]).tolist()
