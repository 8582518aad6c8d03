"""Each method with real processes equals `mix` in one process, and resumes exactly."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import run_population
from reading import assert_same_bits, checkpoint
from torch import Tensor

from dist_graft import Graft, Papa, Wash, graft_units, mix
from dist_graft.config import ModelConfig
from dist_graft.grafting.reactivation import graft_internal, graft_noise, noise_deviation
from dist_graft.grafting.rules.base import Rule
from dist_graft.grafting.rules.filter_graft import FilterGraft, filter_links
from dist_graft.grafting.units import graft_tensors
from dist_graft.seeding import stream_seed
from dist_graft.training.models import build_model

State = dict[str, Tensor]
SEED, THRESHOLD = 3, 3.0
TINY = (
    *("--data.batch_size", "16", "--data.test_samples", "20", "--monitor.tensorboard", "false"),
    *("--optim.schedule", "constant", "--runtime.threads", "1", "--seed", str(SEED)),
)
STEPS_PER_EPOCH = "4"  # 64 images in batches of 16
STEPS_OF_TWO_EPOCHS = "8"
MODEL = build_model(ModelConfig(name="resnet20"), num_classes=10, channels=1)
UNITS = graft_units(MODEL)


def specify_rule(rule: Rule) -> Callable[[list[State]], list[State]]:
    """Return a function that applies the first round of a rule to the networks."""

    def round_(states: list[State]) -> list[State]:
        information = torch.stack([rule.measure(UNITS, state) for state in states])
        return mix(states, UNITS, rule.decide(information.double(), 0))

    return round_


def specify_self_grafting(source: str, *, add: bool) -> Callable[[list[State]], list[State]]:
    """Return a function that applies the first round of noise or internal scions."""

    def round_(states: list[State]) -> list[State]:
        for network, state in enumerate(states):
            generator = torch.Generator().manual_seed(stream_seed("noise", SEED, network, 0))
            for unit in UNITS:
                filters = unit.filters(state[unit.lead])
                if source == "internal":
                    grafted = graft_internal(filters, threshold=THRESHOLD, add=add)
                else:
                    deviation = noise_deviation(0, annealing=0.9)
                    grafted = graft_noise(
                        filters, deviation=deviation, threshold=THRESHOLD, generator=generator
                    )
                unit.store_filters(state[unit.lead], grafted)
        return states

    return round_


@dataclass(frozen=True)
class Method:
    """Options of a method, and its first round as a function of the state dicts before it."""

    first_round: Callable[[list[State]], list[State]]
    options: tuple[str, ...]
    epochs_before: int = 1
    """Epochs before the first round."""


def self_grafting(source: str, *own: str) -> Method:
    options = ("--graft.threshold", str(THRESHOLD), "--graft.noise_annealing", "0.9", *own)
    round_ = specify_self_grafting(source, add="add" in own)
    return Method(round_, ("--graft.source", source, *options))


# Two networks that graft: test_two_networks.py. Rules without random numbers, between processes:
# tests/distributed/test_rules_between_processes.py.
METHODS: dict[str, Method] = {
    "exponential": Method(
        specify_rule(Graft(topology="exponential", criterion="filter_entropy")),
        (
            *("--graft.topology", "exponential", "--graft.criterion", "filter_entropy"),
            *("--graft.exchange", "p2p"),
        ),
    ),
    "random": Method(
        specify_rule(Graft(topology="random", criterion="l1", sensitivity=50.0, seed=SEED)),
        (
            *("--graft.topology", "random", "--graft.criterion", "l1"),
            *("--graft.sensitivity", "50", "--graft.start", "1"),
        ),
        epochs_before=2,
    ),
    "shuffled": Method(
        specify_rule(Graft(criterion="shuffled", seed=SEED)),
        (
            *("--graft.criterion", "shuffled"),
            *("--graft.every_steps", STEPS_OF_TWO_EPOCHS),
        ),
        epochs_before=2,
    ),
    "filter": Method(
        specify_rule(FilterGraft(links=filter_links(UNITS, graft_tensors(MODEL)))),
        ("--graft.level", "filter"),
    ),
    "noise": self_grafting("noise"),
    "internal": self_grafting("internal"),
    "internal-add": self_grafting("internal", "--graft.internal", "add"),
    "papa": Method(
        specify_rule(Papa(beta=0.9, seed=SEED)),
        ("--method", "papa", "--papa.beta", "0.9", "--papa.every_steps", STEPS_PER_EPOCH),
    ),
    "papa-pairs": Method(
        specify_rule(Papa(variant="pairs", seed=SEED)),
        ("--method", "papa", "--papa.variant", "pairs", "--papa.every", "1"),
    ),
    "wash": Method(
        specify_rule(Wash(probability=0.3, seed=SEED)),
        (
            *("--method", "wash", "--wash.probability", "0.3"),
            *("--wash.every_steps", STEPS_PER_EPOCH),
        ),
    ),
}


@pytest.fixture(scope="module")
def independent(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Return a function that trains K networks for two epochs without rounds, once per K."""

    @cache
    def runs(networks: int) -> Path:
        run = tmp_path_factory.mktemp("independent") / "run"
        run_population(networks, run, *TINY, "--method", "none", "--epochs", "2")
        return run

    return runs


