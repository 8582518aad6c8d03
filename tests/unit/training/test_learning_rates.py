from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_graft.config import OptimConfig
from dist_graft.errors import ConfigError, FunctionError
from dist_graft.training.learning_rates import learning_rates, lr_factor


@pytest.mark.parametrize(
    ("networks", "shares"),
    [
        (1, [1.0]),
        (2, [0.5, 1.0]),
        (3, [0.25, 0.75, 1.0]),
        (4, [0.146, 0.5, 0.854, 1.0]),
    ],
)
def test_cosine_diversity_as_published(networks: int, shares: list[float]) -> None:
    rates = learning_rates(OptimConfig(lr=0.2, lr_diversity="cosine"), networks)
    assert rates == pytest.approx([0.2 * share for share in shares], abs=1e-4)
    assert rates[-1] == 0.2


@given(st.integers(1, 64), st.floats(1e-6, 10))
def test_cosine_diversity_increases_strictly_up_to_lr(networks: int, lr: float) -> None:
    rates = learning_rates(OptimConfig(lr=lr, lr_diversity="cosine"), networks)
    assert len(rates) == networks
    assert rates[-1] == lr
    assert rates[0] > 0
    assert all(low < high for low, high in pairwise(rates))


def test_no_diversity() -> None:
    assert learning_rates(OptimConfig(lr=0.3), 3) == [0.3, 0.3, 0.3]


def test_one_rate_per_network() -> None:
    assert learning_rates(OptimConfig(lrs=[0.3, 0.1]), 2) == [0.3, 0.1]


@pytest.mark.parametrize("networks", [1, 3])
def test_a_wrong_number_of_rates_is_rejected(networks: int) -> None:
    with pytest.raises(ConfigError) as caught:
        learning_rates(OptimConfig(lrs=[0.3, 0.1]), networks)
    text = str(caught.value)
    assert f"optim.lrs has 2 learning rates for {networks} networks" in text
    assert "one per network" in text


def factors(config: OptimConfig, *, epochs: int, steps_per_epoch: int) -> list[float]:
    factor = lr_factor(config, epochs=epochs, steps_per_epoch=steps_per_epoch)
    return [factor(step) for step in range(epochs * steps_per_epoch)]


def test_cosine_is_updated_at_the_start_of_an_epoch() -> None:
    found = factors(OptimConfig(), epochs=4, steps_per_epoch=2)
    expected = [(1 + math.cos(math.pi * epoch / 4)) / 2 for epoch in range(4)]
    assert found == [value for value in expected for _ in range(2)]
    assert found[0] == 1.0


def test_cosine_is_updated_after_every_step() -> None:
    found = factors(OptimConfig(schedule_unit="step"), epochs=4, steps_per_epoch=2)
    assert found == [(1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)]


@pytest.mark.parametrize(("unit", "steps"), [("epoch", 2), ("step", 3)])
def test_every_cycle_is_a_cosine_schedule_of_its_length(unit: Any, steps: int) -> None:
    config = OptimConfig(schedule_unit=unit, cycles=3)
    found = factors(config, epochs=12, steps_per_epoch=steps)
    cycle = factors(OptimConfig(schedule_unit=unit), epochs=4, steps_per_epoch=steps)
    assert found == pytest.approx(cycle * 3)
    assert found[:: 4 * steps] == [1.0, 1.0, 1.0]
    assert lr_factor(config, epochs=12, steps_per_epoch=steps)(12 * steps) == 0.0


def test_schedule_epochs_replace_the_epochs_of_the_run() -> None:
    whole = factors(OptimConfig(), epochs=6, steps_per_epoch=2)
    part = factors(OptimConfig(schedule_epochs=6), epochs=4, steps_per_epoch=2)
    assert part == whole[: len(part)]


def test_step_decays_every_step_epochs() -> None:
    config = OptimConfig(schedule="step", step_epochs=2, step_factor=0.5)
    assert factors(config, epochs=5, steps_per_epoch=2) == [1.0] * 4 + [0.5] * 4 + [0.25] * 2


