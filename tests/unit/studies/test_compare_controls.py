from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from made_up import make_plan

from dist_graft.config import TrainConfig
from dist_graft.errors import ConfigError
from dist_graft.studies.controls import Arm, Design, Run, build_design
from dist_graft.studies.plan import BASELINES, Plan
from dist_graft.studies.train_options import build_config, delivery, expand, merge, run_key


def plan(**changes: Any) -> Plan:
    return make_plan(**{"seeds": [0], "leave_out": ["constant", "shuffled"]} | changes)


def designed(plan: Plan) -> Design:
    return build_design(plan)


def arm_of(design: Design, name: str) -> Arm:
    (arm,) = (arm for arm in design.arms if arm.name == name)
    return arm


def labels(design: Design) -> list[str]:
    return [arm.label for arm in design.arms]


class TestControls:
    def test_of_a_minimal_plan(self) -> None:
        found = designed(plan())
        assert labels(found) == [
            "graft, 2 networks",
            "no exchange, 2 networks",
            "one network, 2 x epochs",
        ]
        assert found.aliases[found.arms[1].key] == ["independent"]
        (contrast,) = found.primary
        assert (contrast.method, contrast.control) == (found.arms[0], found.arms[1])
        assert [further.control_name for further in found.secondary] == [
            "independent (both as ensembles)",
            "one network, 2 x epochs",
        ]
        outcomes = [(c.outcome, c.control_outcome) for c in (contrast, *found.secondary)]
        assert outcomes == [(name, name) for name in ("delivered", "ensemble", "delivered")]
        assert [role.role for role in found.arms] == ["method", "control", "control"]

    def test_methods_are_compared_with_every_arm_without_exchange(self) -> None:
        slow = {"method": "none", "optim.lrs": [0.05, 0.05]}
        found = designed(plan(methods={"graft": None, "papa": None, "slow": slow}))
        assert [
            (c.method.name, c.outcome, c.control_outcome)
            for c in found.secondary
            if c.control_name == "slow"
        ] == [("graft", "delivered", "delivered"), ("papa", "delivered", "delivered")]

    def test_no_exchange_differs_from_the_method_only_in_the_exchange(self) -> None:
        methods = {"dlr": {"optim.lr_diversity": "cosine", "graft.amplitude": 0.2}}
        found = designed(plan(methods=methods, recipe={"optim.weight_decay": 1e-4}))
        method, control = (
            arm.config(3) for arm in (found.primary[0].method, found.primary[0].control)
        )
        assert control.method == "none"
        assert control.graft.every == 0
        assert replace(control, method=method.method, graft=method.graft) == method
        assert control.optim.lr_diversity == "cosine"

    def test_independent_networks_have_one_learning_rate(self) -> None:
        found = designed(plan(recipe={"optim.lr_diversity": "cosine"}))
        control = arm_of(found, "independent")
        assert control.config(0).optim.lr_diversity == "none"
        assert control.config(0).method == "none"
        assert control.networks == 2

    def test_every_arm_trains_with_its_own_best_rate(self) -> None:
        study = plan(tuning={"rates": [0.1, 0.2, 0.4]})
        declared = build_design(study)
        assert {arm.config(0).optim.lr for arm in declared.arms} == {0.1}
        rates = dict(zip((arm.key for arm in declared.arms), (0.4, 0.1, 0.2), strict=True))
        found = build_design(study, rates)
        assert [arm.config(0).optim.lr for arm in found.arms] == [0.4, 0.1, 0.2]

    def test_an_arm_without_a_rate_is_left_out(self) -> None:
        study = plan(tuning={"rates": [0.1, 0.2]})
        keys = [arm.key for arm in build_design(study).arms]
        found = build_design(study, {keys[0]: 0.1, keys[1]: None, keys[2]: 0.2})
        assert [arm.name for arm in found.arms] == ["graft", "one network, 2 x epochs"]
        assert any(text.startswith("no exchange, 2 networks: no learn") for text in found.omitted)

    def test_methods_that_differ_in_a_tuned_rate_are_one_arm(self) -> None:
        methods = {"graft": None, "hot": {"optim.lr": 0.4}}
        found = designed(plan(methods=methods, tuning={"rates": [0.1, 0.2]}))
        assert found.aliases[found.arms[0].key] == ["hot"]

    @pytest.mark.parametrize("networks", [2, 4])
    def test_one_network_trains_for_the_epochs_of_the_whole_population(self, networks: int) -> None:
        recipe = {"epochs": 7, "optim": {"schedule": "step", "step_epochs": 3}}
        found = designed(plan(networks=[networks], recipe=recipe))
        long = next(arm for arm in found.arms if arm.name.startswith("one network"))
        assert long.networks == 1
        assert long.config(0).epochs == 7 * networks
        assert long.config(0).optim.step_epochs == 3 * networks

    def test_population_of_one_has_no_longer_trained_control(self) -> None:
        found = designed(plan(networks=[1], methods=["internal"]))
        assert labels(found) == ["internal, 1 network", "no exchange, 1 network"]

    def test_population_of_one_has_no_exchange(self) -> None:
        found = designed(plan(networks=[1, 2]))
        assert [contrast.method.networks for contrast in found.primary] == [2]

    def test_methods_that_differ_only_in_the_exchange_share_controls(self) -> None:
        methods = {"graft": None, "sharp": {"graft.sensitivity": 500}}
        found = designed(plan(methods=methods))
        assert len(found.arms) == 4
        assert len({contrast.control.key for contrast in found.primary}) == 1

    def test_methods_that_train_differently_have_separate_controls(self) -> None:
        methods = {"graft": None, "long": {"epochs": 40}}
        found = designed(plan(methods=methods))
        names = [arm.name for arm in found.arms if arm.role == "control"]
        assert names == [
            "no exchange",
            "one network, 2 x epochs",
            "no exchange (as long)",
            "one network, 2 x epochs (as long)",
        ]

    def test_a_method_without_exchange_is_not_compared_with_itself(self) -> None:
        found = designed(plan(methods=["graft", "independent"]))
        assert [contrast.method.name for contrast in found.primary] == ["graft"]
        assert found.primary[0].control.name == "independent"
        assert "no exchange" in found.aliases[found.primary[0].control.key]

    def test_identical_arms_are_run_once(self) -> None:
        found = designed(plan(methods={"graft": None, "again": {"graft.amplitude": 0.4}}))
        assert found.aliases[found.arms[0].key] == ["again"]

    @pytest.mark.parametrize(
        ("against", "name"),
        [
            ("no_exchange", "no exchange"),
            ("best_lr", "independent"),
            ("one_network", "one network, 2 x epochs"),
        ],
    )
    def test_against_selects_the_primary_contrasts(self, against: str, name: str) -> None:
        recipe = {"optim.lr_diversity": "cosine"}  # otherwise two controls are the same
        found = designed(plan(against=against, recipe=recipe))
        assert [contrast.control_name for contrast in found.primary] == [name]
        assert name not in [contrast.control_name for contrast in found.secondary]

    def test_the_plans_control_may_have_another_name(self) -> None:
        found = designed(plan(against="best_lr"))
        (contrast,) = found.primary
        assert contrast.control.key == arm_of(found, "no exchange").key
        assert found.aliases[contrast.control.key] == ["independent"]
        assert contrast.identity not in [other.identity for other in found.secondary]

    def test_an_ensemble_is_compared_with_populations_only(self) -> None:
        found = designed(plan(primary="ensemble", baselines=["ema", "local_sgd"]))
        assert labels(found) == ["graft, 2 networks", "no exchange, 2 networks"]
        assert [c.outcome for c in (*found.primary, *found.secondary)] == ["ensemble"]
        assert [text.partition(":")[0] for text in found.omitted[2:]] == [
            "one network, 2 x epochs",
            "EMA of one network",
            "EMA of one network, 2 x epochs",
            "local SGD, 2 networks",
        ]

    def test_a_soup_is_compared_with_the_model_that_a_control_delivers(self) -> None:
        found = designed(plan(primary="uniform_soup", methods={"graft": {"delivers": "soup"}}))
        outcomes = {c.control_name: c.control_outcome for c in (*found.primary, *found.secondary)}
        assert outcomes["no exchange"] == outcomes["one network, 2 x epochs"] == "delivered"
        methods = {"average": {"delivers": "soup"}}
        found = designed(plan(primary="uniform_soup", methods=methods, baselines=["local_sgd"]))
        assert [c.control_outcome for c in found.secondary if c.control_name == "local SGD"] == [
            "uniform_soup"  # local SGD exchanges, and so forms one
        ]
        assert {c.outcome for c in found.primary} == {"uniform_soup"}

    def test_independent_networks_drop_the_members_options(self) -> None:
        methods = {"graft": {"members": [{"optim.momentum": 0.8}, {}]}}
        found = designed(plan(methods=methods))
        names = [arm.name for arm in found.arms if arm.role == "control"]
        assert names == [
            "no exchange (as graft)",
            "independent (without the members' options)",
            "one network, 2 x epochs (without the members' options)",
        ]

    @pytest.mark.parametrize(
        "options",
        [
            {"members": [{"optim.lr": 0.1}, {"optim.lr": 0.2}]},
            {"diversity": {"optim.lr": {"uniform": [0.1, 0.2]}}},
            {"optim.lrs": [0.1, 0.2]},
        ],
    )
    def test_rates_of_single_networks_are_not_tuned(self, options: dict[str, Any]) -> None:
        found = designed(plan(methods={"graft": options}))
        assert not arm_of(found, "graft").tunable
        assert arm_of(designed(plan()), "graft").tunable
        momentum = {"members": [{"optim.momentum": 0.8}, {}]}
        assert arm_of(designed(plan(methods={"graft": momentum})), "graft").tunable

    def test_contrasts_are_distinct(self) -> None:
        methods = {"graft": None, "dlr": {"optim.lr_diversity": "cosine"}}
        found = designed(plan(methods=methods, networks=[2, 4]))
        pairs = [contrast.identity for contrast in (*found.primary, *found.secondary)]
        assert len(pairs) == len(set(pairs))
        assert len(found.primary) == 4


