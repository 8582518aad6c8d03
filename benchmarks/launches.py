"""Operations, host reads and synchronizations of one round on an accelerator, counted without one.

The network's tensors are wrapped: they report the device cuda:0, are computed on the CPU, and count
what is done with them. So a round takes the accelerators' branch everywhere, on real values. The
process group is torch's fake one: this process is rank 0 of K, and receives its own data.

- operations: everything the host enqueues for the device that is not a view or an allocation:
  kernels, copies from host memory, collectives. A multi-tensor operation (_foreach_*) counts once,
  although CUDA launches several kernels for many or large tensors.
- reads: the host waits for a result of the device (copies to host memory, .item()).
- syncs: reads, plus copies from host memory that block, operations whose result size depends on the
  data, and explicit synchronization; without the last one of a round.

Operations on host memory (headers, coefficients, random draws) are not counted.

    python benchmarks/launches.py
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from reporting import machine, verdict
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from dist_graft import Average, Graft, Grafter, GraftRecord, Papa, Rule, Wash
from dist_graft.config import ModelConfig
from dist_graft.printing import format_table
from dist_graft.training.models import build_model

DEVICE = torch.device("cuda", 0)
RULES: dict[str, Callable[[], Rule]] = {
    "graft": Graft,
    "average": Average,
    "papa": Papa,
    "wash": Wash,
}
MODELS = {"resnet20": "conv", "resnet50": "conv", "vit_b_16": "conv+linear"}
TARGETS = {"graft": 700, "average": 120, "papa": 120, "wash": 200}
"""Largest number of operations for ResNet-50."""
READS_TARGET = 4
ALLOCATIONS = ("empty", "empty_strided", "empty_like", "new_empty", "detach", "lift_fresh", "alias")
DATA_DEPENDENT = ("bincount", "nonzero", "masked_select", "unique2", "equal", "is_nonzero")


class OnDevice(Tensor):
    """Tensor that reports the device DEVICE; its values are in the CPU tensor `host`."""

    host: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> OnDevice:
        """Wrap a CPU tensor, which shares its memory."""
        wrapped: OnDevice = Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device="meta",  # C++ would set up a real device
        )
        wrapped.host = values
        return wrapped

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE

    def tolist(self) -> Any:
        return self.cpu().tolist()  # as for a tensor on a device

    @classmethod
    def __torch_dispatch__(cls, function: Any, *_: Any, **__: Any) -> Any:
        raise RuntimeError(f"{function} outside of Counting")


@dataclass
class Counts:
    """What one rank asks of its device in one round."""

    operations: int
    reads: int
    syncs: int


class Counting(TorchDispatchMode):
    """Computes on the host tensors of OnDevice tensors, and counts operations and waits by name."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.reads: Counter[str] = Counter()
        self.blocking: Counter[str] = Counter()

    def counts(self) -> Counts:
        reads = self.reads.total()
        return Counts(self.operations.total(), reads, reads + self.blocking.total())

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        flat = tree_flatten((args, kwargs))[0]
        inputs = [each for each in flat if isinstance(each, Tensor)]
        given = any(isinstance(each, OnDevice) for each in inputs)
        target = kwargs.get("device")
        gives = given if target is None else torch.device(target).type != "cpu"
        if target is not None:
            kwargs["device"] = "cpu"
        self._count(function, args, kwargs, given=given, gives=gives)
        args, kwargs = tree_map(_values, (args, kwargs))
        return tree_map(_wrapped, function(*args, **kwargs)) if gives else function(*args, **kwargs)

    def _count(
        self, function: Any, args: Any, kwargs: dict[str, Any], *, given: bool, gives: bool
    ) -> None:
        name = function.name().partition("::")[2].partition(".")[0]
        returned = function._schema.returns
        alias = returned[0].alias_info if returned else None
        if not (given or gives) or name in ALLOCATIONS or (alias and not alias.is_write):
            return
        to_host = given and not gives
        from_host = gives and not given
        if name == "copy_":
            to_host = not isinstance(args[0], OnDevice)
            from_host = not isinstance(args[1], OnDevice)
        masks = name == "index" and any(
            each is not None and each.dtype in (torch.bool, torch.uint8) for each in args[1]
        )
        self.operations[name] += 1
        if to_host or name in ("_local_scalar_dense", "equal"):
            self.reads[name] += 1
        elif name in DATA_DEPENDENT or masks:
            self.blocking[name] += 1
        elif from_host and name in ("_to_copy", "copy_"):
            waits = not (kwargs.get("non_blocking") or (name == "copy_" and args[2:] == (True,)))
            self.blocking[f"{name} from host"] += waits


