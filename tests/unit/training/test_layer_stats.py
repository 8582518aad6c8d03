from __future__ import annotations

import pytest
import torch
from small import make_state, small_model
from torch import nn

import dist_graft
from dist_graft.config import GraftConfig, OptimConfig, TrainConfig
from dist_graft.errors import NonFiniteError
from dist_graft.grafting.units import graft_units
from dist_graft.monitoring.metrics import NetworkRow
from dist_graft.population.round.agreement import LOSS_NOT_FINITE, describe_divergence
from dist_graft.training.layer_stats import check_finite, layer_stats, naming_epoch, non_finite_part


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("key", ["0.weight", "1.running_var", "5.bias"])
def test_a_non_finite_weight_is_named(key: str, value: float) -> None:
    state = make_state(OptimConfig(), model=small_model(batch_norm=True), network=3)
    assert not non_finite_part(state, loss=False)
    state.model.state_dict()[key].view(-1)[-1] = value
    for loss in (False, True):
        assert non_finite_part(state, loss=loss) == f"a weight that is not finite in {key}"


def test_a_loss_is_named_when_all_weights_are_finite() -> None:
    found = non_finite_part(make_state(OptimConfig()), loss=True)
    assert found == "a training loss or gradient that is not finite"


def test_integers_are_ignored() -> None:
    state = make_state(OptimConfig(), model=small_model(batch_norm=True))
    state.model.get_buffer("1.num_batches_tracked").fill_(2**62)
    assert not non_finite_part(state, loss=False)


class TestCheckFinite:
    def networks(self, *finite: bool) -> list[NetworkRow]:
        return [NetworkRow(*[0.0] * 11, finite=float(one)) for one in finite]

    @pytest.mark.parametrize("tolerant", [True, False])
    def test_finite_networks_continue(self, tolerant: bool) -> None:
        check_finite(self.networks(True, True), 0, "", tolerant=tolerant)

    @pytest.mark.parametrize("network", [0, 1, 2])
    def test_one_finite_network_is_enough_for_a_tolerant_run(self, network: int) -> None:
        rows = self.networks(False, True, False)
        check_finite(rows, network, "a weight", tolerant=True)
        with pytest.raises(NonFiniteError):
            check_finite(rows, network, "a weight", tolerant=False)

    @pytest.mark.parametrize("tolerant", [True, False])
    @pytest.mark.parametrize("networks", [1, 3])
    def test_without_a_finite_network_the_run_ends(self, networks: int, tolerant: bool) -> None:
        rows = self.networks(*[False] * networks)
        with pytest.raises(NonFiniteError, match="network 0 has something"):
            check_finite(rows, 0, "something", tolerant=tolerant)

    def test_the_error_names_all_diverged_networks(self) -> None:
        rows = self.networks(False, True, False)
        with pytest.raises(NonFiniteError) as caught, naming_epoch(7, "; a hint"):
            check_finite(rows, 2, "a weight that is not finite in a.b", tolerant=False)
        assert str(caught.value) == (
            "epoch 7: network 0 has a weight, training loss or gradient that is not finite; "
            "network 2 has a weight that is not finite in a.b: try a lower learning rate, warm-up "
            "or gradient clipping; a hint"
        )
        with pytest.raises(NonFiniteError, match=r"network 0 has a .*; network 2 has a "):
            check_finite(rows, 1, "", tolerant=False)

    @pytest.mark.parametrize("own", [0, LOSS_NOT_FINITE, None])
    def test_a_line_of_the_error_is_recognized(self, own: int | None) -> None:
        """That of the diverged network, and that of another one."""
        part = "" if own is None else describe_divergence(own, ["a.b"])
        with pytest.raises(NonFiniteError) as caught:
            check_finite(self.networks(True, False), int(bool(part)), part, tolerant=False)
        assert NonFiniteError.is_reported_in(f"dist-graft: error: {caught.value}")


def test_information_is_measured_on_the_lead() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 5, 3))
    state = make_state(OptimConfig(), model=model)
    stats = layer_stats(TrainConfig(), state, graft_units(model))
    weights = {name: model[int(name)].weight.detach() for name in ("0", "1")}
    expected = {name: float(dist_graft.entropy(weight)) for name, weight in weights.items()}
    assert stats.criterion == "entropy"
    assert stats.information == pytest.approx(expected)
    config = TrainConfig(graft=GraftConfig(criterion="l1"))
    other = layer_stats(config, state, graft_units(model))
    assert other.criterion == "l1"
    assert other.information["1"] == pytest.approx(float(weights["1"].abs().mean()))


def test_a_non_finite_unit_has_no_information() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 5, 3))
    with torch.no_grad():
        model[1].weight[0, 0, 0, 0] = float("nan")
    stats = layer_stats(TrainConfig(), make_state(OptimConfig(), model=model), graft_units(model))
    assert list(stats.information) == ["0"]


def test_invalid_filters_are_counted_by_their_l1_norm() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4))
    norms = torch.tensor([1.0, 0.09, 0.009, 0.0])
    with torch.no_grad():
        model[0].weight.copy_((norms / 9)[:, None, None, None].expand(4, 1, 3, 3))
        model[0].weight[:, :, 0, 0] *= -1
    state = make_state(OptimConfig(), model=model)
    stats = layer_stats(TrainConfig(), state, graft_units(model))
    assert stats.invalid == {0.1: {"0": 3}, 0.01: {"0": 2}}
