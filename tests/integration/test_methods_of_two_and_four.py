"""Every method with two and four real processes: a run is its one-process specification, and
resumes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import finish, together, torchrun
from reading import assert_same_bits, checkpoint
from torch import Tensor

from dist_graft import Average, Graft, Papa, Wash, graft_units, mix
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
AT_THE_END_OF_AN_EPOCH = "4"  # 64 images in batches of 16
AT_THE_END_OF_THE_SECOND = "8"
MODEL = build_model(ModelConfig(name="resnet20"), num_classes=10, channels=1)
UNITS = graft_units(MODEL)


def between(rule: Rule) -> Callable[[list[State]], list[State]]:
    """What the first round of a rule makes of the networks."""

    def round_(states: list[State]) -> list[State]:
        information = torch.stack([rule.measure(UNITS, state) for state in states])
        return mix(states, UNITS, rule.decide(information.double(), 0))

    return round_


def within(source: str) -> Callable[[list[State]], list[State]]:
    """What the first round of noise or internal scions makes of each network."""

    def round_(states: list[State]) -> list[State]:
        for network, state in enumerate(states):
            draw = torch.Generator().manual_seed(stream_seed("noise", SEED, network, 0))
            for unit in UNITS:
                filters = unit.filters(state[unit.lead])
                if source == "internal":
                    grafted = graft_internal(filters, threshold=THRESHOLD)
                else:
                    deviation = noise_deviation(0, annealing=0.9)
                    grafted = graft_noise(
                        filters, deviation=deviation, threshold=THRESHOLD, generator=draw
                    )
                unit.store_filters(state[unit.lead], grafted)
        return states

    return round_


@dataclass(frozen=True)
class Method:
    """What is asked for, and what it should make of networks that had no round before."""

    specified: Callable[[list[State]], list[State]]
    options: tuple[str, ...]
    first_epoch: int = 1
    """Epochs before the first round."""


def inside(source: str) -> Method:
    noisy = ("--graft.threshold", str(THRESHOLD), "--graft.noise_annealing", "0.9")
    return Method(within(source), ("--graft.source", source, *noisy))


METHODS: dict[str, Method] = {
    "graft": Method(between(Graft()), ("--method", "graft")),
    "exponential": Method(
        between(Graft(topology="exponential", criterion="filter_entropy")),
        (
            *("--graft.topology", "exponential", "--graft.criterion", "filter_entropy"),
            *("--graft.exchange", "p2p"),
        ),
    ),
    "random": Method(
        between(Graft(topology="random", criterion="l1", sensitivity=50.0, seed=SEED)),
        (
            *("--graft.topology", "random", "--graft.criterion", "l1"),
            *("--graft.sensitivity", "50", "--graft.start", "1"),
        ),
        first_epoch=2,
    ),
    "constant": Method(between(Graft(criterion="constant")), ("--graft.criterion", "constant")),
    "shuffled": Method(
        between(Graft(criterion="shuffled", seed=SEED)),
        (
            *("--graft.criterion", "shuffled"),
            *("--graft.every_steps", AT_THE_END_OF_THE_SECOND),
        ),
        first_epoch=2,
    ),
    "filter": Method(
        between(FilterGraft(links=filter_links(UNITS, graft_tensors(MODEL)))),
        ("--graft.level", "filter"),
    ),
    "noise": inside("noise"),
    "internal": inside("internal"),
    "average": Method(between(Average()), ("--method", "average")),
    "papa": Method(
        between(Papa(beta=0.9, seed=SEED)),
        ("--method", "papa", "--papa.beta", "0.9", "--papa.every_steps", AT_THE_END_OF_AN_EPOCH),
    ),
    "papa-pairs": Method(
        between(Papa(variant="pairs", seed=SEED)),
        ("--method", "papa", "--papa.variant", "pairs", "--papa.every", "1"),
    ),
    "wash": Method(
        between(Wash(probability=0.3, seed=SEED)),
        (
            *("--method", "wash", "--wash.probability", "0.3"),
            *("--wash.every_steps", AT_THE_END_OF_AN_EPOCH),
        ),
    ),
}


ELSEWHERE = ("graft", "exponential", "average", "papa", "papa-pairs", "wash")
"""Two networks of these are trained and restarted in test_methods.py and test_resume.py, and
compared with their specification in tests/distributed."""
CASES = [
    *((2, name) for name in METHODS if name not in ELSEWHERE),
    *((4, name) for name in METHODS),
]


@pytest.fixture(scope="module")
def independent(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Two epochs of so many of the same networks without a round; trained once."""

    @cache
    def runs(networks: int) -> Path:
        run = tmp_path_factory.mktemp("independent") / "run"
        together(networks, run, *TINY, "--method", "none", "--epochs", "2")
        return run

    return runs


