"""Which tensors of a module are grafted together, with one coefficient."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from dist_graft.grafting.memory_layout import filter_matrix, write_filters

Lead = Literal["conv", "conv+linear"]

_CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_WRAPPER = "_orig_mod."  # what torch.compile puts into the keys of a module


@dataclass(frozen=True)
class GraftUnit:
    """Tensors that share one coefficient: a lead layer's weight and what follows it."""

    name: str
    """State-dict key of the lead's weight without ".weight"."""
    tensors: tuple[str, ...]
    """State-dict keys of all tensors of the unit, in state-dict order."""
    lead: str
    """State-dict key of the lead's weight, whose information stands for the unit."""
    transposed: bool = False
    """Whether the lead is a transposed convolution."""
    groups: int = 1
    """Groups of the lead."""
    buffers: frozenset[str] = frozenset()
    """Those of its tensors that are no parameters: running statistics."""

    def filters(self, weight: Tensor) -> Tensor:
        """The lead's weight as [filters, weights per filter]."""
        return filter_matrix(weight, transposed=self.transposed, groups=self.groups)

    def store_filters(self, weight: Tensor, filters: Tensor) -> None:
        """Write what `filters` gave, after a change, back into the lead's weight in place."""
        write_filters(weight, filters, transposed=self.transposed, groups=self.groups)


Place = tuple[Hashable, ...]


def place_of(tensor: Tensor) -> Place:
    """Where a tensor's elements are: equal for tensors that are tied, be it through a view.

    Tensors without elements or memory (the meta device) are equal to themselves alone.
    """
    if tensor.numel() == 0 or tensor.is_meta:
        return (id(tensor),)
    return (tensor.device, tensor.data_ptr(), tensor.numel(), tensor.dtype)


def graft_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that a round blends, by plain state-dict key, in state-dict order.

    Every floating parameter and persistent buffer, frozen ones included; tied tensors once, under
    their first key. The tensors are the module's own, so writing to them changes the module. Keys
    do not contain what torch.compile adds.

    Raises: ValueError naming a complex or uninitialised tensor.
    """
    tensors: dict[str, Tensor] = {}
    seen: set[Place] = set()
    for key, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            continue  # a module's extra state
        if isinstance(value, (nn.UninitializedParameter, nn.UninitializedBuffer)):
            raise ValueError(f"{key} has no shape yet: run the model once before grafting it")
        if value.is_complex():
            raise ValueError(f"{key} is complex: grafting blends real tensors only")
        place = place_of(value)
        if not value.is_floating_point() or place in seen:
            continue
        seen.add(place)
        tensors[key.replace(_WRAPPER, "")] = value
    return tensors


def graft_units(model: nn.Module, *, lead: Lead = "conv") -> list[GraftUnit]:
    """Cut a module's state dict into graft units.

    A unit is led by a convolution's weight, recognised by module type. Every floating tensor
    belongs to the last lead before it in state-dict order, those before the first lead to the
    first unit: so a batch norm (with its running statistics) and the classifier share the
    coefficient of the convolution before them.

    Args:
        model: any module, plain or compiled.
        lead: "conv": convolutions lead; "conv+linear": linear layers too (MLPs, transformers).

    Returns: the units in state-dict order; together they hold every floating tensor once.

    Raises: ValueError when nothing leads, when lead is "conv" and convolutions hold less than half
        of the weights (it says what to pass), or naming a layer whose weight is parametrised.
    """
    if lead not in ("conv", "conv+linear"):
        raise ValueError(f"lead must be 'conv' or 'conv+linear', got {lead!r}")
    tensors = graft_tensors(model)
    leads = _leads(model, lead, tensors)
    if lead == "conv":
        _check_share(leads, tensors)
    elif not leads:
        raise ValueError("the model has neither convolutions nor linear layers: nothing can lead")

    members: dict[str, list[str]] = {key: [] for key in leads}
    current = next(iter(key for key in tensors if key in leads))
    for key in tensors:
        current = key if key in leads else current
        members[current].append(key)
    return [
        GraftUnit(
            name=key.removesuffix(".weight"),
            tensors=tuple(members[key]),
            lead=key,
            transposed=isinstance(module, _TRANSPOSED),
            groups=getattr(module, "groups", 1),
            buffers=frozenset(
                member for member in members[key] if not isinstance(tensors[member], nn.Parameter)
            ),
        )
        for key, module in sorted(leads.items(), key=lambda item: list(tensors).index(item[0]))
    ]


def _leads(model: nn.Module, lead: Lead, tensors: dict[str, Tensor]) -> dict[str, nn.Module]:
    kinds = _CONVOLUTIONS if lead == "conv" else (*_CONVOLUTIONS, nn.Linear)
    leads: dict[str, nn.Module] = {}
    key_of = {place_of(tensor): key for key, tensor in tensors.items()}
    for path, module in model.named_modules():
        if not isinstance(module, kinds):
            continue
        name = (path + ".").replace(_WRAPPER, "").rstrip(".")
        if is_parametrized(module, "weight") or "weight" not in module._parameters:
            raise ValueError(
                f"layer {name} ({type(module).__name__}) has a parametrised weight, which cannot "
                "be blended: remove the parametrisation before grafting"
            )
        weight = module._parameters["weight"]
        assert weight is not None
        leads.setdefault(key_of[place_of(weight)], module)
    return leads


def _check_share(leads: dict[str, nn.Module], tensors: dict[str, Tensor]) -> None:
    total = sum(tensor.numel() for tensor in tensors.values() if tensor.dim() > 1)
    led = sum(tensors[key].numel() for key in leads)
    if not leads or 2 * led < total:
        raise ValueError(
            f"convolutions hold {led:,} of the model's {total:,} weights, less than half: pass "
            "lead='conv+linear' (--graft.lead conv+linear) to let linear layers lead too"
        )