def test_constant() -> None:
    assert factors(OptimConfig(schedule="constant"), epochs=3, steps_per_epoch=3) == [1.0] * 9


@pytest.mark.parametrize("epochs", [0.5, 1.0, 1.5])
def test_warmup_is_linear_in_steps(epochs: float) -> None:
    config = OptimConfig(schedule="constant", warmup_epochs=epochs)
    found = factors(config, epochs=2, steps_per_epoch=4)
    rising = int(4 * epochs)
    assert found == [(step + 1) / rising for step in range(rising)] + [1.0] * (8 - rising)


def test_warmup_and_cosine_are_multiplied() -> None:
    with_warmup = factors(OptimConfig(warmup_epochs=2.0), epochs=4, steps_per_epoch=2)
    without = factors(OptimConfig(), epochs=4, steps_per_epoch=2)
    ratios = [a / b for a, b in zip(with_warmup, without, strict=True)]
    assert ratios == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1])


@given(
    st.sampled_from(["cosine", "step", "constant"]),
    st.floats(0, 5),
    st.integers(1, 12),
    st.integers(1, 7),
)
def test_factors_are_in_0_to_1(name: str, warmup: float, epochs: int, steps: int) -> None:
    config = OptimConfig(schedule=name, warmup_epochs=warmup, step_epochs=2)  # type: ignore[arg-type]
    assert all(0 < value <= 1 for value in factors(config, epochs=epochs, steps_per_epoch=steps))


@pytest.mark.parametrize("name", ["step", "constant"])
def test_schedules_without_an_end_do_not_depend_on_epochs(name: str) -> None:
    config = OptimConfig(schedule=name, step_epochs=2, warmup_epochs=1.5)  # type: ignore[arg-type]
    short = factors(config, epochs=3, steps_per_epoch=2)
    assert factors(config, epochs=9, steps_per_epoch=2)[: len(short)] == short


class TestOwnSchedule:
    """optim.schedule package.module:name."""

    NAME = "own_components:triangle"

    def test_progress_is_a_fraction_of_the_run(self) -> None:
        found = factors(OptimConfig(schedule=self.NAME), epochs=4, steps_per_epoch=2)
        assert found == [0.0, 0.0, 0.5, 0.5, 1.0, 1.0, 0.5, 0.5]
        config = OptimConfig(
            schedule=self.NAME, schedule_kwargs={"peak": 0.25}, schedule_unit="step"
        )
        expected = [0, 0.5, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
        assert factors(config, epochs=4, steps_per_epoch=2) == pytest.approx(expected)

    def test_it_stretches_with_the_number_of_epochs(self) -> None:
        config = OptimConfig(schedule=self.NAME, schedule_unit="step")
        short = factors(config, epochs=2, steps_per_epoch=3)
        assert factors(config, epochs=4, steps_per_epoch=3)[::2] == short

    def test_warmup_is_multiplied(self) -> None:
        config = OptimConfig(schedule=self.NAME, schedule_unit="step", warmup_epochs=1.0)
        found = factors(config, epochs=2, steps_per_epoch=2)
        assert found == [0.0, 0.5, 1.0, 0.5]
        assert lr_factor(config, epochs=2, steps_per_epoch=2)(4) == 0.0

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"schedule": "own_components:rising"}, r"factor in \[0, 1\], got 1\.5 at 0\.5"),
            ({"schedule": "own_components:nothing"}, "no function or class 'nothing'"),
            (
                {"schedule": NAME, "schedule_kwargs": {"top": 1}},
                r"cannot be called as function\(\.\.\., top=\.\.\.\)",
            ),
        ],
    )
    def test_a_wrong_function_is_refused(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            lr_factor(OptimConfig(**options), epochs=2, steps_per_epoch=2)

    def test_a_function_that_fails(self) -> None:
        config = OptimConfig(schedule=self.NAME, schedule_kwargs={"peak": "high"})
        with pytest.raises(FunctionError, match=r"optim\.schedule .*triangle failed: TypeError"):
            lr_factor(config, epochs=2, steps_per_epoch=2)
