"""Graft units of a module."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from dist_graft import GraftUnit, graft_units
from dist_graft.grafting.units import graft_tensors


def as_lists(units: list[GraftUnit]) -> dict[str, list[str]]:
    return {unit.name: list(unit.tensors) for unit in units}


def norm(name: str) -> list[str]:
    return [f"{name}.{what}" for what in ("weight", "bias", "running_mean", "running_var")]


class Block(nn.Module):
    """A block whose layers are registered in a different order than they are called."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.shortcut = nn.Conv2d(4, 4, 1)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(4)


def test_a_tensor_belongs_to_the_last_lead_before_it():
    model = nn.Sequential()
    model.add_module("stem", nn.Conv2d(3, 4, 3))
    model.add_module("block", Block())
    model.add_module("head", nn.Linear(4, 2))
    assert as_lists(graft_units(model)) == {
        "stem": ["stem.weight", "stem.bias"],
        "block.conv1": ["block.conv1.weight", *norm("block.bn1")],
        "block.shortcut": ["block.shortcut.weight", "block.shortcut.bias"],
        "block.conv2": [
            "block.conv2.weight",
            *norm("block.bn2"),
            "head.weight",
            "head.bias",
        ],
    }


def test_running_statistics_are_the_units_buffers():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1))
    model[0].weight.requires_grad_(False)
    first, second = graft_units(model)
    assert first.buffers == {"1.running_mean", "1.running_var"}
    assert second.buffers == frozenset()


def test_tensors_before_the_first_lead_belong_to_the_first_unit():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, bias=False))
    assert as_lists(graft_units(model)) == {
        "1": [*norm("0"), "1.weight", "1.bias"],
        "2": ["2.weight"],
    }


def test_leads_are_recognized_by_module_type():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Conv2d(3, 8, 3, bias=False)
            self.conv_like = nn.Linear(2, 2)
            self.upsample = nn.ConvTranspose2d(8, 8, 2, groups=2, bias=False)

    first, second = graft_units(Odd())
    assert first.name == "features"
    assert first.tensors == ("features.weight", "conv_like.weight", "conv_like.bias")
    assert (first.transposed, first.groups) == (False, 1)
    assert second.name == "upsample"
    assert (second.transposed, second.groups) == (True, 2)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(3, 4, 3),
        nn.Conv2d(3, 4, 3),
        nn.Conv3d(3, 4, 3),
        nn.ConvTranspose1d(3, 4, 3),
        nn.ConvTranspose2d(3, 4, 3),
        nn.ConvTranspose3d(3, 4, 3),
        nn.Conv2d(4, 4, 3, groups=4),
    ],
    ids=str,
)
def test_every_convolution_type_leads(layer):
    """A model that is a single convolution has the key "weight", which names the unit."""
    (unit,) = graft_units(layer)
    assert unit.lead == "weight"
    assert unit.name == "weight"
    assert unit.tensors == ("weight", "bias")
    assert unit.filters(layer.weight).shape[0] == layer.out_channels


def test_units_are_immutable_and_hashable():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    (unit,) = graft_units(model)
    assert unit.name == "0"
    assert unit.lead == "0.weight"
    assert isinstance(unit.tensors, tuple)
    assert set(unit.tensors) <= set(model.state_dict())
    with pytest.raises(dataclasses.FrozenInstanceError):
        unit.name = "1"
    assert unit == graft_units(model)[0]
    assert hash(unit) == hash(graft_units(model)[0])


def test_tied_weights_appear_once_under_their_first_key():
    model = nn.Sequential(*(nn.Conv2d(4, 4, 3) for _ in range(3)))
    model[2].weight = model[0].weight
    assert as_lists(graft_units(model)) == {
        "0": ["0.weight", "0.bias"],
        "1": ["1.weight", "1.bias", "2.bias"],
    }


