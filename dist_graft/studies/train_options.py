"""Options of ``train`` as nested dictionaries: merge, check, format and hash them."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from typing import Any, Literal

from dist_graft.config import TrainConfig
from dist_graft.config.members import member_configs
from dist_graft.config.parsing import from_mapping
from dist_graft.config.validation import own
from dist_graft.grafting.rules import RULES, Rule
from dist_graft.grafting.rules.base import RoundSchedule
from dist_graft.references import is_reference
from dist_graft.run_directory import flatten
from dist_graft.training.data import check_dataset_name
from dist_graft.training.learning_rates import learning_rates

TrainOptions = dict[str, Any]

Delivery = Literal["network", "member", "soup", "ema", "checkpoints", "snapshots"]
"""The model that a run delivers: its only network; any of its networks (the expected accuracy is
their mean); the uniform soup, batch norm re-estimated; the moving average of the weights; the mean
of the last checkpoints, batch norm re-estimated; or the ensemble of the last checkpoints. The last
three are means over the networks."""
DELIVERIES: tuple[Delivery, ...] = ("member", "soup", "ema", "checkpoints")

HALF_SLOW = "dist_graft.studies.speeds:HalfSlow"
"""Callback that simulates networks of different speeds."""
EXCHANGE_SECTIONS = (
    "method",
    "graft",
    "population",
    *(name for name, rule in RULES.items() if rule.options),
)
"""Options that define the exchange between networks; all others define how each one trains."""

_NOT_OF_ONE_NETWORK = ("members", "diversity", "model.shared_init")
NO_EXCHANGE: TrainOptions = {"method": "none", "graft": {"every": 0}}
_LEARNING_RATES = ("optim.lr", "optim.lrs", "optim.lr_diversity")
_NO_EFFECT_ON_RESULTS = (
    *("run_dir", "resume", "checkpoint.", "monitor.", "runtime.timeout_"),
    *("data.root", "data.workers", "data.download", "data.skip_broken", "graft.bucket_mb"),
)
_OF_CHECKPOINTS = ("checkpoint.keep", "checkpoint.every", "checkpoint.every_minutes")
"""Options that decide what the mean, or the ensemble, of the last checkpoints is."""
_OVER_CHECKPOINTS = ("checkpoints", "snapshots")
_OF_OWN_DATA = ("data.root", "data.skip_broken")
"""Options that decide what images a function of the user returns."""
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
    """Return the options without those that define the exchange, or the speed of the networks."""
    kept = {name: value for name, value in options.items() if name not in EXCHANGE_SECTIONS}
    callbacks = [name for name in kept.pop("callbacks", ()) if name != HALF_SLOW]
    return kept | ({"callbacks": callbacks} if callbacks else {})


def without_learning_rates(options: Mapping[str, Any]) -> TrainOptions:
    """Return the options without those that define the networks' learning rates."""
    return _without(options, _LEARNING_RATES)


def single_network(options: Mapping[str, Any]) -> TrainOptions:
    """Return the options that one network trains with: no exchange, and the largest rate.

    model.shared_init is dropped, since it has no effect on a single network.
    """
    alone = _without(without_exchange(options), _NOT_OF_ONE_NETWORK)
    optim = alone.get("optim", {})
    lr = max(optim["lrs"]) if optim.get("lrs") else optim.get("lr")
    return merge(
        without_learning_rates(alone), {} if lr is None else {"optim": {"lr": lr}}, NO_EXCHANGE
    )


def _without(options: Mapping[str, Any], names: Collection[str]) -> TrainOptions:
    """Return the options without some sections and options, and without sections left empty."""
    kept: TrainOptions = {}
    for name, value in options.items():
        rest = value
        if isinstance(value, Mapping):
            rest = {k: v for k, v in value.items() if f"{name}.{k}" not in names}
        if name not in names and rest != {}:
            kept[name] = rest
    return kept


