"""How an option that is out of range is refused."""

from __future__ import annotations

import math

from dist_graft.errors import ConfigError


def require(ok: bool, name: str, value: object, legal: str) -> None:
    """Raise ConfigError naming option, value and legal range, unless ok."""
    if not ok:
        raise ConfigError(f"{name} must be {legal}, got {value!r}")


def at_least(name: str, value: float | None, least: float) -> None:
    """Require a finite number not below the least; None stands for unset."""
    if value is not None:
        require(math.isfinite(value) and value >= least, name, value, f"at least {least}")


def above_zero(name: str, value: float) -> None:
    """Require a finite number above 0."""
    require(math.isfinite(value) and value > 0, name, value, "above 0")
