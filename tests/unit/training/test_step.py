from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from small import CPU, make_data, make_state, small_model, train_steps
from torch import Tensor, nn

from dist_graft import Callback, Trainer
from dist_graft.config import OptimConfig
from dist_graft.errors import ConfigError, RunDirectoryError
from dist_graft.population.runtime.replicas import Replicas
from dist_graft.training.data import Data
from dist_graft.training.data.order import Part, Share
from dist_graft.training.optimizers import build_optimizer
from dist_graft.training.state import TrainState, moving_average
from dist_graft.training.step import (
    EvalResult,
    RunningSums,
    TrainResult,
    evaluate,
    merge_eval_results,
    merge_train_results,
    train_step,
)
from dist_graft.training.task import Task, accuracy, classification

PLAIN = {"lr": 0.5, "momentum": 0.0, "weight_decay": 0.0, "schedule": "constant"}


def plain(**options: object) -> OptimConfig:
    """SGD in its simplest form, so that a step is the gradient times the learning rate."""
    return OptimConfig(**{**PLAIN, **options})  # type: ignore[arg-type]


def weights(state: TrainState) -> Tensor:
    """All parameters as one vector."""
    return torch.cat([parameter.detach().flatten() for parameter in state.model.parameters()])


def gradient(model: nn.Module, inputs: Tensor, labels: Tensor, **options: float) -> Tensor:
    loss = F.cross_entropy(model(inputs), labels, **options)  # type: ignore[arg-type]
    parameters = list(model.parameters())
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)])


class TestOneStep:
    """The first step with each option, compared with the gradient."""

    @pytest.fixture
    def first(self) -> tuple[Tensor, Tensor]:
        return next(make_data().train_batches(0, 0, 1))

    def change(self, config: OptimConfig, steps: int = 1) -> Tensor:
        state = make_state(config)
        before = weights(state)
        train_steps(state, make_data(), config, epoch=0, first=0, last=steps)
        return weights(state) - before

    @pytest.mark.parametrize(
        ("options", "step"),
        [
            ({}, -0.5),
            ({"momentum": 0.9, "nesterov": True}, -0.5 * 1.9),
            ({"warmup_epochs": 1.0}, -0.5 / 4),
        ],
        ids=["learning rate", "nesterov", "warm-up"],
    )
    def test_length_of_the_step(
        self, first: tuple[Tensor, Tensor], options: dict[str, object], step: float
    ) -> None:
        found = self.change(plain(**options))
        torch.testing.assert_close(found, step * gradient(small_model(), *first))

    def test_label_smoothing(self, first: tuple[Tensor, Tensor]) -> None:
        expected = -0.5 * gradient(small_model(), *first, label_smoothing=0.3)
        assert not torch.allclose(expected, -0.5 * gradient(small_model(), *first), atol=1e-3)
        found = self.change(plain(label_smoothing=0.3))
        torch.testing.assert_close(found, expected)

    def test_weight_decay(self, first: tuple[Tensor, Tensor]) -> None:
        own = torch.cat([p.detach().flatten() for p in small_model().parameters()])
        expected = -0.5 * (gradient(small_model(), *first) + 0.1 * own)
        found = self.change(plain(weight_decay=0.1))
        torch.testing.assert_close(found, expected)

    def test_momentum_from_the_second_step(self) -> None:
        config = plain(momentum=0.9)
        one = self.change(config)
        two = self.change(config, steps=2)
        two_without = self.change(plain(), steps=2)
        torch.testing.assert_close(two, two_without + 0.9 * one)

    def test_adamw(self, first: tuple[Tensor, Tensor]) -> None:
        config = plain(name="adamw", lr=0.01, weight_decay=0.1)
        own = torch.cat([p.detach().flatten() for p in small_model().parameters()])
        slope = gradient(small_model(), *first)
        steep = slope.abs() > 1e-4
        expected = -0.01 * (slope.sign() + 0.1 * own)
        found = self.change(config)
        torch.testing.assert_close(found[steep], expected[steep], atol=2e-6, rtol=1e-3)

    @pytest.mark.parametrize("accumulation", [1, 3])
    def test_clipping_bounds_the_whole_gradient(
        self, first: tuple[Tensor, Tensor], accumulation: int
    ) -> None:
        slope = gradient(small_model(), *first)
        assert slope.norm() > 0.02
        config = plain(clip_norm=0.01, accumulation=accumulation)
        found = self.change(config)
        torch.testing.assert_close(found, -0.5 * 0.01 * slope / slope.norm(), atol=1e-6, rtol=1e-3)

    def test_clipping_keeps_a_small_gradient(self) -> None:
        clipped = self.change(plain(clip_norm=1e6))
        assert torch.equal(clipped, self.change(plain()))


