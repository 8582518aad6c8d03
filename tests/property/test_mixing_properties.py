"""Properties of `mix` and of graft units."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dist_graft import Graft, Mixing, graft_units, mix

State = dict[str, Tensor]

LAYERS = {
    "conv": lambda: nn.Conv2d(2, 3, 2),
    "bare_conv": lambda: nn.Conv1d(2, 3, 2, bias=False),
    "grouped": lambda: nn.Conv2d(4, 2, 2, groups=2),
    "transposed": lambda: nn.ConvTranspose2d(2, 3, 2),
    "batch_norm": lambda: nn.BatchNorm2d(3),
    "layer_norm": lambda: nn.LayerNorm(3),
    "linear": lambda: nn.Linear(3, 2),
    "embedding": lambda: nn.Embedding(3, 2),
    "relu": nn.ReLU,
    "nested": lambda: nn.Sequential(nn.BatchNorm1d(2), nn.Conv1d(2, 2, 1)),
}
CONVOLUTIONS = ("conv", "bare_conv", "grouped", "transposed", "nested")
LINEAR_LEADS = (*CONVOLUTIONS, "linear")


@st.composite
def models(draw: st.DrawFn) -> nn.Module:
    names = draw(st.lists(st.sampled_from(sorted(LAYERS)), max_size=8))
    names.insert(draw(st.integers(0, len(names))), draw(st.sampled_from(LINEAR_LEADS)))
    return nn.Sequential(*(LAYERS[name]() for name in names))


@given(models())
def test_units_hold_every_floating_point_tensor_once_in_order(model):
    units = graft_units(model, lead="conv+linear")
    keys = [key for key, value in model.state_dict().items() if value.is_floating_point()]
    assert [key for unit in units for key in unit.tensors] == keys
    assert len({unit.name for unit in units}) == len(units)
    for number, unit in enumerate(units):
        assert unit.lead in unit.tensors
        assert unit.lead == unit.name + ".weight"
        assert number == 0 or unit.tensors[0] == unit.lead
    leads = {
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear))
    }
    assert {unit.name for unit in units} == leads


MODEL = nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Conv2d(2, 1, 2))
UNITS = graft_units(MODEL)
values = st.floats(-(2.0**40), 2.0**40, width=32)
halves = st.floats(-60_000, 60_000, width=16)


@st.composite
def states(draw: st.DrawFn, networks: int, dtype: torch.dtype = torch.float32) -> list[State]:
    of = halves if dtype == torch.float16 else values
    population = []
    for _ in range(networks):
        state = {}
        for key, value in MODEL.state_dict().items():
            count = value.numel()
            if value.is_floating_point():
                numbers = draw(st.lists(of, min_size=count, max_size=count))
                state[key] = torch.tensor(numbers).to(dtype).reshape(value.shape)
            else:
                state[key] = torch.tensor(draw(st.integers(0, 1 << 40)))
        population.append(state)
    return population


@st.composite
def mixings(draw: st.DrawFn, networks: int) -> Mixing:
    """Convex shares of any donors in any order, including 0 and 1."""
    donors = tuple(
        tuple(
            draw(st.lists(st.sampled_from(others), unique=True))
            if (others := [other for other in range(networks) if other != network])
            else ()
        )
        for network in range(networks)
    )
    shares = torch.zeros(len(UNITS), networks, networks, dtype=torch.float64)
    for unit in range(len(UNITS)):
        for network, given_by in enumerate(donors):
            members = [network, *given_by]
            parts = draw(
                st.lists(st.integers(0, 5), min_size=len(members), max_size=len(members)).filter(
                    any
                )
            )
            for member, part in zip(members, parts, strict=True):
                shares[unit, network, member] = part / sum(parts)
    return Mixing(shares=shares, donors=donors)


sizes = st.integers(1, 4)
types = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
populations = sizes.flatmap(lambda n: st.tuples(states(n), mixings(n)))


@given(populations)
def test_mix_is_the_weighted_sum(case):
    before, mixing = case
    for network, after in enumerate(mix(before, UNITS, mixing)):
        for unit, shares in zip(UNITS, mixing.shares[:, network], strict=True):
            for key in unit.tensors:
                stacked = torch.stack([state[key].double() for state in before])
                expected = torch.tensordot(shares, stacked, dims=1)
                tolerance = 1e-6 * stacked.abs().amax(dim=0) * len(before) + 1e-40  # denormal
                assert ((after[key] - expected).abs() <= tolerance).all()


@given(populations)
def test_mix_lies_between_its_inputs(case):
    before, mixing = case
    for network, after in enumerate(mix(before, UNITS, mixing)):
        members = [network, *mixing.donors[network]]
        for key in (key for unit in UNITS for key in unit.tensors):
            low, high = torch.stack([before[m][key] for m in members]).aminmax(dim=0)
            assert ((low <= after[key]) & (after[key] <= high)).all()


@given(sizes.flatmap(lambda n: types.flatmap(lambda kind: states(n, kind))), st.data())
def test_graft_lies_between_recipient_and_donor(before, data):
    """Exactly, in every dtype: rounding stays inside the interval."""
    networks = len(before)
    information = torch.tensor(
        data.draw(st.lists(st.floats(0, 3), min_size=2 * networks, max_size=2 * networks)),
        dtype=torch.float64,
    ).view(networks, 2)
    rule = Graft(amplitude=data.draw(st.floats(0, 1)), sensitivity=data.draw(st.floats(0, 500)))
    for network, after in enumerate(mix(before, UNITS, rule.decide(information, 0))):
        for key in (key for unit in UNITS for key in unit.tensors):
            own, donor = before[network][key], before[network - 1][key]
            low, high = torch.minimum(own, donor), torch.maximum(own, donor)
            assert after[key].dtype == own.dtype
            assert ((low <= after[key]) & (after[key] <= high)).all()


@given(populations)
def test_integers_and_inputs_are_unchanged(case):
    before, mixing = case
    kept = [{key: value.clone() for key, value in state.items()} for state in before]
    after = mix(before, UNITS, mixing)
    for network, state in enumerate(before):
        assert after[network]["1.num_batches_tracked"] == kept[network]["1.num_batches_tracked"]
        assert all(torch.equal(state[key], kept[network][key]) for key in state)


@given(populations, st.data())
def test_networks_without_a_share_do_not_matter(case, data):
    """A network depends only on itself and its donors."""
    before, mixing = case
    network = data.draw(st.sampled_from(range(len(before))))
    members = {network, *mixing.donors[network]}
    others = data.draw(states(len(before)))
    changed = [before[k] if k in members else others[k] for k in range(len(before))]
    first, second = (mix(states_, UNITS, mixing)[network] for states_ in (before, changed))
    assert all(torch.equal(first[key], second[key]) for key in first)


@given(st.integers(2, 4).flatmap(states), st.floats(0, 3))
def test_equal_networks_are_unchanged(before, information):
    """Blending equal weights changes no bit, whatever their information."""
    same = [before[0]] * len(before)
    mixing = Graft().decide(torch.rand(len(before), 2, dtype=torch.float64) * information, 0)
    for after in mix(same, UNITS, mixing):
        assert all(torch.equal(after[key], before[0][key]) for key in after)
