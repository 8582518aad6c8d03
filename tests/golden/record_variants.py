"""Record filter_authors.npz and internal_add.npz: rounds that follow the authors' scripts in prose.

Written from the description in README.md, in numpy, without dist_graft. To record again:
python tests/golden/record_variants.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent
CHANNELS = {"0": (3, 5), "3": (5, 8), "6": (8, 4)}
"""Input and output channels of each convolution; its batch norm is the next module."""
VECTORS = ("weight", "bias", "running_mean", "running_var")
THRESHOLD = 0.1

State = dict[str, np.ndarray]


def blend(kept: float, own: np.ndarray, donor: np.ndarray) -> np.ndarray:
    return np.float32(kept) * own + np.float32(1 - kept) * donor


def network(seed: int) -> State:
    random, state = np.random.default_rng(seed), {}
    for conv, (inputs, outputs) in CHANNELS.items():
        state[f"{conv}.weight"] = random.standard_normal((outputs, inputs, 3, 3))
        for vector in VECTORS:
            state[f"{int(conv) + 1}.{vector}"] = random.standard_normal(outputs)
    return {key: value.astype(np.float32) for key, value in state.items()}


def filter_round(own: State, donor: State) -> State:
    """One network's round: w_j = |gamma_j| / (|gamma_j| + |gamma'_j|) of the weights before it."""
    after = {key: value.copy() for key, value in own.items()}
    scales = [{c: np.abs(s[f"{int(c) + 1}.weight"]) for c in CHANNELS} for s in (own, donor)]
    w = {conv: scales[0][conv] / (scales[0][conv] + scales[1][conv]) for conv in CHANNELS}
    for conv in CHANNELS:
        for vector in VECTORS:  # the whole vector, once for each channel
            key = f"{int(conv) + 1}.{vector}"
            for share in w[conv]:
                after[key] = blend(share, after[key], donor[key])
    before = None
    for conv in CHANNELS:
        key = f"{conv}.weight"
        if before is not None:
            for i, share in enumerate(w[before]):
                after[key][:, i] = blend(share, after[key][:, i], donor[key][:, i])
        for j, share in enumerate(w[conv]):
            after[key][j] = blend(share, after[key][j], donor[key][j])
        before = conv
    return after


def internal_round(filters: np.ndarray) -> np.ndarray:
    """The i-th largest filter is added to the i-th smallest while that one is invalid."""
    norms = np.abs(filters).sum(axis=1)
    order, after = np.argsort(norms), filters.copy()
    for i in range(len(order) // 2):
        if norms[order[i]] < THRESHOLD:
            after[order[i]] += filters[order[-1 - i]]
    return after


def main() -> None:
    recorded = {}
    for networks in (2, 3):
        befores = [network(10 * networks + k) for k in range(networks)]
        for k, own in enumerate(befores):
            for key, value in filter_round(own, befores[k - 1]).items():
                recorded[f"{networks}/before/{k}/{key}"] = own[key]
                recorded[f"{networks}/after/{k}/{key}"] = value
    np.savez_compressed(FOLDER / "filter_authors.npz", **recorded)

    random = np.random.default_rng(7)
    filters = random.standard_normal((9, 12)) / 12
    filters[[1, 4, 6]] *= [[1e-2], [1e-3], [0.1]]
    filters = filters.astype(np.float32)
    np.savez_compressed(FOLDER / "internal_add.npz", before=filters, after=internal_round(filters))


if __name__ == "__main__":
    main()