def test_every_step_follows_its_own_gradient() -> None:
    state, reference = make_state(plain()), small_model()
    train_steps(state, make_data(), plain(), epoch=0, first=0, last=4)
    for batch in make_data().train_batches(0, 0, 4):
        step = torch.split(
            -0.5 * gradient(reference, *batch), [p.numel() for p in reference.parameters()]
        )
        with torch.no_grad():
            for parameter, change in zip(reference.parameters(), step, strict=True):
                parameter.add_(change.view_as(parameter))
    expected = torch.cat([parameter.detach().flatten() for parameter in reference.parameters()])
    torch.testing.assert_close(weights(state), expected)


def test_the_learning_rate_follows_the_schedule_step_by_step() -> None:
    config = plain(warmup_epochs=0.5, schedule="step", step_epochs=1)
    rates = []

    class Rates(Callback):
        def on_step_end(self, trainer: Trainer) -> None:
            rates.append(trainer.state.lr)

    state = make_state(config)
    rates.append(state.lr)
    for epoch in range(2):
        train_steps(state, make_data(), config, epoch=epoch, first=0, last=4, callbacks=[Rates()])
    assert rates == pytest.approx([0.25, *[0.5] * 3, *[0.05] * 4, 0.005])


@pytest.mark.parametrize("parts", [2, 3, 8, 50])
def test_accumulation_gives_the_same_step(parts: int) -> None:
    """Also with chunks of different sizes: batches of 8, and a last one of 5."""
    results, ends = [], []
    for accumulation in (1, parts):
        config = OptimConfig(label_smoothing=0.1, accumulation=accumulation)
        state = make_state(config)
        results.append(train_steps(state, make_data(), config, epoch=0, first=0, last=4))
        ends.append(weights(state))
    torch.testing.assert_close(ends[0], ends[1], atol=1e-6, rtol=1e-5)
    assert results[0].loss == pytest.approx(results[1].loss, rel=1e-5)
    assert results[0].metrics == results[1].metrics
    assert results[0].samples == results[1].samples == 29


def test_accumulation_runs_the_chunks_one_by_one() -> None:
    config = OptimConfig(accumulation=3)
    state = make_state(config)
    sizes = []

    def forward(inputs: Tensor) -> Tensor:
        sizes.append(len(inputs))
        output: Tensor = state.model(inputs)
        return output

    state.train_forward = forward  # type: ignore[assignment]
    train_steps(state, make_data(), config, epoch=0, first=0, last=1)
    assert sizes == [3, 3, 2]