class TestUninformedCoefficients:
    def names(self, **changes: Any) -> list[str]:
        found = designed(plan(leave_out=[], **changes))
        return [arm.name for arm in found.arms if arm.name.startswith(("constant", "shuffled"))]

    def test_control_grafting(self) -> None:
        assert self.names() == ["constant", "shuffled"]

    def test_constant_does_not_depend_on_the_sensitivity(self) -> None:
        methods = {"graft": None, "sharp": {"graft.sensitivity": 500}}
        assert self.names(methods=methods) == ["constant", "shuffled", "shuffled (as sharp)"]

    @pytest.mark.parametrize("method", ["papa", "wash", "average", "internal", "noise", "filter"])
    def test_do_not_control_methods_without_layer_coefficients(self, method: str) -> None:
        assert self.names(methods=[method]) == []

    def test_do_not_control_a_single_network(self) -> None:
        assert self.names(networks=[1]) == []

    def test_can_be_methods(self) -> None:
        found = designed(plan(methods=["graft", "constant"], leave_out=[]))
        assert [arm.name for arm in found.arms].count("constant") == 1
        assert "constant" in [contrast.control_name for contrast in found.secondary]

    def test_omitted_controls_are_reported(self) -> None:
        found = designed(plan(leave_out=["one_network", "shuffled"]))
        assert found.omitted == [
            "one_network: left out by the plan",
            "shuffled: left out by the plan",
        ]
        assert not any(arm.name.startswith(("one network", "shuff")) for arm in found.arms)

    def test_omitted_lengths_are_reported(self) -> None:
        baselines = {"ema": {"lengths": [1]}, "checkpoint_average": {"lengths": ["K"]}}
        found = designed(plan(baselines=baselines))
        assert [text for text in found.omitted if "lengths" in text] == [
            "EMA of one network, 2 x epochs: left out by the plan (baselines.ema.lengths)",
            "mean of checkpoints of one network: left out by the plan "
            "(baselines.checkpoint_average.lengths)",
        ]


