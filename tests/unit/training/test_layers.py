from __future__ import annotations

import pytest
import torch
from small import MakeTrainee, small_model
from torch import nn

import dist_graft
from dist_graft.config import GraftConfig, OptimConfig, TrainConfig
from dist_graft.errors import NonFiniteError
from dist_graft.grafting.units import graft_units
from dist_graft.training.layers import check_finite, look_at_layers


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("key", ["0.weight", "1.running_var", "5.bias"])
def test_a_weight_that_is_not_finite_is_named(
    make_trainee: MakeTrainee, key: str, value: float
) -> None:
    trainee = make_trainee(OptimConfig(), model=small_model(batch_norm=True), network=3)
    check_finite(trainee, 7)
    trainee.model.state_dict()[key].view(-1)[-1] = value
    with pytest.raises(NonFiniteError) as caught:
        check_finite(trainee, 7)
    for part in ("epoch 7", "network 3", key, "learning rate"):
        assert part in str(caught.value)


def test_integers_are_not_looked_at(make_trainee: MakeTrainee) -> None:
    trainee = make_trainee(OptimConfig(), model=small_model(batch_norm=True))
    trainee.model.get_buffer("1.num_batches_tracked").fill_(2**62)
    check_finite(trainee, 0)


def test_information_is_that_of_the_lead(make_trainee: MakeTrainee) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 5, 3))
    trainee = make_trainee(OptimConfig(), model=model)
    view = look_at_layers(TrainConfig(), trainee, graft_units(model))
    weights = {name: model[int(name)].weight.detach() for name in ("0", "1")}
    expected = {name: float(dist_graft.entropy(weight)) for name, weight in weights.items()}
    assert view.criterion == "entropy"
    assert view.information == pytest.approx(expected)
    config = TrainConfig(graft=GraftConfig(criterion="l1"))
    weighed = look_at_layers(config, trainee, graft_units(model))
    assert weighed.criterion == "l1"
    assert weighed.information["1"] == pytest.approx(float(weights["1"].abs().mean()))


def test_a_unit_that_is_not_finite_has_no_information(make_trainee: MakeTrainee) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 5, 3))
    with torch.no_grad():
        model[1].weight[0, 0, 0, 0] = float("nan")
    view = look_at_layers(
        TrainConfig(), make_trainee(OptimConfig(), model=model), graft_units(model)
    )
    assert list(view.information) == ["0"]


def test_invalid_filters_are_counted_by_their_l1_norm(make_trainee: MakeTrainee) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4))
    norms = torch.tensor([1.0, 0.09, 0.009, 0.0])
    with torch.no_grad():
        model[0].weight.copy_((norms / 9)[:, None, None, None].expand(4, 1, 3, 3))
        model[0].weight[:, :, 0, 0] *= -1
    trainee = make_trainee(OptimConfig(), model=model)
    view = look_at_layers(TrainConfig(), trainee, graft_units(model))
    assert view.invalid == {0.1: {"0": 3}, 0.01: {"0": 2}}
