from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small import make_data, make_state, train_steps

from dist_graft.config import GraftConfig, OptimConfig, TrainConfig
from dist_graft.errors import ConfigError
from dist_graft.run_directory import RunDirectory
from dist_graft.training.checkpoint.files import mark_complete
from dist_graft.training.checkpoint.membership import Origin, origin, pending_change

TWO = ["0" * 64] * 2


def requested(*networks: int | str, epochs: int = 5) -> TrainConfig:
    return TrainConfig(epochs=epochs, resume_networks=list(networks))  # type: ignore[arg-type]


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    """Of a run of two networks after three epochs."""
    run = RunDirectory(tmp_path)
    mark_complete(run.checkpoints / "epoch_0003", epoch=3, round_=3, sha256=TWO)
    return run


def test_a_change_is_pending_until_a_checkpoint_has_it(directory: RunDirectory) -> None:
    assert pending_change(directory, TrainConfig(), 2) is None
    for config, networks in ((requested(1), 1), (requested(1, 0), 2), (requested(0, 1), 3)):
        assert pending_change(directory, config, networks) is not None
    mark_complete(
        directory.checkpoints / "epoch_0004",
        **{"epoch": 4, "round_": 4, "sha256": TWO, "resumed_networks": [1, 0]},
    )
    assert pending_change(directory, requested(1, 0), 2) is None
    assert pending_change(directory, requested(1, 0), 3) is not None, "another number of processes"


def test_a_finished_run_is_refused(directory: RunDirectory) -> None:
    with pytest.raises(
        ConfigError, match=r"nothing to train: .* after epoch 3 of 3; raise --epochs"
    ):
        pending_change(directory, requested(0, epochs=3), 1)


def test_networks_beyond_the_list_copy_its_networks_in_turn(directory: RunDirectory) -> None:
    config = requested(1, "fresh", 0)
    found = pending_change(directory, config, 5)
    assert found is not None
    assert config.resume_networks is not None
    assert [origin(config.resume_networks, found, network=k) for k in range(5)] == [
        Origin(1, "continue"),
        Origin(1, "fresh"),
        Origin(0, "continue"),
        Origin(1, "copy"),
        Origin(0, "copy"),
    ]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"resume": "never"}, "resume auto or must"),
        ({"graft": GraftConfig(every_steps=2, qsr_alpha=0.1)}, "leave out graft.qsr_alpha"),
    ],
)
def test_what_does_not_go_together(options: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        TrainConfig(resume_networks=[0], **options)  # type: ignore[arg-type]


def test_a_network_continues_with_its_own_options() -> None:
    trained = OptimConfig(lr=0.1, weight_decay=1e-3, momentum=0.5)
    before = make_state(trained)
    train_steps(before, make_data(), trained, epoch=0, first=0, last=2)
    state = make_state(OptimConfig(lr=0.2, weight_decay=1e-4))
    state.continue_from(before.state_dict())
    (group,) = state.optimizer.param_groups
    assert (group["weight_decay"], group["momentum"]) == (1e-4, 0.9)
    momenta = (
        one.optimizer.state[one.optimizer.param_groups[0]["params"][0]]["momentum_buffer"]
        for one in (before, state)
    )
    assert torch.equal(*momenta)


def test_another_optimizer_is_refused() -> None:
    before = make_state(OptimConfig(name="adamw", lr=0.1))
    with pytest.raises(ConfigError, match=r"had another optimizer: pass its optim\.name"):
        make_state(OptimConfig(lr=0.1)).continue_from(before.state_dict())
