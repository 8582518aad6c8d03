"""Filter-level grafting against loops over single weights in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from dist_graft import GraftUnit, graft_units, mix
from dist_graft.config import ModelConfig
from dist_graft.grafting.rules.filter_graft import FilterGraft, FilterMixing, filter_links
from dist_graft.grafting.units import graft_tensors
from dist_graft.training.models import build_model

State = dict[str, torch.Tensor]


def chain() -> nn.Module:
    """Plain, grouped, transposed, depthwise and grouped transposed layers, and a classifier."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.Conv2d(6, 4, 3, groups=2),
        nn.BatchNorm2d(4),
        nn.ConvTranspose2d(4, 6, 2),
        nn.BatchNorm2d(6),
        nn.Conv2d(6, 6, 3, groups=6, bias=False),
        nn.BatchNorm2d(6),
        nn.ConvTranspose2d(6, 10, 3, groups=2),
        nn.BatchNorm2d(10),
        nn.AdaptiveAvgPool2d((1, 2)),
        nn.Flatten(),
        nn.Linear(20, 7),
    )


LEADS = {0: (1, False), 2: (2, False), 4: (1, True), 6: (6, False), 8: (2, True)}
"""Layer of the chain -> groups, transposed."""


def population(networks: int, *, channels_last: bool = False) -> tuple[list[State], nn.Module]:
    states, model = [], chain()
    for network in range(networks):
        torch.manual_seed(network)
        model = chain().double()
        if channels_last:
            model.to(memory_format=torch.channels_last)
        with torch.no_grad():
            for tensor in graft_tensors(model).values():
                tensor.copy_(torch.randn(tensor.shape))
        states.append({key: value.clone() for key, value in model.state_dict().items()})
    return states, model


def rule_of(model: nn.Module, **options: object) -> FilterGraft:
    links = filter_links(graft_units(model), graft_tensors(model))
    return FilterGraft(links=links, **options)


def play(states: list[State], model: nn.Module, rule: FilterGraft, round_: int = 0) -> list[State]:
    units = graft_units(model)
    information = torch.stack([rule.measure(units, state) for state in states])
    return mix(states, units, rule.decide(information, round_))


def kept_shares(recipient: State, donor: State) -> dict[int, np.ndarray]:
    """w_j = |gamma_j| / (|gamma_j| + |gamma'_j|) of each layer of the chain."""
    shares = {}
    for layer in LEADS:
        one, other = (np.abs(state[f"{layer + 1}.weight"].numpy()) for state in (recipient, donor))
        shares[layer] = one / (one + other)
    return shares


