"""Base class of the population methods."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:  # command-line help reads the rules' options and must not wait for torch
    from torch import Tensor

    from dist_graft.grafting.mixing import Mixing
    from dist_graft.grafting.units import GraftUnit


@dataclasses.dataclass(frozen=True)
class Interval:
    """Interval between two rounds: a number of epochs or of optimizer steps; the other is 0."""

    epochs: int = 0
    steps: int = 0


@dataclasses.dataclass(frozen=True)
class RoundSchedule:
    """Interval and strength of a method's rounds; the defaults suit most methods.

    Base class of the rules and of the classes that hold their options.
    """

    @property
    def interval(self) -> Interval | None:
        """Interval between two rounds; None: as set by graft.every and every_steps."""
        return None

    def rate(self, lr_factor: float) -> float:
        """Factor in [0, 1] for all donors' shares in a round.

        Args:
            lr_factor: current learning rate divided by the largest one, lr / lr_0.
        """
        del lr_factor
        return 1.0


class Rule(RoundSchedule, ABC):
    """A population method, which decides the shares of all networks in every round.

    Subclasses are frozen dataclasses. Every rank must create the same rule; the fields are compared
    before the first exchange. Only `decide` must be implemented.
    """

    options: ClassVar[type[Any] | None] = None
    """Dataclass of the method's own section of options, named after the method; see papa.py."""
    delivers: ClassVar[Literal["member", "soup"]] = "member"
    """The model that the method delivers and that is evaluated: one network of the population, or
    the mean of all networks' weights."""
    synchronous: ClassVar[bool] = False
    """Whether all networks must exchange at the same time, so that independent jobs (exchange
    "files") cannot use the method."""
    reports_information: ClassVar[bool] = False
    """Whether `measure` returns the information of each unit, which records then hold."""
    same_start: ClassVar[bool] = False
    """Whether all networks must start with the same weights (model.shared_init)."""

    @property
    def needs_only_donor(self) -> bool:
        """Whether a network's shares depend only on its own information and on its donor's.

        The donor is then the nearest network upstream in the ring, so that independent jobs
        (exchange "files") need not know the whole ring.
        """
        return False

    @classmethod
    def build(
        cls, options: Any, *, seed: int, units: Sequence[GraftUnit], tensors: Mapping[str, Tensor]
    ) -> Rule:
        """Create the rule from the command line's options.

        The default implementation passes on every option that is a field of the rule, and the seed.

        Args:
            options: dataclass of the method's own section, or of the section graft without one.
            seed: seed of the run.
            units: graft units of the model.
            tensors: the model's tensors by state-dict key.

        Raises: ValueError for a model or option that the method does not support.
        """
        del units, tensors
        values = {**vars(options), "seed": seed}
        fields = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in fields})

    def measure(self, units: Sequence[GraftUnit], tensors: Mapping[str, Tensor]) -> Tensor:
        """Return this network's information, which is gathered from all networks before a round.

        Args:
            units: the graft units.
            tensors: the network's own tensors by state-dict key; must not be changed.

        Returns: [n], floating, with the same n on every rank. The default is a zero for each unit,
            for methods that need no information.
        """
        del tensors
        import torch

        return torch.zeros(len(units), dtype=torch.float64)

    def init_state(
        self, units: Sequence[GraftUnit], tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the tensors that the rule keeps between rounds, before the first training step.

        They must be equal on all networks. The trainer saves them in checkpoints. A rule with state
        can neither exclude diverged networks nor use exchange "files". The default is empty.

        Args: as `measure`.
        """
        del units, tensors
        return {}

    def after_exchange(
        self,
        units: Sequence[GraftUnit],
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Tensor],
    ) -> None:
        """Change a network after the exchange, without communication. The default does nothing.

        A pure function of the rule and the arguments. Not called if `init_state` returned nothing.

        Args:
            units: the graft units.
            tensors: the network's own tensors by state-dict key, mixed; changed in place.
            state: what `init_state` returned; changed in place.
        """

    @abstractmethod
    def decide(self, information: Tensor, round_: int) -> Mixing:
        """Return the mixing of a round: a pure function of the rule and the arguments.

        Args:
            information: [networks, n], information of each network, float64 on the CPU; identical
                on every rank.
            round_: number of the round, 0-based.
        """


def require(ok: bool, name: str, value: object, legal: str) -> None:
    """Raise ValueError naming option, value and legal range, unless ok."""
    if not ok:
        raise ValueError(f"{name} must be {legal}, got {value!r}")
