"""Options of ``train`` as nested dictionaries: merge, check, format and hash them."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from dist_graft.config import TrainConfig
from dist_graft.config.parsing import from_mapping
from dist_graft.run_directory import flatten
from dist_graft.training.data import check_dataset_name
from dist_graft.training.learning_rates import learning_rates

TrainOptions = dict[str, Any]

EXCHANGE_SECTIONS = ("method", "graft", "papa", "wash", "diloco")
"""Options that define the exchange between networks; all others define how each one trains."""

_LEARNING_RATES = ("lr", "lrs", "lr_diversity")
_NO_EFFECT_ON_RESULTS = ("run_dir", "resume", "checkpoint.", "monitor.", "runtime.timeout_")
_KEY_LENGTH = 12


def expand(options: Mapping[str, Any]) -> TrainOptions:
    """Return options as nested dictionaries; names may contain dots (``graft.every: 0``)."""
    expanded: TrainOptions = {}
    for name, value in options.items():
        first, _, rest = name.partition(".")
        inner = expand({rest: value}) if rest else value
        if isinstance(inner, Mapping):
            inner = merge(expanded.get(first, {}), expand(inner))
        expanded[first] = inner
    return expanded


def merge(base: Mapping[str, Any], *overrides: Mapping[str, Any]) -> TrainOptions:
    """Return a copy of `base` updated with each of `overrides`, section by section."""
    merged = dict(base)
    for options in overrides:
        for name, value in expand(options).items():
            section = merged.get(name)
            if isinstance(value, Mapping) and isinstance(section, Mapping):
                merged[name] = merge(section, value)
            else:
                merged[name] = value
    return merged


def without_exchange(options: Mapping[str, Any]) -> TrainOptions:
    """Return the options without those that define the exchange."""
    return {name: value for name, value in options.items() if name not in EXCHANGE_SECTIONS}


def without_learning_rates(options: Mapping[str, Any]) -> TrainOptions:
    """Return the options without those that define the networks' learning rates."""
    kept = dict(options)
    optim = kept.pop("optim", {})
    optim = {name: value for name, value in optim.items() if name not in _LEARNING_RATES}
    return kept | ({"optim": optim} if optim else {})


def resolve(options: Mapping[str, Any], networks: int) -> TrainConfig:
    """Build the configuration of a run, with the checks of ``train``.

    Raises: ConfigError for options that ``train`` would reject.
    """
    config = _parse(json.dumps(options, default=str))
    check_dataset_name(config.data.name)
    learning_rates(config.optim, networks)
    return config


@functools.cache
def _parse(options: str) -> TrainConfig:
    """Parse options given as JSON. Cached, since parsing takes a tenth of a second."""
    config: TrainConfig = from_mapping(TrainConfig, json.loads(options))
    return config


def has_exchange(config: TrainConfig, networks: int) -> bool:
    """Whether a method changes the networks besides their training."""
    grafts_itself = config.method == "graft" and config.graft.source != "external"
    if config.method == "none" or (networks == 1 and not grafts_itself):
        return False
    if config.method in ("graft", "average"):
        return config.graft.every > 0 or config.graft.every_steps > 0
    return True


def run_key(config: TrainConfig, networks: int) -> str:
    """Hash of everything that determines a run's results: equal keys mean equal runs.

    Only options that differ from their defaults are hashed, so keys stay valid when a later version
    adds an option. Options of the exchange are ignored in a run without exchange.
    """
    defaults = dict(flatten(asdict(TrainConfig())))
    changed = {
        name: value
        for name, value in flatten(asdict(config))
        if value != defaults[name] and not name.startswith(_NO_EFFECT_ON_RESULTS)
    }
    if not has_exchange(config, networks):
        changed = {
            name: value
            for name, value in changed.items()
            if name.partition(".")[0] not in EXCHANGE_SECTIONS
        } | {"method": "none"}
    text = json.dumps({"networks": networks, "options": changed}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:_KEY_LENGTH]


def format_options(options: Mapping[str, Any]) -> str:
    """Format the options on one line of a table."""
    return ", ".join(f"{name}={value}" for name, value in flatten(options)) or "recipe unchanged"
