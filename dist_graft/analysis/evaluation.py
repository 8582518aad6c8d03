"""Accuracies of a run's networks, their mean, their ensemble and their soups."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from dist_graft.analysis.averages import evaluate_averages
from dist_graft.analysis.soups import greedy_soup, reestimate_batch_norm, uniform_soup
from dist_graft.analysis.stored_weights import State, StoredRun, load_state, open_run
from dist_graft.command import Options
from dist_graft.config import TrainConfig
from dist_graft.errors import ConfigError
from dist_graft.population.runtime.process_group import start
from dist_graft.population.runtime.process_info import ProcessInfo
from dist_graft.run_directory import write_atomically
from dist_graft.training.data import ImageData, ensure_available, load_data
from dist_graft.training.learning_rates import learning_rates
from dist_graft.training.models import build_model
from dist_graft.training.state import Predictor, compiled, uses_cuda_graphs
from dist_graft.training.step import EvalResult, evaluate
from dist_graft.training.task import accuracy

PROTOCOL = 1
"""Version of evaluation.json."""


def evaluate_run(options: Options) -> dict[str, Any]:
    """Test the networks of a run one at a time and write RUN/evaluation.json.

    Args: options: of ``dist-graft evaluate``.
    Returns: content of evaluation.json.
    Raises: DistGraftError.
    """
    stored = open_run(Path(options["run"]), options["checkpoint"])
    stored.require_configured("model", "data", "loss", "metrics")
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
    states = list(stored.states())
    try:
        with tqdm(desc="evaluating", unit=" passes", leave=False, disable=None) as bar:
            batches = options["batch_norm_batches"]
            evaluator = _Evaluator(config, data, runtime.device, stored, batches, bar)
            result = _evaluate(stored, states, evaluator)
            result["averages"] = evaluate_averages(
                stored,
                states,
                evaluator,
                splits=("test", "val") if data.has_validation else ("test",),
                soup_test_accuracy=result["uniform_soup"]["batch_norm_reestimated"],
                last_checkpoints=options["last_checkpoints"],
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
            model.to(memory_format=torch.channels_last)
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

    def evaluate_soup(self, state: State) -> dict[str, float]:
        """Test accuracies of a soup, in percent."""
        return {
            "batch_norm_as_is": self.evaluate(state, "test").accuracy,
            "batch_norm_reestimated": self.evaluate(state, "test", reestimated=True).accuracy,
        }


def _evaluate(stored: StoredRun, states: Sequence[State], evaluator: _Evaluator) -> dict[str, Any]:
    """Content of evaluation.json."""
    rates = learning_rates(stored.config.optim, stored.population)
    tested, ensemble = _test_members(states, evaluator)
    reestimated, ensemble_reestimated = _test_members(states, evaluator, reestimated=True)
    validated: list[float] = []
    if evaluator.data.has_validation:
        validated = [evaluator.evaluate(state, "val").accuracy for state in states]
    uniform = evaluator.evaluate_soup(uniform_soup(states))
    greedy: dict[str, Any] | None = None
    if validated:

        def validation_accuracy(soup: dict[str, Tensor]) -> float:
            return evaluator.evaluate(soup, "val").accuracy

        members = greedy_soup(states, validated, validation_accuracy)
        soup = uniform_soup([states[member] for member in sorted(members)])
        numbers = [stored.networks[member] for member in members]
        greedy = {"members": numbers, **evaluator.evaluate_soup(soup)}
    return {
        "protocol": PROTOCOL,
        "run_dir": str(stored.path),
        "epoch": stored.checkpoint.epoch,
        "round": stored.checkpoint.round,
        "members": [
            {
                "network": network,
                "epoch": stored.members[network].epoch,
                "lr": rates[network],
                "test_accuracy": result.accuracy,
                "test_accuracy_reestimated": reestimated[index].accuracy,
                "test_loss": result.loss if math.isfinite(result.loss) else None,
                "val_accuracy": validated[index] if validated else None,
            }
            for index, (network, result) in enumerate(zip(stored.networks, tested, strict=True))
        ],
        "mean_test_accuracy": statistics.fmean(result.accuracy for result in tested),
        "mean_test_accuracy_reestimated": statistics.fmean(r.accuracy for r in reestimated),
        "ensemble_test_accuracy": ensemble,
        "ensemble_test_accuracy_reestimated": ensemble_reestimated,
        "uniform_soup": uniform,
        "greedy_soup": greedy,
    }


def _test_members(
    states: Sequence[State], evaluator: _Evaluator, *, reestimated: bool = False
) -> tuple[list[EvalResult], float]:
    """Test results of each network, and the accuracy of their mean probability in percent.

    Only the sum of their probabilities is kept.
    """
    results: list[EvalResult] = []
    total: Tensor | None = None
    for state in states:
        result = evaluator.evaluate(state, "test", reestimated=reestimated)
        assert result.probabilities is not None
        assert result.labels is not None
        total = result.probabilities if total is None else total.add_(result.probabilities)
        results.append(replace(result, probabilities=None))
    assert total is not None
    assert result.labels is not None
    return results, accuracy(total, result.labels)