def test_module_used_twice_appears_once():
    shared = nn.Conv2d(4, 4, 3)
    model = nn.Sequential(shared, nn.Conv2d(4, 4, 1), shared)
    assert as_lists(graft_units(model)) == {
        "0": ["0.weight", "0.bias"],
        "1": ["1.weight", "1.bias"],
    }


class Autoencoder(nn.Module):
    """The decoder's weight is a transposed view of the encoder's."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(4, 6, bias=False)
        self.decode = nn.Linear(6, 4, bias=False)
        self.decode.weight = nn.Parameter(self.encode.weight.detach().t())


def test_weights_tied_through_a_view_appear_once():
    """Otherwise a round would blend the same memory twice, with two coefficients."""
    tensors = [
        key for unit in graft_units(Autoencoder(), lead="conv+linear") for key in unit.tensors
    ]
    assert tensors == ["encode.weight"]


def test_output_layer_tied_to_an_embedding_can_lead():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))
    model[1].weight = model[0].weight
    (unit,) = graft_units(model, lead="conv+linear")
    assert set(unit.tensors) == {"0.weight", "1.bias"}


def test_units_hold_all_floating_point_tensors():
    model = nn.Sequential(nn.Conv2d(3, 4, 3).requires_grad_(False), nn.BatchNorm2d(4))
    model.register_buffer("mask", torch.ones(4, dtype=torch.bool))
    model.register_buffer("steps", torch.zeros((), dtype=torch.int32))
    model.register_buffer("mean", torch.zeros(3, dtype=torch.float64))
    model.register_buffer("scratch", torch.zeros(3), persistent=False)
    model.register_parameter("gain", nn.Parameter(torch.tensor(1.0)))
    (unit,) = graft_units(model)
    assert set(unit.tensors) == {"0.weight", "0.bias", *norm("1"), "mean", "gain"}


def test_extra_state_is_ignored():
    class Stateful(nn.Conv2d):
        def get_extra_state(self) -> dict[str, int]:
            return {"calls": 1}

        def set_extra_state(self, state: dict[str, int]) -> None:
            pass

    assert as_lists(graft_units(Stateful(3, 4, 3))) == {"weight": ["weight", "bias"]}


def test_compiled_models_have_plain_keys():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 3)))
    plain = as_lists(graft_units(model))
    assert as_lists(graft_units(torch.compile(model, backend="eager"))) == plain
    model[1] = torch.compile(model[1], backend="eager")
    assert "1._orig_mod.0.weight" in model.state_dict()
    assert as_lists(graft_units(model)) == plain
    alone = torch.compile(nn.Conv2d(3, 4, 3), backend="eager")
    assert as_lists(graft_units(alone)) == {"weight": ["weight", "bias"]}


def test_graft_tensors_are_not_copied():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    tensors = graft_tensors(model)
    assert list(tensors) == list(graft_units(model)[0].tensors)
    for key, value in tensors.items():
        with torch.no_grad():
            value.fill_(7)
        assert (model.state_dict()[key] == 7).all()


def weight_norm(layer: nn.Module) -> nn.Module:
    return parametrizations.weight_norm(layer)


def spectral_norm(layer: nn.Module) -> nn.Module:
    return parametrizations.spectral_norm(layer)


def pruned(layer: nn.Module) -> nn.Module:
    return prune.l1_unstructured(layer, "weight", amount=0.5)


def hooked_weight_norm(layer: nn.Module) -> nn.Module:
    """The deprecated function, which does not use torch.nn.utils.parametrize."""
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(layer)


@pytest.mark.parametrize("parametrize", [weight_norm, spectral_norm, pruned, hooked_weight_norm])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_parametrized_convolution_is_an_error(kind, parametrize):
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Sequential(parametrize(kind(3, 4, 3))))
    with pytest.raises(ValueError, match=r"layer 1\.0 \(.*\) has a parametrized weight"):
        graft_units(model)


def test_parametrized_linear_layer_is_an_error_only_as_a_lead():
    model = nn.Sequential(nn.Conv2d(8, 8, 3), weight_norm(nn.Linear(4, 4)))
    (unit,) = graft_units(model)
    assert "1.parametrizations.weight.original1" in unit.tensors
    with pytest.raises(ValueError, match=r"layer 1 \(.*\) has a parametrized weight"):
        graft_units(model, lead="conv+linear")


def test_uninitialized_layer_is_an_error():
    with pytest.raises(ValueError, match=r"0\.weight is uninitialized: run the model once"):
        graft_units(nn.Sequential(nn.LazyConv2d(4, 3)))


def test_complex_tensor_is_an_error():
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    model.register_buffer("wave", torch.zeros(3, dtype=torch.complex64))
    with pytest.raises(ValueError, match="wave is complex"):
        graft_units(model)


def test_too_few_convolutions_are_an_error():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.Linear(4, 100, bias=False))
    text = r"convolutions hold 108 of the model's 508 weights.*lead='conv\+linear'"
    with pytest.raises(ValueError, match=text):
        graft_units(model)
    assert len(graft_units(model, lead="conv+linear")) == 2


def test_convolutions_with_half_of_the_weights_suffice():
    model = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.Linear(4, 4, bias=False))
    assert len(graft_units(model)) == 1
    model.append(nn.BatchNorm1d(40))  # vectors do not count as weights
    assert len(graft_units(model)) == 1
    model.append(nn.Linear(2, 1))
    with pytest.raises(ValueError, match="16 of the model's 34 weights"):
        graft_units(model)


def test_model_without_leads_is_an_error():
    with pytest.raises(ValueError, match=r"convolutions hold 0 .*lead='conv\+linear'"):
        graft_units(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="no convolutions or linear layers"):
        graft_units(nn.BatchNorm1d(3), lead="conv+linear")


@pytest.mark.parametrize("lead", ["linear", "", None])
def test_unknown_lead_is_an_error(lead):
    with pytest.raises(ValueError, match=r"lead must be 'conv' or 'conv\+linear', got"):
        graft_units(nn.Conv2d(3, 3, 3), lead=lead)


def test_linear_layers_lead_in_an_mlp():
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 2, bias=False))
    assert as_lists(graft_units(model, lead="conv+linear")) == {
        "0": ["0.weight", "0.bias", "1.weight", "1.bias"],
        "3": ["3.weight"],
    }


def test_linear_layers_lead_in_a_transformer_encoder():
    """The packed input projection is not a module, so it belongs to the lead before it."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    units = as_lists(graft_units(model, lead="conv+linear"))
    assert list(units) == [
        f"layers.{k}.{name}"
        for k in range(2)
        for name in ("self_attn.out_proj", "linear1", "linear2")
    ]
    packed = ["self_attn.in_proj_weight", "self_attn.in_proj_bias"]
    assert units["layers.0.self_attn.out_proj"] == [
        f"layers.0.{name}"
        for name in (*packed, "self_attn.out_proj.weight", "self_attn.out_proj.bias")
    ]
    assert units["layers.0.linear2"][-2:] == [f"layers.1.{name}" for name in packed]
    assert sorted(key for keys in units.values() for key in keys) == sorted(model.state_dict())


def test_convolutions_and_linear_layers_lead_in_state_dict_order():
    model = nn.Sequential(nn.Linear(3, 3), nn.Conv2d(3, 3, 1), nn.Linear(3, 3))
    assert [unit.name for unit in graft_units(model, lead="conv+linear")] == ["0", "1", "2"]
    assert [unit.name for unit in graft_units(nn.Sequential(nn.Conv2d(9, 9, 1), *model))] == [
        "0",
        "2",
    ]


def test_filters_of_a_unit_are_the_filters_of_its_lead():
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ConvTranspose2d(8, 6, 2, groups=2))
    weights: list[Tensor] = [model[0].weight, model[1].weight]
    shapes = [
        tuple(unit.filters(weight).shape)
        for unit, weight in zip(graft_units(model), weights, strict=True)
    ]
    assert shapes == [(8, 18), (6, 16)]
