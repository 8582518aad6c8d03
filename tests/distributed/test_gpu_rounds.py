"""Rounds over NCCL against `mix`; the same functions run over gloo on the CPU."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from functools import cache

import pytest
import torch
from architectures import State, same_bits
from harness import RankContext, result_or_error, run
from rounds import MeasuresEntropy, Round
from test_rules_between_processes import CASES, RULES, Case, play, play_deterministically, units
from torch import Tensor

from dist_graft import Average, Graft, Grafter, Mixing, graft_units, mix
from dist_graft.config import ModelConfig
from dist_graft.training.models import build_model

ON_CPU = tuple(Case(rule, "p2p") for rule in ("random", "papa", "wash"))
ULPS = 4
"""Of the largest input: a GPU fuses the product and the sum of a blend, a reduction adds in another
order."""
INFORMATION = 0.02
"""Relative difference of the information: a weight near the edge of a bin may be counted next to
it."""
PRESSURE_ROUNDS, PRESSURE_BUCKET = 5, 1 << 18
PEER_SECONDS = 10.0


def cases_on(device: str) -> tuple[Case, ...]:
    return ON_CPU if device == "cpu" else CASES


@cache
def population(device: str, networks: int) -> list[dict[str, list[Round]]]:
    """Run all cases in one launch of the processes."""
    return run(play, networks, cases_on(device), device=device, limit=240)


def rounds_of(device: str, networks: int, case: Case) -> list[tuple[Round, ...]]:
    """[round][network] of a case."""
    played = population(device, networks)
    return list(zip(*(one[str(case)] for one in played), strict=True))


def assert_near(after: State, expected: State, befores: list[State], what: object) -> None:
    """Compare a network after a round with `mix`, up to ULPS; integers are equal."""
    for key, value in after.items():
        if not value.is_floating_point():
            assert torch.equal(value, expected[key]), (what, key)
            continue
        assert value.stride() == expected[key].stride(), (what, key)
        largest = torch.stack([before[key].double().abs() for before in befores]).amax(dim=0)
        allowed = ULPS * torch.finfo(value.dtype).eps * largest
        gap = (value.double() - expected[key].double()).abs()
        assert bool((gap <= allowed).all()), (what, key, float((gap - allowed).max()))


@pytest.mark.xdist_group("gpu rounds")  # they share launches
@pytest.mark.parametrize(
    ("device", "case"),
    [
        *(pytest.param("cpu", case, id=f"cpu-{case}") for case in ON_CPU),
        *(pytest.param("cuda", case, id=f"cuda-{case}", marks=pytest.mark.gpu) for case in CASES),
    ],
)
@pytest.mark.parametrize("networks", [2, pytest.param(4, marks=pytest.mark.gpu)])
def test_a_round_equals_mix(networks: int, device: str, case: Case) -> None:
    rule = RULES[case.rule]
    for number, round_ in enumerate(rounds_of(device, networks, case)):
        befores = [one.before for one in round_]
        mixing = round_[0].record.mixing
        expected = mix(befores, units(), mixing)
        measured = [rule.measure(units(), before).tolist() for before in befores]
        for network, one in enumerate(round_):
            assert_near(one.after, expected[network], befores, (number, network))
            assert not one.moved
            assert one.record.coefficient == dict(
                zip(one.record.coefficient, mixing.own_share(network), strict=True)
            )
            if one.record.information:
                information = list(one.record.information.values())
                assert information == pytest.approx(measured[network], rel=INFORMATION)


@pytest.mark.gpu
@pytest.mark.parametrize("networks", [2, 4])
def test_a_deterministic_round_equals_mix_on_the_gpu_bit_for_bit(networks: int) -> None:
    """--runtime.deterministic takes the exact path, without a reduction."""
    by_rank = run(play_deterministically, networks, CASES, device="cuda", limit=240)
    for case in CASES:
        for round_ in zip(*(one[str(case)] for one in by_rank), strict=True):
            befores = [{k: v.cuda() for k, v in one.before.items()} for one in round_]
            expected = mix(befores, units(), round_[0].record.mixing)
            for network, one in enumerate(round_):
                for key, value in one.after.items():
                    assert same_bits(value, expected[network][key].cpu()), (case, network, key)


def play_under_pressure(context: RankContext, exchange: str) -> list[Round]:
    """Rounds between queued changes of the weights and allocations that overwrite freed buffers.

    Nothing synchronizes the device, and every second round runs on another stream.
    """
    on_gpu = context.device.type == "cuda"
    torch.manual_seed(context.rank)
    model = build_model(ModelConfig(name="resnet20"), num_classes=10, channels=3)
    model = model.to(context.device, memory_format=torch.channels_last)
    grafter = Grafter(model, exchange=exchange, bucket_mb=PRESSURE_BUCKET / 2**20)
    states, records = [], []
    for number in range(PRESSURE_ROUNDS):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        if on_gpu and number % 2:
            here, side = torch.cuda.current_stream(), torch.cuda.Stream()
            side.wait_stream(here)
            with torch.cuda.stream(side):
                records.append(grafter.graft())
            here.wait_stream(side)
        else:
            records.append(grafter.graft())
        # Reuses the memory of buffers that were freed too early.
        poison = [
            torch.full((PRESSURE_BUCKET // 4 * parts,), torch.nan, device=context.device)
            for parts in (*range(1, 1 + context.networks), 1, 1)
        ]
        after = {key: value.clone() for key, value in model.state_dict().items()}
        del poison
        states.append((before, after))
    return [
        Round(*({key: value.cpu() for key, value in state.items()} for state in pair), record)
        for pair, record in zip(states, records, strict=True)
    ]


@pytest.mark.parametrize(
    ("device", "exchange"),
    [
        ("cpu", "p2p"),
        *(pytest.param("cuda", name, marks=pytest.mark.gpu) for name in ("all_gather", "p2p")),
    ],
)
def test_memory_is_not_reused_during_a_round(device: str, exchange: str) -> None:
    by_rank = run(play_under_pressure, 2, exchange, device=device)
    model = build_model(ModelConfig(name="resnet20"), num_classes=10, channels=3)
    for number, round_ in enumerate(zip(*by_rank, strict=True)):
        befores = [one.before for one in round_]
        expected = mix(befores, graft_units(model), round_[0].record.mixing)
        for network, one in enumerate(round_):
            assert_near(one.after, expected[network], befores, (number, network))


class FailsInARound(MeasuresEntropy):
    """Rule whose process is killed or stopped between the header and the exchange."""

    def __init__(self, signal_: signal.Signals, context: RankContext) -> None:
        self._signal, self._context = signal_, context

    def decide(self, information: Tensor, round_: int) -> Mixing:
        if self._context.rank == 1:
            self._context.store.set("pid", str(os.getpid()))
            os.kill(os.getpid(), self._signal)
        return Graft().decide(information, round_)


def graft_with_failing_peer(context: RankContext, signal_: signal.Signals, exchange: str) -> object:
    model = build_model(ModelConfig(name="resnet20"), num_classes=10, channels=3)
    model = model.to(context.device)
    if context.device.type == "cuda":
        Grafter(model, exchange=exchange, rule=Average()).graft()  # connects NCCL
    grafter = Grafter(model, exchange=exchange, rule=FailsInARound(signal_, context))

    def graft_and_finish() -> None:
        grafter.graft()
        if context.device.type == "cuda":
            torch.cuda.synchronize()

    result = result_or_error(graft_and_finish)
    with suppress(ProcessLookupError):
        os.kill(int(context.store.get("pid")), signal.SIGKILL)
    return result


@pytest.mark.parametrize(
    ("device", "signal_", "exchange"),
    [
        ("cpu", signal.SIGKILL, "p2p"),
        ("cpu", signal.SIGSTOP, "p2p"),
        *(
            pytest.param("cuda", signal_, exchange, marks=pytest.mark.gpu)
            for signal_ in (signal.SIGKILL, signal.SIGSTOP)
            for exchange in ("all_gather", "p2p")
        ),
    ],
)
def test_a_peer_that_fails_within_a_round_ends_it(
    device: str, signal_: signal.Signals, exchange: str
) -> None:
    """Within the timeout, and with an error that the caller can catch."""
    (kind, text), _ = run(
        graft_with_failing_peer,
        2,
        signal_,
        exchange,
        device=device,
        ending=[1],
        group_timeout=PEER_SECONDS if device == "cuda" else 3,
        limit=PEER_SECONDS + 50,
    )
    assert kind == "PeerError"
    assert "round" in text
