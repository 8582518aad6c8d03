"""The plan's arithmetic, against numbers that were computed by hand."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields

import pytest
import torch
from torch import nn

from dist_graft import cli
from dist_graft.analysis.planning.estimate import (
    Estimate,
    Rates,
    estimate,
    rounds_to_meet,
    travelling,
)
from dist_graft.analysis.planning.layout import (
    Layout,
    Traffic,
    busiest,
    p2p_moves,
    rings_moves,
    to_everyone,
    together_moves,
)
from dist_graft.analysis.planning.options import PlanOptions
from dist_graft.analysis.planning.page import epoch_of, memory_of
from dist_graft.analysis.planning.sizes import (
    Images,
    Sizes,
    build,
    operations_per_image,
    sizes_of,
)
from dist_graft.errors import ConfigError
from dist_graft.grafting.topology import TOPOLOGIES, exponential, ring

ISSUED = (
    *("plan", "--networks", "64", "--model", "resnet50", "--gpus-per-node", "8"),
    *("--bandwidth-intra", "400", "--bandwidth-inter", "25"),
)
RATES = Rates(inside=100.0, node=10.0, local=50.0, latency=0.01)
SMALL = Sizes(
    elements=(150, 50, 50),
    dtypes=(torch.float32, torch.float32, torch.float32),
    parameters=240,
    parameter_bytes=960,
    trained_bytes=800,
    buffer_bytes=48,
)
"""1,000 bytes a round."""


def of(layout: Layout, exchange: str, topology: str = "ring", **changes: object) -> Estimate:
    settings = {"on_host": False, "bucket_bytes": 400} | changes
    return estimate(layout, SMALL, RATES, exchange=exchange, topology=topology, **settings)


class TestLayout:
    def test_nodes_are_filled_one_after_the_other(self) -> None:
        layout = Layout(64, 1, 8)
        assert (layout.nodes, layout.free) == (8, 0)
        assert layout.crossings() == [(8 * k + 7, (8 * k + 8) % 64) for k in range(8)]

    def test_replicas_lie_side_by_side(self) -> None:
        layout = Layout(4, 2, 4)
        assert [layout.node_of(rank) for rank in range(8)] == [0] * 4 + [1] * 4
        assert [*layout.ranks_of(3)] == [6, 7]
        assert layout.crossings() == [(1, 2), (3, 0)]

    def test_a_network_of_several_nodes(self) -> None:
        layout = Layout(3, 8, 4)
        assert layout.nodes == 6
        assert layout.crossings() == [(0, 1), (1, 2), (2, 0)]

    def test_a_node_that_is_not_full(self) -> None:
        assert (Layout(10, 1, 8).nodes, Layout(10, 1, 8).free) == (2, 6)
        assert Layout(3, 1, 8).crossings() == []

    @pytest.mark.parametrize(
        ("numbers", "says"),
        [
            ((6, 3, 8), "1, 2, 4, 8 or 16, got 3"),
            ((2, 12, 8), "1, 2, 4, 8 or 16, got 12"),
            ((3, 2, 4), "leave 2 GPUs of the last node free"),
            ((3, 2, 4), "take 2 or 4 networks"),
        ],
    )
    def test_what_does_not_fit(self, numbers: tuple[int, int, int], says: str) -> None:
        with pytest.raises(ConfigError, match=re.escape(says)):
            Layout(*numbers)


class TestTraffic:
    """Four networks of 1,000 bytes on two nodes of two."""

    layout = Layout(4, 1, 2)

    def test_the_ring_enters_each_node_once(self) -> None:
        assert busiest(self.layout, p2p_moves(self.layout, ring(4), 1000)) == Traffic(1000, 1000)

    def test_at_distance_two_everybody_crosses(self) -> None:
        moves = p2p_moves(self.layout, exponential(4, 1), 1000)
        assert busiest(self.layout, moves) == Traffic(2000, 0)

    def test_a_ring_that_gathers_passes_on_all_but_its_own(self) -> None:
        assert busiest(self.layout, rings_moves(self.layout, 1000)) == Traffic(3000, 3000)

    def test_two_that_send_to_two_others(self) -> None:
        assert to_everyone(self.layout, 1000) == Traffic(4000, 1000)
        everyone = [
            (sender, receiver, 1000.0)
            for sender in range(4)
            for receiver in range(4)
            if sender != receiver
        ]
        by_link = busiest(self.layout, everyone)
        assert by_link.node == to_everyone(self.layout, 1000).node

    def test_replicas_move_a_share_each_and_put_it_together(self) -> None:
        two = Layout(2, 2, 4)
        assert busiest(two, p2p_moves(two, ring(2), 1000)) == Traffic(0, 500)
        for on_host in (False, True):
            moves = together_moves(two, 1000, on_host=on_host)
            assert busiest(two, moves) == Traffic(0, 500)
        apart = Layout(2, 4, 2)
        assert busiest(apart, p2p_moves(apart, ring(2), 1000)) == Traffic(500, 0)
        moves = together_moves(apart, 1000, on_host=False)
        assert busiest(apart, moves) == Traffic(750, 750)
        moves = together_moves(apart, 1000, on_host=True)
        assert busiest(apart, moves) == Traffic(4 * 250, 250)

    def test_one_process_a_network_has_nothing_to_put_together(self) -> None:
        assert busiest(self.layout, together_moves(self.layout, 1000, on_host=True)) == Traffic()


class TestARound:
    """Weights of 1,000 bytes; 20 s of work on them in each process."""

    def test_p2p_on_the_ring(self) -> None:
        """Buckets of 200 bytes: five messages; two small gathers of three steps."""
        round_ = of(Layout(4, 1, 2), "p2p")
        assert round_.received == 1000
        assert round_.moving == pytest.approx(1000 / 10 + 5 * 0.01)
        assert round_.seconds == pytest.approx(20 + 2 * 3 * 0.01 + round_.moving)
        assert round_.buffers == 2 * 2 * 200

    def test_p2p_at_changing_distances(self) -> None:
        """One network of each node crosses at distance 1, both at distance 2."""
        round_ = of(Layout(4, 1, 2), "p2p", "exponential")
        assert round_.moving == pytest.approx((100 + 200) / 2 + 5 * 0.01)
        assert round_.busiest == Traffic(2000, 1000)

    @pytest.mark.parametrize("topology", TOPOLOGIES)
    def test_all_gather_moves_the_same_in_every_topology(self, topology: str) -> None:
        """Buckets of 400, 400 and 200 bytes go three steps each along the ring."""
        round_ = of(Layout(4, 1, 2), "all_gather", topology)
        assert round_.received == 3000
        assert round_.moving == pytest.approx(3000 / 10 + 3 * 3 * 0.01)
        assert round_.buffers == 4 * 400

    def test_all_gather_over_gloo(self) -> None:
        round_ = of(Layout(4, 1, 2), "all_gather", on_host=True)
        assert round_.moving == pytest.approx(4000 / 10 + 3 * 3 * 0.01)

    def test_inside_one_node(self) -> None:
        assert of(Layout(4, 1, 8), "p2p").moving == pytest.approx(1000 / 100 + 5 * 0.01)
        assert of(Layout(4, 1, 8), "all_gather").moving == pytest.approx(30 + 3 * 3 * 0.01)

    def test_replicas(self) -> None:
        """Each moves 500 bytes in three buckets; two rings of a node's networks cross at once."""
        round_ = of(Layout(4, 2, 4), "p2p")
        assert round_.received == 500
        assert round_.moving == pytest.approx(1000 / 10 + 3 * 0.01 + 500 / 100)
        assert round_.busiest == Traffic(1000, 500 + 500)

    def test_buckets_in_host_memory_are_at_most_16_mib(self) -> None:
        big = Sizes((1 << 24,), (torch.float32,), 1 << 24, 1 << 26, 1 << 26, 0)
        settings = {"rates": RATES, "topology": "ring", "bucket_bytes": 64 << 20}
        two = Layout(2, 1, 2)
        for exchange, on_host, held in (
            ("all_gather", True, 2 * 16),
            ("all_gather", False, 2 * 64),
            ("p2p", True, 2 * 2 * 16),
            ("p2p", False, 2 * 2 * 32),
        ):
            round_ = estimate(two, big, exchange=exchange, on_host=on_host, **settings)
            assert round_.buffers == held << 20, (exchange, on_host)

    def test_buckets_hold_one_type_each(self) -> None:
        mixed = Sizes((100, 30), (torch.float32, torch.float64), 130, 640, 640, 0)
        layout = Layout(2, 2, 4)
        buckets = travelling(layout, mixed, "all_gather", bucket_bytes=128, on_host=False)
        assert [(b.dtype, b.bytes) for b in buckets] == [
            (torch.float32, 128),
            (torch.float32, 72),
            (torch.float64, 120),
        ]


