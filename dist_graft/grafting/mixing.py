"""Shares of each network in each other network in one round, and the round as a pure function."""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from dist_graft.grafting.units import GraftUnit, StorageKey, storage_key


@dataclass(frozen=True, eq=False)
class Mixing:
    """Shares of every network in every network, per graft unit.

    Each network becomes a convex combination of the weights that it and its donors had before the
    round. On the ring each network has one donor; in a population mean all others are donors.

    Raises: ValueError for shares of the wrong shape or type, shares outside [0, 1], rows that do
        not add up to 1, or donors that do not match the shares.
    """

    shares: Tensor
    """[units, networks, networks], float64 on the CPU: shares[u, i, j] is the share of network j in
    unit u of network i. Rows add up to 1."""
    donors: tuple[tuple[int, ...], ...]
    """Donors of each network, in blending order. A network is never its own donor."""
    moves_scalars: ClassVar[bool] = False
    """Whether single scalars are exchanged (`chosen_scalars`); otherwise whole tensors are blended
    (`sequence`, `tensor_fraction`). Scalars require all networks at the same step."""

    def __post_init__(self) -> None:
        shares, networks = self.shares, len(self.donors)
        if shares.dim() != 3 or shares.shape[1:] != (networks, networks):
            raise ValueError(
                f"shares must be [units, {networks}, {networks}] for {networks} networks, got "
                f"{list(shares.shape)}"
            )
        if shares.dtype != torch.float64 or shares.device.type != "cpu":
            raise ValueError(f"shares must be float64 on the CPU, got {shares.dtype}")
        if not ((shares >= 0) & (shares <= 1)).all():
            raise ValueError("shares must be in [0, 1]")
        if shares.numel() and (shares.sum(dim=2) - 1).abs().max() > 1e-9:
            raise ValueError("the shares of each row must add up to 1")
        for network, donors in enumerate(self.donors):
            if not all(0 <= donor < networks for donor in donors):
                raise ValueError(f"network {network} has a donor outside of 0 to {networks - 1}")
            if network in donors or len(set(donors)) != len(donors):
                raise ValueError(f"network {network} must have distinct donors other than itself")
            others = [other for other in range(networks) if other not in {network, *donors}]
            if shares[:, network, others].any():
                raise ValueError(f"network {network} has a share of a network that is not a donor")

    @property
    def networks(self) -> int:
        """Size of the population."""
        return len(self.donors)

    def scaled(self, rate: float) -> Mixing:
        """Return the mixing with every donor's share multiplied by a rate in [0, 1].

        Raises: ValueError for any other rate.
        """
        if not 0 <= rate <= 1:
            raise ValueError(f"rate must be in [0, 1], got {rate!r}")
        identity = torch.eye(self.networks, dtype=torch.float64)
        return replace(self, shares=identity + (self.shares - identity) * rate)

    def own_share(self, network: int) -> list[float]:
        """Return the coefficient, the share of its weights that a network keeps, per unit."""
        return [float(share) for share in self.shares[:, network, network]]

    def row_without(self, network: int, excluded: Collection[int]) -> Tensor:
        """Return a network's shares without some of its donors: [units, networks], float64.

        The excluded share is distributed in proportion to the remaining shares, including the
        network's own. If none remains, the network keeps its weights.
        """
        row = self.shares[:, network].clone()
        row[:, list(excluded)] = 0.0
        remaining = row.sum(dim=1, keepdim=True)
        unchanged = torch.eye(self.networks, dtype=torch.float64)[network]
        return torch.where(remaining > 0, row / remaining, unchanged)

    def mean_fractions(self) -> list[float] | None:
        """Return how far each unit moves toward the population mean, in [0, 1].

        Returns: f for each unit, if every network becomes (1 - f) * itself + f * the mean of all
            networks; None for any other mixing.
        """
        if type(self) is not Mixing or self.networks == 1:
            return None
        own, other = self.shares[:, :1, :1], self.shares[:, :1, 1:2]
        identity = torch.eye(self.networks, dtype=torch.float64)
        if (own < other).any() or not torch.equal(
            self.shares, torch.where(identity > 0, own, other)
        ):
            return None
        return [1 - float(difference) for difference in (own - other).flatten()]

    def tensor_fraction(
        self, network: int, donor: int, unit: int, key: str, shape: torch.Size, *, buffer: bool
    ) -> Tensor | None:
        """Return interpolation weights by element, for methods finer than a graft unit.

        Args:
            network: the recipient.
            donor: the donor that is blended in.
            unit: index of the graft unit.
            key: state-dict key of the tensor.
            shape: shape of the tensor.
            buffer: whether the tensor is a buffer, not a parameter.

        Returns: weights that broadcast to the shape, float32 on the CPU; None where the unit's
            fraction applies to the whole tensor.
        """
        del network, donor, unit, key, shape, buffer
        return None

    def sequence(self, network: int) -> list[tuple[int, list[float]]]:
        """Return the networks to blend in order, each with its interpolation weight per unit."""
        return list(zip(self.donors[network], self.fractions(network), strict=True))

    def chosen_scalars(self, unit: int, key: str, numel: int) -> tuple[Tensor, Tensor]:
        """Return the scalars of one tensor to exchange, identical on every rank.

        Used if `moves_scalars`. The default is none.

        Args:
            unit: index of the graft unit.
            key: state-dict key of the tensor.
            numel: number of the tensor's elements.

        Returns: positions, int64 [n], in the tensor's logical order; and sources, int64
            [n, networks]: the network whose scalar each network holds afterwards. Each row is a
            permutation.
        """
        del unit, key, numel
        none = torch.zeros(0, dtype=torch.int64)
        return none, none.view(0, self.networks)

    def fractions(self, network: int) -> list[list[float]]:
        """Return the interpolation weight of each donor and unit, in blending order.

        Blending donor s with fraction w_s / (1 - sum of the later w) gives every donor its share
        w_s in the result. The last donor's fraction equals its share.
        """
        remaining = torch.ones(self.shares.shape[0], dtype=torch.float64)
        backwards = []
        for donor in reversed(self.donors[network]):
            share = self.shares[:, network, donor]
            backwards.append(torch.where(remaining > 0, share / remaining, 0.0).clamp(max=1.0))
            remaining = remaining - share
        return [fraction.tolist() for fraction in reversed(backwards)]


