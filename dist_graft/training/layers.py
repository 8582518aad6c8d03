"""What one network's layers hold at the end of an epoch."""

from __future__ import annotations

from dist_graft.errors import NonFiniteError
from dist_graft.grafting.criteria import invalid_filters, is_finite
from dist_graft.grafting.rules import Ring
from dist_graft.grafting.units import GraftUnit, graft_tensors
from dist_graft.training.loop import Trainee

INVALID_THRESHOLDS = (0.1, 0.01)
"""L1 norms below which a filter counts as invalid, as in arXiv 2001.05868."""


def check_finite(trainee: Trainee, epoch: int) -> None:
    """Raise NonFiniteError naming epoch, network and tensor, if a weight is not finite."""
    for key, tensor in graft_tensors(trainee.model).items():
        if not is_finite(tensor):
            raise NonFiniteError(
                f"epoch {epoch}: network {trainee.network} has a weight that is not finite in "
                f"{key}: a lower learning rate, warm-up or clipping may help"
            )


def layer_information(trainee: Trainee, units: list[GraftUnit], rule: Ring) -> dict[str, float]:
    """Information of each graft unit, in the unit of the rule's criterion."""
    tensors = graft_tensors(trainee.model)
    return {
        unit.name: float(rule.information(unit.filters(tensors[unit.lead].detach())))
        for unit in units
    }


def count_invalid(trainee: Trainee, units: list[GraftUnit]) -> dict[float, dict[str, int]]:
    """Number of invalid filters, by threshold and graft unit."""
    tensors = graft_tensors(trainee.model)
    return {
        threshold: {
            unit.name: int(invalid_filters(unit.filters(tensors[unit.lead]), threshold))
            for unit in units
        }
        for threshold in INVALID_THRESHOLDS
    }