@pytest.mark.parametrize("networks", [2, 3, 5, 8, 13])
def test_how_fast_information_spreads(networks: int) -> None:
    fastest = (networks - 1).bit_length()
    assert rounds_to_meet("ring", networks) == networks - 1
    assert rounds_to_meet("exponential", networks) == fastest
    assert rounds_to_meet("random", networks) >= fastest


class TestSizes:
    def test_resnet50(self) -> None:
        """25,557,032 parameters; 53 batch norms over 26,560 channels: means, variances, counters"""
        sizes = sizes_of(build("resnet50", 1000))
        assert sizes.parameters == 25_557_032
        assert sizes.round_bytes == 4 * (25_557_032 + 2 * 26_560)
        assert sizes.buffer_bytes == 4 * 2 * 26_560 + 8 * 53

    def test_tied_tensors_count_once(self) -> None:
        with torch.device("meta"):
            model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
        model[1].weight = model[0].weight
        assert sizes_of(model).elements == (144, 4, 4, 144, 4)

    def test_frozen_parameters_travel_but_have_no_gradient(self) -> None:
        model = nn.Conv2d(4, 4, 3)
        model.weight.requires_grad_(False)
        sizes = sizes_of(model)
        assert (sizes.round_bytes, sizes.trained_bytes) == (4 * 148, 4 * 4)

    def test_a_network_that_reads_its_weights_while_it_is_built(self) -> None:
        """RegNet's first weights cannot be drawn without memory."""
        assert sizes_of(build("regnet_y_400mf", 1000)).parameters == 4_344_144

    def test_operations_of_a_convolution(self) -> None:
        """2 x 27 x 8 a pixel forward, thrice that with the backward pass."""
        with torch.device("meta"):
            model = nn.Conv2d(3, 8, 3, padding=1)
        assert operations_per_image(model, 10) == 3 * 2 * 27 * 8 * 100

    def test_images_that_are_too_small(self) -> None:
        with pytest.raises(ConfigError, match="takes no images of 4 x 4 pixels: give --image-size"):
            operations_per_image(nn.Conv2d(3, 8, 5), 4)


