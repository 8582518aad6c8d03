"""Graft units: the tensors of a module that share one coefficient."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from dist_graft.grafting.memory_layout import filter_matrix, write_filters

Lead = Literal["conv", "conv+linear"]

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
_COMPILE_PREFIX = "_orig_mod."  # added to state-dict keys by torch.compile


@dataclass(frozen=True)
class GraftUnit:
    """Tensors that share one coefficient: the weight of a lead layer and the tensors after it."""

    name: str
    """State-dict key of the lead's weight without ".weight"."""
    tensors: tuple[str, ...]
    """State-dict keys of all tensors of the unit, in state-dict order."""
    lead: str
    """State-dict key of the lead's weight, from which the unit's information is computed."""
    transposed: bool = False
    """Whether the lead is a transposed convolution."""
    groups: int = 1
    """Number of groups of the lead."""
    buffers: frozenset[str] = frozenset()
    """State-dict keys of the unit's buffers, such as running statistics."""

    def filters(self, weight: Tensor) -> Tensor:
        """Return the lead's weight as [filters, weights per filter]; a view where possible."""
        return filter_matrix(weight, transposed=self.transposed, groups=self.groups)

    def store_filters(self, weight: Tensor, filters: Tensor) -> None:
        """Write a matrix in the form of `filters` into the lead's weight in place."""
        write_filters(weight, filters, transposed=self.transposed, groups=self.groups)


StorageKey = tuple[Hashable, ...]


def storage_key(tensor: Tensor) -> StorageKey:
    """Identify a tensor's memory: equal for tied tensors, including ties through a view.

    Empty tensors and tensors on the meta device are equal only to themselves.
    """
    if tensor.numel() == 0 or tensor.is_meta:
        return (id(tensor),)
    return (tensor.device, tensor.data_ptr(), tensor.numel(), tensor.dtype)


def graft_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that a round blends, by state-dict key, in state-dict order.

    These are all floating-point parameters (including frozen ones) and persistent buffers. Tied
    tensors appear once, under their first key. The tensors are not copied: writing to them changes
    the module. Keys do not contain the prefix that torch.compile adds.

    Raises: ValueError naming a complex or uninitialized tensor.
    """
    tensors: dict[str, Tensor] = {}
    seen: set[StorageKey] = set()
    for key, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            continue  # extra state of a module
        if isinstance(value, (nn.UninitializedParameter, nn.UninitializedBuffer)):
            raise ValueError(f"{key} is uninitialized: run the model once before grafting it")
        if value.is_complex():
            raise ValueError(f"{key} is complex: only real tensors can be grafted")
        storage = storage_key(value)
        if not value.is_floating_point() or storage in seen:
            continue
        seen.add(storage)
        tensors[key.replace(_COMPILE_PREFIX, "")] = value
    return tensors


def graft_units(model: nn.Module, *, lead: Lead = "conv") -> list[GraftUnit]:
    """Divide a module's state dict into graft units.

    A unit starts at the weight of a lead layer, which is recognized by its module type. Every
    floating-point tensor belongs to the last lead before it in state-dict order, and tensors before
    the first lead belong to the first unit. A batch norm (with its running statistics) and the
    classifier therefore share the coefficient of the convolution before them.

    Args:
        model: any module, plain or compiled.
        lead: "conv": convolutions lead; "conv+linear": linear layers too (MLPs, transformers).

    Returns: the units in state-dict order. Every floating-point tensor is in exactly one unit.

    Raises: ValueError when the model has no lead layer, when lead is "conv" and convolutions hold
        less than half of the weights, or when a lead's weight is parametrized.
    """
    if lead not in ("conv", "conv+linear"):
        raise ValueError(f"lead must be 'conv' or 'conv+linear', got {lead!r}")
    tensors = graft_tensors(model)
    leads = _leads(model, lead, tensors)
    if lead == "conv":
        _check_lead_weights(leads, tensors)
    elif not leads:
        raise ValueError("the model has no convolutions or linear layers to lead a graft unit")

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
    key_of = {storage_key(tensor): key for key, tensor in tensors.items()}
    for path, module in model.named_modules():
        if not isinstance(module, kinds):
            continue
        name = (path + ".").replace(_COMPILE_PREFIX, "").rstrip(".")
        if is_parametrized(module, "weight") or "weight" not in module._parameters:
            raise ValueError(
                f"layer {name} ({type(module).__name__}) has a parametrized weight, which cannot "
                "be grafted: remove the parametrization first"
            )
        weight = module._parameters["weight"]
        assert weight is not None
        leads.setdefault(key_of[storage_key(weight)], module)
    return leads


def _check_lead_weights(leads: dict[str, nn.Module], tensors: dict[str, Tensor]) -> None:
    total = sum(tensor.numel() for tensor in tensors.values() if tensor.dim() > 1)
    led = sum(tensors[key].numel() for key in leads)
    if not leads or 2 * led < total:
        raise ValueError(
            f"convolutions hold {led:,} of the model's {total:,} weights, less than half: pass "
            "lead='conv+linear' (--graft.lead conv+linear) so that linear layers lead too"
        )
