"""The distillation loss against plain NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dist_graft.training.losses import distillation_loss


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