@dataclass(frozen=True, eq=False)
class EqualMean(Mixing):
    """The population mean, with the same bits for all networks: all add up in the same order."""

    def scaled(self, rate: float) -> EqualMean:
        """Return the mixing itself at rate 1; raises ValueError for any other rate."""
        if rate != 1:
            raise ValueError(f"rate must be 1 for this method, got {rate!r}")
        return self

    def mean_fractions(self) -> list[float] | None:
        """Return 1 for each unit; None if diverged networks are left out of the mean."""
        left_out = self.networks == 1 or not self.shares.all()
        return None if left_out else [1.0] * len(self.shares)

    def sequence(self, network: int) -> list[tuple[int, list[float]]]:
        """Return all networks that have a share: the first is copied, the others are blended."""
        members = self.shares[0, network].nonzero().flatten().tolist()
        units = len(self.shares)
        return [(member, [1 / (index + 1)] * units) for index, member in enumerate(members)]


@dataclass(frozen=True, eq=False)
class ScalarSwap(Mixing):
    """A random permutation of some scalars among the networks.

    Every rank draws the same scalars from seed, round and state-dict key, so only their values are
    exchanged. Buffers are not changed. `shares` holds the expected shares.
    """

    probability: tuple[float, ...] = ()
    """Probability that a scalar is chosen, per unit."""
    moves_scalars = True
    seed: int = 0
    round: int = 0

    def scaled(self, rate: float) -> ScalarSwap:
        """Return the swap with the probability of every unit multiplied by the rate."""
        probability = tuple(rate * value for value in self.probability)
        return replace(self, shares=super().scaled(rate).shares, probability=probability)

    def row_without(self, network: int, excluded: Collection[int]) -> Tensor:
        """Return a network's shares if it keeps its scalars in place of the excluded donors'."""
        row = self.shares[:, network].clone()
        row[:, network] += row[:, list(excluded)].sum(dim=1)
        row[:, list(excluded)] = 0.0
        return row

    def chosen_scalars(self, unit: int, key: str, numel: int) -> tuple[Tensor, Tensor]:
        """Draw scalars and a permutation of the networks for each one."""
        draw = random.Random(f"{self.seed}:{self.round}:{key}").getrandbits(63)
        generator = torch.Generator().manual_seed(draw)
        positions = bernoulli_positions(numel, self.probability[unit], generator)
        order = torch.rand(len(positions), self.networks, generator=generator).argsort(dim=1)
        return positions, order

    def tensor_fraction(
        self, network: int, donor: int, unit: int, key: str, shape: torch.Size, *, buffer: bool
    ) -> Tensor:
        """Return 1 where the network's new scalar is the donor's, otherwise 0; 0 for buffers."""
        fraction = torch.zeros(math.prod(shape))
        if not buffer:
            positions, sources = self.chosen_scalars(unit, key, math.prod(shape))
            fraction[positions[sources[:, network] == donor]] = 1.0
        return fraction.view(shape)


