from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from dist_graft.training.loop import TrainState, accuracy, current_lr, evaluate, train_steps
from small import MakeData, MakeTrainee, small_model
from torch import Tensor, nn

from dist_graft.config import OptimConfig
from dist_graft.errors import ConfigError
from dist_graft.training.data import Data
from dist_graft.training.data.order import Part, Share

PLAIN = {"lr": 0.5, "momentum": 0.0, "weight_decay": 0.0, "schedule": "constant"}


def plain(**options: object) -> OptimConfig:
    """SGD in its simplest form, so that a step is the gradient times the learning rate."""
    return OptimConfig(**{**PLAIN, **options})  # type: ignore[arg-type]


def weights(trainee: TrainState) -> Tensor:
    """All parameters as one vector."""
    return torch.cat([parameter.detach().flatten() for parameter in trainee.model.parameters()])


def gradient(model: nn.Module, inputs: Tensor, labels: Tensor, **options: float) -> Tensor:
    loss = F.cross_entropy(model(inputs), labels, **options)  # type: ignore[arg-type]
    parameters = list(model.parameters())
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)])


class TestOneStep:
    """What the options make of the first step, against the gradient itself."""

    @pytest.fixture
    def first(self, make_data: MakeData) -> tuple[Tensor, Tensor]:
        return next(make_data().train_batches(0, 0, 1))

    def change(
        self, make_data: MakeData, make_trainee: MakeTrainee, config: OptimConfig, steps: int = 1
    ) -> Tensor:
        trainee = make_trainee(config)
        before = weights(trainee)
        train_steps(trainee, make_data(), config, epoch=0, first=0, last=steps)
        return weights(trainee) - before

    def test_the_learning_rate(
        self, make_data: MakeData, make_trainee: MakeTrainee, first: tuple[Tensor, Tensor]
    ) -> None:
        expected = -0.5 * gradient(small_model(), *first)
        torch.testing.assert_close(self.change(make_data, make_trainee, plain()), expected)

    def test_label_smoothing(
        self, make_data: MakeData, make_trainee: MakeTrainee, first: tuple[Tensor, Tensor]
    ) -> None:
        expected = -0.5 * gradient(small_model(), *first, label_smoothing=0.3)
        assert not torch.allclose(expected, -0.5 * gradient(small_model(), *first), atol=1e-3)
        found = self.change(make_data, make_trainee, plain(label_smoothing=0.3))
        torch.testing.assert_close(found, expected)

    def test_weight_decay(
        self, make_data: MakeData, make_trainee: MakeTrainee, first: tuple[Tensor, Tensor]
    ) -> None:
        own = torch.cat([p.detach().flatten() for p in small_model().parameters()])
        expected = -0.5 * (gradient(small_model(), *first) + 0.1 * own)
        found = self.change(make_data, make_trainee, plain(weight_decay=0.1))
        torch.testing.assert_close(found, expected)

    def test_nesterov(
        self, make_data: MakeData, make_trainee: MakeTrainee, first: tuple[Tensor, Tensor]
    ) -> None:
        expected = -0.5 * 1.9 * gradient(small_model(), *first)
        config = plain(momentum=0.9, nesterov=True)
        torch.testing.assert_close(self.change(make_data, make_trainee, config), expected)

    def test_momentum_from_the_second_step(
        self, make_data: MakeData, make_trainee: MakeTrainee
    ) -> None:
        config = plain(momentum=0.9)
        one = self.change(make_data, make_trainee, config)
        two = self.change(make_data, make_trainee, config, steps=2)
        two_without = self.change(make_data, make_trainee, plain(), steps=2)
        torch.testing.assert_close(two, two_without + 0.9 * one)

    def test_warm_up(
        self, make_data: MakeData, make_trainee: MakeTrainee, first: tuple[Tensor, Tensor]
    ) -> None:
        expected = -0.5 / 4 * gradient(small_model(), *first)
        found = self.change(make_data, make_trainee, plain(warmup_epochs=1.0))
        torch.testing.assert_close(found, expected)

    def test_adamw(
        self, make_data: MakeData, make_trainee: MakeTrainee, first: tuple[Tensor, Tensor]
    ) -> None:
        config = plain(name="adamw", lr=0.01, weight_decay=0.1)
        own = torch.cat([p.detach().flatten() for p in small_model().parameters()])
        slope = gradient(small_model(), *first)
        steep = slope.abs() > 1e-4
        expected = -0.01 * (slope.sign() + 0.1 * own)
        found = self.change(make_data, make_trainee, config)
        torch.testing.assert_close(found[steep], expected[steep], atol=2e-6, rtol=1e-3)

    @pytest.mark.parametrize("accumulation", [1, 3])
    def test_clipping_bounds_the_whole_gradient(
        self,
        make_data: MakeData,
        make_trainee: MakeTrainee,
        first: tuple[Tensor, Tensor],
        accumulation: int,
    ) -> None:
        slope = gradient(small_model(), *first)
        assert slope.norm() > 0.02
        config = plain(clip_norm=0.01, accumulation=accumulation)
        found = self.change(make_data, make_trainee, config)
        torch.testing.assert_close(found, -0.5 * 0.01 * slope / slope.norm(), atol=1e-6, rtol=1e-3)

    def test_clipping_leaves_a_small_gradient_alone(
        self, make_data: MakeData, make_trainee: MakeTrainee
    ) -> None:
        clipped = self.change(make_data, make_trainee, plain(clip_norm=1e6))
        assert torch.equal(clipped, self.change(make_data, make_trainee, plain()))


