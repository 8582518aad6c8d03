"""Distillation loss."""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812
from torch import Tensor


def distillation_loss(logits: Tensor, teaching: Tensor, *, temperature: float) -> Tensor:
    """Distillation loss -tau^2 sum_k p_k ln q_k (arXiv 2004.12311).

    Args:
        logits: the student's, [batch, classes].
        teaching: p, the mean of the teachers' probabilities at the same temperature,
            [batch, classes]; receives no gradient.
        temperature: tau; q is the softmax of logits / tau.

    Returns: the mean over the batch in float32, a scalar.
    """
    student = F.log_softmax(logits.float() / temperature, dim=1)
    return -(temperature**2) * (teaching * student).sum(dim=1).mean()
