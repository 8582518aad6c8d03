"""Every method with four real processes: a run is its one-process specification, and resumes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from launching import finish, together, torchrun
from reading import assert_same_bits, checkpoint

from dist_graft import Average, Graft, Papa, Wash, graft_units, mix
from dist_graft.config import ModelConfig
from dist_graft.grafting.rules import Rule
from dist_graft.training.models import build_model

NETWORKS = 4
TINY = (
    *("--data.batch_size", "16", "--data.test_samples", "20", "--monitor.tensorboard", "false"),
    *("--optim.schedule", "constant", "--runtime.threads", "1", "--seed", "3"),
)
AT_THE_END_OF_AN_EPOCH = "4"  # 64 images in batches of 16
METHODS: dict[str, tuple[Rule, tuple[str, ...]]] = {
    "graft": (Graft(), ("--method", "graft")),
    "exponential": (
        Graft(topology="exponential"),
        ("--graft.topology", "exponential", "--graft.exchange", "p2p"),
    ),
    "average": (Average(), ("--method", "average")),
    "papa": (
        Papa(beta=0.9, seed=3),
        ("--method", "papa", "--papa.beta", "0.9", "--papa.every_steps", AT_THE_END_OF_AN_EPOCH),
    ),
    "wash": (
        Wash(probability=0.3, seed=3),
        (
            *("--method", "wash", "--wash.probability", "0.3"),
            *("--wash.every_steps", AT_THE_END_OF_AN_EPOCH),
        ),
    ),
}


@pytest.fixture(scope="module")
def independent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One epoch of the same networks without a round."""
    run = tmp_path_factory.mktemp("independent") / "run"
    together(NETWORKS, run, *TINY, "--method", "none", "--epochs", "1")
    return run


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_four_networks(method: str, independent: Path, tmp_path: Path) -> None:
    rule, options = METHODS[method]
    run = tmp_path / "run"
    done = finish(torchrun(NETWORKS, run, *TINY, *options, "--epochs", "2"), timeout=150)
    assert done.status == 0, done

    states = [checkpoint(independent, 1, k)["model"] for k in range(NETWORKS)]
    units = graft_units(build_model(ModelConfig(name="resnet20"), num_classes=10, channels=1))
    information = torch.stack([rule.measure(units, state) for state in states])
    specified = mix(states, units, rule.decide(information.double(), 0))
    for network, state in enumerate(specified):
        assert_same_bits(checkpoint(run, 1, network)["model"], state)

    straight = [checkpoint(run, 2, k) for k in range(NETWORKS)]
    shutil.rmtree(run / "checkpoints/epoch_0002")
    together(NETWORKS, run, *TINY, *options, "--epochs", "2")
    for network, before in enumerate(straight):
        resumed = checkpoint(run, 2, network)
        assert_same_bits(resumed["model"], before["model"])
        assert resumed["round"] == before["round"] == 2
