from __future__ import annotations

from pathlib import Path

import pytest
from stored_runs import related_states, write_run


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
