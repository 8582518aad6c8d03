"""Versions of the package and of what it runs on. Importing this does not import torch."""

from __future__ import annotations

import platform

VERSION = "0.1.0"


def versions() -> dict[str, str]:
    """Versions of this package, torch, Python, CUDA and NCCL.

    Imports torch. The value is "none" for CUDA or NCCL if torch was built without it.
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