class TestBaselines:
    def named(self, **changes: Any) -> dict[str, Arm]:
        found = designed(plan(leave_out=["one_network", "constant", "shuffled"], **changes))
        return {arm.name: arm for arm in found.arms[2:]}

    def test_averages_of_one_network_at_both_lengths(self) -> None:
        recipe = {"epochs": 6, "optim.lr_diversity": "cosine"}
        found = self.named(baselines=["ema", "checkpoint_average"], recipe=recipe)
        del found["independent"]
        described = {
            name: (arm.networks, arm.config(0).epochs, arm.delivers) for name, arm in found.items()
        }
        assert described == {
            "EMA of one network": (1, 6, "ema"),
            "EMA of one network, 2 x epochs": (1, 12, "ema"),
            "mean of checkpoints of one network": (1, 6, "checkpoints"),
            "mean of checkpoints of one network, 2 x epochs": (1, 12, "checkpoints"),
        }
        every = [arm.config(0).checkpoint.every for arm in found.values()]
        assert every == [1, 2, 1, 2]
        assert all(arm.config(0).optim.lr_diversity == "none" for arm in found.values())

    def test_data_parallel_training_takes_the_steps_of_a_member(self) -> None:
        (arm,) = self.named(
            baselines=["data_parallel"], networks=[4], recipe={"epochs": 5}
        ).values()
        config = arm.config(0)
        assert (arm.networks, config.runtime.replicas) == (1, 4)
        assert (config.data.batch_size, config.epochs) == (4 * TrainConfig().data.batch_size, 20)

    def test_longer_training_is_checked_against_the_same_at_the_length_of_the_recipe(self) -> None:
        baselines = ["data_parallel", "ema", "checkpoint_average"]
        design = build_design(make_plan(baselines=baselines, networks=[4]))
        names = {arm.key: arm.name for arm in design.arms}
        compared = {names[key]: (arm.name, n) for key, (arm, n) in design.lengthened.items()}
        independent = compared["one network, 4 x epochs"]
        assert compared == {
            "one network, 4 x epochs": independent,
            "data parallel, one network on 4 processes": independent,
            "EMA of one network, 4 x epochs": ("EMA of one network", 4),
            "mean of checkpoints of one network, 4 x epochs": (
                "mean of checkpoints of one network",
                4,
            ),
        }
        assert independent[1] == 4

    def test_a_long_average_without_a_short_one_is_not_checked(self) -> None:
        baselines = {"ema": {"lengths": ["K"]}, "checkpoint_average": {"lengths": [1]}}
        design = build_design(make_plan(baselines=baselines, networks=[4]))
        names = {arm.key: arm.name for arm in design.arms}
        assert [names[key] for key in design.lengthened] == ["one network, 4 x epochs"]

    def test_local_sgd_is_a_population(self) -> None:
        (arm,) = self.named(baselines={"local_sgd": {"graft.every_steps": 7}}).values()
        config = arm.config(0)
        assert (arm.networks, config.method, config.graft.every_steps) == (2, "average", 7)

    def test_lengths_leave_out_a_variant(self) -> None:
        baselines = {"ema": {"lengths": [1]}, "checkpoint_average": {"lengths": ["K"]}}
        names = ["EMA of one network", "mean of checkpoints of one network, 2 x epochs"]
        found = self.named(baselines=baselines)
        assert list(found) == names
        both = self.named(baselines=list(baselines))
        assert [both[name].key for name in names] == [found[name].key for name in names]

    def test_branches_continue_the_schedule_of_their_start(self) -> None:
        (arm,) = self.named(
            baselines={"branches": {"start": 0.3}},
            networks=[4],
            recipe={"epochs": 10, "optim.lr_diversity": "none"},
        ).values()
        assert arm.name == arm.label == "4 branches of one network after 3 of 10 epochs"
        assert (arm.networks, arm.start_epochs, arm.delivers) == (4, 3, "soup")
        config = arm.config(0)
        assert (config.method, config.epochs, config.optim.schedule_epochs) == ("none", 10, 10)
        run = Run(phase="comparison", arm=arm, seed=0)
        assert [run.trained(epochs) for epochs in (2, 3, 4, 10)] == [2, 3, 7, 31]
        assert run.cost == 3 + 4 * 7
        assert replace(arm, start_epochs=4).key != arm.key
        assert replace(arm, start_epochs=0).key != arm.key

    @pytest.mark.parametrize("schedule", ["step", "constant"])
    def test_branches_with_a_schedule_without_an_end(self, schedule: str) -> None:
        (arm,) = self.named(baselines=["branches"], recipe={"optim.schedule": schedule}).values()
        assert arm.config(0).optim.schedule_epochs is None

    def test_snapshots_are_the_ends_of_the_cycles(self) -> None:
        plans = {
            4: {"baselines": ["snapshots"], "networks": [4]},
            6: {"baselines": {"snapshots": {"optim.cycles": 6}}, "networks": [3]},
        }
        for cycles, changes in plans.items():
            (arm,) = self.named(recipe={"epochs": 8}, **changes).values()
            config, networks = arm.config(0), arm.group
            assert arm.label == (
                f"snapshot ensemble of one network, {networks} x epochs in {cycles} cycles"
            )
            assert (arm.networks, arm.delivers, config.epochs) == (1, "snapshots", 8 * networks)
            assert (config.optim.cycles, config.checkpoint.keep) == (cycles, cycles)
            assert config.checkpoint.every * cycles == config.epochs
            kept = replace(arm, options=merge(arm.options, {"checkpoint.keep": 2}))
            assert kept.key != arm.key

    @pytest.mark.parametrize("primary", ["delivered", "ensemble"])
    def test_snapshots_are_compared_with_ensembles_only(self, primary: str) -> None:
        found = designed(plan(baselines=["snapshots", "ema"], primary=primary))
        contrasts = [c for c in (*found.primary, *found.secondary) if "snapshot" in c.control_name]
        assert [(c.outcome, c.control_outcome) for c in contrasts] == [("ensemble", "ensemble")]

    def test_the_teachers_are_the_population_without_exchange(self) -> None:
        found = designed(plan(baselines=["distilled"], recipe={"epochs": 3}))
        arm = arm_of(found, "distilled from 2 members into one network")
        without = arm_of(found, "no exchange")
        assert arm.teachers
        assert (arm.networks, arm.delivers) == (1, "network")
        run, members = (Run(phase="comparison", arm=each, seed=5) for each in (arm, without))
        assert run.teachers
        assert run.teachers.key == members.key
        assert run.cost == 3 * 2 + 3
        assert run.key not in (Run(phase="comparison", arm=arm, seed=6).key, members.key)
        assert replace(arm, teachers=None).key != arm.key

    def test_members_and_student_have_the_same_learning_rate(self) -> None:
        found = designed(plan(baselines=["distilled"], tuning={"rates": [0.3]}))
        arm = arm_of(found, "distilled from 2 members into one network")
        assert arm.teachers
        assert arm.config(0).optim.lr == arm.teachers.config(0).optim.lr == 0.3
        assert arm.teachers.key == arm_of(found, "no exchange").key

    def test_a_single_network_has_averages_only(self) -> None:
        found = designed(plan(networks=[1], methods=["internal"], baselines=list(BASELINES)))
        assert [arm.name for arm in found.arms[2:]] == [
            "EMA of one network",
            "mean of checkpoints of one network",
        ]

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"baselines": ["branches"], "recipe": {"epochs": 1}}, "got 0.5 of 1 epochs"),
            (
                {"baselines": ["snapshots"], "recipe": {"optim.schedule": "step"}},
                "optim.cycles requires optim.schedule cosine",
            ),
            (
                {"baselines": {"snapshots": {"optim.cycles": 3}}, "recipe": {"epochs": 5}},
                "must divide the",
            ),
        ],
    )
    def test_what_cannot_be_trained_is_refused(self, changes: dict[str, Any], says: str) -> None:
        with pytest.raises(ConfigError, match=says):
            designed(plan(**changes))

    def test_are_compared_by_the_model_that_they_deliver(self) -> None:
        found = designed(plan(baselines=["ema"], primary="mean_of_members"))
        contrasts = [c for c in found.secondary if c.control_name.startswith("EMA")]
        outcomes = [(contrast.outcome, contrast.control_outcome) for contrast in contrasts]
        assert outcomes == [("mean_of_members", "delivered")] * 2

    def test_mean_of_checkpoints_is_not_the_run_of_a_plain_network(self) -> None:
        found = self.named(baselines=["checkpoint_average"], networks=[1], methods=["internal"])
        keys = [arm.key for arm in found.values()]
        assert len(keys) == 1
        assert keys[0] != run_key(build_config({"method": "none"}, 1), 1)


