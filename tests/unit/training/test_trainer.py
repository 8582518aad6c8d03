"""Whole runs of one process on tiny data, through the Python API."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from launching import run_population
from reading import assert_same_bits, checkpoint, metrics, optimizer_tensors, summary
from runs import (
    EPOCHS,
    REGRESSION,
    SEGMENTATION,
    Example,
    Recorder,
    StopAfter,
    config_of,
)
from small import make_data, make_state, make_trainer, small_model, train_steps
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import dist_graft
from dist_graft import Callback, GraftRecord, Trainer
from dist_graft.config import (
    CheckpointConfig,
    DataConfig,
    DistillConfig,
    ModelConfig,
    OptimConfig,
)
from dist_graft.errors import ConfigError, LeaseLostError, StoppedEarlyError
from dist_graft.run_directory import RunDirectory
from dist_graft.training.checkpoint.files import complete_checkpoints
from dist_graft.training.schedule import Segment

TESTS = Path(__file__).parents[2]
RUN_OF_0_1_0 = TESTS / "data" / "run_0_1_0"
"""Two networks that were stopped in the second of three epochs: network 0 after step 3, network 1
after step 4, before the round that follows it."""


def final_state(run: Path) -> dict[str, Tensor]:
    model: dict[str, Tensor] = checkpoint(run, EPOCHS, 0)["model"]
    return model


class TestTasks:
    """Any task, with a custom loss, metrics and optimizer."""

    @pytest.mark.parametrize(
        ("example", "names"),
        [(REGRESSION, ["error"]), (SEGMENTATION, ["iou", "count_error"])],
        ids=["regression", "segmentation"],
    )
    def test_metrics_and_summary(self, tmp_path: Path, example: Example, names: list[str]) -> None:
        trainer = example.trainer(config_of(tmp_path / "run"))
        trainer.fit()
        lines = metrics(tmp_path / "run", 0)
        assert [line["epoch"] for line in lines] == list(range(EPOCHS))
        for line in lines:
            for name in ("loss", *names):
                assert line[f"train_{name}"] > 0
                assert line[f"test_{name}"] > 0
            assert "test_accuracy" not in line
        assert lines[-1]["train_loss"] < lines[0]["train_loss"]
        found = summary(tmp_path / "run")
        first = names[0]
        assert found == trainer.summary
        assert found["metric"] == first
        assert found[f"mean_{first}_before_last_round"] == lines[-1][f"test_{first}"]
        assert found["networks"][0][f"{first}_after_last_round"] > 0
        assert not any("ensemble" in key for key in found)

    @pytest.mark.parametrize("steps", [(1,), (3, 7), (4,), (12,)])
    @pytest.mark.parametrize(
        "example", [REGRESSION, SEGMENTATION], ids=["regression", "segmentation"]
    )
    def test_a_resumed_run_gives_the_same_bits(
        self, tmp_path: Path, example: Example, steps: tuple[int, ...]
    ) -> None:
        example.trainer(config_of(tmp_path / "whole")).fit()
        config = config_of(tmp_path / "stopped")
        for step in steps:
            trainer = example.trainer(config, StopAfter(step))
            with pytest.raises(StoppedEarlyError):
                trainer.fit()
            assert trainer.global_step == step
            assert trainer.directory.stopped.exists()
        trainer = example.trainer(config)
        trainer.fit()
        assert trainer.resumed_from is not None
        assert not trainer.directory.stopped.exists()
        whole, resumed = (checkpoint(tmp_path / name, EPOCHS, 0) for name in ("whole", "stopped"))
        assert_same_bits(whole["model"], resumed["model"])
        assert_same_bits(optimizer_tensors(whole), optimizer_tensors(resumed))
        for first, second in zip(
            metrics(tmp_path / "whole", 0), metrics(tmp_path / "stopped", 0), strict=True
        ):
            assert first["information"] == second["information"]
            for key in set(first) - {"images_per_second", "phase_seconds", "information"}:
                assert first[key] == pytest.approx(second[key]), key

    @pytest.mark.parametrize("options", [{"name": "adamw"}, {"kwargs": {"dampening": 0.5}}])
    def test_an_optimizer_of_both_options_and_arguments_is_refused(
        self, tmp_path: Path, options: dict[str, Any]
    ) -> None:
        config = config_of(tmp_path / "run", optim=OptimConfig(**options))
        with pytest.raises(ConfigError, match=r"does not apply with Trainer\(optimizer=\)"):
            REGRESSION.trainer(config).fit()
        assert not (tmp_path / "run").exists()

    def test_a_network_with_3d_convolutions(self, tmp_path: Path) -> None:
        """channels_last, the default, is a format of images."""

        def model() -> nn.Module:
            return nn.Sequential(nn.Conv3d(1, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 1))

        volumes = TensorDataset(torch.randn(16, 1, 3, 3, 3), torch.randn(16, 1))
        data = dist_graft.Datasets(train=volumes, test=volumes)
        loss = nn.functional.mse_loss
        trainer = Trainer(config_of(tmp_path / "run"), model=model, data=data, loss=loss)
        assert trainer.config.runtime.channels_last
        trainer.fit()
        assert metrics(tmp_path / "run", 0)[-1]["test_loss"] > 0

    def test_teachers_need_a_named_dataset(self, tmp_path: Path) -> None:
        pairs = TensorDataset(torch.randn(8, 1, 4, 4), torch.zeros(8, dtype=torch.int64))
        data = dist_graft.Datasets(train=pairs, test=pairs)
        config = dataclasses.replace(
            config_of(tmp_path / "run"), distill=DistillConfig(teachers=["network00.pt"])
        )
        with pytest.raises(ConfigError, match=r"distill\.teachers needs a dataset that data\.name"):
            Trainer(config, model=small_model, data=data).fit()

    def test_a_finished_run_is_left_unchanged(self, tmp_path: Path) -> None:
        config = config_of(tmp_path / "run")
        REGRESSION.trainer(config).fit()
        before = final_state(tmp_path / "run")
        recorder = Recorder()
        REGRESSION.trainer(config, recorder).fit()
        assert recorder.hooks() == [("setup", 0, 0), ("teardown", EPOCHS, 0)]
        assert_same_bits(before, final_state(tmp_path / "run"))


class TestMovingAverage:
    """optim.ema_decay."""

    def config(self, run: Path) -> dist_graft.TrainConfig:
        return config_of(run, optim=OptimConfig(ema_decay=0.8))

    def test_it_follows_the_weights_after_each_step(self, tmp_path: Path) -> None:
        averages: list[dict[str, Tensor]] = []

        class ByHand(Callback):
            def on_step_end(self, trainer: Trainer) -> None:
                state = copy.deepcopy(trainer.model.state_dict())
                if averages:
                    before = averages.pop()
                    state = {
                        key: 0.8 * before[key] + (1 - 0.8) * value
                        if value.is_floating_point()
                        else value
                        for key, value in state.items()
                    }
                averages.append(state)

        trainer = REGRESSION.trainer(self.config(tmp_path / "run"), ByHand())
        trainer.fit()
        assert trainer.state.averaged is not None
        found = trainer.state.averaged.model.state_dict()
        saved = checkpoint(tmp_path / "run", EPOCHS, 0)["ema"]
        for key, value in averages[0].items():
            if value.is_floating_point():
                torch.testing.assert_close(found[key], value)
            assert torch.equal(saved[f"module.{key}"], found[key])
        assert not torch.equal(
            found["body.0.weight"], final_state(tmp_path / "run")["body.0.weight"]
        )

    def test_it_is_evaluated_after_each_epoch(self, tmp_path: Path) -> None:
        expected: list[tuple[float, float]] = []

        class ByHand(Callback):
            def on_evaluate_end(self, trainer: Trainer, metrics: object) -> None:
                assert trainer.state.averaged is not None
                module = trainer.state.averaged.model
                inputs, targets = torch.utils.data.default_collate(list(REGRESSION.data.test))
                with torch.no_grad():
                    output = module.eval()(inputs)
                loss = float(REGRESSION.loss(output, targets))
                expected.append((loss, float((output - targets).abs().mean())))

        recorder = Recorder()
        REGRESSION.trainer(self.config(tmp_path / "run"), ByHand(), recorder).fit()
        lines = metrics(tmp_path / "run", 0)
        found = [(line["ema_test_loss"], line["ema_test_error"]) for line in lines]
        for pair, wanted in zip(found, expected, strict=True):
            assert pair == pytest.approx(wanted, rel=1e-5)
        assert all(line["ema_test_loss"] != line["test_loss"] for line in lines)
        (reported,) = recorder.arguments("on_evaluate_end")[0]
        assert {"test_loss", "test_error", "ema_test_loss", "ema_test_error"} == set(reported)

    def test_it_does_not_change_the_weights(self, tmp_path: Path) -> None:
        REGRESSION.trainer(config_of(tmp_path / "without")).fit()
        REGRESSION.trainer(self.config(tmp_path / "with")).fit()
        assert_same_bits(final_state(tmp_path / "without"), final_state(tmp_path / "with"))

    def test_it_is_resumed_exactly(self, tmp_path: Path) -> None:
        REGRESSION.trainer(self.config(tmp_path / "whole")).fit()
        with pytest.raises(StoppedEarlyError):
            REGRESSION.trainer(self.config(tmp_path / "stopped"), StopAfter(6)).fit()
        REGRESSION.trainer(self.config(tmp_path / "stopped")).fit()
        whole, resumed = (checkpoint(tmp_path / name, EPOCHS, 0) for name in ("whole", "stopped"))
        assert_same_bits(whole["ema"], resumed["ema"])
        assert_same_bits(whole["model"], resumed["model"])

    def test_a_healed_network_starts_a_new_average(self) -> None:
        config, data = OptimConfig(ema_decay=0.9), make_data()
        state = make_state(config)
        train_steps(state, data, config, epoch=0, first=0, last=4)

        class Healer:
            def graft(self, **_: object) -> GraftRecord:
                state.model.load_state_dict(small_model().state_dict())
                return GraftRecord(
                    **{"round": 0, "network": 0, "donor": 1, "coefficient": {}, "information": {}},
                    **{"distance": {}, "seconds": 0.0, "phase_seconds": {}, "bytes_received": 0},
                    **{"diverged": {0: "NaN"}, "healed": {0: 1}, "mixing": None},
                )

        trainer = make_trainer(state, data, config)
        trainer.grafter = Healer()  # type: ignore[assignment]
        trainer.rate = lambda _: 1.0
        trainer.graft_round(Segment(0, 0, 4, round=True))
        assert state.averaged is not None
        assert_same_bits(state.averaged.model.state_dict(), small_model().state_dict())
        assert not state.optimizer.state


class TestMembers:
    """Options of single networks, and mixed images."""

    OWN: ClassVar = {
        "optim": {"lr": 0.05, "label_smoothing": 0.2, "accumulation": 2},
        "data": {"mixup": 0.5, "cutmix": 1.0, "random_erasing": 0.5},
    }

    def config(self, run: Path, **options: Any) -> dist_graft.TrainConfig:
        data = DataConfig(train_samples=28, test_samples=10, batch_size=6)
        return dataclasses.replace(
            config_of(run), data=data, model=ModelConfig(name="resnet8"), **options
        )

    def common(self, run: Path) -> dist_graft.TrainConfig:
        """The options of the one network as those of all."""
        config = self.config(run)
        sections = {
            name: dataclasses.replace(getattr(config, name), **values)
            for name, values in self.OWN.items()
        }
        return dataclasses.replace(config, **sections)

    def test_own_options_act_like_common_ones(self, tmp_path: Path) -> None:
        Trainer(self.common(tmp_path / "common")).fit()
        trainer = Trainer(self.config(tmp_path / "own", members=[self.OWN]))
        trainer.fit()
        assert trainer.config.optim.lr == 0.1
        assert trainer.member_config.optim.lr == 0.05
        assert_same_bits(final_state(tmp_path / "common"), final_state(tmp_path / "own"))
        first, second = (metrics(tmp_path / name, 0) for name in ("common", "own"))
        assert [line["train_loss"] for line in first] == [line["train_loss"] for line in second]
        assert "options" not in first[0]
        Trainer(self.config(tmp_path / "plain")).fit()
        assert metrics(tmp_path / "plain", 0)[0]["train_loss"] != first[0]["train_loss"]

    def test_a_resumed_run_mixes_the_same_images(self, tmp_path: Path) -> None:
        Trainer(self.common(tmp_path / "whole")).fit()
        with pytest.raises(StoppedEarlyError):
            Trainer(self.common(tmp_path / "stopped"), callbacks=[StopAfter(8)]).fit()
        Trainer(self.common(tmp_path / "stopped")).fit()
        assert_same_bits(final_state(tmp_path / "whole"), final_state(tmp_path / "stopped"))


class TestCheckpointsByTheClock:
    """checkpoint.every_minutes."""

    def run(self, folder: Path, minutes: float | None) -> tuple[list[str], list[str]]:
        """Checkpoints that were reported, and those that are on disk."""
        options = CheckpointConfig(every=0, every_minutes=minutes, keep=100)
        recorder = Recorder()
        REGRESSION.trainer(config_of(folder, checkpoint=options), recorder).fit()
        reported = [path.name for (path,) in recorder.arguments("on_checkpoint")]
        return reported, [found.path.name for found in complete_checkpoints(folder / "checkpoints")]

    def test_they_are_saved_inside_epochs(self, tmp_path: Path) -> None:
        reported, on_disk = self.run(tmp_path, 1e-6)
        assert reported == on_disk
        assert on_disk[0] == "epoch_0000_round_0000"
        assert on_disk[-1] == f"epoch_{EPOCHS:04d}"

    @pytest.mark.parametrize("minutes", [None, 1e6])
    def test_a_run_that_is_too_short_has_only_the_last_checkpoint(
        self, tmp_path: Path, minutes: float | None
    ) -> None:
        assert self.run(tmp_path, minutes) == ([f"epoch_{EPOCHS:04d}"],) * 2

    def test_the_end_of_an_epoch_counts(self, tmp_path: Path) -> None:
        """Also where an epoch is a single step."""
        config = config_of(
            tmp_path, checkpoint=CheckpointConfig(every=0, every_minutes=1e-6, keep=100)
        )
        data = dist_graft.Datasets(train=list(REGRESSION.data.train)[:5], test=REGRESSION.data.test)
        Trainer(config, model=REGRESSION.model, data=data, loss=REGRESSION.loss).fit()
        assert complete_checkpoints(tmp_path / "checkpoints")[0].path.name == "epoch_0001"

    def test_a_run_resumes_from_one_with_the_same_bits(self, tmp_path: Path) -> None:
        options = CheckpointConfig(every=0, every_minutes=1e-6, keep=100)
        for name in ("whole", "resumed"):
            REGRESSION.trainer(config_of(tmp_path / name, checkpoint=options)).fit()
        for found in complete_checkpoints(tmp_path / "resumed/checkpoints")[1:]:
            shutil.rmtree(found.path)
        again = REGRESSION.trainer(config_of(tmp_path / "resumed", checkpoint=options))
        again.fit()
        assert again.resumed_from == tmp_path / "resumed/checkpoints/epoch_0000_round_0000"
        assert_same_bits(final_state(tmp_path / "whole"), final_state(tmp_path / "resumed"))


def test_a_run_of_version_0_1_0_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checkpoint has no metric besides accuracy, and config.yaml lacks newer options."""
    run = tmp_path / "elsewhere" / "run"
    shutil.copytree(RUN_OF_0_1_0, run)
    monkeypatch.setenv("PYTHONPATH", f"{TESTS}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    run_population(
        *(2, run, "--epochs", "3", "--seed", "7", "--optim.lr_diversity", "cosine"),
        *("--data.train_samples", "96", "--data.test_samples", "20", "--data.batch_size", "16"),
        *("--model.name", "tiny_network:TinyNetwork", "--graft.every", "0"),
        *("--graft.every_steps", "2", "--checkpoint.keep", "1"),
    )
    for network in range(2):
        state = checkpoint(run, 3, network)
        assert (state["epoch"], state["step"], state["round"]) == (3, 0, 9)
        before = torch.load(
            RUN_OF_0_1_0 / f"checkpoints/epoch_0001_round_0004/network{network:02d}.pt",
            weights_only=True,
        )
        lines = metrics(run, network)
        assert lines[0] == metrics(RUN_OF_0_1_0, network)[0]
        assert [line["epoch"] for line in lines] == [0, 1, 2]
        assert [line["graft"]["rounds"] for line in lines] == [3, 3, 3]
        assert lines[1]["lr"] == before["lr"]
        # Results of the steps before the stop are part of the epoch's mean.
        hits = before["trained"]["accuracy"] * before["trained"]["images"] / 100
        assert lines[1]["train_accuracy"] * 96 / 100 >= hits - 1e-6
    log = (run / "network00/log.txt").read_text()
    assert "epoch 1, step 3, round 4" in log
    assert summary(run)["diverged"] == []


class TakeOver(Callback):
    """Another run takes over the run directory in the second epoch."""

    def on_epoch_start(self, trainer: Trainer) -> None:
        if trainer.epoch == 1:
            path = trainer.directory.lease
            path.write_text(json.dumps(json.loads(path.read_text()) | {"token": "ab"}))


def test_a_run_that_lost_its_directory_stops_without_writing(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    with pytest.raises(LeaseLostError, match="was taken over by another run"):
        REGRESSION.trainer(config_of(tmp_path), TakeOver()).fit()
    assert [json.loads(line)["epoch"] for line in run.metrics(0).read_text().splitlines()] == [0]
    assert not (run.checkpoints / "epoch_0002").exists()
    assert json.loads(run.status(0).read_text())["phase"] not in ("finished", "failed")
    assert json.loads(run.lease.read_text())["token"] == "ab"
