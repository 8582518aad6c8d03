"""Nested batches against torch's own collation and splitting."""

from __future__ import annotations

from collections import OrderedDict
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import default_collate

from dist_graft.training.data.batches import batch_size, map_tensors, split_batch


class Pair(NamedTuple):
    left: Any
    right: Any


def nested(size: int) -> dict[str, Any]:
    numbers = torch.arange(size * 3).view(size, 3)
    return OrderedDict(
        image=numbers,
        boxes=[numbers + 1, (numbers + 2,)],
        pair=Pair(numbers + 3, MappingProxyType({"inner": numbers + 4})),
        name=[str(index) for index in range(size)],
        scale=0.5,
    )


def test_map_tensors_keeps_the_structure() -> None:
    batch = nested(2)
    mapped = map_tensors(lambda tensor: tensor * 2, batch)
    assert isinstance(mapped, OrderedDict)
    assert torch.equal(mapped["image"], batch["image"] * 2)
    assert torch.equal(mapped["boxes"][1][0], batch["boxes"][1][0] * 2)
    assert isinstance(mapped["pair"], Pair)
    assert torch.equal(mapped["pair"].right["inner"], batch["pair"].right["inner"] * 2)
    assert (mapped["name"], mapped["scale"]) == (["0", "1"], 0.5)
    assert torch.equal(batch["image"], nested(2)["image"]), "the batch itself is unchanged"


@given(st.integers(0, 12), st.integers(1, 5))
def test_split_batch_equals_tensor_split(size: int, parts: int) -> None:
    batch = nested(size)
    assert batch_size(batch) == size
    pieces = list(split_batch(batch, parts))
    for piece, expected in zip(pieces, batch["image"].tensor_split(parts), strict=True):
        assert torch.equal(piece["image"], expected)
        assert torch.equal(piece["pair"].right["inner"], expected + 4)
        assert len(piece["name"]) == len(expected)
    assert [name for piece in pieces for name in piece["name"]] == batch["name"]


def test_a_collated_batch_has_the_size_of_its_samples() -> None:
    assert batch_size(default_collate([{"text": "a", "x": 1}, {"text": "b", "x": 2}])) == 2
    with pytest.raises(ValueError, match="a batch must contain tensors, got"):
        batch_size({"scale": 0.5})