class TestDelivery:
    @pytest.mark.parametrize(
        ("options", "networks", "delivered"),
        [
            ({"method": "graft"}, 2, "member"),
            ({"method": "average"}, 2, "member"),
            ({"method": "papa"}, 2, "soup"),
            ({"method": "wash"}, 4, "soup"),
            ({"method": "papa"}, 1, "network"),
            ({"method": "none"}, 2, "member"),
            ({"method": "none"}, 1, "network"),
            ({"method": "none", "optim.ema_decay": 0.9}, 1, "ema"),
            ({"method": "graft", "optim.ema_decay": 0.9}, 2, "ema"),
            ({"method": "papa", "optim.ema_decay": 0.9}, 2, "soup"),
        ],
    )
    def test_of_a_run(self, options: dict[str, Any], networks: int, delivered: str) -> None:
        assert delivery(build_config(expand(options), networks), networks) == delivered

    def test_of_the_plan_replaces_that_of_the_rule(self) -> None:
        methods = {"graft": None, "soup": {"method": "graft", "delivers": "soup"}}
        found = designed(plan(methods=methods))
        assert [arm_of(found, name).delivers for name in methods] == ["member", "soup"]

    @pytest.mark.parametrize(
        ("delivers", "of_controls"),
        [
            ("soup", ["soup", "soup", "member", "member", "network"]),
            ("checkpoints", ["checkpoints"] * 5),
        ],
    )
    def test_of_controls(self, delivers: str, of_controls: list[str]) -> None:
        recipe = {"optim.lr_diversity": "cosine"}
        methods = {"graft": {"delivers": delivers}}
        found = designed(plan(methods=methods, recipe=recipe, leave_out=[]))
        starts = ("constant", "shuffled", "no exchange", "independent", "one network")
        controls = [next(a for a in found.arms if a.name.startswith(name)) for name in starts]
        assert [arm.delivers for arm in controls] == of_controls


