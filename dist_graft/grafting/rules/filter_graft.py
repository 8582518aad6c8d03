"""Filter grafting filter by filter: the batch norm's scale weighs each channel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from dist_graft.grafting.mixing import Mixing, mixing_with_donor
from dist_graft.grafting.rules.base import Rule
from dist_graft.grafting.topology import donors_of
from dist_graft.grafting.units import GraftUnit


@dataclass(frozen=True)
class FilterLink:
    """The tensors of one unit that are indexed by its output channels."""

    scale: str
    """State-dict key of the batch norm's weight, [filters]."""
    filters: int
    lead: str
    transposed: bool
    groups: int
    channels: tuple[str, ...]
    """State-dict keys of the vectors over the output channels: bias and batch norm."""
    bias: str
    """State-dict key of the lead's bias, whether it has one or not."""
    classifier: str | None
    """State-dict key of the following matrix that reads the channels, if any."""


@dataclass(frozen=True, eq=False)
class FilterMixing(Mixing):
    """One share for each channel, applied to a lead's outputs and to the next lead's inputs."""

    links: tuple[FilterLink, ...] = ()
    own: tuple[tuple[Tensor, ...], ...] = ()
    """Share of its weights that each channel keeps, by network and unit: float64 [filters]."""
    as_published: bool = False
    """Whether shares multiply; see `FilterGraft.filter_rule`."""

    def scaled(self, rate: float) -> FilterMixing:
        """Return the mixing with every donor's share of every channel multiplied by the rate."""
        own = tuple(tuple(1 - rate * (1 - part) for part in parts) for parts in self.own)
        return replace(self, shares=super().scaled(rate).shares, own=own)

    def tensor_fraction(
        self, network: int, donor: int, unit: int, key: str, shape: torch.Size, *, buffer: bool
    ) -> Tensor | None:
        """Return 1 - share by channel; for a lead, of the mean or product of its two channels'."""
        del donor, buffer
        link, outputs = self.links[unit], self.own[network][unit]
        if key == link.lead:
            inputs = self.own[network][unit - 1] if unit else None
            share = _weight_share(link, shape, outputs, inputs, product=self.as_published)
        elif self.as_published and key in link.channels and key != link.bias:
            share = outputs.prod()
        elif key in link.channels:
            share = outputs
        elif key == link.classifier:
            share = outputs.repeat_interleave(shape[1] // link.filters)
        else:
            return None
        return (1 - share).float()


@dataclass(frozen=True, kw_only=True)
class FilterGraft(Rule):
    """Filter-level grafting (arXiv 2001.05868), method graft with graft.level filter.

    Channel j keeps the share w_j = |gamma_j| / (|gamma_j| + |gamma'_j|), where gamma and gamma' are
    the scales of the recipient's and the donor's batch norm. A weight of a convolution keeps the
    mean of its output channel's share and of its input channel's share in the layer before.
    """

    links: tuple[FilterLink, ...]
    filter_rule: Literal["channel", "authors"] = "channel"
    """authors: as in the published script, which blends a convolution twice, by input and then by
    output channels, so that a weight keeps the product of the two shares. It blends a whole batch
    norm once for every channel, which thus keeps the product of all shares, nearly 0."""
    topology: str = "ring"
    seed: int = 0

    @property
    def needs_only_donor(self) -> bool:
        """Whether the topology is the ring."""
        return self.topology == "ring"

    @classmethod
    def build(
        cls, options: Any, *, seed: int, units: Sequence[GraftUnit], tensors: Mapping[str, Tensor]
    ) -> Rule:
        """Create the rule for a model; raises ValueError as `filter_links` does."""
        return cls(
            links=filter_links(units, tensors),
            filter_rule=options.filter_rule,
            topology=options.topology,
            seed=seed,
        )

    def measure(self, units: Sequence[GraftUnit], tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the absolute scales of all channels, unit by unit: [channels], float64."""
        del units
        return torch.cat([tensors[link.scale].detach() for link in self.links]).abs().double()

    def decide(self, information: Tensor, round_: int) -> Mixing:
        """Set the shares by the ratio of the scales, or to 1/2 where both are zero."""
        donor = donors_of(self.topology, len(information), round_, self.seed)
        total = information + information[donor]
        own = torch.where(total > 0, information / total, 0.5)
        parts = tuple(row.split([link.filters for link in self.links]) for row in own)
        means = torch.stack([torch.stack([part.mean() for part in row]) for row in parts])
        mixing = mixing_with_donor(donor, means)
        return FilterMixing(
            shares=mixing.shares,
            donors=mixing.donors,
            links=self.links,
            own=parts,
            as_published=self.filter_rule == "authors",
        )


def filter_links(
    units: Sequence[GraftUnit], tensors: Mapping[str, Tensor]
) -> tuple[FilterLink, ...]:
    """Find each unit's batch norm and check that the next unit reads its channels.

    Raises: ValueError naming the first layer without a batch norm after it, or with channels that
        the next layer does not read one to one. Such models can only be grafted layer by layer.
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
                f"layer {unit.name} has no batch norm after it: set graft.level to layer"
            )
        if index + 1 < len(units):
            following = units[index + 1]
            inputs = _input_channels(following, tensors[following.lead])
            if inputs != filters:
                raise ValueError(
                    f"layer {unit.name} has {filters} channels, but the next layer, "
                    f"{following.name}, reads {inputs}: set graft.level to layer"
                )
        links.append(_link(unit, tensors, scales[0], filters))
    return tuple(links)


def _link(unit: GraftUnit, tensors: Mapping[str, Tensor], scale: str, filters: int) -> FilterLink:
    following = [key for key in unit.tensors if key != unit.lead]
    matrices = [key for key in following if tensors[key].dim() > 1]
    first = following.index(matrices[0]) if matrices else len(following)
    reads = matrices and tensors[matrices[0]].dim() == 2
    return FilterLink(
        scale=scale,
        filters=filters,
        lead=unit.lead,
        transposed=unit.transposed,
        groups=unit.groups,
        channels=tuple(key for key in following[:first] if tensors[key].shape == (filters,)),
        bias=f"{unit.name}.bias",
        classifier=(
            matrices[0] if reads and tensors[matrices[0]].shape[1] % filters == 0 else None
        ),
    )


def _input_channels(unit: GraftUnit, weight: Tensor) -> int:
    return weight.shape[0] if unit.transposed else weight.shape[1] * unit.groups


def _weight_share(
    link: FilterLink, shape: torch.Size, outputs: Tensor, inputs: Tensor | None, *, product: bool
) -> Tensor:
    """Share of each weight, broadcastable to the shape [out, in / groups, ...].

    A transposed convolution has the shape [in, out / groups, ...].
    """
    by_row, by_column = (inputs, outputs) if link.transposed else (outputs, inputs)
    rows, columns = shape[:2]
    groups = link.groups
    parts = []
    if by_row is not None:
        parts.append(by_row[:, None].expand(rows, columns))
    if by_column is not None:
        grouped = by_column.view(groups, 1, -1).expand(groups, rows // groups, -1)
        parts.append(grouped.reshape(rows, columns))
    if len(parts) == 1:
        share = parts[0]
    else:
        share = parts[0] * parts[1] if product else (parts[0] + parts[1]) / 2
    return share.reshape(rows, columns, *[1] * (len(shape) - 2))
