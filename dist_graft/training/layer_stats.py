"""What one network's layers hold at the end of an epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from dist_graft.config import TrainConfig
from dist_graft.errors import NonFiniteError
from dist_graft.grafting.information import invalid_filters, is_finite
from dist_graft.grafting.rules.graft import Graft
from dist_graft.grafting.units import GraftUnit, graft_tensors
from dist_graft.monitoring.console import NetworkRow
from dist_graft.monitoring.tensorboard import LayerView
from dist_graft.training.loop import TrainState

INVALID_THRESHOLDS = (0.1, 0.01)
"""L1 norms below which a filter counts as invalid, as in arXiv 2001.05868."""


def what_is_lost(trainee: TrainState, *, loss: bool) -> str:
    """What of the network is not finite; empty when all is well.

    Args:
        trainee: the network.
        loss: whether it is known that the training loss is not, or fp16 gradients again and again.
    """
    for key, tensor in graft_tensors(trainee.model).items():
        if not is_finite(tensor):
            return f"a weight that is not finite in {key}"
    return "a training loss or gradient that is not finite" if loss else ""


def check_sound(
    everyone: Sequence[NetworkRow], epoch: int, network: int, lost: str, *, may_go_on: bool
) -> None:
    """Raise NonFiniteError, in every process alike, when diverged networks end the run.

    Args:
        everyone: what the networks say of themselves.
        epoch: that is over.
        network: of this process.
        lost: what of it is not finite.
        may_go_on: whether the run goes on while one network is sound.
    """
    diverged = [other for other, row in enumerate(everyone) if not row.sound]
    if not diverged or (may_go_on and len(diverged) < len(everyone)):
        return
    elsewhere = "a weight, training loss or gradient that is not finite"
    who = "; ".join(
        f"network {other} has {lost if other == network else elsewhere}" for other in diverged
    )
    raise NonFiniteError(
        f"epoch {epoch}: {who}: a lower learning rate, warm-up or clipping may help"
    )


@contextmanager
def naming_epoch(epoch: int) -> Iterator[None]:
    """Add the epoch to what a round says of a weight that is not finite."""
    try:
        yield
    except NonFiniteError as error:
        raise NonFiniteError(f"epoch {epoch}: {error}") from error


def layer_stats(config: TrainConfig, trainee: TrainState, units: list[GraftUnit]) -> LayerView:
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
