"""Arithmetic of the plan, compared with numbers computed by hand."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from dist_graft import cli
from dist_graft.analysis.plan import (
    NetworkSize,
    PlanOptions,
    Round,
    Traffic,
    build,
    busiest,
    checkpoint_bytes,
    gather_moves,
    memory,
    plan_round,
    size_of,
)
from dist_graft.errors import ConfigError
from dist_graft.grafting.rules import RULES
from dist_graft.grafting.units import graft_tensors, graft_units

EXAMPLE = (
    *("plan", "--networks", "64", "--model", "resnet50", "--gpus-per-node", "8"),
    *("--bandwidth-intra", "400", "--bandwidth-inter", "25"),
)
SMALL = NetworkSize(
    elements=(150, 50, 50),
    dtypes=(torch.float32, torch.float32, torch.float32),
    parameters=240,
    state_bytes=1008,
    trained_bytes=800,
)
"""1,000 bytes per round."""


Layout = tuple[int, int, int]
"""Networks, replicas of each, GPUs per node."""


def options_of(layout: Layout, **changes: object) -> PlanOptions:
    networks, replicas, per_node = layout
    values = {"model": "resnet8", "bucket_mb": 400 / 2**20} | changes
    return PlanOptions(networks=networks, replicas=replicas, gpus_per_node=per_node, **values)


def round_of(layout: Layout, exchange: str, topology: str = "ring", **changes: object) -> Round:
    return plan_round(options_of(layout, **changes), SMALL, exchange, topology)


class TestLayout:
    @pytest.mark.parametrize(
        ("layout", "nodes", "free"),
        [
            ((64, 1, 8), 8, 0),
            ((4, 2, 4), 2, 0),
            ((3, 8, 4), 6, 0),
            ((10, 1, 8), 2, 6),
        ],
    )
    def test_nodes_are_filled_in_order(self, layout: Layout, nodes: int, free: int) -> None:
        options = options_of(layout)
        assert (options.nodes, options.free) == (nodes, free)

    @pytest.mark.parametrize(
        ("layout", "says"),
        [
            ((6, 3, 8), "runtime.replicas 3 does not fit 8 of 18 processes"),
            ((2, 12, 8), "runtime.replicas 12 does not fit 8 of 24 processes"),
            ((3, 2, 4), "runtime.replicas 2 does not fit 4 of 6 processes"),
        ],
    )
    def test_invalid_layout(self, layout: Layout, says: str) -> None:
        with pytest.raises(ConfigError, match=re.escape(says)):
            options_of(layout)

    def test_valid_layout(self) -> None:
        options_of((2, 2, 8))  # the other valid layouts are those above


class TestTraffic:
    """Networks of 1,000 bytes; Traffic is (GPU link, node link)."""

    @pytest.mark.parametrize(
        ("exchange", "topology", "on_host", "expected"),
        [
            ("p2p", "ring", False, Traffic(1000, 1000)),
            # Distance 1 crosses nodes once, distance 2 twice.
            ("p2p", "exponential", False, Traffic(1000, 2000)),
            # Every process forwards all networks but one along the ring.
            ("all_gather", "ring", False, Traffic(3000, 3000)),
            # Every process sends to all others: two to two across nodes.
            ("all_gather", "ring", True, Traffic(1000, 4000)),
        ],
    )
    def test_four_networks_on_two_nodes(
        self, exchange: str, topology: str, on_host: bool, expected: Traffic
    ) -> None:
        round_ = round_of((4, 1, 2), exchange, topology, backend="gloo" if on_host else "nccl")
        assert (round_.exchanged, round_.joined) == (expected, Traffic())
        assert round_.received == (3000 if exchange == "all_gather" else 1000)

    @pytest.mark.parametrize(
        ("layout", "exchanged", "joined", "joined_on_host"),
        [
            ((2, 2, 4), Traffic(500, 0), Traffic(500, 0), Traffic(500, 0)),
            ((4, 2, 4), Traffic(500, 1000), Traffic(500, 0), Traffic(500, 0)),
            ((2, 4, 2), Traffic(0, 500), Traffic(750, 750), Traffic(250, 4 * 250)),
        ],
    )
    def test_replicas_move_their_shares_and_join_them(
        self, layout: Layout, exchanged: Traffic, joined: Traffic, joined_on_host: Traffic
    ) -> None:
        round_ = round_of(layout, "p2p")
        assert round_.received == 1000 / layout[1]
        assert (round_.exchanged, round_.joined) == (exchanged, joined)
        assert round_of(layout, "p2p", backend="gloo").joined == joined_on_host

    def test_opposite_directions_do_not_add_up(self) -> None:
        options = options_of((2, 1, 2))
        assert busiest(options, [(0, 1, 5.0), (1, 0, 7.0)]) == Traffic(gpu=7)
        assert busiest(options, [(0, 1, 5.0), (0, 1, 7.0)]) == Traffic(gpu=12)
        assert [*gather_moves([[3]], 1.0, direct=False)] == []

    @pytest.mark.parametrize(
        ("traffic", "bandwidths", "seconds"),
        [
            (Traffic(2e9, 3e9), (2.0, 1.0), 3.0),
            (Traffic(8e9, 3e9), (2.0, 1.0), 4.0),
            (Traffic(2e9, 0), (2.0, None), 1.0),
            (Traffic(0, 3e9), (None, 1.0), 3.0),
            (Traffic(2e9, 3e9), (2.0, None), None),
            (Traffic(2e9, 3e9), (None, 1.0), None),
            (Traffic(), (None, None), 0.0),
        ],
    )
    def test_time_is_that_of_the_busiest_link(
        self, traffic: Traffic, bandwidths: tuple[float | None, ...], seconds: float | None
    ) -> None:
        assert traffic.seconds(*bandwidths) == seconds


class TestBuckets:
    @pytest.mark.parametrize(
        ("exchange", "on_host", "mib"),
        [
            ("all_gather", True, 2 * 16),
            ("all_gather", False, 2 * 64),
            ("p2p", True, 2 * 2 * 16),
            ("p2p", False, 2 * 2 * 32),
        ],
    )
    def test_buckets_in_host_memory_are_at_most_16_mib(
        self, exchange: str, on_host: bool, mib: int
    ) -> None:
        big = NetworkSize((1 << 24,), (torch.float32,), 1 << 24, 1 << 26, 1 << 26)
        options = options_of((2, 1, 2), backend="gloo" if on_host else "nccl", bucket_mb=64.0)
        assert plan_round(options, big, exchange, "ring").buffers == mib << 20

    def test_buckets_of_small_networks(self) -> None:
        assert round_of((4, 1, 2), "p2p").buffers == 2 * 2 * 200
        assert round_of((4, 1, 2), "all_gather").buffers == 4 * 400


class TestSize:
    def test_resnet50(self) -> None:
        """25,557,032 parameters; 53 batch norms over 26,560 channels: means, variances, counters"""
        size = size_of(build("resnet50"))
        assert size.parameters == 25_557_032
        assert size.round_bytes == 4 * (25_557_032 + 2 * 26_560)
        assert size.state_bytes == size.round_bytes + 8 * 53

    def test_tied_tensors_count_once(self) -> None:
        with torch.device("meta"):
            model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
        model[1].weight = model[0].weight
        assert size_of(model).elements == (144, 4, 4, 144, 4)

    def test_frozen_parameters_are_mixed_but_have_no_gradient(self) -> None:
        model = nn.Conv2d(4, 4, 3)
        model.weight.requires_grad_(False)
        size = size_of(model)
        assert (size.round_bytes, size.trained_bytes) == (4 * 148, 4 * 4)

    def test_model_that_cannot_be_built_without_memory(self) -> None:
        assert size_of(build("regnet_y_400mf")).parameters == 4_344_144

    def test_model_without_weights(self) -> None:
        with pytest.raises(ConfigError, match="no weights to graft"):
            size_of(nn.Identity())

    @pytest.mark.parametrize(
        ("optimizer", "replicas", "expected"),
        [("sgd", 1, [1008, 800, 800]), ("adamw", 2, [1008, 800, 1600, 800])],
    )
    def test_memory_of_a_process(self, optimizer: str, replicas: int, expected: list[int]) -> None:
        options = options_of((2, replicas, 8), optimizer=optimizer)
        assert list(memory(options, SMALL, []).values()) == expected

    def test_methods_without_a_state(self) -> None:
        for name in ("graft", "average", "papa", "wash"):
            assert size_of(build("resnet50"), RULES[name]()).rule_bytes == 0

    def test_diloco_keeps_two_copies_of_the_parameters(self) -> None:
        """Outer weights and momentum, also in checkpoints; not of batch norm's statistics."""
        size = size_of(build("resnet50"), RULES["diloco"]())
        assert size.rule_bytes == 2 * 4 * 25_557_032
        options = options_of((2, 1, 8), method="diloco", optimizer="adamw")
        assert memory(options, size, [])["state of diloco"] == size.rule_bytes
        assert checkpoint_bytes(options, size) == 5 * 4 * 25_557_032 + 4 * 2 * 26_560 + 8 * 53

    def test_planned_bytes_of_a_checkpoint_are_those_of_its_tensors(self) -> None:
        options, model = options_of((2, 1, 8), method="diloco", optimizer="adamw"), build("resnet8")
        model = model.to_empty(device="cpu")
        optimizer = torch.optim.AdamW(model.parameters())
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        units, tensors = graft_units(model), graft_tensors(model)
        rule = RULES["diloco"]()
        kept = [*model.state_dict().values(), *rule.init_state(units, tensors).values()]
        moments = [
            state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")
        ]
        stored = sum(tensor.nbytes for tensor in (*kept, *moments))
        assert checkpoint_bytes(options, size_of(model, rule)) == stored


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
        assert re.search(r"buckets of all_gather +2,048\.0\n", out)
        assert re.search(r"buckets of p2p +64\.0\n", out)
        # 102.44 MB per network; 25 GB/s between nodes are slower than 400 GB/s within.
        rows = {
            name: row.split("  ")
            for name, row in re.findall(r"^ *(all_gather|p2p \w+)  +(.*)$", out, re.MULTILINE)
        }
        assert [cell.strip() for cell in rows["p2p ring"] if cell] == [
            *("102 MB", "102 MB", "102 MB", "4.1 ms")
        ]
        assert [cell.strip() for cell in rows["p2p exponential"] if cell] == [
            *("102 MB", "102 MB", "820 MB", "32.8 ms")
        ]
        assert [cell.strip() for cell in rows["all_gather"] if cell] == [
            *("6.45 GB", "6.45 GB", "6.45 GB", "258 ms")
        ]
        assert "warning: all_gather holds 2.0 GiB" in out
        assert "give --bandwidth" not in out

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            (("--networks", "12"), "4 GPUs of the last node have no network: 8 or 16"),
            (("--networks", "2", "--replicas", "16"), "each network spans several nodes"),
            (("--networks", "2", "--replicas", "4"), "2 x resnet18, 4 replicas each: 11,689,512"),
            (("--networks", "5"), "each process receives 4 networks and needs one"),
            (("--networks", "20"), "after 19 rounds; with --graft.topology exponential, after 5"),
            (("--networks", "2"), "give --bandwidth-intra and --bandwidth-inter"),
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
        assert re.search(r"\n +state of diloco +195\.0\n", out)

    def test_no_warning(self, capsys: pytest.CaptureFixture[str]) -> None:
        out = self.output(capsys, "plan", "--model", "resnet18", "--networks", "4")
        assert "warning" not in out
        assert " ms\n" not in out

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            (("--networks", "0"), "networks must be in [1, 1024], got 0"),
            (("--networks", "4", "--gpus-per-node", "0"), "gpus-per-node must be at least 1"),
            (("--networks", "4", "--bandwidth-inter", "0"), "bandwidth-inter must be above 0"),
            (("--networks", "4", "--bandwidth-intra", ".inf"), "bandwidth-intra must be above 0"),
            (("--networks", "4", "--replicas", "3"), "runtime.replicas 3 does not fit 8 of 12"),
            (("--networks", "4", "--model", "resnet19"), "model.name 'resnet19' is unknown"),
            (("--networks", "4", "--method", "none"), "method must be one of graft, average, "),
            (
                ("--networks", "4", "--backend", "mpi"),
                "must be one of nccl, gloo, got mpi",
            ),
            (("--networks", "4", "--epoch-seconds", "1"), "--epoch-seconds was removed: "),
            (("--networks", "4", "--gpus-per-nod", "1"), "did you mean --gpus-per-node?"),
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
            *("plan", "--networks", "8", "--model", "resnet8", "--gpus-per-node", "4"),
            *("--bandwidth-intra", "8", "--bandwidth-inter", "8"),
        )
        others = {
            "--networks": "12",
            "--model": "resnet14",
            "--gpus-per-node": "8",
            "--replicas": "2",
            "--bandwidth-intra": "0.1",
            "--bandwidth-inter": "4",
            "--backend": "gloo",
            "--bucket-mb": "0.1",
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
