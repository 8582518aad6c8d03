"""Distillation teachers: probabilities, loss, and errors about their files."""

from __future__ import annotations

import contextlib
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from small import CPU, make_data, small_model
from torch import Tensor, nn

from dist_graft.config import ModelConfig, RuntimeConfig, TrainConfig
from dist_graft.config.distill import DistillConfig
from dist_graft.errors import ConfigError
from dist_graft.training.models import build_model
from dist_graft.training.teachers import Teachers, distillation_loss, load_teachers

NOT_A_CHECKPOINT = "is not a checkpoint of a network"


class Constant(nn.Module):
    """Returns the same logits for every image."""

    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, images: Tensor) -> Tensor:
        return self.logits.expand(len(images), -1) + 0 * images.mean()


def checkpoint_of_a_run(run: Path, *, num_classes: int = 4, seed: int = 0) -> Path:
    """A network file in the layout of a run directory."""
    torch.manual_seed(seed)
    config = ModelConfig(name="resnet20", activation="leaky_relu")
    model = build_model(config, num_classes=num_classes, channels=1)
    with torch.no_grad():  # running statistics for evaluation mode
        for key, value in model.state_dict().items():
            if key.endswith(("running_mean", "running_var")):
                value.add_(0.5)
    path = run / "checkpoints/epoch_0002/network00.pt"
    path.parent.mkdir(parents=True)
    torch.save({"model": model.state_dict(), "epoch": 2}, path)
    (run / "config.yaml").write_text(yaml.safe_dump({"model": asdict(config)}))
    return path


def config_with(*paths: Path, **runtime: bool) -> TrainConfig:
    return TrainConfig(
        distill=DistillConfig(teachers=[str(path) for path in paths]),
        runtime=RuntimeConfig(**runtime),  # type: ignore[arg-type]
    )


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_teachers(config_with(path), make_data(), CPU)
    text = str(caught.value)
    assert f"distill.teachers: {path}" in text
    return text


def test_probabilities_are_the_mean_of_the_softened_probabilities() -> None:
    rows = np.array([[1.0, 2.0, -1.0], [0.0, -3.0, 4.0]])
    teachers = Teachers([Constant(*row) for row in rows], DistillConfig(temperature=2.0))
    result = teachers.probabilities(torch.rand(5, 1, 2, 2), contextlib.nullcontext())
    soft = np.exp(rows / 2) / np.exp(rows / 2).sum(axis=1, keepdims=True)
    assert result.dtype == torch.float32
    np.testing.assert_allclose(result.numpy(), np.tile(soft.mean(axis=0), (5, 1)), atol=1e-6)
    assert not result.requires_grad


def test_the_loss_is_weighted_and_has_gradients_for_the_student_only() -> None:
    models = [Constant(1.0, 2.0), Constant(0.5, -1.0)]
    images, nothing = torch.rand(3, 1, 2, 2), contextlib.nullcontext()
    logits = torch.tensor([[0.3, -0.2]] * 3, requires_grad=True)
    losses = [
        Teachers(models, DistillConfig(weight=weight)).loss(images, logits, nothing)
        for weight in (1.0, 0.25)
    ]
    assert losses[1].item() == pytest.approx(0.25 * losses[0].item())
    losses[0].backward()
    assert logits.grad is not None
    assert logits.grad.abs().min() > 0
    assert all(model.logits.grad is None for model in models)


