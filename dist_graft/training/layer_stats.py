"""Information and invalid filters of one network's layers, and checks for NaN and Inf."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

from dist_graft.config import TrainConfig
from dist_graft.errors import NonFiniteError, user_code
from dist_graft.grafting.information import invalid_filters, is_finite
from dist_graft.grafting.rules.graft import Graft
from dist_graft.grafting.units import GraftUnit, graft_tensors
from dist_graft.monitoring.metrics import LayerStats, NetworkRow
from dist_graft.population.round.agreement import describe_divergence, finite_state
from dist_graft.references import is_reference
from dist_graft.training.state import TrainState

INVALID_THRESHOLDS = (0.1, 0.01)
"""L1 norms below which a filter counts as invalid, as in arXiv 2001.05868."""


def layer_stats(config: TrainConfig, state: TrainState, units: Sequence[GraftUnit]) -> LayerStats:
    """Information by the configured criterion, and invalid filters, by graft unit.

    Units with NaN or Inf have no information: the round or `check_finite` reports them.
    """
    tensors = graft_tensors(state.model)
    rule = Graft(criterion=config.graft.criterion, num_bins=config.graft.num_bins)
    filters = {unit.name: unit.filters(tensors[unit.lead].detach()) for unit in units}
    own = is_reference(rule.criterion)
    with user_code(f"criterion {rule.criterion}") if own else nullcontext():
        information = {
            name: float(rule.information(rows)) for name, rows in filters.items() if is_finite(rows)
        }
    return LayerStats(
        criterion=rule.measured,
        information=information,
        invalid={
            threshold: {
                name: int(invalid_filters(rows, threshold)) for name, rows in filters.items()
            }
            for threshold in INVALID_THRESHOLDS
        },
    )


def non_finite_part(state: TrainState, *, loss: bool) -> str:
    """Description of the first part of the network that is NaN or Inf; empty if all is finite.

    `loss`: whether the training loss, or fp16 gradients repeatedly, were not finite.
    """
    tensors = graft_tensors(state.model)
    return describe_divergence(finite_state(tensors, loss), list(tensors))


def check_finite(
    networks: Sequence[NetworkRow],
    network: int,
    non_finite: str,
    *,
    tolerant: bool,
    first: int = 0,
) -> None:
    """Raise NonFiniteError, on all ranks, when diverged networks end the run.

    Args:
        networks: rows of all networks.
        network: index of this process's network.
        non_finite: what `non_finite_part` found in it.
        tolerant: whether the run continues as long as one network is finite.
        first: number of the first network.
    """
    diverged = [other for other, row in enumerate(networks, first) if not row.finite]
    if not diverged or (tolerant and len(diverged) < len(networks)):
        return
    parts = dict.fromkeys(diverged, "a weight, training loss or gradient that is not finite")
    if network in parts:
        parts[network] = non_finite
    raise NonFiniteError.of_networks(parts)


@contextmanager
def naming_epoch(epoch: int, hint: str) -> Iterator[None]:
    """Add the epoch and a hint to a NonFiniteError."""
    try:
        yield
    except NonFiniteError as error:
        raise NonFiniteError(f"epoch {epoch}: {error}{hint}") from error
