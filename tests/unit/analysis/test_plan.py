"""Arithmetic of the plan, compared with numbers computed by hand."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from itertools import permutations

import pytest
import torch
from torch import nn

from dist_graft import cli
from dist_graft.analysis.plan import PlanOptions, Round, plan_round
from dist_graft.analysis.planned_memory import bucket_bytes, build, memory
from dist_graft.errors import ConfigError
from dist_graft.grafting.rules import RULES
from dist_graft.grafting.topology import TOPOLOGIES
from dist_graft.grafting.units import graft_tensors, graft_units

EXAMPLE = (
    *("plan", "--networks", "64", "--model", "resnet50", "--gpus_per_node", "8"),
    *("--bandwidth_intra", "400", "--bandwidth_inter", "25"),
)
Layout = tuple[int, int, int]
"""Networks, replicas of each, GPUs per node."""
Move = tuple[int, int, int]
"""Sending rank, receiving rank, number of shares."""
INTRA, INTER = 2e-6, 1e-6
"""Bandwidths in GB/s: 2,000 and 1,000 bytes per second."""


def options_of(layout: Layout, **changes: object) -> PlanOptions:
    networks, replicas, per_node = layout
    values = {"bandwidth_intra": INTRA, "bandwidth_inter": INTER} | changes
    return PlanOptions(
        networks=networks, model="resnet8", replicas=replicas, gpus_per_node=per_node, **values
    )


class TestLayout:
    @pytest.mark.parametrize(
        ("layout", "says"),
        [
            ((6, 3, 8), "runtime.replicas 3 does not fit 8 of 18 processes"),
            ((2, 12, 8), "runtime.replicas 12 does not fit 8 of 24 processes"),
            ((3, 2, 4), "runtime.replicas 2 does not fit 4 of 6 processes"),
        ],
    )
    def test_invalid(self, layout: Layout, says: str) -> None:
        with pytest.raises(ConfigError, match=re.escape(says)):
            options_of(layout)


class TestTraffic:
    """Networks of 1,000 bytes. Round is (received, GPU link, node link, seconds)."""

    @pytest.mark.parametrize(
        ("exchange", "backend", "expected"),
        [
            ("p2p ring", "nccl", Round(1000, 1000, 1000, 1)),
            # Distance 1 crosses nodes once, distance 2 twice.
            ("p2p exponential", "nccl", Round(1000, 1000, 2000, 2)),
            # Every process forwards all networks but one along the ring.
            ("all_gather", "nccl", Round(3000, 3000, 3000, 3)),
            # Every process sends to all others: two to two across nodes.
            ("all_gather", "gloo", Round(3000, 1000, 4000, 4)),
        ],
    )
    def test_four_networks_on_two_nodes(self, exchange: str, backend: str, expected: Round) -> None:
        assert plan_round(options_of((4, 1, 2), backend=backend), 1000, exchange) == expected

    @pytest.mark.parametrize(
        ("layout", "nccl", "gloo"),
        [
            # Each share of 500 bytes goes to another network, then to the other replica.
            ((2, 2, 4), Round(500, 1000, 0, 0.5), Round(500, 1000, 0, 0.5)),
            ((4, 2, 4), Round(500, 1000, 1000, 1.25), Round(500, 1000, 1000, 1.25)),
            # Two of four replicas on a node; all shares of 250 bytes cross.
            ((2, 4, 2), Round(250, 750, 500 + 750, 1.25), Round(250, 250, 500 + 1000, 1.5)),
        ],
    )
    def test_replicas_move_their_shares_and_join_them(
        self, layout: Layout, nccl: Round, gloo: Round
    ) -> None:
        assert plan_round(options_of(layout, backend="nccl"), 1000, "p2p ring") == nccl
        assert plan_round(options_of(layout, backend="gloo"), 1000, "p2p ring") == gloo

    @pytest.mark.parametrize(
        ("per_node", "intra", "inter", "seconds"),
        [
            (2, INTRA, None, 0.5),
            (1, None, INTER, 1),
            (2, None, INTER, math.inf),
            (1, INTRA, None, math.inf),
        ],
    )
    def test_time_needs_the_bandwidths_of_used_links(
        self, per_node: int, intra: float | None, inter: float | None, seconds: float
    ) -> None:
        options = options_of((2, 1, per_node), bandwidth_intra=intra, bandwidth_inter=inter)
        assert plan_round(options, 1000, "p2p ring").seconds == seconds

    @pytest.mark.parametrize(
        "layout", [(2, 1, 1), (4, 1, 2), (10, 1, 8), (12, 1, 6), (8, 2, 4), (3, 4, 2), (5, 2, 16)]
    )
    @pytest.mark.parametrize("backend", ["nccl", "gloo"])
    def test_links_carry_what_the_processes_send(self, layout: Layout, backend: str) -> None:
        networks, replicas, per_node = layout
        direct = backend == "gloo"
        ranks = [range(k * replicas, (k + 1) * replicas) for k in range(networks)]
        joined = busiest(per_node, [move for group in ranks for move in gather(group, direct)])

        def carried(moves: list[Move]) -> tuple[float, ...]:
            pairs = zip(busiest(per_node, moves), joined, strict=True)
            return tuple(1000 / replicas * sum(pair) for pair in pairs)

        def planned(exchange: str) -> tuple[float, ...]:
            round_ = plan_round(options_of(layout, backend=backend), 1000, exchange)
            return round_.gpu_link, round_.node_link

        gathered = [move for group in zip(*ranks, strict=True) for move in gather(group, direct)]
        assert planned("all_gather") == carried(gathered)
        for topology, donors in TOPOLOGIES.items():
            for number in range(4):
                sent = [
                    (ranks[donor][replica], ranks[network][replica], 1)
                    for network, donor in enumerate(donors(networks, number, 0))
                    for replica in range(replicas)
                ]
                pairs = zip(carried(sent), planned(f"p2p {topology}"), strict=True)
                assert all(count <= bound for count, bound in pairs), topology
            if topology == "ring":
                assert planned("p2p ring") == carried(sent)


def gather(ranks: Sequence[int], direct: bool) -> list[Move]:
    """Moves of an all-gather: from each process directly to all others, or along a ring."""
    if direct:
        return [(*pair, 1) for pair in permutations(ranks, 2)]
    following = [*ranks[1:], ranks[0]]
    return [(*pair, len(ranks) - 1) for pair in zip(ranks, following, strict=True)]


def busiest(per_node: int, moves: list[Move]) -> tuple[int, int]:
    """Shares on the busiest GPU link and the busiest node link."""
    gpu, node = Counter(), Counter()
    for sender, receiver, shares in moves:
        source, target = sender // per_node, receiver // per_node
        links, ends = (gpu, (sender, receiver)) if source == target else (node, (source, target))
        links["out", ends[0]] += shares
        links["in", ends[1]] += shares
    return max(gpu.values(), default=0), max(node.values(), default=0)


class TestMemory:
    @pytest.mark.parametrize(
        ("exchange", "backend", "mib"),
        [
            ("all_gather", "gloo", 2 * 16),
            ("all_gather", "nccl", 2 * 64),
            ("p2p", "gloo", 2 * 2 * 16),
            ("p2p", "nccl", 2 * 2 * 32),
        ],
    )
    def test_buckets_in_host_memory_are_at_most_16_mib(
        self, exchange: str, backend: str, mib: int
    ) -> None:
        options = options_of((2, 1, 2), backend=backend, bucket_mb=64.0)
        big = [torch.empty(1 << 24, device="meta")]
        assert bucket_bytes(options, big, exchange) == mib << 20

    def test_buckets_of_small_networks(self) -> None:
        options = options_of((4, 1, 2), bucket_mb=400 / 2**20)
        small = [torch.empty(length, device="meta") for length in (150, 50, 50)]
        assert bucket_bytes(options, small, "p2p") == 2 * 2 * 200
        assert bucket_bytes(options, small, "all_gather") == 4 * 400

    def test_resnet50(self) -> None:
        """25,557,032 parameters; 53 batch norms over 26,560 channels: means, variances, counters"""
        parameters, statistics, counters = 4 * 25_557_032, 4 * 2 * 26_560, 8 * 53
        model = build("resnet50")
        assert sum(each.nbytes for each in graft_tensors(model).values()) == parameters + statistics
        stored, gradients = memory(options_of((2, 1, 8)), model)
        assert [*stored.values()] == [parameters + statistics + counters, parameters, 0]
        assert gradients == {"gradients": parameters}
        # Outer weights and momentum, not of batch norm's statistics.
        stored, gradients = memory(options_of((2, 2, 8), method="diloco", optimizer="adamw"), model)
        assert [*stored.values()][1:] == [2 * parameters, 2 * parameters]
        assert gradients == {"gradients": parameters, "gradient buckets of DDP": parameters}

    def test_methods_without_a_state(self) -> None:
        for method in set(RULES) - {"diloco"}:
            stored, _ = memory(options_of((2, 1, 8), method=method), build("resnet8"))
            assert stored[f"state of {method}"] == 0

    def test_frozen_parameters_have_no_gradient(self) -> None:
        model = nn.Conv2d(4, 4, 3)
        model.weight.requires_grad_(False)
        stored, gradients = memory(options_of((2, 1, 8)), model)
        assert [*stored.values()] == [4 * 148, 4 * 4, 0]
        assert gradients == {"gradients": 4 * 4}

    def test_model_that_cannot_be_built_without_memory(self) -> None:
        parameters = build("regnet_y_400mf").parameters()
        assert sum(parameter.numel() for parameter in parameters) == 4_344_144

    def test_planned_bytes_of_a_checkpoint_are_those_of_its_tensors(self) -> None:
        options, model = options_of((2, 1, 8), method="diloco", optimizer="adamw"), build("resnet8")
        model = model.to_empty(device="cpu")
        optimizer = torch.optim.AdamW(model.parameters())
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        state = RULES["diloco"]().init_state(graft_units(model), graft_tensors(model))
        kept = [*model.state_dict().values(), *state.values()]
        moments = [
            each[name] for each in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")
        ]
        planned, _ = memory(options, model)
        assert sum(planned.values()) == sum(tensor.nbytes for tensor in (*kept, *moments))


@pytest.mark.usefixtures("empty_working_directory")
class TestCommand:
    def output(self, capsys: pytest.CaptureFixture[str], *argv: str) -> str:
        assert cli.run(argv) == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        return captured.out

    def test_sixty_four_networks(self, capsys: pytest.CaptureFixture[str]) -> None:
        out = self.output(capsys, *EXAMPLE)
        assert "64 x resnet50: 25,557,032 parameters, 102 MB" in out
        assert re.search(r"\n +7 +8 of 8 +56-63\n", out)
        assert re.search(r"buckets of all_gather +2\.15 GB\n", out)
        assert re.search(r"buckets of p2p +67\.1 MB\n", out)
        # 102.44 MB per network; 25 GB/s between nodes are slower than 400 GB/s within.
        assert re.search(r"p2p ring +102 MB +102 MB +102 MB +4\.1 ms\n", out)
        assert re.search(r"p2p exponential +102 MB +102 MB +820 MB +32\.8 ms\n", out)
        assert re.search(r"all_gather +6\.45 GB +6\.45 GB +6\.45 GB +258 ms\n", out)
        assert "receives 63 networks, needs one, and holds 2.15 GB of buckets" in out
        assert "give --bandwidth" not in out

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            (("--networks", "12"), "4 GPUs of the last node have no network: 8 or 16"),
            (("--networks", "2", "--replicas", "16"), "each network spans several nodes"),
            (("--networks", "2", "--replicas", "4"), "2 x resnet18, 4 replicas each: 11,689,512"),
            (("--networks", "5"), "each process receives 4 networks, needs one, and holds"),
            (("--networks", "20"), "after 19 rounds; with --graft.topology exponential, after 5"),
            (("--networks", "2"), "give --bandwidth_intra and --bandwidth_inter"),
            (("--networks", "1"), "A single network has no rounds."),
            (("--networks", "4", "--backend", "gloo"), "host memory per process"),
            (("--networks", "80"), "...     ...       ...\n   9  8 of 8     72-79"),
        ],
    )
    def test_warnings_and_notes(
        self, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], says: str
    ) -> None:
        assert says in self.output(capsys, "plan", "--model", "resnet18", *options)

    def test_diloco(self, capsys: pytest.CaptureFixture[str]) -> None:
        out = self.output(
            capsys, *("plan", "--model", "resnet50", "--networks", "2", "--method", "diloco")
        )
        assert "102 MB per network and round, 409 MB per network and checkpoint" in out
        assert re.search(r"\n +state of diloco +204 MB\n", out)

    def test_no_warning(self, capsys: pytest.CaptureFixture[str]) -> None:
        out = self.output(capsys, "plan", "--model", "resnet18", "--networks", "4")
        assert "warning" not in out
        assert " ms\n" not in out

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            (("--networks", "0"), "networks must be at least 1, got 0"),
            (("--networks", "4", "--gpus_per_node", "0"), "gpus_per_node must be at least 1"),
            (("--networks", "4", "--bandwidth_inter", "0"), "bandwidth_inter must be above 0"),
            (("--networks", "4", "--bandwidth_intra", ".inf"), "bandwidth_intra must be above 0"),
            (("--networks", "4", "--replicas", "3"), "runtime.replicas 3 does not fit 8 of 12"),
            (("--networks", "4", "--model", "resnet19"), "model.name 'resnet19' is unknown"),
            (("--networks", "4", "--model", "torch.nn:Identity"), "has no weights to graft"),
            (("--networks", "4", "--method", "none"), "method must be one of graft, average, "),
            (
                ("--networks", "4", "--backend", "mpi"),
                "must be one of nccl, gloo, got mpi",
            ),
            (("--networks", "4", "--gpus-per-node", "1"), "did you mean --gpus_per_node?"),
            (("--network", "4"), "dist-graft plan --help lists all options"),
            ((), "networks"),
        ],
    )
    def test_invalid_options(
        self, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], says: str
    ) -> None:
        assert cli.run(("plan", "--model", "resnet8", *options)) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert len(captured.err.splitlines()) == 1, captured.err
        assert says in captured.err

    def test_every_option_has_an_effect(self, capsys: pytest.CaptureFixture[str]) -> None:
        default = (
            *("plan", "--networks", "8", "--model", "resnet8", "--gpus_per_node", "4"),
            *("--bandwidth_intra", "8", "--bandwidth_inter", "8"),
        )
        others = {
            "--networks": "12",
            "--model": "resnet14",
            "--gpus_per_node": "8",
            "--replicas": "2",
            "--bandwidth_intra": "0.1",
            "--bandwidth_inter": "4",
            "--backend": "gloo",
            "--bucket_mb": "0.1",
            "--optimizer": "adamw",
            "--classes": "100",
            "--method": "diloco",
        }
        options = {
            option
            for action in cli.command_parsers()["plan"]._actions
            for option in action.option_strings
        }
        assert set(others) == options - {"-h", "--help"}
        output = self.output(capsys, *default)
        for option, value in others.items():
            assert self.output(capsys, *default, option, value) != output, option