class OneBatch:
    """One batch, split between processes."""

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
def test_the_replicas_of_a_network_run_equally_many_chunks(
    size: int, replicas: int, accumulation: int
) -> None:
    """Otherwise a collective in a forward pass (SyncBatchNorm) would have no counterpart."""
    config = OptimConfig(accumulation=accumulation)
    counts = []
    for replica in range(replicas):
        state = make_state(config)
        sizes: list[int] = []
        state.model.register_forward_hook(lambda _, x, __, sizes=sizes: sizes.append(len(x[0])))
        data = OneBatch(size, Share(replica, replicas))
        train_steps(state, data, config, epoch=0, first=0, last=1)  # type: ignore[arg-type]
        counts.append(len(sizes))
        assert max(sizes) - min(sizes) <= 1
    smallest = size if size < replicas else size // replicas
    assert counts == [len(torch.arange(smallest).chunk(accumulation))] * replicas


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
class TestLossScaling:
    """Loss scaling as in fp16, on the CPU."""

    @pytest.fixture
    def state(self) -> TrainState:
        state = make_state(plain(lr=0.1, momentum=0.9))
        state.scaler = torch.amp.GradScaler("cpu")
        return state

    def diverge(self, state: TrainState, data: Data) -> None:
        """Take non-finite steps until the loss scale has collapsed."""
        with torch.no_grad():
            state.model[0].weight[0] = math.nan
        for epoch in range(10):
            train_steps(state, data, plain(), epoch=epoch, first=0, last=4)

    def test_non_finite_steps_are_skipped_until_the_scale_collapses(
        self, state: TrainState
    ) -> None:
        train_steps(state, make_data(), plain(), epoch=0, first=0, last=4)
        assert not state.loss_scale_collapsed
        before = weights(state)[-5:]
        self.diverge(state, make_data())
        assert torch.equal(weights(state)[-5:], before)
        assert state.loss_scale_collapsed

    def test_a_healed_network_trains_like_one_that_never_diverged(self, state: TrainState) -> None:
        self.diverge(state, make_data())
        healthy = make_state(plain(lr=0.1, momentum=0.9))
        state.model.load_state_dict(healthy.model.state_dict())
        state.reset_optimizer()
        for one in (state, healthy):
            train_steps(one, make_data(), plain(), epoch=0, first=0, last=4)
        assert not state.loss_scale_collapsed
        torch.testing.assert_close(weights(state), weights(healthy))

    def test_without_loss_scaling_no_scale_collapses(self) -> None:
        state = make_state(plain())
        train_steps(state, make_data(), plain(), epoch=0, first=0, last=4)
        state.reset_optimizer()
        assert not state.loss_scale_collapsed


@pytest.mark.parametrize("cut", [0, 1, 3, 4])
def test_segments_give_the_same_bits_as_a_whole_epoch(cut: int) -> None:
    """Including dropout, batch norm and augmentation."""
    config, data = OptimConfig(), make_data(augment=True)
    states = []
    for segments in ([(0, 4)], [(0, cut), (cut, 4)]):
        state = make_state(config, model=small_model(batch_norm=True, dropout=0.5))
        for first, last in segments:
            if first < last:
                train_steps(state, data, config, epoch=0, first=first, last=last)
                torch.rand(7)  # other random draws have no effect
        states.append(state.model.state_dict())
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key


def test_dropout_depends_on_seed_network_epoch_and_step_only() -> None:
    data, config = make_data(), plain(lr=1e-9)
    masks = []
    for network, seed, epoch in ((0, 0, 0), (0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)):
        model = small_model(dropout=0.5)
        state = make_state(config, model=model, network=network)
        state.seed = seed
        kept: list[Tensor] = []
        model[3].register_forward_hook(lambda _, __, out, kept=kept: kept.append(out != 0))
        train_steps(state, data, config, epoch=epoch, first=0, last=2)
        assert not torch.equal(*kept)
        masks.append(kept)
    assert torch.equal(masks[0][0], masks[1][0])
    for first, other in ((0, 2), (0, 3), (0, 4)):
        assert not torch.equal(masks[first][0], masks[other][0])


def test_results_are_means_over_the_samples() -> None:
    """Not over the batches: the last batch is smaller."""
    config, data = plain(lr=1e-12), make_data()
    found = train_steps(make_state(config), data, config, epoch=0, first=0, last=4)
    batches = list(data.train_batches(0, 0, 4))
    inputs = torch.cat([batch[0] for batch in batches])
    labels = torch.cat([batch[1] for batch in batches])
    logits = small_model()(inputs).detach()
    assert found.loss == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)
    hits = int((logits.argmax(1) == labels).sum())
    assert 0 < hits < 29
    assert found.metrics["accuracy"] == pytest.approx(100 * hits / 29)
    assert (found.samples, found.steps, found.counts) == (29, 4, {"accuracy": 29})
    assert found.seconds > found.data_seconds > 0


