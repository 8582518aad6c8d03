"""What is compared, on which seeds, by which number: fixed before anything runs."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from dist_graft.config.parsing import SECTIONS, from_mapping, load_strictly
from dist_graft.errors import ConfigError
from dist_graft.studies.overrides import Options, expand, merge

Primary = Literal["largest_lr_member", "mean_of_members", "ensemble", "uniform_soup"]
"""A run's outcomes that a comparison may be about; all are accuracies after the last round."""

BUILT_IN: dict[str, Options] = {
    "graft": {"method": "graft"},
    "independent": {"method": "none", "graft": {"every": 0}},
    "average": {"method": "average"},
    "papa": {"method": "papa"},
    "wash": {"method": "wash"},
    "constant": {"method": "graft", "graft": {"criterion": "constant"}},
    "shuffled": {"method": "graft", "graft": {"criterion": "shuffled"}},
    "internal": {"method": "graft", "graft": {"source": "internal"}},
    "noise": {"method": "graft", "graft": {"source": "noise"}},
    "filter": {"method": "graft", "graft": {"level": "filter"}},
}
"""What the method of a name sets; a plan's own options come on top."""

NOT_THE_PLANS = ("run_dir", "resume", "seed")
FEWEST_CONFIRMING_SEEDS = 5
FIRST_SPARE_SEED = 1000


@dataclass(frozen=True, kw_only=True)
class BestLr:
    """How the best learning rate of a single network is found; never on the test set."""

    value: float | None = None
    """The learning rate, when it is known."""
    candidates: list[float] | None = None
    """Learning rates that are tried on a validation split; unset: those that the plan's networks
    have. With one candidate nothing is tried."""
    seeds: list[int] | None = None
    """Seeds of these trials, not those of the comparison; unset: two that the plan does not use."""
    val_fraction: float = 0.1
    """Share of the training images kept for validation in these trials, when the recipe keeps
    none."""

    def __post_init__(self) -> None:
        if self.value is not None and self.candidates is not None:
            raise ConfigError("best_lr.value and best_lr.candidates exclude each other: give one")
        for value in (self.candidates or []) if self.value is None else [self.value]:
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"best_lr holds a learning rate that is not above 0: {value!r}")
        if self.candidates is not None and not self.candidates:
            raise ConfigError("best_lr.candidates must name at least one learning rate")
        _check_seeds("best_lr.seeds", self.seeds)
        _check_fraction("best_lr.val_fraction", self.val_fraction)


