from __future__ import annotations

from pathlib import Path

import pytest

from dist_graft.integrations.rounds import encode_paths, refuse_shared_paths


def test_a_shared_folder_is_named(tmp_path: Path) -> None:
    texts = [encode_paths({"checkpoints": tmp_path / name}) for name in ("a", "b", "a")]
    with pytest.raises(ValueError, match=rf"networks 0 and 2 would both .* {tmp_path}/a.*: do it"):
        refuse_shared_paths(texts, "do it")
    refuse_shared_paths(texts[:2], "do it")


def test_a_network_that_is_alone_is_noticed() -> None:
    with pytest.warns(UserWarning, match="no network to graft with; start one process for each"):
        refuse_shared_paths([encode_paths({})], "do it")