class TestEvaluate:
    def test_each_image_counts_once_and_no_weight_changes(self) -> None:
        data = make_data()
        model = small_model(batch_norm=True, dropout=0.5)
        state = make_state(OptimConfig(), model=model)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        found = evaluate(state, data, "test")
        inputs = torch.cat([batch[0] for batch in data.eval_batches("test")])
        labels = torch.cat([batch[1] for batch in data.eval_batches("test")])
        logits = model.eval()(inputs).detach()
        assert found.loss == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)
        assert found.accuracy == 100 * int((logits.argmax(1) == labels).sum()) / 10
        torch.testing.assert_close(found.probabilities, logits.softmax(1))
        assert torch.equal(found.labels, labels)
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
        assert not found.probabilities.requires_grad

    def test_training_switches_back_to_training_mode(self) -> None:
        config, data = OptimConfig(), make_data()
        model = small_model(batch_norm=True)
        state = make_state(config, model=model)
        evaluate(state, data, "test")
        running = model[1].running_mean.clone()
        train_steps(state, data, config, epoch=0, first=0, last=1)
        assert not torch.equal(running, model[1].running_mean)

    def test_the_validation_split(self) -> None:
        data = make_data(val_fraction=0.25)
        assert data.train_size + 7 == 29
        found = evaluate(make_state(OptimConfig()), data, "val")
        assert len(found.labels) == 7

    def test_bf16_leaves_the_weights_in_fp32(self) -> None:
        config, data = OptimConfig(), make_data()
        state = make_state(config, precision="bf16")
        kinds = set()
        state.model[5].register_forward_hook(lambda _, __, out: kinds.add(out.dtype))
        train_steps(state, data, config, epoch=0, first=0, last=4)
        found = evaluate(state, data, "test")
        assert kinds == {torch.bfloat16}
        assert found.probabilities.dtype == torch.float32
        assert {p.dtype for p in state.model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("scores", "percent"),
    [([[0.1, 0.9], [0.8, 0.2]], 50.0), ([[0.1, 0.9], [0.3, 0.7]], 100.0), ([[2.0, 1.0]], 0.0)],
)
def test_accuracy_in_percent(scores: list[list[float]], percent: float) -> None:
    labels = torch.ones(len(scores), dtype=torch.int64)
    assert accuracy(torch.tensor(scores), labels) == percent
    total, count = classification().metrics["accuracy"](torch.tensor(scores), labels)
    assert float(total) / count == percent
    assert count == len(scores)


class WithEmptyBatch:
    """Data in which batch 1 of every epoch is empty."""

    def __init__(self, data: Data) -> None:
        self.data = data

    def part(self, step: int) -> Part:
        return self.data.part(step)

    def train_batches(self, epoch: int, first: int, last: int) -> Iterator[tuple[Tensor, Tensor]]:
        for step, (images, labels) in enumerate(self.data.train_batches(epoch, first, last), first):
            yield (images[:0], labels[:0]) if step == 1 else (images, labels)


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_an_empty_batch_counts_as_a_step_and_changes_no_weight(clip_norm: float | None) -> None:
    config = plain(momentum=0.9, warmup_epochs=2.0, accumulation=2, clip_norm=clip_norm)
    data = WithEmptyBatch(make_data())
    state = make_state(config)
    train_steps(state, data, config, epoch=0, first=0, last=1)  # type: ignore[arg-type]
    before, rate = weights(state), state.lr
    done = train_steps(state, data, config, epoch=0, first=1, last=2)  # type: ignore[arg-type]
    assert (done.steps, done.samples, done.loss) == (1, 0, 0.0)
    assert torch.equal(weights(state), before)
    assert state.lr > rate


