"""What a network is trained to make small."""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812
from torch import Tensor


def distillation_loss(logits: Tensor, teaching: Tensor, *, temperature: float) -> Tensor:
    """Mean over the images of -tau^2 sum_k p_k ln q_k (arXiv 2004.12311).

    Args:
        logits: of the student, [images, classes].
        teaching: p, mean of the teachers' probabilities softened by the same temperature, of the
            same shape; no gradient flows into it.
        temperature: tau; q is the softmax of logits / tau.

    Returns: a scalar.
    """
    student = F.log_softmax(logits.float() / temperature, dim=1)
    return -(temperature**2) * (teaching * student).sum(dim=1).mean()
