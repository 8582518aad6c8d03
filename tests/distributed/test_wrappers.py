"""Modules inside compile and data-parallel wrappers, and groups other than the default one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from architectures import build, same_bits, snapshot
from harness import RankContext, result_or_error, run
from torch.nn.parallel import DistributedDataParallel

from dist_graft import Graft, Grafter, graft_units, mix
from dist_graft.population.compat import all_gather_single

UNITS = ["0", "3"]


def expected(states):
    units = graft_units(build("plain", 0))
    information = [
        torch.stack([Graft().information(unit.filters(state[unit.lead])) for unit in units])
        for state in states
    ]
    return mix(states, units, Graft().decide(torch.stack(information), 0))


def graft_compiled(context: RankContext):
    model = build("plain", context.rank).eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    batch = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        stale = compiled(batch)
        before = snapshot(model)
        record = Grafter(compiled).graft()
        with torch.compiler.set_stance("fail_on_recompile"):
            fresh = compiled(batch)
        return before, snapshot(model), record, stale, fresh, model(batch)


def test_compiled_module_has_plain_keys_and_uses_the_new_weights():
    results = run(graft_compiled, 2)
    after = expected([before for before, *_ in results])
    for network, (_, state, record, stale, fresh, eager) in enumerate(results):
        assert all(same_bits(state[key], after[network][key]) for key in state)
        assert list(record.coefficient) == UNITS
        assert torch.equal(fresh, eager)
        assert not torch.equal(fresh, stale)


def graft_data_parallel(context: RankContext):
    """Ranks 0 and 1 hold one network, ranks 2 and 3 the other."""
    replicas = [dist.new_group([0, 1]), dist.new_group([2, 3])][context.rank // 2]
    networks = [dist.new_group([0, 2]), dist.new_group([1, 3])][context.rank % 2]
    model = build("plain", context.rank // 2)
    wrapped = DistributedDataParallel(model, process_group=replicas)
    grafter = Grafter(wrapped, group=networks)
    before = snapshot(model)
    record = grafter.graft()
    after = snapshot(model)
    wrapped(torch.randn(4, 3, 8, 8)).sum().backward()
    same_gradient = all(_same_everywhere(p.grad, replicas) for p in model.parameters())
    return before, after, record, same_gradient


def _same_everywhere(tensor, group):
    gathered = torch.stack([torch.zeros_like(tensor)] * dist.get_world_size(group))
    all_gather_single(gathered.view(-1), tensor.contiguous().view(-1), group=group)
    return bool((gathered == gathered[0]).all())


def test_two_networks_with_two_replicas():
    results = run(graft_data_parallel, 4)
    after = expected([results[0][0], results[2][0]])
    for rank, (_, state, record, same_gradient) in enumerate(results):
        assert all(same_bits(state[key], after[rank // 2][key]) for key in state)
        assert list(record.coefficient) == UNITS
        assert record.donor == 1 - rank // 2
        assert same_gradient


def graft_in_every_wrapper(context: RankContext):
    """One process for each network, each in its own data-parallel group."""
    own = [dist.new_group([rank]) for rank in range(context.networks)][context.rank]
    wrappers = (
        lambda model: DistributedDataParallel(model, process_group=own),
        lambda model: torch.compile(
            DistributedDataParallel(model, process_group=own), backend="eager"
        ),
        lambda model: DistributedDataParallel(
            torch.compile(model, backend="eager"), process_group=own
        ),
    )
    outcomes = []
    for wrap in wrappers:
        model = build("plain", context.rank)
        before = snapshot(model)
        record = Grafter(wrap(model)).graft()
        outcomes.append((before, snapshot(model), record))
    return outcomes


def test_compile_and_data_parallel_wrappers_in_any_order():
    results = run(graft_in_every_wrapper, 2)
    for outcomes in zip(*results, strict=True):
        after = expected([before for before, *_ in outcomes])
        for network, (_, state, record) in enumerate(outcomes):
            assert all(same_bits(state[key], after[network][key]) for key in state)
            assert list(record.coefficient) == UNITS


def graft_in_a_subgroup(context: RankContext, exchange: str):
    group = dist.new_group([3, 1, 2])
    model = build("plain", context.rank)
    before = snapshot(model)
    record = Grafter(model, group=group, exchange=exchange).graft() if context.rank else None
    return before, snapshot(model), record


@pytest.mark.parametrize("exchange", ["all_gather", "p2p"])
def test_only_the_ranks_of_the_group_are_networks(exchange):
    results = run(graft_in_a_subgroup, 4, exchange)
    outside, *members = results
    assert outside[2] is None
    assert all(same_bits(outside[0][key], outside[1][key]) for key in outside[0])
    after = expected([before for before, *_ in members])
    for network, (_, state, record) in enumerate(members):
        assert all(same_bits(state[key], after[network][key]) for key in state)
        assert record.donor == (network - 1) % 3


def build_with_bad_options(context: RankContext):
    model = build("plain", 0)
    options = (
        {"exchange": "broadcast"},
        {"bucket_mb": 0},
        {"bucket_mb": float("nan")},
        {"amplitude": 1.5},
        {"sensitivity": -1.0},
        {"num_bins": 0},
        {"criterion": "l2"},
        {"lead": "linear"},
    )
    return [
        (option, result_or_error(lambda option=option: Grafter(model, **option)))
        for option in options
    ]


def test_option_out_of_range_is_an_error():
    (results,) = run(build_with_bad_options, 1)
    for option, error in results:
        ((name, value),) = option.items()
        kind, text = error
        assert kind == "ValueError", option
        assert name in text
        assert repr(value) in text or str(value) in text


def test_a_grafter_needs_a_process_group():
    with pytest.raises(RuntimeError, match="init_process_group"):
        Grafter(build("plain", 0))


def destroy_group_while_the_grafter_lives(_: RankContext):
    grafter = Grafter(build("plain", 0))
    grafter.graft()
    with_group = sum(1 for _ in Path("/proc/self/task").iterdir())
    dist.destroy_process_group()
    without = sum(1 for _ in Path("/proc/self/task").iterdir())
    assert grafter.round == 1
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # for the harness
    return with_group - without


def test_grafter_does_not_keep_the_default_groups_threads_alive():
    assert all(ended >= 2 for ended in run(destroy_group_while_the_grafter_lives, 2))