@pytest.mark.parametrize(
    "answer",
    [
        lambda logits: {"out": logits},
        lambda logits: (logits, logits),
        lambda logits: logits[:, :, None],
        lambda logits: logits[1:],
    ],
)
def test_a_model_that_does_not_return_class_scores_is_an_error(answer: object) -> None:
    state = make_state(OptimConfig())
    model = state.model
    state.train_forward = lambda inputs: answer(model(inputs))  # type: ignore[operator]
    with pytest.raises(ConfigError, match="one row of class scores per image"):
        train_steps(state, make_data(), OptimConfig(), epoch=0, first=0, last=1)


@pytest.mark.parametrize(
    ("enabled", "fused", "expected"),
    [(True, False, ["wait", "step"]), (True, True, ["step"]), (False, False, ["step"])],
)
def test_the_host_reads_no_gradient_before_its_peers_have_delivered_theirs(
    enabled: bool, fused: bool, expected: list[str]
) -> None:
    """A loss scaler reads whether one overflowed, unless the optimizer does so on the device."""
    config, data = OptimConfig(), make_data()
    state = make_state(config)
    state.optimizer = build_optimizer(config, state.model, lr=0.1, fused=fused)
    state.scaler = torch.amp.GradScaler("cpu", enabled=enabled)
    calls: list[str] = []
    state.optimizer.register_step_pre_hook(lambda *_: calls.append("step"))

    class Waiting(Replicas):
        def wait_for_device(self, device: torch.device) -> None:
            assert device == state.device
            calls.append("wait")

    inputs, targets = next(data.train_batches(0, 0, 1))
    task = classification()
    train_step(
        state,
        task,
        inputs,
        targets,
        config=config,
        part=data.part(0),
        sums=RunningSums(task, CPU),
        replicas=Waiting(),
    )
    assert calls == expected


class TestMerging:
    """Results of the replicas of one network."""

    def test_means_are_weighted_by_samples_and_counts(self) -> None:
        parts = [
            TrainResult(1.0, 3, {"iou": 0.5}, {"iou": 10.0}, steps=2, seconds=5.0),
            TrainResult(2.0, 1, {"iou": 0.2}, {"iou": 30.0}, steps=2, seconds=6.0),
            TrainResult(0.0, 0, {"iou": 0.0}, {"iou": 0.0}, steps=2, seconds=7.0),
        ]
        merged = merge_train_results(parts[1], [part.row() for part in parts])
        assert merged.loss == pytest.approx(5 / 4)
        assert merged.metrics == pytest.approx({"iou": 11 / 40})
        assert (merged.samples, merged.counts, merged.steps, merged.seconds) == (
            *(4, {"iou": 40.0}, 2, 6.0),
        )
        tests = [
            EvalResult(part.loss, part.samples, part.metrics, part.counts) for part in parts[:2]
        ]
        found = merge_eval_results(tests[0], [test.row() for test in tests])
        assert (found.loss, found.samples) == (pytest.approx(5 / 4), 4)
        assert found.metrics == pytest.approx({"iou": 11 / 40})

    def test_one_replica_keeps_its_result(self) -> None:
        trained = TrainResult(1.0, 3, {"iou": 0.5}, {"iou": 10.0}, steps=2, seconds=5.0)
        tested = EvalResult(1.0, 3, {"iou": 0.5}, {"iou": 10.0})
        assert merge_train_results(trained, [trained.row()]) is trained
        assert merge_eval_results(tested, [tested.row()]) is tested

    def test_a_segment_continues_the_results_of_an_epoch(self) -> None:
        first = TrainResult(1.0, 3, {"iou": 0.5}, {"iou": 10.0}, 2, 5.0, 0.5)
        second = TrainResult(2.0, 1, {"iou": 0.1}, {"iou": 30.0}, 1, 1.0, 0.25)
        assert first + second == TrainResult(
            1.25, 4, {"iou": pytest.approx(0.2)}, {"iou": 40.0}, 3, 6.0, 0.75
        )
        empty = TrainResult(0.0, 0)
        assert empty + empty == empty

    @pytest.mark.parametrize("sizes", [(6, 4), (9, 1)])
    def test_classifiers_equal_an_evaluation_by_one_process(self, sizes: tuple[int, int]) -> None:
        state, data = make_state(OptimConfig()), make_data()
        whole = evaluate(state, data, "test")
        assert whole.probabilities is not None
        assert whole.labels is not None
        parts = []
        for probabilities, labels in zip(
            whole.probabilities.split(sizes), whole.labels.split(sizes), strict=True
        ):
            loss = float(F.nll_loss(probabilities.log(), labels))
            hits = accuracy(probabilities, labels)
            size = len(labels)
            parts.append(
                EvalResult(
                    *(loss, size, {"accuracy": hits}, {"accuracy": float(size)}),
                    *(probabilities, labels),
                )
            )
        rows = [part.row() for part in parts]
        for part in parts:
            merged = merge_eval_results(part, rows, classification=True)
            assert merged.loss == pytest.approx(whole.loss, rel=1e-5)
            assert (merged.samples, merged.accuracy) == (10, whole.accuracy)
            assert merged.probabilities is part.probabilities  # those of the others stay there
            assert merged.finite

    def test_accuracies_are_exact(self) -> None:
        """The weighted mean of the percentages differs from this in the last bit."""
        parts = [
            EvalResult(0.0, size, {"accuracy": 100 * (right / size)}, {"accuracy": float(size)})
            for right, size in ((0, 3), (1, 11))
        ]
        merged = merge_eval_results(parts[0], [part.row() for part in parts], classification=True)
        assert merged.accuracy == 100 * (1 / 14)

    def test_probabilities_that_are_not_finite_in_one_replica(self) -> None:
        parts = [
            EvalResult(0.0, 2, {"accuracy": 50.0}, {"accuracy": 2.0}, finite=finite)
            for finite in (True, False)
        ]
        assert not merge_eval_results(
            parts[0], [part.row() for part in parts], classification=True
        ).finite


