"""A training process in which one network fails at one step, in a way that is asked for.

    python faulty.py WAY NETWORK STEP ... -- train --run_dir RUN ...

The steps are counted over the process's whole life. A checkpoint set that is being written beside
them is waited for first; `lose` is a `kill` at the first step from that one on at which there is a
complete set, and holds up nobody. A file beside the run directory remembers that a fault happened,
so that processes that are started again live on.
"""

from __future__ import annotations

import math
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from dist_graft.__main__ import main

SLOW_SECONDS = 0.3
SET_SECONDS = 60.0


def fail(way: str, optimizer: torch.optim.Optimizer, run: Path) -> None:
    """Do to this process what the way says."""
    if way == "raise":
        raise RuntimeError("injected")
    if way in ("kill", "lose"):
        os.kill(os.getpid(), signal.SIGKILL)
    if way == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if way == "vanish":
        run.rename(run.with_name("vanished"))
    if way == "exit":
        os._exit(3)
    if way in ("nan", "all-nan"):
        with torch.no_grad():
            next(iter(optimizer.param_groups[0]["params"])).fill_(math.nan)
    if way == "full":  # every file that grows past this size is refused, as by a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    if way == "space":
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)


def wait_for_set() -> None:
    """Until the set under way is complete or has failed, for all that this process knows."""
    for thread in threading.enumerate():
        if thread.name.startswith("checkpoint "):
            thread.join(SET_SECONDS)
            assert not thread.is_alive(), f"nothing became of {thread.name}"


def comes(way: str, steps: int, step: int, run: Path) -> bool:
    """Whether the fault is to happen after so many steps."""
    if way == "lose":
        return steps >= step and any(run.glob("checkpoints/*/COMPLETE.json"))
    if steps == step:
        wait_for_set()
    return steps == step


def inject(way: str, network: int, step: int, run: Path, once: Path) -> None:
    """Have the fault happen after a step of this process, if it trains that network."""
    if int(os.environ.get("RANK", "0")) != network:
        return
    steps = 0

    def after_step(optimizer: torch.optim.Optimizer, *_: object) -> None:
        nonlocal steps
        steps += 1
        if way == "slow":
            time.sleep(SLOW_SECONDS)
        elif not once.exists() and comes(way, steps, step, run):
            once.touch()
            fail(way, optimizer, run)

    register_optimizer_step_post_hook(after_step)


if __name__ == "__main__":
    split = sys.argv.index("--")
    faults, arguments = sys.argv[1:split], sys.argv[split + 1 :]
    run = Path(arguments[arguments.index("--run_dir") + 1])
    for number in range(0, len(faults), 3):
        way, network, step = faults[number : number + 3]
        once = run.with_name(f"{run.name}.{way}{number}")
        inject(way, int(network), int(step), run, once)
    sys.argv[1:] = arguments
    sys.exit(main())
