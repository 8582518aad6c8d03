"""Grafting filter by filter: the batch norm's scale says how much each channel matters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dist_graft.grafting.mixing import Mixing
from dist_graft.grafting.topology import donors_of
from dist_graft.grafting.units import GraftUnit


@dataclass(frozen=True)
class FilterLink:
    """How one unit's output channels are scaled, and which unit reads them."""

    scale: str
    """State-dict key of the batch norm's weight, [filters]."""
    filters: int
    lead: str
    transposed: bool
    groups: int
    channels: tuple[str, ...]
    """State-dict keys of the vectors over the channels: bias, batch norm."""
    classifier: str | None
    """State-dict key of a matrix behind them that reads the channels."""


@dataclass(frozen=True, eq=False)
class FilterMixing(Mixing):
    """Each output channel has a share of its own, and the next lead's input channel shares it."""

    links: tuple[FilterLink, ...] = ()
    own: tuple[tuple[Tensor, ...], ...] = ()
    """By network and unit: share that each channel keeps of itself, float64 [filters]."""

    def scaled(self, rate: float) -> FilterMixing:
        """Every channel takes less, too."""
        own = tuple(tuple(1 - rate * (1 - part) for part in parts) for parts in self.own)
        return replace(self, shares=super().scaled(rate).shares, own=own)

    def tensor_fraction(
        self, network: int, donor: int, unit: int, key: str, shape: torch.Size, *, buffer: bool
    ) -> Tensor | None:
        """1 - share, channel by channel; a lead's weight takes the mean of its two channels'."""
        del donor, buffer
        link, out = self.links[unit], self.own[network][unit]
        if key == link.lead:
            into = self.own[network][unit - 1] if unit else None
            share = _of_weight(link, shape, out, into)
        elif key in link.channels:
            share = out
        elif key == link.classifier:
            share = out.repeat_interleave(shape[1] // link.filters)
        else:
            return None
        return (1 - share).float()


@dataclass(frozen=True, kw_only=True)
class FilterGraft:
    """Filter-level grafting: w_j = |gamma_j| / (|gamma_j| + |gamma'_j|), channel by channel."""

    links: tuple[FilterLink, ...]
    topology: str = "ring"
    seed: int = 0
    units: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "units", len(self.links))

    def measure(self, units: Sequence[GraftUnit], tensors: Mapping[str, Tensor]) -> Tensor:
        """The absolute scales of all channels, unit after unit: [channels], float64."""
        del units
        return torch.cat([tensors[link.scale].detach().abs().double() for link in self.links])

    def decide(self, information: Tensor, round_: int) -> Mixing:
        """Shares by the ratio of the scales; one half where both are zero."""
        networks = information.shape[0]
        donor = donors_of(self.topology, networks, round_, self.seed)
        total = information + information[donor]
        own = torch.where(total > 0, information / total, 0.5)
        parts = tuple(row.split([link.filters for link in self.links]) for row in own)
        shares = torch.zeros(self.units, networks, networks, dtype=torch.float64)
        for network, channels in enumerate(parts):
            for unit, part in enumerate(channels):
                mean = float(part.mean()) if networks > 1 else 1.0
                shares[unit, network, donor[network]] += 1 - mean
                shares[unit, network, network] += mean
        return FilterMixing(
            shares=shares,
            donors=tuple((other,) if networks > 1 else () for other in donor),
            links=self.links,
            own=parts,
        )


def filter_links(
    units: Sequence[GraftUnit], tensors: Mapping[str, Tensor]
) -> tuple[FilterLink, ...]:
    """Find each unit's batch norm and check that the next unit reads its channels.

    Raises: ValueError naming the layer that has no batch norm behind it, or whose channels the
        next layer does not read one to one: such a model is grafted by layer only.
    """
    links = []
    for index, unit in enumerate(units):
        filters = unit.filters(tensors[unit.lead]).shape[0]
        scales = [
            key
            for key in unit.tensors
            if key != unit.lead and key.endswith(".weight") and tensors[key].shape == (filters,)
        ]
        if not scales:
            raise ValueError(
                f"layer {unit.name} has no batch norm behind it: use the level 'layer'"
            )
        if index + 1 < len(units):
            after = units[index + 1]
            if _inputs(after, tensors[after.lead]) != filters:
                raise ValueError(
                    f"layer {unit.name} has {filters} channels, and the next one, {after.name}, "
                    f"reads {_inputs(after, tensors[after.lead])}: use the level 'layer'"
                )
        links.append(_link(unit, tensors, scales[0], filters))
    return tuple(links)


def _link(unit: GraftUnit, tensors: Mapping[str, Tensor], scale: str, filters: int) -> FilterLink:
    behind = [key for key in unit.tensors if key != unit.lead]
    matrices = [key for key in behind if tensors[key].dim() > 1]
    first = behind.index(matrices[0]) if matrices else len(behind)
    reads = matrices and tensors[matrices[0]].dim() == 2
    return FilterLink(
        scale=scale,
        filters=filters,
        lead=unit.lead,
        transposed=unit.transposed,
        groups=unit.groups,
        channels=tuple(key for key in behind[:first] if tensors[key].shape == (filters,)),
        classifier=(
            matrices[0] if reads and tensors[matrices[0]].shape[1] % filters == 0 else None
        ),
    )


def _inputs(unit: GraftUnit, weight: Tensor) -> int:
    return weight.shape[0] if unit.transposed else weight.shape[1] * unit.groups


def _of_weight(link: FilterLink, shape: torch.Size, out: Tensor, into: Tensor | None) -> Tensor:
    """Share of each weight [out, in / groups] (transposed: [in, out / groups]), as its shape."""
    groups = link.groups
    if link.transposed:
        of_out = out.view(groups, 1, -1).expand(groups, shape[0] // groups, -1).reshape(*shape[:2])
        of_in = None if into is None else into[:, None].expand(*shape[:2])
    else:
        of_out = out[:, None].expand(*shape[:2])
        of_in = None
        if into is not None:
            of_in = into.view(groups, 1, -1).expand(groups, shape[0] // groups, -1)
            of_in = of_in.reshape(*shape[:2])
    share = of_out if of_in is None else (of_out + of_in) / 2
    return share.reshape(*shape[:2], *[1] * (len(shape) - 2))
