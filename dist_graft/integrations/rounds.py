"""What the callbacks of all frameworks have in common."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from dist_graft.grafting.rules.base import Rule
from dist_graft.population.round.record import GraftRecord


def check_interval(*, every_n_epochs: int, every_n_steps: int | None) -> None:
    """Raise ValueError for an interval below 1."""
    for name, value in (("every_n_epochs", every_n_epochs), ("every_n_steps", every_n_steps)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def refuse_rule_state(rule: Rule | None) -> None:
    """Raise ValueError for a stateful rule: the frameworks' checkpoints do not hold its state."""
    # A user's rule may be any class.
    if getattr(type(rule), "init_state", Rule.init_state) is not Rule.init_state:
        raise ValueError(
            f"{type(rule).__name__} keeps state between rounds, which this callback does "
            "not save: use dist_graft.Trainer, or dist_graft.Grafter in a loop of your own"
        )


def encode_paths(paths: Mapping[str, str | Path | None]) -> str:
    """Resolve the folders that a network writes to, as text for `refuse_shared_paths`."""
    return json.dumps({what: str(Path(path).resolve()) for what, path in paths.items() if path})


def refuse_shared_paths(texts: Sequence[str], advice: str) -> None:
    """Check that there are several networks, and that they write to different folders.

    Warns if there is only one network, which has no donor.

    Args:
        texts: by network, the result of `encode_paths`.
        advice: what to do, for the message.

    Raises: ValueError naming the folder and two networks that share it.
    """
    if len(texts) == 1:
        warnings.warn(
            "GraftCallback: a single process has no network to graft with; start one process for "
            "each network, with dist_graft.launch or torchrun",
            stacklevel=2,
        )
    owners: dict[str, int] = {}
    for network, text in enumerate(texts):
        for what, path in json.loads(text).items():
            other = owners.setdefault(path, network)
            if other != network:
                raise ValueError(
                    f"networks {other} and {network} would both write {what} to {path}, and lose "
                    f"each other's files: {advice}"
                )


def round_metrics(record: GraftRecord) -> dict[str, float]:
    """Means of coefficient and distance over the layers, by the name they are logged under."""
    values = {"coefficient": record.coefficient, "distance": record.distance}
    return {
        f"graft/{name}": sum(by_layer.values()) / len(by_layer)
        for name, by_layer in values.items()
        if by_layer
    }
