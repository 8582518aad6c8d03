"""What is refused before a logger is used."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from dist_graft.errors import ConfigError
from dist_graft.monitoring.logger import check_loggers


def test_a_folder_is_not_the_package_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs of W&B leave a folder wandb where they were started."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    importlib.invalidate_caches()
    with pytest.raises(ConfigError, match=r"monitor\.loggers wandb needs the package wandb: pip"):
        check_loggers(["wandb"])
    (tmp_path / "wandb/__init__.py").touch()
    importlib.invalidate_caches()
    check_loggers(["wandb"])