def test_every_step_follows_its_own_gradient(
    make_data: MakeData, make_trainee: MakeTrainee
) -> None:
    trainee, reference = make_trainee(plain()), small_model()
    train_steps(trainee, make_data(), plain(), epoch=0, first=0, last=4)
    for batch in make_data().train_batches(0, 0, 4):
        step = torch.split(
            -0.5 * gradient(reference, *batch), [p.numel() for p in reference.parameters()]
        )
        with torch.no_grad():
            for parameter, change in zip(reference.parameters(), step, strict=True):
                parameter.add_(change.view_as(parameter))
    expected = torch.cat([parameter.detach().flatten() for parameter in reference.parameters()])
    torch.testing.assert_close(weights(trainee), expected)


def test_the_learning_rate_follows_the_schedule_step_by_step(
    make_data: MakeData, make_trainee: MakeTrainee
) -> None:
    config = plain(warmup_epochs=0.5, schedule="step", step_epochs=1)
    trainee, rates = make_trainee(config), [0.25]
    for epoch in range(2):
        train_steps(
            trainee,
            make_data(),
            config,
            epoch=epoch,
            first=0,
            last=4,
            on_step=lambda: rates.append(trainee.optimizer.param_groups[0]["lr"]),
        )
    assert rates == pytest.approx([0.25, *[0.5] * 3, *[0.05] * 4, 0.005])


@pytest.mark.parametrize("parts", [2, 3, 8, 50])
def test_accumulation_is_the_same_step(
    make_data: MakeData, make_trainee: MakeTrainee, parts: int
) -> None:
    """Also where a part is smaller than the others: batches of 8 and a last one of 5."""
    results, ends = [], []
    for accumulation in (1, parts):
        config = OptimConfig(label_smoothing=0.1, accumulation=accumulation)
        trainee = make_trainee(config)
        results.append(train_steps(trainee, make_data(), config, epoch=0, first=0, last=4))
        ends.append(weights(trainee))
    torch.testing.assert_close(ends[0], ends[1], atol=1e-6, rtol=1e-5)
    assert results[0].loss == pytest.approx(results[1].loss, rel=1e-5)
    assert results[0].accuracy == results[1].accuracy
    assert results[0].images == results[1].images == 29


