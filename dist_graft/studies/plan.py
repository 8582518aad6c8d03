"""The plan of a comparison: methods, seeds and primary outcome, fixed before the first run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from dist_graft.config.parsing import SECTIONS, from_mapping, load_strictly
from dist_graft.config.validation import above_zero, at_least, require
from dist_graft.errors import ConfigError
from dist_graft.studies.train_options import (
    DELIVERIES,
    HALF_SLOW,
    Delivery,
    TrainOptions,
    expand,
    merge,
    parse,
)

Primary = Literal["delivered", "mean_of_members", "ensemble", "uniform_soup"]
"""Outcomes of a run that a comparison can be about: accuracies after the last round."""
Control = Literal["one_network", "constant", "shuffled"]
"""Controls that a plan can leave out."""

BUILT_IN: dict[str, TrainOptions] = {
    "graft": {"method": "graft"},
    "independent": {"method": "none", "graft": {"every": 0}},
    "graft-files": {
        "method": "graft",
        "graft": {"exchange": "files"},
        "population": {"size": 1},  # set to the number of networks
        "callbacks": [HALF_SLOW],
    },
    "average": {"method": "average"},
    "papa": {"method": "papa"},
    "wash": {"method": "wash"},
    "diloco": {"method": "diloco", "model": {"shared_init": True}},
    "constant": {"method": "graft", "graft": {"criterion": "constant"}},
    "shuffled": {"method": "graft", "graft": {"criterion": "shuffled"}},
    "internal": {"method": "graft", "graft": {"source": "internal"}},
    "noise": {"method": "graft", "graft": {"source": "noise"}},
    "filter": {"method": "graft", "graft": {"level": "filter"}},
    "local_sgd": {"method": "average", "graft": {"every_steps": 10}},
}
"""Options of the built-in methods. Options in the plan take precedence."""

BASELINES: dict[str, TrainOptions] = {
    "ema": {"optim": {"ema_decay": 0.995}, "lengths": [1, "K"]},
    "checkpoint_average": {
        "checkpoint": {"keep": 5},
        "delivers": "checkpoints",
        "lengths": [1, "K"],
    },
    "data_parallel": {},
    "local_sgd": BUILT_IN["local_sgd"],
    "branches": {"start": 0.5, "delivers": "soup"},
    "snapshots": {"delivers": "snapshots"},
    "distilled": {},
}
"""Options of the baselines; see `controls.baseline_arms`. Options in the plan take precedence.

