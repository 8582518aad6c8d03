from __future__ import annotations

import pytest
import torch
from small import MakeTrainee, small_model
from torch import nn

import dist_graft
from dist_graft.config import GraftConfig, OptimConfig, TrainConfig
from dist_graft.errors import NonFiniteError
from dist_graft.grafting.units import graft_units
from dist_graft.monitoring.console import NetworkRow
from dist_graft.training.layer_stats import check_sound, layer_stats, what_is_lost


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("key", ["0.weight", "1.running_var", "5.bias"])
def test_a_weight_that_is_not_finite_is_named(
    make_trainee: MakeTrainee, key: str, value: float
) -> None:
    trainee = make_trainee(OptimConfig(), model=small_model(batch_norm=True), network=3)
    assert not what_is_lost(trainee, loss=False)
    trainee.model.state_dict()[key].view(-1)[-1] = value
    for loss in (False, True):
        assert what_is_lost(trainee, loss=loss) == f"a weight that is not finite in {key}"


def test_a_loss_is_named_where_all_weights_are_well(make_trainee: MakeTrainee) -> None:
    found = what_is_lost(make_trainee(OptimConfig()), loss=True)
    assert found == "a training loss or gradient that is not finite"


def test_integers_are_not_looked_at(make_trainee: MakeTrainee) -> None:
    trainee = make_trainee(OptimConfig(), model=small_model(batch_norm=True))
    trainee.model.get_buffer("1.num_batches_tracked").fill_(2**62)
    assert not what_is_lost(trainee, loss=False)


class TestCheckSound:
    def rows(self, *sound: bool) -> list[NetworkRow]:
        return [NetworkRow(*[0.0] * 11, sound=float(one)) for one in sound]

    @pytest.mark.parametrize("may_go_on", [True, False])
    def test_sound_networks_go_on(self, may_go_on: bool) -> None:
        check_sound(self.rows(True, True), 7, 0, "", may_go_on=may_go_on)

    @pytest.mark.parametrize("network", [0, 1, 2])
    def test_one_sound_network_is_enough_where_the_run_may_go_on(self, network: int) -> None:
        everyone = self.rows(False, True, False)
        check_sound(everyone, 7, network, "a weight", may_go_on=True)
        with pytest.raises(NonFiniteError):
            check_sound(everyone, 7, network, "a weight", may_go_on=False)

    @pytest.mark.parametrize("may_go_on", [True, False])
    @pytest.mark.parametrize("networks", [1, 3])
    def test_none_is_not(self, networks: int, may_go_on: bool) -> None:
        everyone = self.rows(*[False] * networks)
        with pytest.raises(NonFiniteError, match="network 0 has something"):
            check_sound(everyone, 7, 0, "something", may_go_on=may_go_on)

    def test_the_error_names_all_and_says_of_its_own_what_was_lost(self) -> None:
        everyone = self.rows(False, True, False)
        with pytest.raises(NonFiniteError) as caught:
            check_sound(everyone, 7, 2, "a weight that is not finite in a.b", may_go_on=False)
        assert str(caught.value) == (
            "epoch 7: network 0 has a weight, training loss or gradient that is not finite; "
            "network 2 has a weight that is not finite in a.b: a lower learning rate, warm-up or "
            "clipping may help"
        )
        with pytest.raises(NonFiniteError, match=r"network 0 has a weight, .*; network 2 has a"):
            check_sound(everyone, 7, 1, "", may_go_on=False)


def test_information_is_that_of_the_lead(make_trainee: MakeTrainee) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 5, 3))
    trainee = make_trainee(OptimConfig(), model=model)
    view = layer_stats(TrainConfig(), trainee, graft_units(model))
    weights = {name: model[int(name)].weight.detach() for name in ("0", "1")}
    expected = {name: float(dist_graft.entropy(weight)) for name, weight in weights.items()}
    assert view.criterion == "entropy"
    assert view.information == pytest.approx(expected)
    config = TrainConfig(graft=GraftConfig(criterion="l1"))
    weighed = layer_stats(config, trainee, graft_units(model))
    assert weighed.criterion == "l1"
    assert weighed.information["1"] == pytest.approx(float(weights["1"].abs().mean()))


def test_a_unit_that_is_not_finite_has_no_information(make_trainee: MakeTrainee) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 5, 3))
    with torch.no_grad():
        model[1].weight[0, 0, 0, 0] = float("nan")
    view = layer_stats(TrainConfig(), make_trainee(OptimConfig(), model=model), graft_units(model))
    assert list(view.information) == ["0"]


def test_invalid_filters_are_counted_by_their_l1_norm(make_trainee: MakeTrainee) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4))
    norms = torch.tensor([1.0, 0.09, 0.009, 0.0])
    with torch.no_grad():
        model[0].weight.copy_((norms / 9)[:, None, None, None].expand(4, 1, 3, 3))
        model[0].weight[:, :, 0, 0] *= -1
    trainee = make_trainee(OptimConfig(), model=model)
    view = layer_stats(TrainConfig(), trainee, graft_units(model))
    assert view.invalid == {0.1: {"0": 3}, 0.01: {"0": 2}}
