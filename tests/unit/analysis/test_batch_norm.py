from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dist_graft.analysis.soups import reestimate_batch_norm
from dist_graft.training.loop import Predictor

Batch = tuple[Tensor, Tensor]


def predictor(model: nn.Module) -> Predictor:
    return Predictor(model=model, forward=model, precision="fp32", device=torch.device("cpu"))


def batches(sizes: tuple[int, ...] = (8, 8, 3), features: int = 5) -> list[Batch]:
    torch.manual_seed(1)
    return [(torch.randn(size, features), torch.zeros(size).long()) for size in sizes]


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3), nn.BatchNorm1d(3)
    )


def test_statistics_are_means_over_batches(model: nn.Sequential) -> None:
    """Reference in numpy: each batch is normalized by its own statistics, as in training."""
    given = batches()
    expected: list[list[tuple[np.ndarray, np.ndarray]]] = [[], []]
    for images, _ in given:
        hidden = images.double().numpy()
        for layer, place in enumerate((0, 3)):
            weight, bias = (
                tensor.detach().double().numpy() for tensor in model[place].parameters()
            )
            hidden = hidden @ weight.T + bias
            mean, variance = hidden.mean(0), hidden.var(0)
            expected[layer].append((mean, hidden.var(0, ddof=1)))
            hidden = np.tanh((hidden - mean) / np.sqrt(variance + 1e-5))

    reestimate_batch_norm(predictor(model), given)

    for layer, place in enumerate((1, 4)):
        means, variances = (
            np.mean(values, axis=0) for values in zip(*expected[layer], strict=True)
        )
        np.testing.assert_allclose(model[place].running_mean.numpy(), means, rtol=0, atol=1e-6)
        np.testing.assert_allclose(model[place].running_var.numpy(), variances, rtol=1e-5)
        assert model[place].num_batches_tracked.item() == len(given)


def test_empty_batch_is_skipped(model: nn.Sequential) -> None:
    given = batches()
    reestimate_batch_norm(predictor(model), given)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    reestimate_batch_norm(predictor(model), [*given[:1], *batches((0,)), *given[1:]])
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name])


def test_previous_statistics_do_not_matter(model: nn.Sequential) -> None:
    reestimate_batch_norm(predictor(model), batches())
    first = [model[place].running_var.clone() for place in (1, 4)]
    model[1].running_var.fill_(100.0)
    model[4].running_mean.fill_(7.0)
    reestimate_batch_norm(predictor(model), batches())
    assert all(torch.equal(model[place].running_var, first[i]) for i, place in enumerate((1, 4)))


def test_nothing_else_is_modified(model: nn.Sequential) -> None:
    model[1].momentum = 0.3
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    reestimate_batch_norm(predictor(model), batches())
    assert model[1].momentum == 0.3
    assert model[4].momentum == 0.1
    assert not any(module.training for module in model.modules())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None


def test_dropout_is_off_and_draws_nothing() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(5))
    given = batches((16,))
    torch.manual_seed(3)
    state = torch.get_rng_state()
    reestimate_batch_norm(predictor(model), given)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(model[1].running_mean, given[0][0].mean(0))


def test_no_batch_is_read_without_batch_norm() -> None:
    def unread() -> Iterator[Batch]:
        pytest.fail("a batch was read")
        yield from ()

    model = nn.Sequential(nn.Linear(5, 2), nn.BatchNorm1d(2, track_running_stats=False))
    reestimate_batch_norm(predictor(model), unread())