def test_memory_of_a_process() -> None:
    options = PlanOptions(networks=4, model="small", replicas=2, optimizer="adamw")
    assert list(memory_of(options, SMALL).values()) == [1008, 800, 1600, 800]
    alone = PlanOptions(networks=4, model="small")
    assert list(memory_of(alone, SMALL).values()) == [1008, 800, 800]


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        ({"epoch_seconds": 7.0}, 7.0),
        ({"images_per_second": 5.0}, 20.0),
        ({"images_per_second": 5.0, "replicas": 2}, 10.0),
        ({"tflops": 2.0}, 100 * 4e9 / 2e12),
    ],
)
def test_seconds_of_an_epoch(given: dict[str, float], seconds: float) -> None:
    options = PlanOptions(networks=2, model="small", **given)
    assert epoch_of(options, Images(10, 100, 2), 4e9).seconds == pytest.approx(seconds)


class TestCommand:
    @pytest.fixture(autouse=True)
    def _alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)

    def told(self, capsys: pytest.CaptureFixture[str], *argv: str) -> str:
        assert cli.run(argv) == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        return captured.out

    def test_sixty_four_networks(self, capsys: pytest.CaptureFixture[str]) -> None:
        out = self.told(capsys, *ISSUED)
        assert "64 x resnet50 (25,557,032 parameters" in out
        assert "8 nodes of 8 GPUs" in out
        assert "crosses between nodes in 8 places: 7 to 8, 15 to 16, 23 to 24, ... 63 to 0" in out
        assert re.search(r"buckets of all_gather +2,048\.0\n", out)
        assert re.search(r"buckets of p2p +64\.0\n", out)
        rows = re.findall(r"^ *(all_gather|p2p) +(\w+) .* (\d+) rounds$", out, re.MULTILINE)
        assert [row[:2] for row in rows] == [
            (exchange, topology) for exchange in ("all_gather", "p2p") for topology in TOPOLOGIES
        ]
        assert {row[2] for row in rows if row[1] == "ring"} == {"63"}
        assert {row[2] for row in rows if row[1] == "exponential"} == {"6"}
        assert "warning: all_gather holds 2.0 GiB" in out
        assert "take --graft.exchange p2p" in out
        assert "400 GB/s from and to each GPU" in out

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            (("--networks", "12"), "4 GPUs of the last node have no network: 8 or 16"),
            (("--networks", "2", "--replicas", "16"), "a network spans nodes"),
            (
                ("--networks", "8", "--epoch-seconds", "0.4"),
                "of the time with any choice: with --graft.every 2 it is less than 2%",
            ),
            (("--networks", "20"), "reaches the last after 19 rounds"),
            (("--networks", "1"), "One network exchanges nothing"),
            (("--networks", "4", "--backend", "gloo"), "sends its weights to all others"),
        ],
    )
    def test_what_is_said_of_a_choice(
        self, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], says: str
    ) -> None:
        assert says in self.told(capsys, "plan", "--model", "resnet18", *options)

    def test_a_choice_that_hurts_nobody(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "warning" not in self.told(capsys, "plan", "--model", "resnet18", "--networks", "4")

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            (("--networks", "0"), "networks must be in [1, 4096], got 0"),
            (("--networks", "4", "--gpus-per-node", "0"), "gpus-per-node must be at least 1"),
            (("--networks", "4", "--bandwidth-inter", "0"), "bandwidth-inter must be above 0"),
            (("--networks", "4", "--bandwidth-intra", ".inf"), "bandwidth-intra must be above 0"),
            (("--networks", "4", "--replicas", "3"), "replicas must divide the 8 GPUs"),
            (("--networks", "4", "--epoch-seconds", "1", "--images-per-second", "1"), "give one"),
            (("--networks", "4", "--model", "resnet19"), "model.name 'resnet19' is unknown"),
            (("--networks", "4", "--backend", "mpi"), "'nccl', 'gloo'"),
            (("--network", "4"), "dist-graft plan --help lists all options"),
            ((), "networks"),
        ],
    )
    def test_what_is_refused(
        self, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], says: str
    ) -> None:
        assert cli.run(("plan", "--model", "resnet8", *options)) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert len(captured.err.splitlines()) == 1, captured.err
        assert says in captured.err

    def test_every_option_changes_the_page(self, capsys: pytest.CaptureFixture[str]) -> None:
        """None is there that does nothing."""
        usual = ("plan", "--networks", "8", "--model", "resnet8", "--gpus-per-node", "4")
        others = {
            "networks": "12",
            "model": "resnet14",
            "gpus_per_node": "8",
            "replicas": "2",
            "bandwidth_intra": "4",
            "bandwidth_inter": "4",
            "bandwidth_local": "1",
            "backend": "gloo",
            "bucket_mb": "0.1",
            "optimizer": "adamw",
            "classes": "100",
            "image_size": "64",
            "images": "1000",
            "images_per_second": "1000",
            "epoch_seconds": "60",
            "tflops": "5",
        }
        assert set(others) == {field.name for field in fields(PlanOptions)}
        before = self.told(capsys, *usual)
        for name, value in others.items():
            changed = self.told(capsys, *usual, f"--{name.replace('_', '-')}", value)
            assert changed != before, name

    def test_help_and_mistakes_load_no_torch(self) -> None:
        program = (
            "import sys\n"
            "from dist_graft.cli import run\n"
            "assert run(['plan', '--networks', '0', '--model', 'resnet50']) == 2\n"
            "try:\n"
            "    run(['plan', '--help'])\n"
            "except SystemExit:\n"
            "    pass\n"
            "assert not {'torch', 'matplotlib', 'numpy'} & set(sys.modules)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "--bandwidth-inter" in done.stdout
