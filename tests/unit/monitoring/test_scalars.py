"""Scalars of the population when the loss of a network is not finite."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from fake_trainer import epoch_metrics, epoch_report, network_row

from dist_graft.monitoring.scalars import population_scalars


@pytest.mark.parametrize("loss", [math.inf, math.nan])
def test_a_network_that_diverges_leaves_the_scalars_of_the_population(loss: float) -> None:
    networks = [network_row(test_loss=value) for value in (1.0, loss)]
    report = replace(epoch_report(epoch_metrics(0), networks=networks, ensemble=25.0), metric=None)
    scalars = population_scalars(report)
    assert scalars["population/test_loss_mean"] == pytest.approx(loss, nan_ok=True)
    assert math.isnan(scalars["population/test_loss_standard_deviation"])
    assert scalars["population/ensemble_test_accuracy"] == 25.0
