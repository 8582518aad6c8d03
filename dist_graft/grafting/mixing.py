"""What flows into what in one round, and the round itself as a function of a whole population."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dist_graft.grafting.units import GraftUnit, Place, place_of


@dataclass(frozen=True, eq=False)
class Mixing:
    """How much of each network flows into each, per graft unit.

    Each network becomes a convex combination of itself and its donors, all as they were before
    the round. The ring has one donor a network; a mean over the population has all others.
    """

    shares: Tensor
    """[units, networks, networks], float64 on the CPU: shares[u, i, j] is how much of network j
    flows into unit u of network i. Rows add up to 1."""
    donors: tuple[tuple[int, ...], ...]
    """Of each network, in the order in which they are blended in; never itself."""

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
            own = {network, *donors}
            others = [other for other in range(networks) if other not in own]
            if shares[:, network, others].any():
                raise ValueError(
                    f"network {network} has a share of a network it does not take from"
                )

    @property
    def networks(self) -> int:
        """Size of the population."""
        return len(self.donors)

    def scaled(self, rate: float) -> Mixing:
        """The mixing with every donor's share multiplied by a rate in [0, 1].

        Raises: ValueError for another rate.
        """
        if not 0 <= rate <= 1:
            raise ValueError(f"rate must be in [0, 1], got {rate!r}")
        own = torch.eye(self.networks, dtype=torch.float64)
        return replace(self, shares=own + (self.shares - own) * rate)

    def own_share(self, network: int) -> list[float]:
        """What the network keeps of itself, per unit: the coefficient."""
        return [float(share) for share in self.shares[:, network, network]]

    def row_without(self, network: int, lost: Collection[int]) -> Tensor:
        """The network's shares when some donors give nothing: [units, networks], float64.

        The others, itself among them, take over their share in proportion; the network stays as it
        is where nothing is left.
        """
        row = self.shares[:, network].clone()
        row[:, list(lost)] = 0.0
        left = row.sum(dim=1, keepdim=True)
        own = torch.eye(self.networks, dtype=torch.float64)[network]
        return torch.where(left > 0, row / left, own)

    def tensor_fraction(
        self, network: int, donor: int, unit: int, key: str, shape: torch.Size, *, buffer: bool
    ) -> Tensor | None:
        """Element by element, where a method mixes finer than by graft unit.

        Args: buffer: whether the tensor is no parameter.

        Returns: the weight of the interpolation that blends the donor into the tensor `key` of
        this shape in this unit, broadcastable to the shape, float32 on the CPU; None where the
        unit's fraction holds for the whole tensor.
        """
        del network, donor, unit, key, shape, buffer
        return None

    def fractions(self, network: int) -> list[list[float]]:
        """Per donor and unit: the weight of the linear interpolation that blends the donor in.

        Blending donors in one after the other, the s-th with fraction w_s / (1 - sum of the later
        w), gives each the share w it was meant to have. The last fraction is its share itself.
        """
        remaining = torch.ones(self.shares.shape[0], dtype=torch.float64)
        backwards = []
        for donor in reversed(self.donors[network]):
            share = self.shares[:, network, donor]
            backwards.append(torch.where(remaining > 0, share / remaining, 0.0).clamp(max=1.0))
            remaining = remaining - share
        return [fraction.tolist() for fraction in reversed(backwards)]


def blend_(recipient: Tensor, donor: Tensor, fraction: float) -> None:
    """Blend in place: recipient <- recipient + fraction (donor - recipient).

    The one place where weights are blended: in a distributed round and in `mix` alike, so that
    both give the same bits. A fraction of 1 copies, so that nothing of the recipient stays, were it
    NaN. Storage and memory format of the recipient stay as they are.
    """
    with torch.no_grad():
        if fraction == 1.0:
            recipient.copy_(donor)
        else:
            torch._foreach_lerp_([recipient], [donor], [fraction])


def blend_finely_(recipient: Tensor, donor: Tensor, fraction: Tensor) -> None:
    """Blend in place with a fraction for each element, as `blend_` does with one for a tensor."""
    with torch.no_grad():
        recipient.lerp_(donor, fraction.to(recipient.device, recipient.dtype))


def mix(
    states: Sequence[Mapping[str, Tensor]], units: Sequence[GraftUnit], mixing: Mixing
) -> list[dict[str, Tensor]]:
    """A whole population's round in one process: the specification of the distributed round.

    Args:
        states: state dict of each network.
        units: of their common architecture; tensors outside of them are kept as they are.
        mixing: of as many networks and units.

    Returns: the state dicts after the round, in new tensors; the arguments are not changed.

    Raises: ValueError when the numbers of networks or units do not match.
    """
    if len(states) != mixing.networks or len(units) != mixing.shares.shape[0]:
        raise ValueError(
            f"the mixing is of {mixing.networks} networks and {mixing.shares.shape[0]} units, "
            f"got {len(states)} states and {len(units)} units"
        )
    mixed = []
    for network, state in enumerate(states):
        after = _copy(state)
        for donor, fractions in zip(mixing.donors[network], mixing.fractions(network), strict=True):
            for index, (unit, fraction) in enumerate(zip(units, fractions, strict=True)):
                for key in unit.tensors:
                    other = states[donor][key].detach()
                    fine = mixing.tensor_fraction(
                        network, donor, index, key, other.shape, buffer=key in unit.buffers
                    )
                    if fine is None:
                        blend_(after[key], other, fraction)
                    else:
                        blend_finely_(after[key], other, fine.expand(other.shape))
        mixed.append(after)
    return mixed


def _copy(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state in new tensors; keys that share one tensor share its copy."""
    copies: dict[Place, Tensor] = {}
    return {
        key: copies.setdefault(place_of(value), value.detach().clone())
        for key, value in state.items()
    }
