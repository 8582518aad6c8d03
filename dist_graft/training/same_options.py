"""Comparison of the options with which the processes of a run were started."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from dist_graft.config import TrainConfig
from dist_graft.errors import DisagreementError
from dist_graft.run_directory import as_plain, flatten

_PER_PROCESS = (
    *("run_dir", "data.root", "data.workers", "runtime.device", "runtime.threads"),
    "population.network",
)
"""Options that may differ between the processes of a run."""
_CHUNK = 6  # bytes that a float64 holds exactly
_MAX_NAMED = 3


def options_text(config: TrainConfig) -> str:
    """The options that all processes must share, as JSON."""
    options = dict(flatten(as_plain(config)))
    return json.dumps({name: options[name] for name in options if name not in _PER_PROCESS})


def digest(text: str) -> list[float]:
    """Hash of a text as four numbers, for a gather."""
    content = hashlib.sha256(text.encode()).digest()
    return [float(int.from_bytes(content[k : k + _CHUNK])) for k in range(0, 4 * _CHUNK, _CHUNK)]


def refuse_different_options(texts: Sequence[str], processes: Sequence[str]) -> None:
    """Raise DisagreementError if options differ, naming up to three, with values and processes.

    Args:
        texts: result of `options_text` of each process.
        processes: description of each process.
    """
    options = [json.loads(text) for text in texts]
    names = list(dict.fromkeys(name for values in options for name in values))
    different = []
    for name in names:
        users: dict[str, list[str]] = {}
        for values, process in zip(options, processes, strict=True):
            users.setdefault(repr(values.get(name)), []).append(process)
        if len(users) > 1:
            values_of = (
                f"{value} in {who[0]}{f' and {len(who) - 1} more' if who[1:] else ''}"
                for value, who in users.items()
            )
            different.append(f"{name} is {', '.join(values_of)}")
    if different:
        more = len(different) - _MAX_NAMED
        rest = f"; and {more} more options" if more > 0 else ""
        raise DisagreementError(
            "the processes were started with different options: "
            f"{'; '.join(different[:_MAX_NAMED])}{rest}; start all with the same options"
        )