def test_a_checkpoint_is_loaded_frozen(tmp_path: Path) -> None:
    paths = [checkpoint_of_a_run(tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    teachers = load_teachers(config_with(*paths, channels_last=True), make_data(), CPU)
    assert teachers is not None
    images = torch.rand(3, 1, 8, 8)
    singles = []
    for path in paths:
        model = build_model(
            ModelConfig(name="resnet20", activation="leaky_relu"), num_classes=4, channels=1
        )
        model.load_state_dict(torch.load(path, weights_only=True)["model"])
        with torch.no_grad():
            singles.append((model.eval()(images) / 2.0).softmax(dim=1))
    before = [{key: value.clone() for key, value in model.state_dict().items()}
              for model in teachers._models]  # fmt: skip
    for _ in range(2):
        result = teachers.probabilities(images, contextlib.nullcontext())
        torch.testing.assert_close(result, torch.stack(singles).mean(dim=0))
    for model, state in zip(teachers._models, before, strict=True):
        assert not any(part.training for part in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_no_teachers() -> None:
    assert load_teachers(TrainConfig(), make_data(), CPU) is None


@pytest.mark.parametrize(
    "path",
    [
        "network00.pt",
        "run/checkpoints/epoch_0001/network00.pt",
        "run/checkpoints/epoch_0002/network07.pt",
    ],
)
def test_a_missing_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint_of_a_run(Path("run"))
    text = refusal(Path(path))
    assert NOT_A_CHECKPOINT in text
    assert "RUN/checkpoints/epoch_0200/network00.pt" in text


@pytest.mark.parametrize("content", [b"", b"no network", b"PK\x03\x04 cut"])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = checkpoint_of_a_run(tmp_path / "run")
    path.write_bytes(content)
    assert NOT_A_CHECKPOINT in refusal(path)


@pytest.mark.parametrize("content", ["[1, 2", "text", "model: {shape: 3}", "epochs: 2"])
def test_a_file_beside_an_invalid_configuration_is_named(tmp_path: Path, content: str) -> None:
    path = checkpoint_of_a_run(tmp_path / "run")
    (tmp_path / "run/config.yaml").write_text(content)
    assert NOT_A_CHECKPOINT in refusal(path)


def test_a_file_without_a_model_is_named(tmp_path: Path) -> None:
    path = checkpoint_of_a_run(tmp_path / "run")
    torch.save({"weights": small_model().state_dict()}, path)
    assert NOT_A_CHECKPOINT in refusal(path)


def test_a_teacher_of_other_classes_is_named(tmp_path: Path) -> None:
    text = refusal(checkpoint_of_a_run(tmp_path / "run", num_classes=10))
    assert "does not fit 4 classes and 1 channels" in text


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def example() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    return random.normal(0, 3, (6, 5)), softmax(random.normal(0, 2, (6, 5)))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 8.0])
def test_the_published_sum(temperature: float) -> None:
    logits, teaching = example()
    expected = 0.0
    student = softmax(logits / temperature)
    for image in range(6):
        for label in range(5):
            expected -= temperature**2 * teaching[image, label] * np.log(student[image, label])
    loss = distillation_loss(torch.tensor(logits), torch.tensor(teaching), temperature=temperature)
    assert loss.shape == ()
    assert float(loss) == pytest.approx(expected / 6, rel=1e-5)


def test_the_gradient_is_the_difference_of_the_probabilities() -> None:
    """tau (q - p) / batch, and zero for equal probabilities."""
    logits, teaching = example()
    student = torch.tensor(logits, requires_grad=True)
    distillation_loss(student, torch.tensor(teaching), temperature=2.0).backward()
    assert student.grad is not None
    expected = 2.0 * (softmax(logits / 2.0) - teaching) / 6
    np.testing.assert_allclose(student.grad.numpy(), expected, atol=1e-6)

    same = torch.tensor(2.0 * np.log(teaching), requires_grad=True)
    distillation_loss(same, torch.tensor(teaching), temperature=2.0).backward()
    assert same.grad is not None
    assert float(same.grad.abs().max()) < 1e-6


def test_half_precision_logits_are_computed_in_float32() -> None:
    logits, teaching = (torch.tensor(value, dtype=torch.float32) for value in example())
    half = logits.bfloat16()
    loss = distillation_loss(half, teaching, temperature=2.0)
    assert loss.dtype == torch.float32
    assert loss == distillation_loss(half.float(), teaching, temperature=2.0)
