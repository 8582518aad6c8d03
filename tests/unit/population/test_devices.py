from __future__ import annotations

import pytest
import torch

from dist_graft.population.runtime.devices import all_different, gpu_name, set_matmul_precision


@pytest.mark.parametrize(
    ("gpus", "different"),
    [
        (["a", "b"], True),
        (["a", "b", "c", "a"], False),
        (["a", "a"], False),
        (["a", ""], False),
        (["", ""], False),
    ],
)
def test_nccl_needs_a_different_gpu_in_every_process(gpus: list[str], different: bool) -> None:
    assert all_different(gpus) is different


@pytest.mark.parametrize(
    ("precision", "tf32"), [("highest", False), ("high", True), ("medium", True)]
)
def test_convolutions_follow_the_precision_of_matrix_products(precision: str, tf32: bool) -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        set_matmul_precision(precision, torch.device("cpu"))
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before
        set_matmul_precision(precision, torch.device("cuda", 0))
        assert torch.get_float32_matmul_precision() == precision
        assert torch.backends.cudnn.allow_tf32 is tf32
        assert torch.backends.cuda.matmul.allow_tf32 is tf32
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.parametrize(
    ("environments", "nccl", "different"),
    [
        ([{}, {}], (2, 30, 7), False),
        ([{"NCCL_HOSTID": "0"}, {"NCCL_HOSTID": "0"}], (2, 30, 7), False),
        ([{"NCCL_HOSTID": "0"}, {"NCCL_HOSTID": "1"}], (2, 28, 9), True),
        ([{"NCCL_HOSTID": "0"}, {}], (2, 28, 9), True),
        ([{"NCCL_MULTI_RANK_GPU_ENABLE": "1"}] * 2, (2, 30), True),
        ([{"NCCL_MULTI_RANK_GPU_ENABLE": "1"}] * 2, (2, 28, 9), False),
        ([{"NCCL_MULTI_RANK_GPU_ENABLE": "0"}] * 2, (2, 30, 7), False),
    ],
)
def test_processes_share_a_gpu_only_if_nccl_is_told_to(
    environments: list[dict[str, str]], nccl: tuple[int, ...], different: bool
) -> None:
    gpus = [gpu_name("a", rank, nccl, each) for rank, each in enumerate(environments)]
    assert all_different(gpus) is different
