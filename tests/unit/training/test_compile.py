"""Compiled networks: which graphs there are does not depend on the order of the calls."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from reading import assert_same_bits, checkpoint, optimizer_tensors
from runs import EPOCHS, REGRESSION, StopAfter, config_of
from small import make_data, make_runtime, make_state, small_model, train_steps
from torch import Tensor, fx

from dist_graft.config import ModelConfig, OptimConfig, RuntimeConfig, TrainConfig
from dist_graft.errors import ConfigError, StoppedEarlyError
from dist_graft.training.builders import build_state
from dist_graft.training.state import compiled, uses_cuda_graphs
from dist_graft.training.step import evaluate


class Backend:
    """Records the batch size of each graph. A graph for all batch sizes gives other numbers."""

    def __init__(self) -> None:
        self.sizes: list[int | torch.SymInt] = []

    def __call__(self, graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        tensors = (value for value in inputs if isinstance(value, Tensor))
        # Weights are at most 3 wide, images are wider.
        images = next(value for value in tensors if value.dim() == 4 and value.shape[-1] > 3)
        self.sizes.append(images.shape[0])
        if isinstance(images.shape[0], int):
            return graph.forward
        return lambda *arguments: [output * 1.01 for output in graph.forward(*arguments)]


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """Compile with a backend that takes no time."""
    backend = Backend()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    yield backend
    torch._dynamo.reset()


CALLS = [(True, 6), (True, 4), (False, 6), (False, 3)]


@pytest.mark.parametrize("order", [CALLS, CALLS[::-1], [CALLS[i] for i in (3, 0, 2, 1)]])
def test_each_batch_size_has_its_own_graph_in_any_order(
    order: list[tuple[bool, int]], backend: Backend
) -> None:
    model = small_model(batch_norm=True)
    forward = compiled(model, True)
    for training, size in itertools.chain(order, order):
        model.train(training)
        with torch.set_grad_enabled(training):
            forward(torch.randn(size, 1, 8, 8))
    assert backend.sizes == [size for _, size in order]


def test_more_batch_sizes_than_torch_compiles_by_default(backend: Backend) -> None:
    forward = compiled(small_model(), True)
    for size in range(2, 12):
        forward(torch.randn(size, 1, 8, 8))
    assert backend.sizes == list(range(2, 12))


def test_a_run_that_resumes_before_an_evaluation_uses_the_same_graphs(
    tmp_path: Path, backend: Backend
) -> None:
    """Its first graph is the evaluation's, and not that of a training batch."""
    whole, stopped = (
        replace(config, runtime=replace(config.runtime, compile=True))
        for config in (config_of(tmp_path / "whole"), config_of(tmp_path / "stopped"))
    )
    REGRESSION.trainer(whole).fit()
    straight = list(backend.sizes)
    assert straight == [6, 4, 6, 4]  # training and test batches; the last ones are smaller

    torch._dynamo.reset()
    last = 4  # step of the epoch
    with pytest.raises(StoppedEarlyError):
        REGRESSION.trainer(stopped, StopAfter(last)).fit()
    torch._dynamo.reset()
    backend.sizes.clear()
    trainer = REGRESSION.trainer(stopped)
    trainer.fit()
    assert trainer.resumed_from is not None
    assert backend.sizes == straight
    first, second = (checkpoint(tmp_path / name, EPOCHS, 0) for name in ("whole", "stopped"))
    assert_same_bits(first["model"], second["model"])
    assert_same_bits(optimizer_tensors(first), optimizer_tensors(second))


def test_a_compiler_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Any:
        raise RuntimeError("C++ compile error" + 1000 * "\n a line of the compiler")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=fail))
    config = config_of(tmp_path / "run")
    config = replace(config, runtime=replace(config.runtime, compile=True))
    with pytest.raises(ConfigError, match=r"compile failed \(.*C\+\+ compile error") as caught:
        REGRESSION.trainer(config).fit()
    assert "runtime.compile false" in str(caught.value)
    assert len(str(caught.value)) < 400
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("option", "mode", "graphs"),
    [
        (False, "not compiled", False),
        (True, None, False),
        ("reduce-overhead", "reduce-overhead", True),
        ("max-autotune", "max-autotune", True),
    ],
)
def test_modes(
    option: Any, mode: str | None, graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(torch, "compile", lambda model, **options: calls.append(options) or model)
    runtime = RuntimeConfig(compile=option)
    config = TrainConfig(model=ModelConfig(name="resnet20"), runtime=runtime)
    state = build_state(config, make_data(), make_runtime(), lr=0.1)
    assert calls == ([{"dynamic": False, "mode": mode}] if option else [])
    assert not state.cuda_graphs
    assert uses_cuda_graphs(option, torch.device("cuda", 0)) is graphs


def test_modes_that_choose_kernels_by_speed_are_not_deterministic() -> None:
    RuntimeConfig(deterministic=True, compile="reduce-overhead")
    with pytest.raises(ConfigError, match=r"runtime\.compile max-autotune"):
        RuntimeConfig(deterministic=True, compile="max-autotune")


def test_cuda_graphs_begin_a_step_per_batch_and_not_per_chunk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The chunks of an accumulated batch belong to one step: their gradients add up."""
    calls: list[str] = []
    begin = "torch.compiler.cudagraph_mark_step_begin"
    monkeypatch.setattr(begin, lambda: calls.append("step"))
    config, data = OptimConfig(accumulation=3), make_data()
    state = make_state(config)
    train_steps(state, data, config, epoch=0, first=0, last=2)
    assert calls == []
    state.cuda_graphs = True
    train_steps(state, data, config, epoch=0, first=0, last=2)
    assert calls == ["step"] * 2
    evaluate(state, data, "test")
    assert calls == ["step"] * (2 + len(list(data.eval_batches("test"))))