def mixing_with_donor(donor: Sequence[int], own_share: Tensor) -> Mixing:
    """Mixing in which each network keeps a share of its weights; the rest is one donor's.

    Args:
        donor: donor of each network; ignored in a population of one.
        own_share: share that each network keeps, [networks, units], float64, in [0, 1].
    """
    networks, units = own_share.shape
    rows = torch.arange(networks)
    shares = torch.zeros(units, networks, networks, dtype=torch.float64)
    shares[:, rows, list(donor)] = (1 - own_share).T
    shares[:, rows, rows] = own_share.T if networks > 1 else 1.0
    return Mixing(shares=shares, donors=tuple((other,) if networks > 1 else () for other in donor))


def mixing_with_mean(networks: int, units: int, *, keep: float = 0.0) -> Mixing:
    """Mixing in which each network becomes keep * itself + (1 - keep) * the population mean."""
    row = (1 - keep) / networks
    identity = torch.eye(networks, dtype=torch.float64)
    return Mixing(
        shares=(row * torch.ones_like(identity) + keep * identity).expand(units, -1, -1).clone(),
        donors=tuple(
            tuple(other for other in range(networks) if other != network)
            for network in range(networks)
        ),
    )


def bernoulli_positions(count: int, probability: float, generator: torch.Generator) -> Tensor:
    """Positions of the successes in `count` independent trials: int64, ascending.

    Draws the gaps between successes (geometric), so the cost grows only with the successes.
    """
    if probability <= 0 or count == 0:
        return torch.zeros(0, dtype=torch.int64)
    if probability >= 1:
        return torch.arange(count)
    found: list[Tensor] = []
    last = -1
    while last < count:
        expected = (count - last) * probability
        batch = int(expected + 5 * math.sqrt(expected) + 10)
        gaps = torch.empty(batch, dtype=torch.float64)
        gaps.geometric_(probability, generator=generator)
        positions = last + gaps.to(torch.int64).cumsum(0)
        found.append(positions)
        last = int(positions[-1])
    drawn = torch.cat(found)
    return drawn[drawn < count]


def blend_(
    recipients: Sequence[Tensor], donors: Sequence[Tensor], fractions: Sequence[float]
) -> None:
    """Blend tensors in place: recipient <- recipient + fraction * (donor - recipient).

    The distributed round and `mix` both blend with this function, so their results are bitwise
    identical. A fraction of 1 copies the donor, which also replaces NaN. Storage and memory format
    of the recipients are preserved.

    Args:
        recipients: changed; of one dtype and on one device.
        donors: as many, of the same shapes.
        fractions: interpolation weight of each pair.
    """
    copied = [index for index, fraction in enumerate(fractions) if fraction == 1.0]
    blended = [index for index, fraction in enumerate(fractions) if fraction != 1.0]
    with torch.no_grad():
        if copied:
            torch._foreach_copy_([recipients[i] for i in copied], [donors[i] for i in copied])
        if blended:
            torch._foreach_lerp_(
                [recipients[i] for i in blended],
                [donors[i] for i in blended],
                [fractions[i] for i in blended],
            )


def blend_elementwise_(recipient: Tensor, donor: Tensor, fraction: Tensor) -> None:
    """Blend in place with one fraction for each element; see `blend_`."""
    with torch.no_grad():
        weight = fraction.to(recipient.device, recipient.dtype, non_blocking=True)
        recipient.lerp_(donor, weight)


def mix(
    states: Sequence[Mapping[str, Tensor]], units: Sequence[GraftUnit], mixing: Mixing
) -> list[dict[str, Tensor]]:
    """Apply one round to a whole population in a single process.

    This is the specification of the distributed round, which is bitwise identical, except that
    means over NCCL are summed in another order (ADR 35).

    Args:
        states: state dict of each network; not changed.
        units: graft units of the common architecture. Other tensors are copied unchanged.
        mixing: shares for the same number of networks and units.

    Returns: the state dicts after the round, in new tensors.

    Raises: ValueError when the numbers of networks or units do not match.
    """
    if len(states) != mixing.networks or len(units) != mixing.shares.shape[0]:
        raise ValueError(
            f"the mixing is for {mixing.networks} networks and {mixing.shares.shape[0]} units, "
            f"got {len(states)} states and {len(units)} units"
        )
    mixed = []
    for network, state in enumerate(states):
        after = _copy(state)
        for donor, fractions in mixing.sequence(network):
            for index, (unit, fraction) in enumerate(zip(units, fractions, strict=True)):
                for key in unit.tensors:
                    other = states[donor][key].detach()
                    by_element = mixing.tensor_fraction(
                        network, donor, index, key, other.shape, buffer=key in unit.buffers
                    )
                    if by_element is None:
                        blend_([after[key]], [other], [fraction])
                    else:
                        blend_elementwise_(after[key], other, by_element.expand(other.shape))
        mixed.append(after)
    return mixed


def _copy(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Clone a state dict; keys that share one tensor share its clone."""
    copies: dict[StorageKey, Tensor] = {}
    return {
        key: copies.setdefault(storage_key(value), value.detach().clone())
        for key, value in state.items()
    }
