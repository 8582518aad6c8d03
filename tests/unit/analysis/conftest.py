from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from stored_runs import related_states, write_run


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run of three related networks with a validation split and two checkpoints."""
    return write_run(
        tmp_path_factory.mktemp("trio") / "run",
        related_states(3),
        epochs=(1, 2),
        val_fraction=0.4,
        lrs=[0.1, 0.2, 0.3],
    )
