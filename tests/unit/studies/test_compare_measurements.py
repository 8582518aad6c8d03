"""Measurements read from the files of a run."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_graft.errors import RunDirectoryError
from dist_graft.studies.controls import Arm, Run
from dist_graft.studies.measurements import MEASURED, measure, parse_list
from dist_graft.studies.train_options import Delivery
from dist_graft.training.learning_rates import lr_factor


def run_of(networks: int = 2, **options: Any) -> Run:
    arm = Arm(name="a", role="method", networks=networks, group=networks, options=options)
    return Run(phase="comparison", arm=arm, seed=0)


def write_metrics(folder: Path, networks: list[list[dict[str, Any] | None]]) -> None:
    """Write metrics.jsonl of each network: the rounds of each epoch."""
    for number, rounds in enumerate(networks):
        path = folder / f"network{number:02d}" / "metrics.jsonl"
        path.parent.mkdir(parents=True)
        lines = [{"epoch": e, "lr": 0.1, "graft": graft} for e, graft in enumerate(rounds)]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def grafted(*coefficients: float, rounds: int = 1, size: int = 100) -> dict[str, Any]:
    units = {f"unit{number}": value for number, value in enumerate(coefficients)}
    more = {"donor": 0, "healed_from": None}
    return {"rounds": rounds, "bytes": size, "coefficient": units} | more


class TestRounds:
    def test_coefficients_over_networks_units_and_epochs(self, tmp_path: Path) -> None:
        write_metrics(
            tmp_path,
            [
                [grafted(0.4, 0.6), None, grafted(0.5, 0.51)],
                [grafted(0.6, 0.4), None, grafted(0.3, 0.49)],
            ],
        )
        found = measure(tmp_path, run_of(epochs=3))
        values = [0.4, 0.6, 0.6, 0.4, 0.5, 0.51, 0.3, 0.49]
        assert found["coefficient_min"] == 0.3
        assert found["coefficient_max"] == 0.6
        assert found["coefficient_median"] == pytest.approx(np.median(values))
        assert found["coefficient_5"] == pytest.approx(np.quantile(values, 0.05))
        assert found["coefficient_95"] == pytest.approx(np.quantile(values, 0.95))
        assert found["coefficient_near_half"] == pytest.approx(100 * 3 / 8)
        first, second, third = found["coefficients_median"]
        assert (first, math.isnan(second), third) == (0.5, True, pytest.approx(0.495))
        assert found["coefficients_5"][0] == pytest.approx(0.4)

    def test_rounds_without_a_donor_have_no_coefficients(self, tmp_path: Path) -> None:
        alone, healed = {"donor": None}, {"donor": 0, "healed_from": 0}
        write_metrics(
            tmp_path,
            [
                [grafted(1.0) | alone, grafted(1.0) | alone],
                [grafted(0.0) | healed, grafted(0.4)],
            ],
        )
        found = measure(tmp_path, run_of(epochs=2))
        assert found["coefficient_min"] == found["coefficient_max"] == 0.4
        assert math.isnan(found["coefficients_median"][0])
        assert found["rounds_with_donor"] == 50.0

    def test_no_round_had_a_donor(self, tmp_path: Path) -> None:
        rounds = [grafted(1.0) | {"donor": None}]
        write_metrics(tmp_path, [rounds, rounds])
        found = measure(tmp_path, run_of(epochs=1))
        assert found["rounds_with_donor"] == 0.0
        assert "coefficient_min" not in found

    def test_counts_rounds_once_and_bytes_of_every_network(self, tmp_path: Path) -> None:
        rounds = [grafted(0.5, rounds=3, size=10), None, grafted(0.5, rounds=2, size=7)]
        write_metrics(tmp_path, [rounds, rounds])
        found = measure(tmp_path, run_of(epochs=3))
        assert (found["rounds"], found["bytes_moved"]) == (5, 34)

    def test_without_exchange_there_are_no_rounds(self, tmp_path: Path) -> None:
        write_metrics(tmp_path, [[None, None], [None, None]])
        assert measure(tmp_path, run_of(method="none")) == {"heals": 0}

    def test_only_grafting_has_coefficients(self, tmp_path: Path) -> None:
        write_metrics(tmp_path, [[grafted(0.5)], [grafted(0.5)]])
        found = measure(tmp_path, run_of(method="average"))
        assert set(found) == {"heals", "rounds", "bytes_moved"}

    def test_cells_with_one_number_per_epoch(self) -> None:
        assert parse_list("0.4 nan 0.6")[::2] == [0.4, 0.6]
        assert math.isnan(parse_list("0.4 nan 0.6")[1])


class TestStrength:
    def test_pull_of_papa_equals_the_product_of_its_shares(self, tmp_path: Path) -> None:
        run = run_of(method="papa", papa={"beta": 0.9}, epochs=4)
        factor = lr_factor(run.config.optim, epochs=4, steps_per_epoch=10)
        rates = [factor(10 * epoch) for epoch in range(4)]
        folder = tmp_path / "network00"
        folder.mkdir()
        lines = [
            {"lr": 0.2 * rate, "graft": {"rounds": 3, "bytes": 0, "coefficient": {}}}
            for rate in rates
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "metrics.jsonl").write_text(text)
        (tmp_path / "network01").mkdir()
        (tmp_path / "network01" / "metrics.jsonl").write_text(text)
        kept = math.prod((1 - 0.1 * rate) ** 3 for rate in rates)
        assert measure(tmp_path, run)["cumulative_pull"] == pytest.approx(-math.log(kept))

    def test_variants_without_a_pull_have_none(self, tmp_path: Path) -> None:
        write_metrics(tmp_path, [[grafted(0.5)], [grafted(0.5)]])
        found = measure(tmp_path, run_of(method="papa", papa={"variant": "all", "every": 1}))
        assert "cumulative_pull" not in found

    def test_moves_of_wash(self, tmp_path: Path) -> None:
        # 240 steps with p = 0.001, which falls linearly to 0 at the last layer
        write_metrics(tmp_path, [[grafted(rounds=240)], [grafted(rounds=240)]])
        assert measure(tmp_path, run_of(method="wash"))["moves_per_scalar"] == pytest.approx(0.12)


EVALUATION: dict[str, Any] = {
    "members": [
        {"test_loss_reestimated": loss, "test_calibration_error_reestimated": error}
        for loss, error in ((0.3, 4.0), (0.5, None))
    ],
    "ensemble_test_loss_reestimated": 0.2,
    "ensemble_test_calibration_error_reestimated": 1.0,
    "disagreement": 7.0,
    "barrier": {"mean": 0.1},
    "barrier_before_last_round": {"mean": 0.7},
    "uniform_soup": {"test_loss": 0.25, "test_calibration_error": None},
}


class TestOtherFiles:
    def test_heals(self, tmp_path: Path) -> None:
        write_metrics(tmp_path, [[None], [None]])
        events = [{"kind": kind} for kind in ("healed", "slow", "healed", "diverged")]
        path = tmp_path / "population" / "events.jsonl"
        path.parent.mkdir()
        path.write_text("".join(json.dumps(event) + "\n" for event in events))
        assert measure(tmp_path, run_of(method="none"))["heals"] == 2

    def test_evaluation(self, tmp_path: Path) -> None:
        write_metrics(tmp_path, [[None], [None]])
        (tmp_path / "evaluation.json").write_text(json.dumps(EVALUATION))
        assert measure(tmp_path, run_of(method="none")) == {
            "heals": 0,
            "nll": pytest.approx(0.4),
            "ensemble_nll": 0.2,
            "ensemble_calibration_error": 1.0,
            "disagreement": 7.0,
            "barrier": 0.1,
            "barrier_before": 0.7,
            "soup_nll": 0.25,
        }

    @pytest.mark.parametrize(
        ("delivers", "prefix"),
        [("ema", "average"), ("checkpoints", "average"), ("snapshots", "ensemble")],
    )
    def test_scores_of_a_delivered_average(
        self, tmp_path: Path, delivers: Delivery, prefix: str
    ) -> None:
        write_metrics(tmp_path, [[None]])
        scores = {"test_loss": 0.125, "test_calibration_error": 2.0}
        averages = {kind: dict.fromkeys(scores, -1.0) for kind in ("soup", "ema")}
        run = replace(run_of(1), arm=replace(run_of(1).arm, explicit_delivery=delivers))
        for found in (scores, dict.fromkeys(scores)):
            evaluation = EVALUATION | {"averages": averages | {delivers: found}}
            (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
            measured = measure(tmp_path, run)
            assert measured.get(f"{prefix}_nll") == found["test_loss"]
            assert measured.get(f"{prefix}_calibration_error") == found["test_calibration_error"]
            assert None not in measured.values()

    def test_a_trial_does_not_read_test_measurements(self, tmp_path: Path) -> None:
        write_metrics(tmp_path, [[None], [None]])
        (tmp_path / "evaluation.json").write_text(json.dumps(EVALUATION))
        test = run_of(method="none")
        assert set(measure(tmp_path, test)) > {"heals", "nll", "soup_nll"}
        assert measure(tmp_path, replace(test, phase="tuning")) == {"heals": 0}

    def test_missing_metrics(self, tmp_path: Path) -> None:
        write_metrics(tmp_path, [[None]])
        with pytest.raises(RunDirectoryError, match=r"network01/metrics\.jsonl cannot be read"):
            measure(tmp_path, run_of(2))


def test_every_column_is_declared(tmp_path: Path) -> None:
    found: dict[str, Any] = {}
    for number, (method, options) in enumerate(
        [("graft", {}), ("papa", {}), ("wash", {}), ("none", {"optim": {"ema_decay": 0.9}})]
    ):
        folder = tmp_path / str(number)
        write_metrics(folder, [[grafted(0.5)], [grafted(0.5)]])
        score = {"test_loss": 1.0, "test_calibration_error": 1.0}
        members = {f"{name}_reestimated": 1.0 for name in score}
        evaluation = {"members": [members], "uniform_soup": score, "disagreement": 1.0}
        evaluation |= {f"ensemble_{name}": 1.0 for name in members} | {"barrier": {"mean": 0.0}}
        evaluation["barrier_before_last_round"] = {"mean": 1.0}
        evaluation["averages"] = {"ema": score}
        (folder / "evaluation.json").write_text(json.dumps(evaluation))
        found |= measure(folder, run_of(method=method, **options))
    assert set(found) == set(MEASURED)