def test_accumulation_runs_the_parts_one_by_one(
    make_data: MakeData, make_trainee: MakeTrainee
) -> None:
    config = OptimConfig(accumulation=3)
    trainee = make_trainee(config)
    sizes = []

    def forward(inputs: Tensor) -> Tensor:
        sizes.append(len(inputs))
        output: Tensor = trainee.model(inputs)
        return output

    trainee.forward = forward
    train_steps(trainee, make_data(), config, epoch=0, first=0, last=1)
    assert sizes == [3, 3, 2]


class OneBatch:
    """A data set of which a process sees its part of one batch."""

    def __init__(self, size: int, share: Share) -> None:
        self._part = share.of_batch(size)
        self._size = size

    def part(self, _: int) -> Part:
        return self._part

    def train_batches(self, *_: int) -> Iterator[tuple[Tensor, Tensor]]:
        images = torch.ones(self._size, 1, 8, 8)[self._part.positions]
        yield images, torch.zeros(len(images), dtype=torch.int64)


@pytest.mark.parametrize(("replicas", "accumulation"), [(4, 8), (3, 2), (2, 7)])
@pytest.mark.parametrize("size", [1, 2, 5, 11, 130, 143])
def test_the_processes_of_a_network_run_equally_many_parts(
    make_trainee: MakeTrainee, size: int, replicas: int, accumulation: int
) -> None:
    """Else a collective of a forward pass (synchronised batch norm) has no counterpart."""
    config = OptimConfig(accumulation=accumulation)
    counts = []
    for replica in range(replicas):
        trainee = make_trainee(config)
        sizes: list[int] = []
        trainee.model.register_forward_hook(lambda _, x, __, sizes=sizes: sizes.append(len(x[0])))
        data = OneBatch(size, Share(replica, replicas))
        train_steps(trainee, data, config, epoch=0, first=0, last=1)  # type: ignore[arg-type]
        counts.append(len(sizes))
        assert max(sizes) - min(sizes) <= 1
    smallest = size if size < replicas else size // replicas
    assert counts == [len(torch.arange(smallest).chunk(accumulation))] * replicas


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
class TestLossScaling:
    """What fp16 does on a GPU, with a scaler of the CPU."""

    @pytest.fixture
    def trainee(self, make_trainee: MakeTrainee) -> TrainState:
        trainee = make_trainee(plain(lr=0.1, momentum=0.9))
        trainee.scaler = torch.amp.GradScaler("cpu")
        return trainee

    def lose(self, trainee: TrainState, data: Data) -> None:
        """Steps whose gradients are not finite, until none ever would be again."""
        with torch.no_grad():
            trainee.model[0].weight[0] = math.nan
        for epoch in range(10):
            train_steps(trainee, data, plain(), epoch=epoch, first=0, last=4)

    def test_steps_that_are_not_finite_are_skipped_until_the_scale_is_gone(
        self, make_data: MakeData, trainee: TrainState
    ) -> None:
        train_steps(trainee, make_data(), plain(), epoch=0, first=0, last=4)
        assert not trainee.scale_collapsed
        before = weights(trainee)[-5:]
        self.lose(trainee, make_data())
        assert torch.equal(weights(trainee)[-5:], before)
        assert trainee.scale_collapsed

    def test_a_network_that_begins_anew_learns_again(
        self, make_data: MakeData, make_trainee: MakeTrainee, trainee: TrainState
    ) -> None:
        """As one whose weights were never lost."""
        self.lose(trainee, make_data())
        sound = make_trainee(plain(lr=0.1, momentum=0.9))
        trainee.model.load_state_dict(sound.model.state_dict())
        trainee.begin_anew()
        for one in (trainee, sound):
            train_steps(one, make_data(), plain(), epoch=0, first=0, last=4)
        assert not trainee.scale_collapsed
        torch.testing.assert_close(weights(trainee), weights(sound))

    def test_without_scaling_there_is_no_scale_to_lose(
        self, make_data: MakeData, make_trainee: MakeTrainee
    ) -> None:
        trainee = make_trainee(plain())
        train_steps(trainee, make_data(), plain(), epoch=0, first=0, last=4)
        trainee.begin_anew()
        assert not trainee.scale_collapsed