class TestKeys:
    CONFIG = TrainConfig()

    def key(self, networks: int = 2, **options: Any) -> str:
        return run_key(build_config(expand(options), networks), networks)

    def test_options_that_change_results_change_the_key(self) -> None:
        keys = [
            self.key(),
            self.key(networks=3),
            self.key(seed=1),
            self.key(epochs=3),
            self.key(**{"optim.lr": 0.2}),
            self.key(**{"graft.amplitude": 0.2}),
            self.key(method="none"),
        ]
        assert len(set(keys)) == len(keys)

    def test_options_without_effect_leave_the_key_unchanged(self) -> None:
        for name, value in {
            "run_dir": "x",
            "resume": "must",
            "checkpoint.keep": 5,
            "monitor.tensorboard": False,
            "runtime.timeout_seconds": 3.0,
            "data.root": "elsewhere",
            "data.workers": 2,
            "data.download": False,
            "data.skip_broken": True,
            "graft.bucket_mb": 1.0,
            "graft.amplitude": 0.4,
        }.items():
            assert self.key(**{name: value}) == self.key(), name

    def test_the_root_of_own_data_changes_the_key(self) -> None:
        own = {"data.name": "torchvision.datasets:fake"}
        assert self.key(**own, **{"data.root": "a"}) != self.key(**own, **{"data.root": "b"})

    def test_options_of_checkpoints_change_the_mean_of_checkpoints(self) -> None:
        options = [{}, {"keep": 5}, {"keep": 10}, {"every": 2}, {"every_minutes": 1.0}]
        keys = [
            run_key(build_config({"checkpoint": changed}, 2), 2, "checkpoints")
            for changed in options
        ]
        assert len(set(keys)) == len(keys)

    def test_options_of_the_exchange_are_ignored_without_exchange(self) -> None:
        none = self.key(method="none")
        assert self.key(method="none", graft={"every": 0, "amplitude": 1.0}) == none
        assert self.key(graft={"every": 0, "amplitude": 1.0}) == none
        assert self.key(method="average", graft={"every": 0}) == none
        assert self.key(graft={"every": 0, "every_steps": 5}) != none

    def test_single_networks_do_not_depend_on_shared_initial_weights(self) -> None:
        methods = {"graft": None, "wash": {"model.shared_init": True}}
        names = [arm.name for arm in designed(plan(methods=methods)).arms]
        assert "no exchange (as wash)" in names
        assert sum(name.startswith("one network") for name in names) == 1

    def test_single_network_has_no_exchange(self) -> None:
        none = self.key(1, method="none")
        assert self.key(1) == self.key(1, method="wash") == none
        assert self.key(1, graft={"source": "noise"}) != none


def test_merge_updates_sections() -> None:
    base = {"a": {"x": 1, "y": {"z": 2}}, "b": 3}
    assert merge(base, {"a.y.w": 4, "b": {"c": 5}}) == {
        "a": {"x": 1, "y": {"z": 2, "w": 4}},
        "b": {"c": 5},
    }
    assert base == {"a": {"x": 1, "y": {"z": 2}}, "b": 3}


@pytest.mark.parametrize(
    ("options", "expanded"),
    [
        ({}, {}),
        ({"a": 1}, {"a": 1}),
        ({"a.b": 1, "a.c": 2}, {"a": {"b": 1, "c": 2}}),
        ({"a": {"b": 1}, "a.c": 2}, {"a": {"b": 1, "c": 2}}),
        ({"a.b": {"c.d": 1}}, {"a": {"b": {"c": {"d": 1}}}}),
        ({"a": [1, 2]}, {"a": [1, 2]}),
    ],
)
def test_expand(options: dict[str, Any], expanded: dict[str, Any]) -> None:
    assert expand(options) == expanded