@dataclass(frozen=True, kw_only=True)
class Search:
    """Regimes that are tried on a validation split; one is confirmed on the test set."""

    recipes: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    """Options of each regime, on top of the plan's recipe; empty: no search. `networks` among them,
    a number or a list, is the regime's size of population, instead of the plan's."""
    seeds: list[int] = field(default_factory=list)
    """Of the search."""
    confirm_seeds: list[int] = field(default_factory=list)
    """Of the confirmation: at least 5, none of the search's."""
    val_fraction: float = 0.1
    """Share of the training images kept for validation, when the recipe keeps none."""

    def __post_init__(self) -> None:
        _check_fraction("search.val_fraction", self.val_fraction)
        if not self.recipes:
            if self.seeds or self.confirm_seeds:
                raise ConfigError("search.recipes must name at least one regime")
            return
        for name, options in self.recipes.items():
            if options and "networks" in options:
                _check_networks(f"search.recipes.{name}.networks", options["networks"])
        if not self.seeds:
            raise ConfigError("search.seeds must name at least one seed")
        _check_seeds("search.seeds", self.seeds)
        _check_seeds("search.confirm_seeds", self.confirm_seeds)
        if len(self.confirm_seeds) < FEWEST_CONFIRMING_SEEDS:
            raise ConfigError(
                f"search.confirm_seeds must name at least {FEWEST_CONFIRMING_SEEDS} seeds, got "
                f"{self.confirm_seeds!r}"
            )
        _check_apart("search.confirm_seeds", self.confirm_seeds, "search.seeds", self.seeds)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A comparison: methods that train populations under one recipe, and their controls."""

    name: str
    """Of the comparison."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """Options of `train` that all runs share; `config` names a YAML file (or several) with more,
    found from the plan's folder."""
    methods: dict[str, dict[str, Any] | None]
    """By name: the options that make the method, on top of the recipe's. The names graft,
    independent, average, papa, wash, constant, shuffled, internal, noise and filter bring their
    own."""
    networks: list[int]
    """Sizes of the populations."""
    seeds: list[int] = field(default_factory=list)
    """Of the comparison; every method and control is trained once with each."""
    primary: Primary = "largest_lr_member"
    """The outcome that the verdict is about: test accuracy after the last round of the member with
    the largest learning rate (of equals the last one), the members' mean, their ensemble, or their
    uniform soup with batch norm re-estimated."""
    against: Literal["no_exchange", "best_lr", "one_network"] = "no_exchange"
    """The control that the verdict compares with: the same population without exchange, as many
    independent networks at the best single learning rate, or one network trained as long as all."""
    best_lr: BestLr = field(default_factory=BestLr)
    search: Search = field(default_factory=Search)
    leave_out: list[Literal["one_network", "constant", "shuffled"]] = field(default_factory=list)
    """Controls that are not run; the report says so."""
    keep_checkpoints: int = 1
    """Checkpoint sets that are kept of a finished run."""
    out: str | None = None
    """Folder of the results; unset: comparisons/NAME."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.-]+", self.name):
            raise ConfigError(f"name must be letters, digits, '.', '_' and '-', got {self.name!r}")
        if not self.methods:
            raise ConfigError("methods must name at least one method")
        _check_networks("networks", self.networks)
        if self.keep_checkpoints < 0:
            raise ConfigError(f"keep_checkpoints must be at least 0, got {self.keep_checkpoints!r}")
        _check_seeds("seeds", self.seeds)
        if self.search.recipes:
            if self.seeds:
                raise ConfigError(
                    "seeds and search exclude each other: a search has seeds and confirm_seeds of "
                    "its own"
                )
            if self.primary not in ("largest_lr_member", "mean_of_members"):
                raise ConfigError(
                    f"a search needs a primary outcome that a validation split has, "
                    f"largest_lr_member or mean_of_members, got {self.primary!r}"
                )
        elif not self.seeds:
            raise ConfigError("seeds must name at least one seed")
        for name in ("seeds", "search.seeds", "search.confirm_seeds"):
            owner, _, attribute = name.rpartition(".")
            others = getattr(self.search if owner else self, attribute)
            _check_apart("best_lr.seeds", self.best_lr.seeds or [], name, others)

    @property
    def test_seeds(self) -> list[int]:
        """Seeds of the runs whose test accuracy is read."""
        return self.search.confirm_seeds or self.seeds

    @property
    def lr_seeds(self) -> list[int]:
        """Seeds on which the best learning rate is found."""
        if self.best_lr.seeds:
            return self.best_lr.seeds
        used = {*self.test_seeds, *self.search.seeds}
        spare = (seed for seed in range(FIRST_SPARE_SEED, 2**63) if seed not in used)
        return [next(spare), next(spare)]

    def method_options(self, name: str) -> Options:
        """What a method sets, on top of the recipe."""
        return merge(BUILT_IN.get(name, {}), self.methods[name] or {})

    def in_regime(self, name: str) -> Plan:
        """The plan with the recipe and the sizes of population of a regime of its search."""
        options = dict(self.search.recipes[name] or {})
        networks = options.pop("networks", self.networks)
        return replace(
            self,
            recipe=merge(self.recipe, options),
            networks=[networks] if isinstance(networks, int) else networks,
        )

    def in_regimes(self) -> list[Plan]:
        """The plan in each of its regimes; itself alone without a search."""
        return [self.in_regime(name) for name in self.search.recipes] or [self]


def read_plan(path: Path) -> Plan:
    """Read a plan; a recipe's file is put into it.

    Raises: ConfigError naming the file and what is wrong in it.
    """
    content = _read_yaml(path)
    try:
        return plan_of(content, path.parent)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def plan_of(content: Mapping[str, Any], folder: Path = Path()) -> Plan:
    """The plan that a mapping describes; `folder` is where a recipe's file is looked for."""
    values = dict(content)
    if isinstance(values.get("recipe"), str):
        values["recipe"] = {"config": values["recipe"]}
    if isinstance(values.get("methods"), list):
        values["methods"] = dict.fromkeys(values["methods"])
    plan: Plan = from_mapping(Plan, values)
    own = {name: value for name, value in plan.recipe.items() if name != "config"}
    methods = {name: expand(options or {}) for name, options in plan.methods.items()}
    regimes = {name: expand(options or {}) for name, options in plan.search.recipes.items()}
    for where, options in [
        ("recipe", own),
        *((f"methods.{name}", options) for name, options in methods.items()),
        *((f"search.recipes.{name}", options) for name, options in regimes.items()),
    ]:
        for name in set(NOT_THE_PLANS) & set(options):
            raise ConfigError(f"{where} must not set {name}: the comparison does")
    for name, options in methods.items():
        if not options and name not in BUILT_IN:
            raise ConfigError(
                f"methods.{name} is none of {', '.join(BUILT_IN)}: give the options that make it"
            )
    return replace(
        plan,
        recipe=merge(_files(plan.recipe.get("config", []), folder), own),
        methods=dict(methods),
        search=replace(plan.search, recipes=dict(regimes)),
    )


def plan_text(plan: Plan) -> str:
    """The plan as YAML, with everything that it takes from elsewhere; its sha256 names the plan."""
    values = {name: value for name, value in asdict(plan).items() if name != "out"}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = load_strictly(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not the YAML that is wanted: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold names and values")
    return content


def _files(names: str | Sequence[str], folder: Path) -> Options:
    options: Options = {}
    for name in [names] if isinstance(names, str) else names:
        path = folder / name
        content = _read_yaml(path)
        sections = {
            section: _read_yaml(path.parent / file)
            for section, file in content.items()
            if section in SECTIONS and isinstance(file, str)
        }
        options = merge(options, content | sections)
    for name in NOT_THE_PLANS:
        options.pop(name, None)
    return options


def _check_networks(name: str, value: Any) -> None:
    sizes = value if isinstance(value, list) else [value]
    if not sizes or not all(type(size) is int and size >= 1 for size in sizes):
        raise ConfigError(f"{name} must name sizes of populations, each at least 1, got {value!r}")
    _check_distinct(name, sizes)


def _check_seeds(name: str, seeds: Sequence[int] | None) -> None:
    for seed in seeds or ():
        if not 0 <= seed < 2**63:
            raise ConfigError(f"{name} must be in [0, 2^63), got {seed!r}")
    _check_distinct(name, seeds or ())


def _check_distinct(name: str, values: Sequence[int]) -> None:
    twice = sorted({value for value in values if list(values).count(value) > 1})
    if twice:
        raise ConfigError(f"{name} names {twice[0]} twice")


def _check_apart(name: str, seeds: Iterable[int], other: str, others: Iterable[int]) -> None:
    shared = sorted(set(seeds) & set(others))
    if shared:
        raise ConfigError(f"{name} and {other} share the seed {shared[0]}: they must be disjoint")


def _check_fraction(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise ConfigError(f"{name} must be above 0 and below 1, got {value!r}")
