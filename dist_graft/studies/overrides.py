"""Options of training as nested dictionaries: merged, checked, and named by a hash."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from dist_graft.config import TrainConfig
from dist_graft.config.parsing import from_mapping
from dist_graft.training.data.names import check_dataset_name
from dist_graft.training.learning_rates import learning_rates

Options = dict[str, Any]

EXCHANGE = ("method", "graft", "papa", "wash")
"""Sections that say what flows between networks; the others say what a network is and learns."""

_LEARNING_RATES = ("lr", "lrs", "lr_diversity")
_WITHOUT_INFLUENCE = ("run_dir", "resume", "checkpoint.", "monitor.", "runtime.timeout_")
_KEY_LENGTH = 12


def expand(options: Mapping[str, Any]) -> Options:
    """Nested dictionaries from names that may be written with dots (`graft.every: 0`)."""
    expanded: Options = {}
    for name, value in options.items():
        first, _, rest = name.partition(".")
        inner = expand({rest: value}) if rest else value
        if isinstance(inner, Mapping):
            inner = merge(expanded.get(first, {}), expand(inner))
        expanded[first] = inner
    return expanded


def merge(under: Mapping[str, Any], *over: Mapping[str, Any]) -> Options:
    """The first options, with those of the later ones laid over them."""
    merged = dict(under)
    for options in over:
        for name, value in expand(options).items():
            section = merged.get(name)
            if isinstance(value, Mapping) and isinstance(section, Mapping):
                merged[name] = merge(section, value)
            else:
                merged[name] = value
    return merged


def population_part(options: Mapping[str, Any]) -> Options:
    """The options that say what the networks are and learn, not what flows between them."""
    return {name: value for name, value in options.items() if name not in EXCHANGE}


def without_learning_rates(options: Mapping[str, Any]) -> Options:
    """The options but for those that say who learns how fast."""
    if "optim" not in options:
        return dict(options)
    optim = {name: value for name, value in options["optim"].items() if name not in _LEARNING_RATES}
    rest = {name: value for name, value in options.items() if name != "optim"}
    return rest | ({"optim": optim} if optim else {})


def resolve(options: Mapping[str, Any], networks: int) -> TrainConfig:
    """The whole configuration of a training, checked as `train` checks it.

    Raises: ConfigError for what `train` would refuse.
    """
    config = _parsed(json.dumps(options, default=str))
    check_dataset_name(config.data.name)
    learning_rates(config.optim, networks)
    return config


@functools.cache
def _parsed(options: str) -> TrainConfig:
    """As JSON, so that the same options are parsed once: that takes a tenth of a second."""
    config: TrainConfig = from_mapping(TrainConfig, json.loads(options))
    return config


def exchanges(config: TrainConfig, networks: int) -> bool:
    """Whether anything happens to the networks besides their training."""
    if config.method == "none" or (networks == 1 and not _within(config)):
        return False
    by_graft = config.method in ("graft", "average")
    return not by_graft or config.graft.every > 0 or config.graft.every_steps > 0


def _within(config: TrainConfig) -> bool:
    """Whether a network takes its scions from itself."""
    return config.method == "graft" and config.graft.source != "external"


def key_of(config: TrainConfig, networks: int) -> str:
    """Short hash of everything that a run's numbers follow from: equal keys, equal runs.

    Only options that differ from their defaults count, so an option that a later version adds
    leaves the keys as they are. Without exchange its options do not count.
    """
    defaults = dict(flat(asdict(TrainConfig())))
    differing = {
        name: value
        for name, value in flat(asdict(config))
        if value != defaults[name] and not name.startswith(_WITHOUT_INFLUENCE)
    }
    if not exchanges(config, networks):
        differing = {
            name: value
            for name, value in differing.items()
            if name.partition(".")[0] not in EXCHANGE
        } | {"method": "none"}
    text = json.dumps({"networks": networks, "options": differing}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:_KEY_LENGTH]


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Names with dots, and their values."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def short(options: Mapping[str, Any]) -> str:
    """The options on one line, for a table."""
    return ", ".join(f"{name}={value}" for name, value in flat(options)) or "as the recipe"
