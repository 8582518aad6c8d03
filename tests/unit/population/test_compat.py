from __future__ import annotations

import pytest
from torch.distributed.launcher.api import LaunchConfig

from dist_graft.errors import ConfigError
from dist_graft.population import compat


class OldConfig:
    """LaunchConfig before it had a shutdown_timeout."""


def test_an_old_launcher_waits_for_its_own_time_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "LaunchConfig", OldConfig)
    assert compat.shutdown_option(30) == {}
    with pytest.raises(ConfigError, match=r"shutdown_timeout must be 30 with torch .*, got 5"):
        compat.shutdown_option(5)


@pytest.mark.skipif(not hasattr(LaunchConfig, "shutdown_timeout"), reason="needs a newer torch")
def test_a_new_launcher_waits_as_long_as_asked() -> None:
    config = LaunchConfig(1, 1, 1, **compat.shutdown_option(5))
    assert config.shutdown_timeout == 5
