"""A new method is one file: outside the package, or inside it with one line in the registry."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from launching import SMALL, run_population, run_program
from reading import metrics

from dist_graft.config import TrainConfig
from dist_graft.training.builders import build_cadence, build_rate, build_user_rule
from dist_graft.training.schedule import Cadence

OUTSIDE = '''
from dataclasses import dataclass

import torch

from dist_graft import Mixing, Rule
from dist_graft.grafting.rules import Interval


@dataclass(frozen=True)
class Follow(Rule):
    """theta_k <- keep theta_k + (1 - keep) theta_0, every two steps, by a rate of 1/2."""

    delivers = "soup"

    keep: float = 0.5

    @property
    def interval(self):
        return Interval(steps=2)

    def rate(self, lr_factor):
        return 0.5

    def decide(self, information, round_):
        networks, units = information.shape
        shares = self.keep * torch.eye(networks, dtype=torch.float64)
        shares[:, 0] += 1 - self.keep
        donors = tuple((0,) if network else () for network in range(networks))
        return Mixing(shares=shares.expand(units, -1, -1).clone(), donors=donors)
'''
INSIDE = '''
"""Follow: every network approaches network 0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dist_graft.grafting.rules.base import Interval, RoundSchedule, Rule, require

if TYPE_CHECKING:
    from torch import Tensor

    from dist_graft.grafting.mixing import Mixing


@dataclass(frozen=True, kw_only=True)
class FollowConfig(RoundSchedule):
    """Follow, for method follow."""

    keep: float = 0.9
    """Share that a network keeps, in [0, 1]."""
    every_steps: int = 4
    """Optimizer steps between two rounds."""

    def __post_init__(self) -> None:
        require(0 <= self.keep <= 1, "keep", self.keep, "in [0, 1]")

    @property
    def interval(self) -> Interval:
        return Interval(steps=self.every_steps)


@dataclass(frozen=True, kw_only=True)
class Follow(FollowConfig, Rule):
    """theta_k <- keep theta_k + (1 - keep) theta_0."""

    options = FollowConfig

    def decide(self, information: Tensor, round_: int) -> Mixing:
        import torch

        from dist_graft.grafting.mixing import mixing_with_donor

        networks, _ = information.shape
        donor = [1, *[0] * (networks - 1)]
        own_share = torch.full_like(information, self.keep)
        own_share[0] = 1.0
        return mixing_with_donor(donor, own_share)
'''
REGISTRY = """
import sys

import dist_graft.grafting.rules as rules
from follow import Follow

rules.RULES["follow"] = Follow

from dist_graft.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
"""
OPTIONS = ("--epochs", "1", "--data.batch_size", "16", "--monitor.tensorboard", "false")
"""4 steps an epoch."""


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "outside", raising=False)
    Path("outside.py").write_text(OUTSIDE)


def coefficients(run: Path, network: int) -> set[float]:
    (line,) = metrics(run, network)
    return {round(share, 9) for share in line["graft"]["coefficient"].values()}


def test_method_from_outside_of_the_package(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_population(2, run, *OPTIONS, "--method", "outside:Follow")
    assert coefficients(run, 0) == {1.0}
    assert coefficients(run, 1) == {0.75}
    assert metrics(run, 1)[0]["graft"]["round"] == 1  # 4 steps, a round every 2


def test_method_from_outside_has_its_own_interval_and_rate() -> None:
    config = TrainConfig(method="outside:Follow")
    rule = build_user_rule(config)
    assert build_cadence(config, 2, 4, rule) == Cadence(every_steps=2)
    assert build_rate(config, 10, rule)(40) == 0.5


def test_method_from_inside_of_the_package(tmp_path: Path) -> None:
    """With its own section of options on the command line."""
    Path("follow.py").write_text(INSIDE)
    Path("with_follow.py").write_text(REGISTRY)
    run = tmp_path / "run"
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    program = ("--nproc-per-node=2", "with_follow.py", "train", "--run_dir", str(run), *SMALL)
    method = ("--method", "follow", "--follow.keep", "0.25", "--follow.every_steps", "2")
    package = str(Path(__file__).parents[2])
    done = run_program(
        (*launcher, *program, *OPTIONS, *method), timeout=150, PYTHONPATH=f"{package}:{tmp_path}"
    )
    assert done.status == 0, done
    assert coefficients(run, 1) == {0.25}
    assert metrics(run, 1)[0]["graft"]["round"] == 1
    assert "follow:\n  keep: 0.25\n  every_steps: 2\n" in (run / "config.yaml").read_text()


def test_option_of_a_method_from_inside_is_validated(tmp_path: Path) -> None:
    Path("follow.py").write_text(INSIDE)
    Path("with_follow.py").write_text(REGISTRY)
    options = ("train", "--run_dir", str(tmp_path / "run"), "--follow.keep", "2")
    done = run_program(
        (sys.executable, "with_follow.py", *options),
        timeout=60,
        PYTHONPATH=f"{Path(__file__).parents[2]}:{tmp_path}",
    )
    assert done.status == 2
    assert "follow.keep must be in [0, 1], got 2.0" in done.errors
