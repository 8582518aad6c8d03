"""The versions that a run's numbers depend on; importing this imports nothing heavy."""

from __future__ import annotations

import platform

VERSION = "0.1.0"


def versions() -> dict[str, str]:
    """Of this package, Python, torch, and the CUDA and NCCL that torch was built with.

    Imports torch. What torch was built without is "none".
    """
    import torch

    with_nccl = hasattr(torch._C, "_nccl_version")
    return {
        "dist_graft": VERSION,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "cuda": torch.version.cuda or "none",
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if with_nccl else "none",
    }