def trained(networks: int, run: Path, *options: str) -> list[dict[str, Any]]:
    """Train for two epochs; returns the final checkpoint of each network."""
    run_population(networks, run, *TINY, *options, "--epochs", "2")
    return [checkpoint(run, 2, network) for network in range(networks)]


def models(run: Path, epoch: int, networks: int) -> list[State]:
    return [checkpoint(run, epoch, network)["model"] for network in range(networks)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("networks", "name"),
    [(2 if "--graft.source" in method.options else 4, name) for name, method in METHODS.items()],
)
def test_run_equals_mix_and_resumes(
    networks: int, name: str, independent: Callable[[int], Path], tmp_path: Path
) -> None:
    method, without_rounds, run = METHODS[name], independent(networks), tmp_path / "run"
    uninterrupted = trained(networks, run, *method.options)

    before = models(without_rounds, method.epochs_before, networks)
    expected_states = method.first_round(
        [{k: v.clone() for k, v in state.items()} for state in before]
    )
    for network, state in enumerate(models(run, method.epochs_before, networks)):
        assert_same_bits(state, expected_states[network])
        assert any(not torch.equal(state[key], before[network][key]) for key in state)
    if method.epochs_before == 2:
        for one, other in zip(
            models(run, 1, networks), models(without_rounds, 1, networks), strict=True
        ):
            assert_same_bits(one, other)

    shutil.rmtree(run / "checkpoints/epoch_0002")
    run_population(networks, run, *TINY, *method.options, "--epochs", "2")
    for network, expected in enumerate(uninterrupted):
        resumed = checkpoint(run, 2, network)
        assert_same_bits(resumed["model"], expected["model"])
        assert resumed["round"] == expected["round"] == 3 - method.epochs_before


@pytest.mark.slow
def test_distillation_with_grafting(independent: Callable[[int], Path], tmp_path: Path) -> None:
    networks = 2
    without_rounds = independent(networks)
    teacher = without_rounds / "checkpoints/epoch_0002/network00.pt"
    distill = ("--distill.teachers", f"[{teacher}]")
    run_population(
        networks, tmp_path / "independent", *TINY, *distill, "--method", "none", "--epochs", "1"
    )
    uninterrupted = trained(networks, tmp_path / "run", *distill)
    independent_students = models(tmp_path / "independent", 1, networks)
    assert not torch.equal(
        independent_students[0]["conv1.weight"], models(without_rounds, 1, 1)[0]["conv1.weight"]
    )
    for state, specified in zip(
        models(tmp_path / "run", 1, networks),
        specify_rule(Graft())(independent_students),
        strict=True,
    ):
        assert_same_bits(state, specified)
    shutil.rmtree(tmp_path / "run/checkpoints/epoch_0002")
    run_population(networks, tmp_path / "run", *TINY, *distill, "--epochs", "2")
    for network, expected in enumerate(uninterrupted):
        assert_same_bits(checkpoint(tmp_path / "run", 2, network)["model"], expected["model"])
