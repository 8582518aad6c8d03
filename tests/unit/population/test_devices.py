from __future__ import annotations

import pytest

from dist_graft.population.runtime.devices import all_different


@pytest.mark.parametrize(
    ("gpus", "different"),
    [
        (["a", "b"], True),
        (["a", "b", "c", "a"], False),
        (["a", "a"], False),
        (["a", ""], False),
        (["", ""], False),
    ],
)
def test_nccl_needs_a_different_gpu_in_every_process(gpus: list[str], different: bool) -> None:
    assert all_different(gpus) is different