def weight_share(layer: int, shape: tuple[int, ...], share: dict[int, np.ndarray]) -> np.ndarray:
    """Kept share of each weight: the mean of its output and its input channel's."""
    groups, transposed = LEADS[layer]
    kept = np.zeros(shape)
    before = share.get(layer - 2)
    for first in range(shape[0]):
        for second in range(shape[1]):
            if transposed:  # [in, out / groups]
                into = first
                out = (first // (shape[0] // groups)) * shape[1] + second
            else:  # [out, in / groups]
                out = first
                into = (first // (shape[0] // groups)) * shape[1] + second
            of = [share[layer][out]] + ([] if before is None else [before[into]])
            kept[first, second] = sum(of) / len(of)
    return kept


def expected(recipient: State, donor: State) -> dict[str, np.ndarray]:
    share = kept_shares(recipient, donor)
    after = {}
    for key, value in recipient.items():
        one, other = value.numpy(), donor[key].numpy()
        layer, what = int(key.split(".")[0]), key.split(".")[1]
        if what == "num_batches_tracked":
            kept = np.ones(())
        elif layer in LEADS and what == "weight":
            kept = weight_share(layer, one.shape, share)
        elif layer in LEADS:
            kept = share[layer]
        elif layer == 12 and what == "weight":  # two pixels of each of ten channels
            kept = np.array([[share[8][column // 2] for column in range(20)]] * 7)
        elif layer == 12:
            kept = np.full(7, share[8].mean())
        else:
            kept = share[layer - 1]
        after[key] = kept * one + (1 - kept) * other
    return after


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("networks", [2, 3, 4])
def test_each_weight_has_the_share_of_its_channels(networks, channels_last):
    states, model = population(networks, channels_last=channels_last)
    after = play(states, model, rule_of(model))
    for network, state in enumerate(after):
        wanted = expected(states[network], states[network - 1])
        for key, value in state.items():
            # The fractions are float32.
            np.testing.assert_allclose(value.numpy(), wanted[key], rtol=0, atol=2e-6, err_msg=key)


@pytest.mark.parametrize("topology", ["random", "exponential"])
def test_donor_follows_the_topology(topology):
    states, model = population(4)
    for round_ in range(3):
        rule = rule_of(model, topology=topology, seed=2)
        information = torch.stack([rule.measure(graft_units(model), state) for state in states])
        donors = [donor for (donor,) in rule.decide(information, round_).donors]
        if topology == "exponential":
            assert donors == [(k - (1, 2, 1)[round_]) % 4 for k in range(4)]
        after = play(states, model, rule, round_)
        for network, donor in enumerate(donors):
            wanted = expected(states[network], states[donor])["4.weight"]
            np.testing.assert_allclose(after[network]["4.weight"].numpy(), wanted, atol=2e-6)


def test_two_networks_are_equal_after_a_round():
    """w_j and w'_j add up to 1."""
    states, model = population(2)
    rule = rule_of(model)
    first, second = play(states, model, rule)
    for key, value in first.items():
        torch.testing.assert_close(value, second[key], rtol=0, atol=1e-6)
    information = torch.stack([rule.measure(graft_units(model), state) for state in states])
    mixing = rule.decide(information, 0)
    assert isinstance(mixing, FilterMixing)
    for one, other in zip(*mixing.own, strict=True):
        np.testing.assert_allclose((one + other).numpy(), 1.0, atol=1e-12)


def test_single_network_is_unchanged():
    states, model = population(1)
    (after,) = play(states, model, rule_of(model))
    assert all(torch.equal(after[key], states[0][key]) for key in after)


def test_information_is_the_absolute_scales():
    states, model = population(1)
    information = rule_of(model).measure(graft_units(model), states[0])
    scales = [states[0][f"{layer + 1}.weight"].abs() for layer in LEADS]
    assert information.dtype == torch.float64
    assert torch.equal(information, torch.cat(scales))


def test_zero_scales():
    """Both zero: equal shares. Zero only in the recipient: the donor replaces the channel."""
    states, model = population(2)
    for state in states:
        state["1.weight"][0] = 0.0
    states[0]["1.weight"][1] = 0.0
    first, second = play(states, model, rule_of(model))
    mean = (states[0]["0.weight"][0] + states[1]["0.weight"][0]) / 2
    torch.testing.assert_close(first["0.weight"][0], mean)
    torch.testing.assert_close(first["0.weight"][1], states[1]["0.weight"][1])
    torch.testing.assert_close(second["0.weight"][1], states[1]["0.weight"][1])


def test_coefficient_is_the_mean_over_the_channels():
    states, model = population(3)
    rule = rule_of(model)
    information = torch.stack([rule.measure(graft_units(model), state) for state in states])
    mixing = rule.decide(information, 0)
    for network in range(3):
        share = kept_shares(states[network], states[network - 1])
        wanted = [share[layer].mean() for layer in LEADS]
        assert mixing.own_share(network) == pytest.approx(wanted)


def test_rate_scales_every_channel():
    states, model = population(2)
    rule, units = rule_of(model), graft_units(model)
    information = torch.stack([rule.measure(units, state) for state in states])
    after = mix(states, units, rule.decide(information, 0).scaled(0.25))
    whole = expected(states[0], states[1])["0.weight"]
    wanted = 0.75 * states[0]["0.weight"].numpy() + 0.25 * whole
    np.testing.assert_allclose(after[0]["0.weight"].numpy(), wanted, atol=2e-6)


def test_classifier_bias_is_not_mistaken_for_channels():
    """Ten classes after ten channels: the classifier's bias is indexed by classes."""
    states, units = [], []
    for network in range(2):
        torch.manual_seed(network)
        model = nn.Sequential(
            nn.Conv2d(3, 10, 3), nn.BatchNorm2d(10), nn.Flatten(), nn.Linear(10, 10)
        )
        with torch.no_grad():
            for tensor in graft_tensors(model).values():
                tensor.copy_(torch.randn(tensor.shape))
        units, rule = graft_units(model), rule_of(model)
        states.append({key: value.clone() for key, value in model.state_dict().items()})
    after = mix(
        states, units, rule.decide(torch.stack([rule.measure(units, s) for s in states]), 0)
    )
    scales = [state["1.weight"].abs().double() for state in states]
    mean = float((scales[0] / (scales[0] + scales[1])).mean())
    wanted = mean * states[0]["3.bias"] + (1 - mean) * states[1]["3.bias"]
    torch.testing.assert_close(after[0]["3.bias"], wanted, rtol=0, atol=1e-5)


def test_links_of_a_chain():
    _, model = population(1)
    links = filter_links(graft_units(model), graft_tensors(model))
    counts = (6, 4, 6, 6, 10)
    assert [
        (link.scale, link.filters, link.lead, link.transposed, link.groups) for link in links
    ] == [
        (f"{layer + 1}.weight", count, f"{layer}.weight", transposed, groups)
        for count, (layer, (groups, transposed)) in zip(counts, LEADS.items(), strict=True)
    ]


def test_vgg_can_be_grafted_filter_by_filter():
    with torch.device("meta"):
        model = build_model(ModelConfig(name="vgg16_bn"), num_classes=10, channels=3)
    convolutions = [part for part in model.modules() if isinstance(part, nn.Conv2d)]
    tensors = dict(model.state_dict())
    leads = [key for key, value in tensors.items() if key.endswith(".weight") and value.dim() == 4]
    units = []
    for key in leads:
        keys = list(tensors)
        after = [keys.index(other) for other in leads if keys.index(other) > keys.index(key)]
        members = keys[keys.index(key) : after[0] if after else None]
        units.append(GraftUnit(name=key.removesuffix(".weight"), tensors=tuple(members), lead=key))
    links = filter_links(units, tensors)
    assert [link.filters for link in links] == [conv.out_channels for conv in convolutions]


def test_layer_without_batch_norm_is_an_error():
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)
    )
    with pytest.raises(ValueError, match="layer 2 has no batch norm after it: set graft"):
        rule_of(model)


def test_layer_without_a_following_reader_is_an_error():
    model = nn.Sequential()
    model.add_module("stem", nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)))
    model.add_module("side", nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)))
    text = r"layer stem\.0 has 6 channels, but the next layer, side\.0, reads 3: set graft"
    with pytest.raises(ValueError, match=text):
        rule_of(model)
