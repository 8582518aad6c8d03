"""Options in which the networks of a population differ: `members` and `diversity`.

Both belong to the configuration that all networks share, so every process knows the options of
every network. Nothing here depends on the number of networks, except the length of `members`.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dist_graft.config.data import DataConfig
from dist_graft.config.model import ModelConfig
from dist_graft.config.optim import OWN_OPTIONS, OptimConfig
from dist_graft.errors import ConfigError
from dist_graft.seeding import stream_seed

if TYPE_CHECKING:
    from dist_graft.config.train import TrainConfig

Options = dict[str, Any]
"""Values by name: optim.lr, data.mixup, ..."""
Spec = dict[str, list[Any]]
"""One of the kinds of `diversity` with its values."""

_KINDS = ("uniform", "log_uniform", "choice")
_SECTIONS: dict[str, type[Any]] = {"optim": OptimConfig, "data": DataConfig, "model": ModelConfig}
# Not the schedule: rounds and their rate follow it. Not data.batch_size: all networks take equally
# many steps in an epoch.
_NAMES = {
    "optim": (
        *("name", "kwargs", "lr", "momentum", "nesterov", "betas", "weight_decay", "clip_norm"),
        *("accumulation", "label_smoothing", "loss", "loss_kwargs", "ema_decay"),
    ),
    "data": (
        *("augment", "mixup", "cutmix", "random_erasing", "rand_augment"),
        *("transform", "transform_kwargs"),
    ),
    "model": ("dropout",),
}
MEMBER_OPTIONS = {
    f"{section}.{name}": typing.get_type_hints(_SECTIONS[section])[name]
    for section, names in _NAMES.items()
    for name in names
}
"""Options that may differ between networks, with their types."""


def member_options(config: TrainConfig, network: int) -> Options:
    """Options of one network that `members` or `diversity` set; `members` wins.

    A draw is a function of the seed, the network, and the option's name only.
    """
    drawn = {
        name: _draw(spec, stream_seed(f"diversity {name}", config.seed, network))
        for name, spec in config.diversity.items()
    }
    return drawn | (config.members[network] if config.members else {})


def differing_options(config: TrainConfig) -> list[str]:
    """Names of the options that `members` or `diversity` set for any network, in order."""
    named = (config.diversity, *config.members)
    return list(dict.fromkeys(name for options in named for name in options))


def member_config(config: TrainConfig, network: int) -> TrainConfig:
    """The configuration with one network's own options in their sections, without members.

    Raises: ConfigError naming the network if its options contradict each other.
    """
    options = member_options(config, network)
    try:
        sections = _sections(config, options)
        return dataclasses.replace(config, members=[], diversity={}, **sections)
    except ConfigError as error:
        raise ConfigError(f"options of network {network}: {error}") from error


def member_configs(config: TrainConfig, networks: int) -> list[TrainConfig]:
    """Configuration of each network.

    Raises: ConfigError if `members` does not have one entry per network, or an option does not fit.
    """
    config.refuse_unused()
    if config.members and len(config.members) != networks:
        raise ConfigError(
            f"members has length {len(config.members)} for {networks} networks: give one mapping "
            "per network; {} changes nothing"
        )
    configs = [member_config(config, network) for network in range(networks)]
    if len({found.optim.ema_decay is None for found in configs}) > 1:
        raise ConfigError(
            "optim.ema_decay is set for some networks only: set it for all of them, or for none"
        )
    _refuse_unused(config, configs)
    return configs


def _refuse_unused(config: TrainConfig, configs: Sequence[TrainConfig]) -> None:
    """Raise ConfigError for an option of an optimizer that its networks cannot use."""
    for network, (entry, found) in enumerate(zip(config.members, configs, strict=False)):
        for option, name in OWN_OPTIONS.items():
            if f"optim.{option}" in entry and found.optim.name != name:
                raise ConfigError(
                    f"members[{network}]: optim.{option} applies to optim.name {name} only, and "
                    f"the optimizer of this network is {found.optim.name}"
                )
    names = {found.optim.name for found in configs}
    names.update(config.diversity.get("optim.name", {}).get("choice", ()))
    for option, name in OWN_OPTIONS.items():
        default = getattr(OptimConfig, option)
        if name not in names and any(getattr(c.optim, option) != default for c in configs):
            raise ConfigError(
                f"optim.{option} applies to optim.name {name} only: pass the arguments of "
                "another optimizer as optim.kwargs"
            )


def checked_members(config: TrainConfig) -> list[Options]:
    """`members` with dotted names and converted values; see `TrainConfig.members`.

    Raises: ConfigError naming the entry, the option, and the legal values.
    """
    checked = []
    for network, entry in enumerate(config.members):
        try:
            options = {name: _typed(name, value) for name, value in _dotted(entry).items()}
            _sections(config, options)
        except ConfigError as error:
            raise ConfigError(f"members[{network}]: {error}") from error
        checked.append(options)
    return checked


def checked_diversity(config: TrainConfig) -> dict[str, Spec]:
    """`diversity` with dotted names and converted values; see `TrainConfig.diversity`.

    Raises: ConfigError naming the option and the legal values.
    """
    try:
        specs = {name: _spec(name, value) for name, value in _dotted(config.diversity).items()}
        for name, spec in specs.items():
            for value in next(iter(spec.values())):
                _sections(config, {name: value})
    except ConfigError as error:
        raise ConfigError(f"diversity: {error}") from error
    return specs


def _draw(spec: Spec, seed: int) -> Any:
    fraction = (seed >> 10) / 2**53  # in [0, 1)
    ((kind, values),) = spec.items()
    if kind == "choice":
        return values[int(fraction * len(values))]
    low, high = values
    if kind == "uniform":
        return low + fraction * (high - low)
    return low * (high / low) ** fraction


def _sections(config: TrainConfig, options: Options) -> dict[str, Any]:
    """The sections of the configuration that the options change."""
    changes: dict[str, Options] = {}
    for name, value in options.items():
        section, _, option = name.partition(".")
        changes.setdefault(section, {})[option] = value
    return {
        section: dataclasses.replace(getattr(config, section), **values)
        for section, values in changes.items()
    }


def _dotted(options: object) -> Options:
    """Options with dotted names; sections are flattened."""
    if not isinstance(options, Mapping):
        raise ConfigError(f"must be a mapping of options to values, got {options!r}")
    dotted: Options = {}
    for name, value in options.items():
        if name in _SECTIONS and isinstance(value, Mapping):
            dotted |= {f"{name}.{option}": inner for option, inner in value.items()}
        else:
            dotted[str(name)] = value
    for name in dotted:
        if name not in MEMBER_OPTIONS:
            raise ConfigError(f"{name} cannot differ between networks; {_hint(name)}")
    return dotted


def _hint(name: str) -> str:
    same = [option for option in MEMBER_OPTIONS if option.endswith(f".{name}")]
    near = same or difflib.get_close_matches(name, MEMBER_OPTIONS, n=1, cutoff=0.8)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return "only options of optim (not the schedule), augmentation (data), and model.dropout can"


def _spec(name: str, spec: object) -> Spec:
    """A range or choice, checked."""
    legal = "{uniform: [LOW, HIGH]}, {log_uniform: [LOW, HIGH]}, or {choice: [...]}"
    kind, values = next(iter(spec.items()), ("", None)) if isinstance(spec, Mapping) else ("", None)
    ok = isinstance(spec, Mapping) and len(spec) == 1 and kind in _KINDS
    if not ok or not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise ConfigError(f"{name} must be {legal}, got {spec!r}")
    typed = [_typed(name, value) for value in values]
    if kind == "choice":
        return {kind: typed}
    if len(typed) != 2 or not all(isinstance(value, float) for value in typed):
        raise ConfigError(f"{name}: {kind} needs an option of two numbers [LOW, HIGH]; use choice")
    low, high = typed
    if not low < high or (kind == "log_uniform" and low <= 0):
        above = " above 0" if kind == "log_uniform" else ""
        raise ConfigError(f"{name}: {kind} must be [LOW, HIGH] with LOW{above} < HIGH, got {spec}")
    return {kind: typed}


def _typed(name: str, value: Any) -> Any:
    """The value as the type of its option; whole numbers become floats where these are expected.

    Raises: ConfigError naming the option and its type.
    """
    kind = MEMBER_OPTIONS[name]
    union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    kinds = typing.get_args(kind) if union else (kind,)
    for each in kinds:
        origin, parts = typing.get_origin(each), typing.get_args(each)
        if each is float and _is_number(value):
            return float(value)
        if origin is dict and isinstance(value, Mapping):
            return dict(value)
        values = value if isinstance(value, (list, tuple)) else ()
        if origin is tuple and len(values) == len(parts) and all(map(_is_number, values)):
            return tuple(map(float, values))
        if (origin is typing.Literal and value in parts) or type(value) is each:
            return value
    words = " or ".join(map(_described, kinds))
    raise ConfigError(f"{name} must be {words}, got {value!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _described(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return " or ".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) is dict:
        return "a mapping"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    return names.get(kind, "null" if kind is type(None) else "a list of numbers")
