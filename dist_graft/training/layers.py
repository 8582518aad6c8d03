"""What one network's layers hold at the end of an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dist_graft.config import TrainConfig
from dist_graft.errors import NonFiniteError
from dist_graft.grafting.criteria import invalid_filters, is_finite
from dist_graft.grafting.rules import Graft
from dist_graft.grafting.units import GraftUnit, graft_tensors
from dist_graft.monitoring.tensorboard import LayerView
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


@contextmanager
def naming_epoch(epoch: int) -> Iterator[None]:
    """Add the epoch to what a round says of a weight that is not finite."""
    try:
        yield
    except NonFiniteError as error:
        raise NonFiniteError(f"epoch {epoch}: {error}") from error


def look_at_layers(config: TrainConfig, trainee: Trainee, units: list[GraftUnit]) -> LayerView:
    """Information by the configured criterion, and invalid filters, by graft unit.

    Units that are not finite have no information: the round, or `check_finite`, says so.
    """
    tensors = graft_tensors(trainee.model)
    rule = Graft(criterion=config.graft.criterion, num_bins=config.graft.num_bins)
    filters = {unit.name: unit.filters(tensors[unit.lead].detach()) for unit in units}
    return LayerView(
        criterion=rule.measured,
        information={
            name: float(rule.information(rows)) for name, rows in filters.items() if is_finite(rows)
        },
        invalid={
            threshold: {
                name: int(invalid_filters(rows, threshold)) for name, rows in filters.items()
            }
            for threshold in INVALID_THRESHOLDS
        },
    )
