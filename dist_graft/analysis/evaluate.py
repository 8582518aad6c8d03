"""How good a run's networks are: each, their mean, their ensemble, their soups."""

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

from dist_graft.analysis.batch_norm import reestimate
from dist_graft.analysis.soups import greedy_soup, uniform_soup
from dist_graft.analysis.stored_run import State, StoredRun, fill, open_run
from dist_graft.config import TrainConfig
from dist_graft.errors import ConfigError
from dist_graft.monitoring.console import table
from dist_graft.population.runtime.process_group import start
from dist_graft.population.runtime.process_info import ProcessInfo
from dist_graft.training.checkpoint.files import write_atomically
from dist_graft.training.data import ImageData, ensure_available, load_data
from dist_graft.training.learning_rates import learning_rates
from dist_graft.training.loop import EvalResult, Precision, Predictor, accuracy, evaluate
from dist_graft.training.models import build_model

PROTOCOL = 1
NO_GREEDY_SOUP = (
    "no greedy soup: the run keeps no validation split (data.val_fraction is 0), and nothing is "
    "chosen on the test set"
)


def evaluate_run(
    run: str,
    *,
    checkpoint: str | None = None,
    data_root: str | None = None,
    device: str | None = None,
    precision: Precision | None = None,
    batch_size: int | None = None,
    batch_norm_batches: int | None = None,
) -> str:
    """Test the networks of a run, one after the other, and write RUN/evaluation.json.

    Args:
        run: the run directory.
        checkpoint: name of a set; None: the newest complete one.
        data_root: folder of the data sets, instead of the run's.
        device: auto, cpu, cuda or cuda:N, instead of the run's.
        precision: of the forward passes, instead of the run's.
        batch_size: images at once (and in a batch of re-estimation), instead of the run's.
        batch_norm_batches: training batches that batch norm is re-estimated on; None: all of an
            epoch.

    Returns: the results as a table.

    Raises: a DistGraftError whose text says what to do.
    """
    stored = open_run(Path(run), checkpoint)
    config = stored.config
    data_config = replace(
        config.data,
        root=data_root or config.data.root,
        batch_size=batch_size or config.data.batch_size,
    )
    runtime_config = replace(
        config.runtime,
        device=device or config.runtime.device,
        precision=precision or config.runtime.precision,
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
            tester = _Tester(config, data, runtime.device, stored, batch_norm_batches, bar)
            result = _evaluate(stored, states, tester)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"out of GPU memory ({str(error).splitlines()[0]}): lower --batch_size"
        ) from error
    path = stored.path / "evaluation.json"
    write_atomically(path, (json.dumps(result, indent=1) + "\n").encode())
    return f"{evaluation_text(result)}\nwritten: {path}"


class _Tester:
    """One module on the device, into which one network's weights are put after the other's."""

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
            forward=torch.compile(model) if config.runtime.compile else model,
            precision=config.runtime.precision,
            device=device,
        )
        self.data = data
        self._source = stored.checkpoint.path
        self._bar = bar
        self._batches = min(batch_norm_batches or data.steps_per_epoch, data.steps_per_epoch)

    def member(
        self, state: State, split: Literal["test", "val"], *, anew: bool = False
    ) -> EvalResult:
        """How good the weights are on a split, with batch norm as it is or estimated anew."""
        fill(self._predictor.model, state, self._source)
        if anew:
            reestimate(self._predictor, self.data.train_batches(0, 0, self._batches))
        result = evaluate(self._predictor, self.data, split)
        self._bar.update()
        return result

    def soup(self, state: State) -> dict[str, float]:
        """Test accuracy of a soup, with batch norm as it is and estimated anew."""
        return {
            "batch_norm_as_is": self.member(state, "test").accuracy,
            "batch_norm_reestimated": self.member(state, "test", anew=True).accuracy,
        }


def _evaluate(stored: StoredRun, states: Sequence[State], tester: _Tester) -> dict[str, Any]:
    rates = learning_rates(stored.config.optim, len(states))
    tested = [tester.member(state, "test") for state in states]
    anew = [tester.member(state, "test", anew=True) for state in states]
    validated: list[float] = []
    if tester.data.has_validation:
        validated = [tester.member(state, "val").accuracy for state in states]
    uniform = tester.soup(uniform_soup(states))
    greedy: dict[str, Any] | None = None
    if validated:

        def on_validation(soup: dict[str, Tensor]) -> float:
            return tester.member(soup, "val").accuracy

        members = greedy_soup(states, validated, on_validation)
        soup = uniform_soup([states[member] for member in sorted(members)])
        greedy = {"members": members, **tester.soup(soup)}
    return {
        "protocol": PROTOCOL,
        "run_dir": str(stored.path),
        "epoch": stored.checkpoint.epoch,
        "round": stored.checkpoint.round,
        "members": [
            {
                "network": network,
                "lr": rates[network],
                "test_accuracy": result.accuracy,
                "test_accuracy_reestimated": anew[network].accuracy,
                "test_loss": result.loss if math.isfinite(result.loss) else None,
                "val_accuracy": validated[network] if validated else None,
            }
            for network, result in enumerate(tested)
        ],
        "mean_test_accuracy": statistics.fmean(result.accuracy for result in tested),
        "mean_test_accuracy_reestimated": statistics.fmean(result.accuracy for result in anew),
        "ensemble_test_accuracy": ensemble_accuracy(tested),
        "ensemble_test_accuracy_reestimated": ensemble_accuracy(anew),
        "uniform_soup": uniform,
        "greedy_soup": greedy,
    }


def ensemble_accuracy(members: Sequence[EvalResult]) -> float:
    """Percent that the members' mean probability gets right."""
    total = members[0].probabilities.clone()
    for member in members[1:]:
        total += member.probabilities
    return accuracy(total, members[0].labels)


def evaluation_text(result: dict[str, Any]) -> str:
    """What evaluation.json holds, as a table."""
    header = (
        f"{result['run_dir']}, epoch {result['epoch']}",
        "test %",
        "batch norm re-estimated %",
        "test loss",
        "validation %",
    )
    rows = [
        (
            f"network {member['network']} (lr {member['lr']:.4g})",
            f"{member['test_accuracy']:.2f}",
            f"{member['test_accuracy_reestimated']:.2f}",
            "-" if member["test_loss"] is None else f"{member['test_loss']:.4f}",
            "-" if member["val_accuracy"] is None else f"{member['val_accuracy']:.2f}",
        )
        for member in result["members"]
    ]
    greedy = result["greedy_soup"]
    others = [
        (name, result[f"{name}_test_accuracy"], result[f"{name}_test_accuracy_reestimated"])
        for name in ("mean", "ensemble")
    ]
    soups = {"uniform soup": result["uniform_soup"]}
    if greedy:
        soups[f"greedy soup of {'+'.join(map(str, greedy['members']))}"] = greedy
    others += [
        (name, soup["batch_norm_as_is"], soup["batch_norm_reestimated"])
        for name, soup in soups.items()
    ]
    rows += [(name, f"{as_is:.2f}", f"{anew:.2f}", "", "") for name, as_is, anew in others]
    text = table(header, rows)
    return text if greedy else f"{text}\n{NO_GREEDY_SOUP}"