@pytest.mark.parametrize("cut", [0, 1, 3, 4])
def test_an_epoch_in_parts_is_the_epoch_at_once(
    make_data: MakeData, make_trainee: MakeTrainee, cut: int
) -> None:
    """Bit for bit, dropout, batch norm and augmentation included."""
    config, data = OptimConfig(), make_data(augment=True)
    states = []
    for stretches in ([(0, 4)], [(0, cut), (cut, 4)]):
        trainee = make_trainee(config, model=small_model(batch_norm=True, dropout=0.5))
        for first, last in stretches:
            if first < last:
                train_steps(trainee, data, config, epoch=0, first=first, last=last)
                torch.rand(7)  # what others draw meanwhile changes nothing
        states.append(trainee.model.state_dict())
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key


def test_dropout_follows_from_seed_network_epoch_and_step(
    make_data: MakeData, make_trainee: MakeTrainee
) -> None:
    data, config = make_data(), plain(lr=1e-9)
    masks = []
    for network, seed, epoch in ((0, 0, 0), (0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)):
        model = small_model(dropout=0.5)
        trainee = make_trainee(config, model=model, network=network)
        trainee.seed = seed
        kept: list[Tensor] = []
        model[3].register_forward_hook(lambda _, __, out, kept=kept: kept.append(out != 0))
        train_steps(trainee, data, config, epoch=epoch, first=0, last=2)
        assert not torch.equal(*kept)
        masks.append(kept)
    assert torch.equal(masks[0][0], masks[1][0])
    for first, other in ((0, 2), (0, 3), (0, 4)):
        assert not torch.equal(masks[first][0], masks[other][0])


def test_what_a_stretch_reports(make_data: MakeData, make_trainee: MakeTrainee) -> None:
    """Means over the images, not over the batches: the last batch is smaller."""
    config, data = plain(lr=1e-12), make_data()
    told: list[None] = []
    trainee = make_trainee(config)
    found = train_steps(
        trainee, data, config, epoch=0, first=0, last=4, on_step=lambda: told.append(None)
    )
    batches = list(data.train_batches(0, 0, 4))
    inputs = torch.cat([batch[0] for batch in batches])
    labels = torch.cat([batch[1] for batch in batches])
    logits = small_model()(inputs).detach()
    assert found.loss == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)
    hits = int((logits.argmax(1) == labels).sum())
    assert 0 < hits < 29
    assert found.accuracy == pytest.approx(100 * hits / 29)
    assert found.images == 29
    assert found.seconds > 0
    assert len(told) == 4


def test_training_fits_what_it_is_given(make_data: MakeData, make_trainee: MakeTrainee) -> None:
    config, data = OptimConfig(lr=0.05), make_data()
    trainee = make_trainee(config, epochs=12)
    losses = [
        train_steps(trainee, data, config, epoch=epoch, first=0, last=4).loss for epoch in range(12)
    ]
    assert losses[-1] < losses[0] / 10