Options of ``train``, `delivers`, `lengths` (multiples of the recipe's epochs), and `start` (share
of the epochs before the branches)."""
_OF_BASELINES = ("lengths", "start")

SET_BY_COMPARISON = ("run_dir", "resume", "seed")
MIN_CONFIRM_SEEDS = 5
FIRST_SPARE_SEED = 1000
PILOT_SEEDS = 3
"""Number of the plan's seeds that a pilot uses."""


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How the learning rate of every method and control is chosen. The test set is never used.

    Each one is trained at its own length with each rate, and scored by the model that it delivers.
    """

    rates: list[float] | None = None
    """Learning rates (optim.lr) to try; default: half, one and two times the recipe's. A single
    rate is used without trials; an empty list (`tuning: none`) leaves all learning rates as they
    are."""
    seeds: list[int] | None = None
    """Seeds of the trials, disjoint from the comparison's; default: two that the plan does not
    use."""
    val_fraction: float = 0.1
    """Fraction of the training images held out in the trials, when the recipe holds out none."""
    max_extensions: int = 2
    """How many further rates are tried for a method or control while the smallest or the largest
    rate is the best."""

    def __post_init__(self) -> None:
        for value in self.rates or []:
            above_zero("tuning.rates", value)
        if len(set(self.rates or [])) < len(self.rates or []):
            raise ConfigError(f"tuning.rates contains a rate twice: {self.rates!r}")
        _check_seeds("tuning.seeds", self.seeds)
        _check_fraction("tuning.val_fraction", self.val_fraction)
        at_least("tuning.max_extensions", self.max_extensions, 0)


@dataclass(frozen=True, kw_only=True)
class RegimeSearch:
    """Training regimes to try on a validation split, of which one is confirmed on the test set."""

    recipes: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    """Options of each regime, on top of the plan's recipe; empty: no search. The option `networks`,
    an integer or a list, replaces the plan's population sizes."""
    seeds: list[int] = field(default_factory=list)
    """Seeds of the search."""
    confirm_seeds: list[int] = field(default_factory=list)
    """Seeds of the confirmation: at least 5, disjoint from the search's."""
    val_fraction: float = 0.1
    """Fraction of the training images held out, when the recipe holds out none."""

    def __post_init__(self) -> None:
        _check_fraction("search.val_fraction", self.val_fraction)
        if not self.recipes:
            if self.seeds or self.confirm_seeds:
                raise ConfigError("search.recipes must contain at least one regime")
            return
        for name, options in self.recipes.items():
            if options and "networks" in options:
                _check_networks(f"search.recipes.{name}.networks", options["networks"])
        if not self.seeds:
            raise ConfigError("search.seeds must contain at least one seed")
        _check_seeds("search.seeds", self.seeds)
        _check_seeds("search.confirm_seeds", self.confirm_seeds)
        if len(self.confirm_seeds) < MIN_CONFIRM_SEEDS:
            raise ConfigError(
                f"search.confirm_seeds must contain at least {MIN_CONFIRM_SEEDS} seeds, got "
                f"{self.confirm_seeds!r}"
            )
        _check_disjoint("search.confirm_seeds", self.confirm_seeds, "search.seeds", self.seeds)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Methods that train populations under one recipe, to be compared with their controls."""

    name: str
    """Name of the comparison."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """Options of ``train`` that all runs share. `config` names one or more YAML files to start
    from, relative to the plan's directory."""
    methods: dict[str, dict[str, Any] | None]
    """Options of each method, on top of the recipe. The names graft, independent, average, papa,
    wash, constant, shuffled, internal, noise, filter and local_sgd have options of their own. The
    option `delivers` (member, soup, ema or checkpoints) replaces the model that the method's rule
    delivers."""
    networks: list[int]
    """Population sizes."""
    seeds: list[int] = field(default_factory=list)
    """Seeds of the comparison; every method and control trains once with each."""
    primary: Primary = "delivered"
    """Primary outcome, measured on the test set after the last round: the accuracy of the model
    that each method delivers, the members' mean, their ensemble, or their uniform soup with batch
    norm re-estimated."""
    against: Literal["no_exchange", "best_lr", "one_network"] = "no_exchange"
    """Control of the primary comparison: the same population without exchange, independent networks
    with one learning rate, or one network trained K times as long."""
    smallest_effect: float = 0.3
    """Smallest difference of interest, in percentage points."""
    tuning: Tuning = field(default_factory=Tuning)
    search: RegimeSearch = field(default_factory=RegimeSearch)
    baselines: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    """Further controls, each with options on top of the recipe: ema, checkpoint_average,
    data_parallel, local_sgd, branches, snapshots, distilled."""
    leave_out: list[Control] = field(default_factory=list)
    """Controls to skip; the report lists them."""
    keep_checkpoints: int = 1
    """Number of checkpoints to keep of a finished run."""
    out: str | None = None
    """Output directory; default: comparisons/NAME."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.-]+", self.name):
            raise ConfigError(
                f"name must consist of letters, digits, '.', '_' and '-', got {self.name!r}"
            )
        if not self.methods:
            raise ConfigError("methods must contain at least one method")
        _check_networks("networks", self.networks)
        above_zero("smallest_effect", self.smallest_effect)
        at_least("keep_checkpoints", self.keep_checkpoints, 0)
        if self.primary == "ensemble" and self.against == "one_network":
            raise ConfigError(
                "primary ensemble must not be compared with one_network: an ensemble of K networks "
                "costs K times the inference; choose primary delivered, or against best_lr"
            )
        for name in self.baselines:
            require(name in BASELINES, "baselines", name, f"among {', '.join(BASELINES)}")
        if "distilled" in self.baselines and not self.keep_checkpoints:
            raise ConfigError(
                "baselines.distilled requires keep_checkpoints of at least 1: the members' last "
                "checkpoints are the teachers"
            )
        _check_seeds("seeds", self.seeds)
        if self.search.recipes:
            if self.seeds:
                raise ConfigError(
                    "seeds and search are mutually exclusive: give search.seeds and "
                    "search.confirm_seeds instead of seeds"
                )
            require(
                self.primary in ("delivered", "mean_of_members"),
                "primary",
                self.primary,
                "delivered or mean_of_members in a search",
            )
        elif not self.seeds:
            raise ConfigError("seeds must contain at least one seed")
        for name, seeds in (
            ("seeds", self.seeds),
            ("search.seeds", self.search.seeds),
            ("search.confirm_seeds", self.search.confirm_seeds),
        ):
            _check_disjoint("tuning.seeds", self.tuning.seeds or [], name, seeds)

    @property
    def test_seeds(self) -> list[int]:
        """Seeds of the runs that are evaluated on the test set."""
        return self.search.confirm_seeds or self.seeds

    @property
    def rates(self) -> list[float]:
        """Learning rates that every method and control tries, ascending; [] without tuning."""
        if self.tuning.rates is not None:
            return sorted(self.tuning.rates)
        lr = parse(self.recipe).optim.lr
        return [float(f"{factor * lr:.6g}") for factor in (0.5, 1, 2)]

    @property
    def tuning_seeds(self) -> list[int]:
        """Seeds of the learning rate trials."""
        if self.tuning.seeds:
            return self.tuning.seeds
        used = {*self.test_seeds, *self.search.seeds}
        spare = (seed for seed in range(FIRST_SPARE_SEED, 2**63) if seed not in used)
        return [next(spare), next(spare)]

    def method_options(self, name: str) -> TrainOptions:
        """Options of a method, on top of the recipe, without `delivers`."""
        options = merge(BUILT_IN.get(name, {}), self.methods[name] or {})
        options.pop("delivers", None)
        return options

    def method_delivery(self, name: str) -> Delivery | None:
        """The model that a method delivers, if the plan sets it."""
        return (self.methods[name] or {}).get("delivers")

    def with_regime(self, name: str) -> Plan:
        """Return the plan with the recipe and the population sizes of one regime of its search."""
        options = dict(self.search.recipes[name] or {})
        networks = options.pop("networks", self.networks)
        return replace(
            self,
            recipe=merge(self.recipe, options),
            networks=[networks] if isinstance(networks, int) else networks,
        )

    def with_each_regime(self) -> list[Plan]:
        """Return the plan with each regime of its search; [self] without a search."""
        return [self.with_regime(name) for name in self.search.recipes] or [self]


def read_plan(path: Path) -> Plan:
    """Read a plan and the recipe files that it names.

    Raises: ConfigError naming the file and the field.
    """
    content = _read_yaml(path)
    try:
        return parse_plan(content, path.parent)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def parse_plan(content: Mapping[str, Any], folder: Path = Path()) -> Plan:
    """Build a plan from a mapping; `folder` is the directory that recipe files are relative to.

    Raises: ConfigError naming the field.
    """
    values = dict(content)
    if isinstance(values.get("recipe"), str):
        values["recipe"] = {"config": values["recipe"]}
    for name in ("methods", "baselines"):
        if isinstance(values.get(name), list):
            values[name] = dict.fromkeys(values[name])
    if values.get("tuning") == "none":
        values["tuning"] = {"rates": []}
    if "best_lr" in values:
        raise ConfigError(
            "best_lr was replaced by tuning, which applies to every method and control: write "
            "tuning: {rates: [...], seeds: [...]}"
        )
    plan: Plan = from_mapping(Plan, values)
    recipe = {name: value for name, value in plan.recipe.items() if name != "config"}
    methods = {name: expand(options or {}) for name, options in plan.methods.items()}
    baselines = {name: expand(options or {}) for name, options in plan.baselines.items()}
    regimes = {name: expand(options or {}) for name, options in plan.search.recipes.items()}
    for section, options in [
        ("recipe", recipe),
        *((f"methods.{name}", options) for name, options in methods.items()),
        *((f"baselines.{name}", options) for name, options in baselines.items()),
        *((f"search.recipes.{name}", options) for name, options in regimes.items()),
    ]:
        for name in set(SET_BY_COMPARISON) & set(options):
            raise ConfigError(f"{section} must not set {name}: the comparison sets it")
    for name, options in methods.items():
        if options.get("delivers", "soup") not in DELIVERIES:
            raise ConfigError(
                f"methods.{name}.delivers must be one of {', '.join(DELIVERIES)}, got "
                f"{options['delivers']!r}"
            )
        if not options and name not in BUILT_IN:
            raise ConfigError(
                f"methods.{name} needs options, or a name among {', '.join(BUILT_IN)}"
            )
    for name, options in baselines.items():
        _check_baseline(name, options)
    recipe = merge(_read_recipes(plan.recipe.get("config", []), folder), recipe)
    for options in (recipe, *methods.values(), *baselines.values(), *regimes.values()):
        if options.get("population", {}).get("join") == "donor":
            raise ConfigError("population.join must be fresh in a comparison, got 'donor'")
    return replace(
        plan,
        recipe=recipe,
        methods=dict(methods),
        baselines=dict(baselines),
        search=replace(plan.search, recipes=dict(regimes)),
    )


def plan_text(plan: Plan) -> str:
    """Format a plan as YAML, with its recipe files included. Its sha256 identifies the plan."""
    values = {name: value for name, value in asdict(plan).items() if name != "out"}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = load_strictly(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must contain a mapping")
    return content


def _read_recipes(names: str | Sequence[str], folder: Path) -> TrainOptions:
    options: TrainOptions = {}
    for name in [names] if isinstance(names, str) else names:
        path = folder / name
        content = _read_yaml(path)
        sections = {
            section: _read_yaml(path.parent / file)
            for section, file in content.items()
            if section in SECTIONS and isinstance(file, str)
        }
        options = merge(options, content | sections)
    for name in SET_BY_COMPARISON:
        options.pop(name, None)
    return options


def _check_baseline(name: str, options: Mapping[str, Any]) -> None:
    """Check options of a baseline that are not options of ``train``."""
    for option in _OF_BASELINES:
        if option in options and option not in BASELINES[name]:
            raise ConfigError(f"baselines.{name} has no option {option}")
    lengths = options.get("lengths", [1])
    require(
        lengths in ([1], ["K"], [1, "K"], ["K", 1]),
        f"baselines.{name}.lengths",
        lengths,
        "[1], [K] or [1, K]: multiples of the recipe's epochs",
    )
    start = options.get("start", 0.5)
    fits = isinstance(start, int | float) and 0 < start < 1
    require(fits, f"baselines.{name}.start", start, "above 0 and below 1")


def _check_networks(name: str, value: Any) -> None:
    sizes = value if isinstance(value, list) else [value]
    if not sizes or not all(type(size) is int and size >= 1 for size in sizes):
        raise ConfigError(f"{name} must contain population sizes of at least 1, got {value!r}")
    _check_distinct(name, sizes)


def _check_seeds(name: str, seeds: Sequence[int] | None) -> None:
    for seed in seeds or ():
        require(0 <= seed < 2**63, name, seed, "in [0, 2^63)")
    _check_distinct(name, seeds or ())


def _check_distinct(name: str, values: Sequence[int]) -> None:
    repeated = sorted({value for value in values if list(values).count(value) > 1})
    if repeated:
        raise ConfigError(f"{name} contains {repeated[0]} twice")


def _check_disjoint(name: str, seeds: Iterable[int], other: str, others: Iterable[int]) -> None:
    shared = sorted(set(seeds) & set(others))
    if shared:
        raise ConfigError(f"{name} and {other} must be disjoint, both contain {shared[0]}")


def _check_fraction(name: str, value: float) -> None:
    require(0 < value < 1, name, value, "above 0 and below 1")
