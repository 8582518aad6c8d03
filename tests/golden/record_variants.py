"""Record filter_*.npz and internal_*.npz: variants of a round, from their description in prose.

Written from the description in README.md, in numpy, without dist_graft. The description of the
authors' script does not mention a convolution's bias or a classifier: what they keep is this
project's choice. To record again: python tests/golden/record_variants.py
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent
CHANNELS = {"0": (3, 5), "3": (5, 8), "6": (8, 4)}
"""Input and output channels of each convolution; its batch norm is the next module."""
VECTORS = ("weight", "bias", "running_mean", "running_var")
CLASSES, POSITIONS = 3, 2
"""The classifier, module 10, reads every channel of the last convolution at each position."""
THRESHOLD = 0.1

State = dict[str, np.ndarray]
Shares = dict[str, np.ndarray]
"""w_j by convolution."""


def blend(kept: float, own: np.ndarray, donor: np.ndarray) -> np.ndarray:
    return np.float32(kept) * own + np.float32(1 - kept) * donor


def network(seed: int, *, classifier: bool) -> State:
    random, state = np.random.default_rng(seed), {}
    for conv, (inputs, outputs) in CHANNELS.items():
        state[f"{conv}.weight"] = random.standard_normal((outputs, inputs, 3, 3))
        for vector in VECTORS:
            state[f"{int(conv) + 1}.{vector}"] = random.standard_normal(outputs)
    if classifier:
        for conv, (_, outputs) in CHANNELS.items():
            state[f"{conv}.bias"] = random.standard_normal(outputs)
        state["10.weight"] = random.standard_normal((CLASSES, outputs * POSITIONS))
        state["10.bias"] = random.standard_normal(CLASSES)
    return {key: value.astype(np.float32) for key, value in state.items()}


def shares(own: State, donor: State) -> Shares:
    """w_j = |gamma_j| / (|gamma_j| + |gamma'_j|) of the weights before the round."""
    scales = [{c: np.abs(s[f"{int(c) + 1}.weight"]) for c in CHANNELS} for s in (own, donor)]
    return {conv: scales[0][conv] / (scales[0][conv] + scales[1][conv]) for conv in CHANNELS}


def authors_round(own: State, donor: State) -> State:
    """One network's round as in the authors' script."""
    after = {key: value.copy() for key, value in own.items()}
    w = shares(own, donor)
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
    return blend_biases_and_classifier(after, donor, w)


def channel_round(own: State, donor: State) -> State:
    """One network's round in which every element is blended once."""
    after = {key: value.copy() for key, value in own.items()}
    w = shares(own, donor)
    before = None
    for conv, (inputs, outputs) in CHANNELS.items():
        for j in range(outputs):
            for vector in VECTORS:
                key = f"{int(conv) + 1}.{vector}"
                after[key][j] = blend(w[conv][j], own[key][j], donor[key][j])
            for i in range(inputs):
                key = f"{conv}.weight"
                share = w[conv][j] if before is None else (w[before][i] + w[conv][j]) / 2
                after[key][j, i] = blend(share, own[key][j, i], donor[key][j, i])
        before = conv
    return blend_biases_and_classifier(after, donor, w)


def blend_biases_and_classifier(after: State, donor: State, w: Shares) -> State:
    """This project's choice: they follow their channels, the classifier's bias the mean."""
    if "10.weight" not in after:
        return after
    for conv in CHANNELS:
        key = f"{conv}.bias"
        for j, share in enumerate(w[conv]):
            after[key][j] = blend(share, after[key][j], donor[key][j])
    last = w[conv]
    for column in range(len(last) * POSITIONS):
        own, others = after["10.weight"][:, column], donor["10.weight"][:, column]
        after["10.weight"][:, column] = blend(last[column // POSITIONS], own, others)
    after["10.bias"] = blend(last.mean(), after["10.bias"], donor["10.bias"])
    return after


def internal_round(filters: np.ndarray, *, add: bool) -> np.ndarray:
    """The i-th largest filter goes into the i-th smallest while that one is invalid."""
    norms = np.abs(filters).sum(axis=1)
    order, after = np.argsort(norms), filters.copy()
    for i in range(len(order) // 2):
        if norms[order[i]] < THRESHOLD:
            strong = filters[order[-1 - i]]
            after[order[i]] = filters[order[i]] + strong if add else strong
    return after


def record_filters(name: str, round_: Callable[[State, State], State], *, classifier: bool) -> None:
    recorded = {}
    for networks in (2, 3):
        befores = [network(10 * networks + k, classifier=classifier) for k in range(networks)]
        for k, own in enumerate(befores):
            for key, value in round_(own, befores[k - 1]).items():
                recorded[f"{networks}/before/{k}/{key}"] = own[key]
                recorded[f"{networks}/after/{k}/{key}"] = value
    np.savez_compressed(FOLDER / f"filter_{name}.npz", **recorded)


def main() -> None:
    record_filters("authors", authors_round, classifier=False)
    record_filters("authors_classifier", authors_round, classifier=True)
    record_filters("channel", channel_round, classifier=True)

    random = np.random.default_rng(7)
    filters = random.standard_normal((9, 12)) / 12
    filters[[1, 4, 6]] *= [[1e-2], [1e-3], [0.1]]
    filters = filters.astype(np.float32)
    for rule in ("add", "replace"):
        after = internal_round(filters, add=rule == "add")
        np.savez_compressed(FOLDER / f"internal_{rule}.npz", before=filters, after=after)


if __name__ == "__main__":
    main()