def test_too_many_probabilities_are_not_kept() -> None:
    state, data = make_state(OptimConfig()), make_data()
    kept = evaluate(state, data, "test", max_numbers=40)
    assert kept.probabilities is not None
    found = evaluate(state, data, "test", max_numbers=39)
    assert found.probabilities is None
    assert found.labels is None
    assert (found.loss, found.samples, found.accuracy) == (kept.loss, 10, kept.accuracy)


@pytest.mark.parametrize("chunk", [1, 40, 1000])
def test_probabilities_leave_the_device_in_chunks(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, data = make_state(OptimConfig()), make_data(batch_size=3)
    whole = evaluate(state, data, "test").probabilities
    monkeypatch.setattr("dist_graft.training.step.ENSEMBLE_CHUNK", chunk)
    found = evaluate(state, data, "test").probabilities
    assert whole is not None
    assert found is not None
    assert torch.equal(whole, found)


@pytest.mark.parametrize("chunk", [1, 40, 99, 100])
def test_many_probabilities_are_in_a_file(
    chunk: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    state, data = make_state(OptimConfig()), make_data(batch_size=3)
    whole = evaluate(state, data, "test").probabilities
    monkeypatch.setattr("dist_graft.training.step.ENSEMBLE_CHUNK", chunk)
    found = evaluate(state, data, "test", spool=tmp_path).probabilities
    assert whole is not None
    assert found is not None
    assert torch.equal(whole, found)
    mapped = any(str(tmp_path) in line for line in Path("/proc/self/maps").read_text().splitlines())
    assert mapped == (chunk < whole.numel())
    assert not list(tmp_path.iterdir()), "a crash would leave a file"


def test_a_folder_that_cannot_hold_the_probabilities(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("dist_graft.training.step.ENSEMBLE_CHUNK", 10)
    (tmp_path / "file").touch()
    with pytest.raises(RunDirectoryError, match="cannot hold the predictions on the test images"):
        evaluate(make_state(OptimConfig()), make_data(), "test", spool=tmp_path / "file")


def test_running_sums_of_custom_metrics() -> None:
    task = Task(
        lambda output, target: (output - target).square().mean(),
        {
            "distance": lambda output, target: ((output - target).abs().sum(), len(target)),
            "above": lambda output, _: (float((output > 1).sum()), 2.0),
        },
    )
    sums = RunningSums(task, CPU)
    for output, target in (([1.0, 2.0], [0.0, 0.0]), ([4.0], [1.0])):
        values = torch.tensor(output), torch.tensor(target)
        sums.add(task.loss(*values), *values)
    found = sums.result(steps=2, seconds=1.0, data_seconds=0.5)
    assert found.loss == pytest.approx((1 + 4 + 9) / 3)
    assert found.metrics == {"distance": 2.0, "above": 0.5}
    assert found.counts == {"distance": 3.0, "above": 4.0}
    empty = RunningSums(task, CPU).result(steps=0, seconds=1.0, data_seconds=0.0)
    assert (empty.loss, empty.samples) == (0.0, 0)
    assert empty.metrics == {"distance": 0.0, "above": 0.0}


class TestMixedImages:
    """data.mixup and data.cutmix: targets are probabilities."""

    def test_the_loss_is_the_cross_entropy_with_probabilities(self) -> None:
        torch.manual_seed(0)
        logits, probabilities = torch.randn(6, 4), torch.rand(6, 4).softmax(1)
        smooth = 0.9 * probabilities + 0.1 / 4
        expected = -(smooth * logits.log_softmax(1)).sum(1).mean()
        found = classification(label_smoothing=0.1).mean_loss(logits, probabilities)
        torch.testing.assert_close(found, expected)

    def test_accuracy_is_that_of_the_dominant_class(self) -> None:
        probabilities = torch.tensor([[0.6, 0.4], [0.3, 0.7], [1.0, 0.0]])
        scores = torch.tensor([[2.0, 1.0], [2.0, 1.0], [0.0, 1.0]])
        total, count = classification().metrics["accuracy"](scores, probabilities)
        assert float(total) / count == pytest.approx(100 / 3)

    def test_an_epoch_equals_the_loop_over_its_batches(self) -> None:
        config = OptimConfig(accumulation=2, label_smoothing=0.1)
        data, state, other = make_data(mixup=1.0, cutmix=1.0), make_state(config), small_model()
        optimizer = torch.optim.SGD(
            other.parameters(), lr=0.1, momentum=0.9, weight_decay=config.weight_decay
        )
        losses, right = 0.0, 0
        for inputs, targets in data.train_batches(1, 0, 4):
            output = other(inputs)
            loss = F.cross_entropy(output, targets, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses += float(loss.detach()) * len(targets)
            right += int((output.argmax(1) == targets.argmax(1)).sum())
        result = train_steps(state, data, config, epoch=1, first=0, last=4)
        for parameter, expected in zip(state.model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(parameter, expected)
        assert result.loss == pytest.approx(losses / 29)
        assert result.metrics["accuracy"] == pytest.approx(100 * right / 29)
        assert result.samples == 29


@pytest.mark.parametrize("decay", [0.9, 0.9999])
def test_a_moving_average_copies_integers(decay: float) -> None:
    """Indices must remain valid: torch would round their average down."""
    model = nn.BatchNorm1d(2)
    model.register_buffer("table", torch.arange(169))
    average = moving_average(model, decay)
    for number in range(3):
        with torch.no_grad():
            model.weight.fill_(number)
        assert model.num_batches_tracked is not None
        model.num_batches_tracked.fill_(number)
        average.update_parameters(model)
    assert torch.equal(average.module.get_buffer("table"), torch.arange(169))
    assert average.module.get_buffer("num_batches_tracked") == 2
    expected = torch.zeros(2)  # the first update copies
    for number in (1, 2):
        expected = expected.lerp(torch.full((2,), float(number)), 1 - decay)
    assert torch.equal(average.module.get_parameter("weight"), expected)