def _values(each: Any) -> Any:
    return each.host if isinstance(each, OnDevice) else each


def _wrapped(each: Any) -> Any:
    return OnDevice(each) if isinstance(each, Tensor) else each


class Event:
    """Replaces torch.Event; nothing takes time on the pretended device."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass  # after the last read of the round the device is idle

    def query(self) -> bool:
        return True  # the host waits for the device where it reads, and those reads are counted

    def elapsed_time(self, end: Event) -> float:
        del end
        return 0.0


def move_(model: nn.Module) -> None:
    """Wrap all parameters and buffers of a module on the CPU."""
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[key] = nn.Parameter(OnDevice(parameter.detach()))
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = OnDevice(buffer)


@contextmanager
def pretended_group(networks: int) -> Iterator[None]:
    """Join a group of which only this rank exists; CUDA is never initialized."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=networks)
    try:
        with mock.patch("torch.cuda._lazy_init"), mock.patch("torch.Event", Event):
            yield
    finally:
        dist.destroy_process_group()


def count_round(
    rule: Rule, model: nn.Module, lead: Any, networks: int, **options: Any
) -> tuple[Counting, GraftRecord]:
    """Run one round of a model on the CPU, which is moved to the pretended device."""
    with pretended_group(networks), Counting() as counting:
        move_(model)
        grafter = Grafter(model, rule=rule, lead=lead, **options)
        for each in (counting.operations, counting.reads, counting.blocking):
            each.clear()
        record = grafter.graft()
    return counting, record


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", type=int, default=4)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--exact", action="store_true", help="with deterministic algorithms")
    parser.add_argument("--names", action="store_true", help="also count by operation")
    options = parser.parse_args()
    torch.use_deterministic_algorithms(options.exact)

    print(machine())
    print(
        f"one rank of {options.networks}, all_gather, buckets of 32 MiB; a _foreach_* operation "
        "counts once, although CUDA launches several kernels for many tensors"
    )
    rows: list[tuple[str, ...]] = []
    lines: list[dict[str, Any]] = []
    verdicts: list[str] = []
    for name in options.models:
        for rule in options.rules:
            model = build_model(ModelConfig(name=name), num_classes=1000, channels=3)
            counting, _ = count_round(RULES[rule](), model, MODELS[name], options.networks)
            counts = counting.counts()
            rows.append((name, rule, *map(str, asdict(counts).values())))
            lines.append({"model": name, "rule": rule, "exact": options.exact, **asdict(counts)})
            if options.names:
                print(name, rule, dict(counting.operations), dict(counting.reads))
            if name == "resnet50":
                target = TARGETS[rule]
                what = f"{rule}, ResNet-50"
                verdicts += [
                    verdict(f"operations, {what}", [counts.operations], at_most=target),
                    verdict(f"host reads, {what}", [counts.reads], at_most=READS_TARGET),
                    verdict(
                        f"syncs other than reads, {what}", [counts.syncs - counts.reads], at_most=0
                    ),
                ]
    print(format_table(("model", "rule", "operations", "reads", "syncs"), rows))
    print("\n".join(map(json.dumps, lines)))
    print("\n".join(verdicts))


if __name__ == "__main__":
    main()
