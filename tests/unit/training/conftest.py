from __future__ import annotations

import pytest

from dist_graft.population.runtime import stop_requests


@pytest.fixture(autouse=True)
def _read_the_stop_file_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop_requests, "_POLL_SECONDS", 0.0)