def parse(options: Mapping[str, Any]) -> TrainConfig:
    """Build a configuration. Cached, since parsing takes a tenth of a second.

    Raises: ConfigError naming the option.
    """
    return _parse(json.dumps(options, default=str))


def build_config(options: Mapping[str, Any], networks: int) -> TrainConfig:
    """Build the configuration of a run, with the checks of ``train``.

    Raises: ConfigError for options that ``train`` would reject.
    """
    if options.get("graft", {}).get("exchange") == "files":
        options = merge(options, {"population": {"size": networks}})
    config = parse(options)
    check_dataset_name(config.data.name)
    member_configs(config, networks)
    learning_rates(config.optim, networks)
    return config


@functools.cache
def _parse(options: str) -> TrainConfig:
    """Parse options given as JSON."""
    config: TrainConfig = from_mapping(TrainConfig, json.loads(options))
    return config


def has_exchange(config: TrainConfig, networks: int) -> bool:
    """Whether a method changes the networks besides their training."""
    if config.method == "none" or (networks == 1 and not config.is_self_grafting):
        return False
    options = getattr(config, config.method, None)
    has_own_interval = isinstance(options, RoundSchedule) and options.interval is not None
    if config.method in RULES and not has_own_interval:
        return config.graft.every > 0 or config.graft.every_steps > 0
    return True


def delivery(config: TrainConfig, networks: int) -> Delivery:
    """Return the model that a run delivers, as its rule declares.

    With `optim.ema_decay`, the moving average is delivered instead of a member.
    """
    rule: Any = Rule
    if has_exchange(config, networks):
        name = config.graft.rule or config.method
        rule = own("method", name) if is_reference(name) else RULES[name]
    if getattr(rule, "delivers", "member") == "soup" and networks > 1:
        return "soup"
    if config.optim.ema_decay is not None:
        return "ema"
    return "member" if networks > 1 else "network"


def key_of(
    options: Mapping[str, Any],
    networks: int,
    seed: int,
    delivers: Delivery | None = None,
    **stages: int | str,
) -> str:
    """Return `run_key` of a run with these options. Cached."""
    return _key_of(
        json.dumps(options, default=str), networks, seed, delivers, tuple(stages.items())
    )


@functools.cache
def _key_of(
    options: str,
    networks: int,
    seed: int,
    delivers: Delivery | None,
    stages: tuple[tuple[str, int | str], ...],
) -> str:
    config = build_config(json.loads(options), networks)
    return run_key(replace(config, seed=seed), networks, delivers, **dict(stages))


def run_key(
    config: TrainConfig, networks: int, delivers: Delivery | None = None, **stages: int | str
) -> str:
    """Hash of everything that determines a run's results: equal keys mean equal runs.

    Only options that differ from their defaults are hashed, so keys stay valid when a later version
    adds an option. Options of the exchange are ignored in a run without exchange. `delivers` is
    hashed if it is not the run's default, and so are `stages`: what is trained before the run, or
    by one of its networks only.
    """
    defaults = dict(flatten(asdict(TrainConfig())))
    effective: tuple[str, ...] = _OF_CHECKPOINTS if delivers in _OVER_CHECKPOINTS else ()
    effective += _OF_OWN_DATA if is_reference(config.data.name) else ()
    changed = {
        name: value
        for name, value in flatten(asdict(config))
        if value != defaults[name]
        and (name in effective or not name.startswith(_NO_EFFECT_ON_RESULTS))
    }
    if not has_exchange(config, networks):
        changed = {
            name: value
            for name, value in changed.items()
            if name.partition(".")[0] not in EXCHANGE_SECTIONS
        } | {"method": "none"}
    hashed: dict[str, Any] = {"networks": networks, "options": changed, **stages}
    if delivers not in (None, delivery(config, networks)):
        hashed["delivers"] = delivers
    text = json.dumps(hashed, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:_KEY_LENGTH]


def format_options(options: Mapping[str, Any]) -> str:
    """Format the options on one line of a table."""
    return ", ".join(f"{name}={value}" for name, value in flatten(options)) or "recipe unchanged"
