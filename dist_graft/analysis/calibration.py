"""Scores of predicted probabilities: negative log-likelihood and calibration error."""

from __future__ import annotations

import torch
from torch import Tensor

CALIBRATION_BINS = 15


def negative_log_likelihood(probabilities: Tensor, labels: Tensor) -> float:
    """Mean of −ln of the probability of the label, in nats.

    Args: probabilities: [samples, classes]. labels: [samples].
    """
    chosen = probabilities.gather(1, labels[:, None]).double()
    return float(-chosen.clamp_min(torch.finfo(torch.float32).tiny).log().mean())


def calibration_error(probabilities: Tensor, labels: Tensor) -> float:
    """Expected calibration error (Guo et al. 2017, arXiv 1706.04599, eq. 3), in percent.

    Samples are put in equal-width bins (m/M, (m + 1)/M] of their confidence, the largest
    probability. The error is the mean of |accuracy − mean confidence| over the bins, weighted by
    their samples.

    Args: probabilities: [samples, classes], each row adds up to 1. labels: [samples].
    """
    bins = CALIBRATION_BINS
    confidence, predicted = probabilities.double().max(1)
    bin_of = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gap = (predicted == labels).double() - confidence
    sums = torch.zeros(bins, dtype=torch.float64).index_add_(0, bin_of, gap)
    return 100 * float(sums.abs().sum()) / len(labels)
