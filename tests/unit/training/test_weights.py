"""`init_from`: initial weights from runs, checkpoints, exports, files, and libraries."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torchvision
from launching import end_population, run_population
from reading import assert_same_bits, checkpoint
from runs import EPOCHS, REGRESSION, Regressor, StopAfter, config_of
from torch import Tensor, nn

from dist_graft import Callback, Trainer
from dist_graft.config import (
    GraftConfig,
    ModelConfig,
    OptimConfig,
    PopulationConfig,
    TrainConfig,
)
from dist_graft.errors import ConfigError, RunDirectoryError, StoppedEarlyError
from dist_graft.run_directory import RunDirectory
from dist_graft.training.checkpoint.files import checkpoint_path, mark_complete, save_network
from dist_graft.training.models import build_model
from dist_graft.training.weights import initialize


def regressor(seed: int) -> Regressor:
    torch.manual_seed(seed)
    return Regressor()


def write_checkpoint(folder: Path, epoch: int, seeds: list[int], first: int = 0) -> Path:
    path = checkpoint_path(folder, epoch)
    sums = [
        save_network(path / f"network{first + k:02d}.pt", {"model": regressor(seed).state_dict()})
        for k, seed in enumerate(seeds)
    ]
    mark_complete(path, epoch=epoch, round_=epoch, sha256=sums, first=first)
    return path


def write_together(folder: Path) -> Path:
    write_checkpoint(folder / "checkpoints", 1, [7, 8])
    write_checkpoint(folder / "checkpoints", 2, [0, 1])
    return folder


def write_one_checkpoint(folder: Path) -> Path:
    path = write_checkpoint(folder / "checkpoints", 1, [0, 1])
    write_checkpoint(folder / "checkpoints", 2, [7, 8])
    return path


def write_jobs(folder: Path) -> Path:
    for network in range(2):
        write_checkpoint(folder / f"network{network:02d}/checkpoints", 2, [network], network)
    return folder


def write_export(folder: Path) -> Path:
    folder.mkdir()
    for network in range(2):
        state = regressor(network).state_dict()
        safetensors.torch.save_file(state, folder / f"network{network:02d}.safetensors")
        torch.save(state, folder / f"network{network:02d}.pt")
    names = [path.name for path in folder.iterdir()]
    description = {"model": None, "lead": "conv", "sha256": dict.fromkeys(names, "")}
    (folder / "export.json").write_text(json.dumps(description))
    return folder


def config(source: object, **options: Any) -> TrainConfig:
    return TrainConfig(init_from=str(source), **options)


class TestSources:
    @pytest.mark.parametrize(
        "write", [write_together, write_one_checkpoint, write_jobs, write_export]
    )
    def test_network_k_starts_from_network_k_modulo(
        self, tmp_path: Path, write: Callable[[Path], Path]
    ) -> None:
        source = write(tmp_path / "source")
        for network, seed in enumerate((0, 1, 0)):
            model = regressor(5)
            line = initialize(model, config(source), network)
            assert_same_bits(model.state_dict(), regressor(seed).state_dict())
            assert "9 of 9 tensors" in line

    @pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
    def test_one_file_for_all(self, tmp_path: Path, suffix: str) -> None:
        path = tmp_path / f"mine{suffix}"
        save = safetensors.torch.save_file if suffix == ".safetensors" else torch.save
        save(regressor(3).state_dict(), path)
        for network in range(2):
            model = regressor(5)
            initialize(model, config(path), network)
            assert_same_bits(model.state_dict(), regressor(3).state_dict())

    def test_file_of_a_checkpoint(self, tmp_path: Path) -> None:
        path = write_together(tmp_path) / "checkpoints/epoch_0002/network01.pt"
        model = regressor(5)
        initialize(model, config(path), 0)
        assert_same_bits(model.state_dict(), regressor(1).state_dict())

    def test_errors(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="no such run, checkpoint, or file"):
            initialize(regressor(0), config(tmp_path / "nowhere"), 0)
        with pytest.raises(ConfigError, match="holds no complete checkpoint"):
            initialize(regressor(0), config(tmp_path), 0)
        run = write_together(tmp_path / "run")
        (run / "checkpoints/epoch_0002/network01.pt").write_bytes(b"damaged")
        with pytest.raises(RunDirectoryError, match=r"network01\.pt is missing or damaged"):
            initialize(regressor(0), config(run), 1)
        (tmp_path / "broken.safetensors").write_bytes(b"broken")
        with pytest.raises(RunDirectoryError, match="cannot be read as weights"):
            initialize(regressor(0), config(tmp_path / "broken.safetensors"), 0)


class TestOtherShapes:
    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        """A network with ten classes and a tensor that has no place in the others."""
        state = build_model(ModelConfig(name="resnet8"), num_classes=10, channels=1).state_dict()
        torch.save({**state, "auxiliary.weight": torch.zeros(2)}, tmp_path / "ten.pt")
        return tmp_path / "ten.pt"

    def test_strict_names_each_tensor(self, file: Path) -> None:
        model = build_model(ModelConfig(name="resnet8"), num_classes=4, channels=1)
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        with pytest.raises(ConfigError) as caught:
            initialize(model, config(file), 0)
        for part in (
            *("linear.weight is [10, 64] there and [4, 64] here", "linear.bias is [10] there"),
            *("auxiliary.weight is unknown here", "init_strict false"),
        ):
            assert part in str(caught.value)
        assert_same_bits(model.state_dict(), before)

    def test_not_strict_keeps_the_new_head(self, file: Path) -> None:
        torch.manual_seed(4)
        model = build_model(ModelConfig(name="resnet8"), num_classes=4, channels=1)
        head = model.linear.weight.detach().clone()
        line = initialize(model, config(file, init_strict=False), 0)
        trained = torch.load(file, weights_only=True)
        for key, tensor in model.state_dict().items():
            if not key.startswith("linear"):
                assert torch.equal(tensor, trained[key])
        assert torch.equal(model.linear.weight, head)
        assert "left at their initialization: linear.weight" in line
        assert "not used: auxiliary.weight" in line

    def test_another_model_is_refused_even_then(self, file: Path) -> None:
        with pytest.raises(ConfigError, match="none of its tensors matches"):
            initialize(nn.Bilinear(2, 3, 4), config(file, init_strict=False), 0)


class TestPretrained:
    @pytest.fixture(autouse=True)
    def _cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))

    def test_torchvision(self, tmp_path: Path) -> None:
        options = config("torchvision:DEFAULT", model=ModelConfig(name="squeezenet1_1"))
        model = torchvision.models.squeezenet1_1()
        with pytest.raises(ConfigError) as caught:
            initialize(model, options, 0)
        url = torchvision.models.SqueezeNet1_1_Weights.DEFAULT.url
        path = tmp_path / "checkpoints" / url.rpartition("/")[2]
        assert f"copy {url} to {path}" in str(caught.value)

        torch.manual_seed(1)
        pretrained = torchvision.models.squeezenet1_1()
        path.parent.mkdir()
        torch.save(pretrained.state_dict(), path)
        initialize(model, options, 0)
        assert_same_bits(model.state_dict(), pretrained.state_dict())

    @pytest.mark.parametrize(
        ("source", "name", "says"),
        [
            ("torchvision:BEST", "resnet18", "the weights of resnet18 are IMAGENET1K_V1, DEFAULT"),
            ("torchvision:DEFAULT", "resnet20", "requires a model of torchvision"),
            ("timm:DEFAULT", "resnet18", "requires a model of timm"),
            ("timm:DEFAULT", "timm/resnet18", "https://huggingface.co/timm/resnet18"),
            ("timm:x", "timm/resnet18", "timm has no such weights"),
        ],
    )
    def test_errors(self, source: str, name: str, says: str) -> None:
        if source.startswith("timm"):
            pytest.importorskip("timm")
        with pytest.raises(ConfigError, match=says):
            initialize(nn.Linear(1, 1), config(source, model=ModelConfig(name=name)), 0)


class KeepFirst(Callback):
    """Keeps the weights with which training starts, and those of the moving average."""

    def on_fit_start(self, trainer: Trainer) -> None:
        def copied(module: nn.Module) -> dict[str, Tensor]:
            return {key: tensor.clone() for key, tensor in module.state_dict().items()}

        self.epoch = trainer.epoch
        self.model = copied(trainer.model)
        self.average = copied(trainer.state.averaged.model) if trainer.state.averaged else None


class TestRuns:
    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        torch.save(regressor(3).state_dict(), tmp_path / "mine.pt")
        return tmp_path / "mine.pt"

    def test_model_and_moving_average_start_from_the_weights(
        self, tmp_path: Path, file: Path
    ) -> None:
        first = KeepFirst()
        options = config_of(tmp_path / "run", optim=OptimConfig(ema_decay=0.9))
        REGRESSION.trainer(replace(options, init_from=str(file)), first).fit()
        expected = regressor(3).state_dict()
        assert first.epoch == 0
        assert_same_bits(first.model, expected)
        assert first.average is not None
        assert_same_bits(first.average, expected)
        assert "initial weights from" in (tmp_path / "run/network00/log.txt").read_text()

    def test_a_resumed_run_does_not_read_them(
        self, tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        runs = [
            replace(config_of(tmp_path / name), init_from="mine.pt")
            for name in ("single", "stopped")
        ]
        REGRESSION.trainer(runs[0]).fit()
        with pytest.raises(StoppedEarlyError):
            REGRESSION.trainer(runs[1], StopAfter(5)).fit()
        file.unlink()
        REGRESSION.trainer(runs[1]).fit()
        states = [checkpoint(Path(run.run_dir), EPOCHS, 0)["model"] for run in runs]
        assert_same_bits(*states)
        stored, _ = RunDirectory(tmp_path / "stopped").read_config()
        assert stored.init_from == str(file)
        assert stored.data.root == str(tmp_path / "data")
        with pytest.raises(RunDirectoryError, match="init_from was"):
            REGRESSION.trainer(replace(runs[1], init_from=None)).fit()

    def test_jobs(self, tmp_path: Path) -> None:
        source = write_together(tmp_path / "source")
        first = KeepFirst()
        options = replace(
            config_of(tmp_path / "run"),
            init_from=str(source),
            graft=GraftConfig(exchange="files"),
            population=PopulationConfig(size=2, network=1),
        )
        REGRESSION.trainer(options, first).fit()
        assert_same_bits(first.model, regressor(1).state_dict())

    def test_all_networks_end_when_there_are_no_weights(self, tmp_path: Path) -> None:
        ends = end_population(2, tmp_path / "run", "--init_from", str(tmp_path / "nowhere"))
        for end in ends:
            assert end.status == 2
            assert len(end.errors.splitlines()) == 1, end.errors
            assert "no such run, checkpoint, or file" in end.errors

    @pytest.mark.parametrize(
        "options",
        [
            ("--runtime.replicas", "2"),
            # The outer optimizer's weights start from them, too.
            ("--method", "diloco", "--model.shared_init", "true", "--diloco.every_steps", "1"),
        ],
        ids=["replicas", "diloco"],
    )
    def test_processes_start_from_the_same_weights(
        self, tmp_path: Path, options: tuple[str, ...]
    ) -> None:
        torch.manual_seed(9)
        model = build_model(ModelConfig(name="resnet8"), num_classes=10, channels=1)
        safetensors.torch.save_file(model.state_dict(), tmp_path / "mine.safetensors")
        run_population(
            2,
            tmp_path / "run",
            *("--epochs", "1", "--model.name", "resnet8", *options),
            *("--optim.lr", "1e-30", "--init_from", str(tmp_path / "mine.safetensors")),
        )
        state = checkpoint(tmp_path / "run", 1, 0)["model"]
        for key, tensor in model.named_parameters():
            torch.testing.assert_close(state[key], tensor.detach(), rtol=0, atol=1e-25)
