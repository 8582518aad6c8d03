"""Accuracy and calibration of a run's networks, ensemble and soups, and how the networks differ."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from tqdm import tqdm

from dist_graft.analysis.averages import (
    evaluate_averages,
    last_checkpoints,
    mean_or_none,
    score,
    score_ensemble,
)
from dist_graft.analysis.evaluate import EVALUATION_FORMAT
from dist_graft.analysis.soups import greedy_soup, reestimate_batch_norm, uniform_soup
from dist_graft.analysis.stored_weights import StoredRun, load_state, open_run
from dist_graft.command import Options
from dist_graft.config import TrainConfig
from dist_graft.errors import ConfigError
from dist_graft.population.runtime.process_group import start
from dist_graft.population.runtime.process_info import ProcessInfo
from dist_graft.run_directory import RunDirectory, write_atomically
from dist_graft.training.checkpoint.last_round import load_weights_before
from dist_graft.training.classes import refuse_other_classes
from dist_graft.training.data import ImageData, ensure_available, load_data
from dist_graft.training.learning_rates import initial_rates
from dist_graft.training.models import build_model, to_channels_last
from dist_graft.training.state import Predictor, compiled, uses_cuda_graphs
from dist_graft.training.step import EvalResult, evaluate
from dist_graft.training.weights import State

BARRIER_POSITIONS = (0.25, 0.5, 0.75)
"""Positions on the line between two networks at which the loss is measured."""
BARRIER_IMAGES = 2048
"""Training images that the losses of a barrier are measured on, rounded up to whole batches."""


def evaluate_run(options: Options) -> dict[str, Any]:
    """Test the networks of a run one at a time and write RUN/evaluation.json.

    Args: options: of ``dist-graft evaluate``.
    Returns: content of evaluation.json.
    Raises: DistGraftError.
    """
    stored = open_run(Path(options["run"]), options["checkpoint"])
    stored.require_configured("model", "data", "loss", "metrics")
    checkpoints = last_checkpoints(stored, options["last_checkpoints"])
    config = stored.config
    data_config = replace(
        config.data,
        root=options["data"]["root"] or config.data.root,
        batch_size=options["batch_size"] or config.data.batch_size,
    )
    runtime_config = replace(
        config.runtime,
        device=options["device"] or config.runtime.device,
        precision=options["precision"] or config.runtime.precision,
        backend="auto",
    )
    config = replace(config, data=data_config, runtime=runtime_config)
    runtime = start(runtime_config, ProcessInfo())
    ensure_available(data_config)
    data = load_data(
        data_config,
        seed=config.seed,
        network=0,
        device=runtime.device,
        channels_last=runtime_config.channels_last,
    )
    refuse_other_classes(RunDirectory(stored.path), data, data_config.root)
    states = list(stored.states())
    # Now, because a run that is still training will delete this checkpoint.
    moving = [stored.averaged_state(network) for network in stored.networks]
    try:
        with tqdm(desc="evaluating", unit=" passes", leave=False, disable=None) as bar:
            batches = options["batch_norm_batches"]
            evaluator = _Evaluator(config, data, runtime.device, stored, batches, bar)
            result = _evaluate(stored, states, evaluator)
            result["averages"] = evaluate_averages(
                stored,
                states,
                partial(evaluator.evaluate, reestimated=True),
                moving=moving,
                splits=("test", "val") if data.has_validation else ("test",),
                soup={
                    "test_accuracy": result["uniform_soup"]["batch_norm_reestimated"],
                    "test_loss": result["uniform_soup"]["test_loss"],
                    "test_calibration_error": result["uniform_soup"]["test_calibration_error"],
                },
                checkpoints=checkpoints,
            )
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"out of GPU memory ({str(error).splitlines()[0]}): lower --batch_size"
        ) from error
    content = (json.dumps(result, indent=1) + "\n").encode()
    write_atomically(stored.path / "evaluation.json", content)
    return result


class _Evaluator:
    """Evaluates networks in turn with one module on the device."""

    def __init__(
        self,
        config: TrainConfig,
        data: ImageData,
        device: torch.device,
        stored: StoredRun,
        batch_norm_batches: int | None,
        bar: tqdm[Any],
    ) -> None:
        model = build_model(config.model, num_classes=data.num_classes, channels=data.channels)
        model.to(device)
        if config.runtime.channels_last:
            to_channels_last(model)
        self._predictor = Predictor(
            model=model,
            forward=compiled(model, config.runtime.compile),
            precision=config.runtime.precision,
            device=device,
            cuda_graphs=uses_cuda_graphs(config.runtime.compile, device),
        )
        self.data = data
        self._source = stored.checkpoint.path
        self._bar = bar
        self._batches = min(batch_norm_batches or data.steps_per_epoch, data.steps_per_epoch)
        needed = -(-BARRIER_IMAGES // config.data.batch_size)
        self.barrier_batches = min(needed, data.steps_per_epoch)

    def evaluate(
        self, state: State, split: Literal["test", "val"], *, reestimated: bool = False
    ) -> EvalResult:
        """Evaluate weights on a split, with stored or re-estimated batch norm statistics."""
        load_state(self._predictor.model, state, self._source)
        if reestimated:
            reestimate_batch_norm(self._predictor, self.data.train_batches(0, 0, self._batches))
        result = evaluate(self._predictor, self.data, split)
        self._bar.update()
        return result

    def evaluate_soup(self, state: State) -> dict[str, float | None]:
        """Test accuracies of a soup; loss and calibration with re-estimated statistics."""
        reestimated = score(self.evaluate(state, "test", reestimated=True))
        return {
            "batch_norm_as_is": self.evaluate(state, "test").accuracy,
            "batch_norm_reestimated": reestimated["accuracy"],
            "test_loss": reestimated["loss"],
            "test_calibration_error": reestimated["calibration_error"],
        }

    @torch.no_grad()
    def training_loss(self, state: State) -> float:
        """Loss on the first training batches, after re-estimating batch norm on them."""
        load_state(self._predictor.model, state, self._source)
        reestimate_batch_norm(self._predictor, self._barrier_data())
        total, samples = 0.0, 0
        for images, labels in self._barrier_data():
            if len(images):
                with self._predictor.autocast():
                    logits = self._predictor.model(images)
                total += float(F.cross_entropy(logits.float(), labels, reduction="sum"))
                samples += len(labels)
        self._bar.update()
        return total / max(samples, 1)

    def _barrier_data(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.data.train_batches(0, 0, self.barrier_batches)


def _evaluate(stored: StoredRun, states: Sequence[State], evaluator: _Evaluator) -> dict[str, Any]:
    """Content of evaluation.json."""
    rates = _initial_rates(stored)
    members, ensemble, predictions = _test_members(states, evaluator)
    members_reestimated, ensemble_reestimated, _ = _test_members(
        states, evaluator, reestimated=True
    )
    validated, validated_reestimated = (
        [evaluator.evaluate(state, "val", reestimated=again).accuracy for state in states]
        if evaluator.data.has_validation
        else []
        for again in (False, True)
    )
    uniform = evaluator.evaluate_soup(uniform_soup(states))
    greedy: dict[str, Any] | None = None
    if validated:

        def validation_accuracy(soup: dict[str, Tensor]) -> float:
            return evaluator.evaluate(soup, "val", reestimated=True).accuracy

        chosen = greedy_soup(states, validated_reestimated, validation_accuracy)
        soup = uniform_soup([states[member] for member in sorted(chosen)])
        numbers = [stored.networks[member] for member in chosen]
        greedy = {"members": numbers, **evaluator.evaluate_soup(soup)}
    return {
        "protocol": EVALUATION_FORMAT,
        "run_dir": str(stored.path),
        "epoch": stored.checkpoint.epoch,
        "round": stored.checkpoint.round,
        "members": [
            {
                "network": network,
                "epoch": stored.members[network].epoch,
                "lr": rates[network],
                **_both("test", members[index], members_reestimated[index]),
                "val_accuracy": validated[index] if validated else None,
                "val_accuracy_reestimated": (
                    validated_reestimated[index] if validated_reestimated else None
                ),
            }
            for index, network in enumerate(stored.networks)
        ],
        "mean_test_accuracy": statistics.fmean(scores["accuracy"] for scores in members),
        "mean_test_accuracy_reestimated": statistics.fmean(
            scores["accuracy"] for scores in members_reestimated
        ),
        **_both("ensemble_test", ensemble, ensemble_reestimated),
        "disagreement": disagreement(predictions),
        "barrier": _barrier(stored, states, evaluator),
        "barrier_before_last_round": _barrier_before(stored, evaluator),
        "uniform_soup": uniform,
        "greedy_soup": greedy,
    }


def _initial_rates(stored: StoredRun) -> Sequence[float | None]:
    """Learning rate of each network; None if the configuration is of another number of networks.

    That happens at a checkpoint from before the number was changed (resume_networks).
    """
    config, networks = stored.config, stored.population
    own = (config.optim.lrs, config.members or None)
    if any(values is not None and len(values) != networks for values in own):
        return [None] * networks
    return initial_rates(config, networks)


def _test_members(
    states: Sequence[State], evaluator: _Evaluator, *, reestimated: bool = False
) -> tuple[list[dict[str, Any]], dict[str, float | None], list[Tensor]]:
    """Test each network and their ensemble.

    Returns: scores of each network; those of the ensemble; predicted class of each test image,
        int64 [samples], of each network.
    """
    members: list[dict[str, Any]] = []
    predictions: list[Tensor] = []

    def results() -> Iterator[EvalResult]:
        for state in states:
            result = evaluator.evaluate(state, "test", reestimated=reestimated)
            assert result.probabilities is not None
            members.append(score(result))
            predictions.append(result.probabilities.argmax(1))
            yield result

    ensemble = score_ensemble(results())
    return members, ensemble, predictions


def _both(
    what: str, stored: Mapping[str, Any], reestimated: Mapping[str, Any]
) -> dict[str, float | None]:
    """Scores with stored and with re-estimated batch norm statistics, by name."""
    return {
        f"{what}_{name}{suffix}": scores[name]
        for name in stored
        for suffix, scores in (("", stored), ("_reestimated", reestimated))
    }


def disagreement(predictions: Sequence[Tensor]) -> float | None:
    """Percentage of samples on which two networks predict different classes, mean over all pairs.

    Args: predictions: int64 [samples] of each network.
    Returns: None for a single network.
    """
    pairs = list(itertools.combinations(predictions, 2))
    if not pairs:
        return None
    return 100 * statistics.fmean(float((a != b).double().mean()) for a, b in pairs)


def _barrier(
    stored: StoredRun, states: Sequence[State], evaluator: _Evaluator
) -> dict[str, Any] | None:
    """Loss barriers (Frankle et al. 2020, arXiv 1912.05671) between neighbors on the ring.

    The largest excess of the loss on the line between two networks over the line between their
    losses, at least 0. None for a single network.
    """
    count = len(states)
    if count < 2:
        return None
    neighbors = [(k - 1, k) for k in range(1, count)] + ([(count - 1, 0)] if count > 2 else [])
    ends = [evaluator.training_loss(state) for state in states]
    pairs: list[dict[str, Any]] = []
    for first, second in neighbors:
        excess = [0.0]
        for position in BARRIER_POSITIONS:
            loss = evaluator.training_loss(_between(states[first], states[second], position))
            straight = (1 - position) * ends[first] + position * ends[second]
            excess.append(loss - straight)
        barrier = max(excess) if all(map(math.isfinite, excess)) else None
        networks = [stored.networks[first], stored.networks[second]]
        pairs.append({"networks": networks, "barrier": barrier})
    return {
        "split": "train",
        "batches": evaluator.barrier_batches,
        "pairs": pairs,
        "mean": mean_or_none([pair["barrier"] for pair in pairs]),
    }


def _barrier_before(stored: StoredRun, evaluator: _Evaluator) -> dict[str, Any] | None:
    """Loss barriers just before the last round.

    None unless the run saved these weights, and the checkpoint is the one after that round.
    """
    states = [
        load_weights_before(stored.path, network, checkpoint.round - 1)
        for network, checkpoint in sorted(stored.members.items())
    ]
    known = [state for state in states if state is not None]
    return _barrier(stored, known, evaluator) if len(known) == len(states) else None


def _between(first: State, second: State, position: float) -> dict[str, Tensor]:
    """Weights on the line between two networks; integer tensors are the first network's."""
    return {
        key: torch.lerp(tensor, second[key], position) if tensor.is_floating_point() else tensor
        for key, tensor in first.items()
    }