class TestEvaluate:
    def test_every_image_once_with_the_weights_as_they_are(
        self, make_data: MakeData, make_trainee: MakeTrainee
    ) -> None:
        data = make_data()
        model = small_model(batch_norm=True, dropout=0.5)
        trainee = make_trainee(OptimConfig(), model=model)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        found = evaluate(trainee, data, "test")
        inputs = torch.cat([batch[0] for batch in data.eval_batches("test")])
        labels = torch.cat([batch[1] for batch in data.eval_batches("test")])
        logits = model.eval()(inputs).detach()
        assert found.loss == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)
        assert found.accuracy == 100 * int((logits.argmax(1) == labels).sum()) / 10
        torch.testing.assert_close(found.probabilities, logits.softmax(1))
        assert torch.equal(found.labels, labels)
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
        assert not found.probabilities.requires_grad

    def test_training_goes_on_in_training_mode(
        self, make_data: MakeData, make_trainee: MakeTrainee
    ) -> None:
        config, data = OptimConfig(), make_data()
        model = small_model(batch_norm=True)
        trainee = make_trainee(config, model=model)
        evaluate(trainee, data, "test")
        running = model[1].running_mean.clone()
        train_steps(trainee, data, config, epoch=0, first=0, last=1)
        assert not torch.equal(running, model[1].running_mean)

    def test_the_validation_split(self, make_data: MakeData, make_trainee: MakeTrainee) -> None:
        data = make_data(val_fraction=0.25)
        assert data.train_size + 7 == 29
        found = evaluate(make_trainee(OptimConfig()), data, "val")
        assert len(found.labels) == 7

    def test_bf16_leaves_the_weights_in_fp32(
        self, make_data: MakeData, make_trainee: MakeTrainee
    ) -> None:
        config, data = OptimConfig(), make_data()
        trainee = make_trainee(config, precision="bf16")
        kinds = set()
        trainee.model[5].register_forward_hook(lambda _, __, out: kinds.add(out.dtype))
        train_steps(trainee, data, config, epoch=0, first=0, last=4)
        found = evaluate(trainee, data, "test")
        assert kinds == {torch.bfloat16}
        assert found.probabilities.dtype == torch.float32
        assert {p.dtype for p in trainee.model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("scores", "percent"),
    [([[0.1, 0.9], [0.8, 0.2]], 50.0), ([[0.1, 0.9], [0.3, 0.7]], 100.0), ([[2.0, 1.0]], 0.0)],
)
def test_accuracy_in_percent(scores: list[list[float]], percent: float) -> None:
    assert accuracy(torch.tensor(scores), torch.ones(len(scores), dtype=torch.int64)) == percent


class WithEmptyBatch:
    """A data set whose batch 1 of an epoch lost all of its images."""

    def __init__(self, data: Data) -> None:
        self.data = data

    def part(self, step: int) -> Part:
        return self.data.part(step)

    def train_batches(self, epoch: int, first: int, last: int) -> Iterator[tuple[Tensor, Tensor]]:
        for step, (images, labels) in enumerate(self.data.train_batches(epoch, first, last), first):
            yield (images[:0], labels[:0]) if step == 1 else (images, labels)


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_an_empty_batch_counts_as_a_step_and_changes_no_weight(
    make_data: MakeData, make_trainee: MakeTrainee, clip_norm: float | None
) -> None:
    config = plain(momentum=0.9, warmup_epochs=2.0, accumulation=2, clip_norm=clip_norm)
    data = WithEmptyBatch(make_data())
    trainee = make_trainee(config)
    train_steps(trainee, data, config, epoch=0, first=0, last=1)  # type: ignore[arg-type]
    before, rate = weights(trainee), current_lr(trainee)
    done = train_steps(trainee, data, config, epoch=0, first=1, last=2)  # type: ignore[arg-type]
    assert (done.steps, done.images, done.loss) == (1, 0, 0.0)
    assert torch.equal(weights(trainee), before)
    assert current_lr(trainee) > rate


@pytest.mark.parametrize(
    "answer",
    [
        lambda logits: {"out": logits},
        lambda logits: (logits, logits),
        lambda logits: logits[:, :, None],
        lambda logits: logits[1:],
    ],
)
def test_a_model_that_does_not_classify_is_refused(
    make_data: MakeData, make_trainee: MakeTrainee, answer: object
) -> None:
    trainee = make_trainee(OptimConfig())
    model = trainee.model
    trainee.forward = lambda inputs: answer(model(inputs))  # type: ignore[operator]
    with pytest.raises(ConfigError, match="choose an image classifier"):
        train_steps(trainee, make_data(), OptimConfig(), epoch=0, first=0, last=1)