def trained(
    networks: int, run: Path, *options: str, launcher: bool = False
) -> list[dict[str, Any]]:
    """The networks at the end of two epochs."""
    if launcher:
        done = finish(torchrun(networks, run, *TINY, *options, "--epochs", "2"), timeout=150)
        assert done.status == 0, done
    else:
        together(networks, run, *TINY, *options, "--epochs", "2")
    return [checkpoint(run, 2, network) for network in range(networks)]


def models(run: Path, epoch: int, networks: int) -> list[State]:
    return [checkpoint(run, epoch, network)["model"] for network in range(networks)]


@pytest.mark.slow
@pytest.mark.parametrize(("networks", "name"), CASES)
def test_a_run_is_its_specification_and_resumes(
    networks: int, name: str, independent: Callable[[int], Path], tmp_path: Path
) -> None:
    method, alone, run = METHODS[name], independent(networks), tmp_path / "run"
    straight = trained(networks, run, *method.options, launcher=name == "graft")

    before = models(alone, method.first_epoch, networks)
    specified = method.specified([{k: v.clone() for k, v in state.items()} for state in before])
    for network, state in enumerate(models(run, method.first_epoch, networks)):
        assert_same_bits(state, specified[network])
        assert any(not torch.equal(state[key], before[network][key]) for key in state)
    if method.first_epoch == 2:
        for one, other in zip(models(run, 1, networks), models(alone, 1, networks), strict=True):
            assert_same_bits(one, other)

    shutil.rmtree(run / "checkpoints/epoch_0002")
    together(networks, run, *TINY, *method.options, "--epochs", "2")
    for network, expected in enumerate(straight):
        resumed = checkpoint(run, 2, network)
        assert_same_bits(resumed["model"], expected["model"])
        assert resumed["round"] == expected["round"] == 3 - method.first_epoch


@pytest.mark.slow
@pytest.mark.parametrize("networks", [2, 4])
def test_grafted_students_of_a_teacher(
    networks: int, independent: Callable[[int], Path], tmp_path: Path
) -> None:
    alone = independent(networks)
    teacher = alone / "checkpoints/epoch_0002/network00.pt"
    taught = ("--distill.teachers", f"[{teacher}]")
    together(networks, tmp_path / "apart", *TINY, *taught, "--method", "none", "--epochs", "1")
    straight = trained(networks, tmp_path / "run", *taught)
    apart = models(tmp_path / "apart", 1, networks)
    assert not torch.equal(apart[0]["conv1.weight"], models(alone, 1, 1)[0]["conv1.weight"])
    for state, specified in zip(
        models(tmp_path / "run", 1, networks), between(Graft())(apart), strict=True
    ):
        assert_same_bits(state, specified)
    shutil.rmtree(tmp_path / "run/checkpoints/epoch_0002")
    together(networks, tmp_path / "run", *TINY, *taught, "--epochs", "2")
    for network, expected in enumerate(straight):
        assert_same_bits(checkpoint(tmp_path / "run", 2, network)["model"], expected["model"])
