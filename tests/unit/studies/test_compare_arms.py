from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dist_graft.config import TrainConfig
from dist_graft.studies.arms import Design, design, lr_trials
from dist_graft.studies.overrides import expand, key_of, merge, resolve
from dist_graft.studies.plan import Plan, plan_of


def plan(**changes: Any) -> Plan:
    content = {"name": "p", "methods": ["graft"], "networks": [2], "seeds": [0]}
    return plan_of(content | {"leave_out": ["constant", "shuffled"]} | changes)


def designed(plan: Plan, best_lr: float | None = 0.1) -> Design:
    return design(plan, {trial.key: best_lr for trial in lr_trials(plan, plan)})


def labels(design: Design) -> list[str]:
    return [arm.label for arm in design.arms]


class TestControls:
    def test_of_the_smallest_plan(self) -> None:
        found = designed(plan())
        assert labels(found) == [
            "graft, 2 networks",
            "no exchange, 2 networks",
            "one network, 2 x epochs, best lr 0.1",
        ]
        assert found.also[found.arms[1].key] == ["independent, best lr 0.1"]
        (contrast,) = found.main
        assert (contrast.method, contrast.control) == (found.arms[0], found.arms[1])
        assert [further.control_name for further in found.further] == [
            "ensemble of 2 independent, best lr 0.1",
            "one network, 2 x epochs, best lr 0.1",
        ]
        assert [role.role for role in found.arms] == ["method", "control", "control"]

    def test_no_exchange_differs_from_the_method_in_the_exchange_alone(self) -> None:
        methods = {"dlr": {"optim.lr_diversity": "cosine", "graft.amplitude": 0.2}}
        found = designed(plan(methods=methods, recipe={"optim.weight_decay": 1e-4}))
        mine, other = found.main[0].method.config(3), found.main[0].control.config(3)
        assert other.method == "none"
        assert other.graft.every == 0
        assert replace(other, method=mine.method, graft=mine.graft) == mine
        assert other.optim.lr_diversity == "cosine"

    def test_the_best_single_learning_rate(self) -> None:
        found = designed(plan(recipe={"optim.lr_diversity": "cosine"}), best_lr=0.05)
        control = next(c for c in found.further if c.control_name == "independent, best lr 0.05")
        config = control.control.config(0)
        assert (config.optim.lr, config.optim.lr_diversity) == (0.05, "none")
        assert config.method == "none"
        assert control.control.networks == 2

    @pytest.mark.parametrize("networks", [2, 4])
    def test_one_network_is_trained_as_long_as_all_together(self, networks: int) -> None:
        recipe = {"epochs": 7, "optim": {"schedule": "step", "step_epochs": 3}}
        found = designed(plan(networks=[networks], recipe=recipe))
        long = next(arm for arm in found.arms if arm.name.startswith("one network"))
        assert long.networks == 1
        assert long.config(0).epochs == 7 * networks
        assert long.config(0).optim.step_epochs == 3 * networks

    def test_one_network_alone_needs_no_longer_one(self) -> None:
        found = designed(plan(networks=[1], methods=["internal"]))
        assert labels(found) == ["internal, 1 network", "no exchange, 1 network"]

    def test_one_network_alone_has_nobody_to_exchange_with(self) -> None:
        found = designed(plan(networks=[1, 2]))
        assert [contrast.method.networks for contrast in found.main] == [2]

    def test_methods_that_differ_in_the_exchange_alone_share_their_controls(self) -> None:
        methods = {"graft": None, "sharp": {"graft.sensitivity": 500}}
        found = designed(plan(methods=methods))
        assert len(found.arms) == 4
        assert len({contrast.control.key for contrast in found.main}) == 1

    def test_methods_that_learn_otherwise_have_their_own(self) -> None:
        methods = {"graft": None, "long": {"epochs": 40}}
        found = designed(plan(methods=methods))
        names = [arm.name for arm in found.arms if arm.role == "control"]
        assert names == [
            "no exchange",
            "one network, 2 x epochs, best lr 0.1",
            "no exchange (as long)",
            "one network, 2 x epochs, best lr 0.1 (as long)",
        ]

    def test_a_method_without_exchange_is_not_compared_with_itself(self) -> None:
        found = designed(plan(methods=["graft", "independent"]))
        assert [contrast.method.name for contrast in found.main] == ["graft"]
        assert found.main[0].control.name == "independent"
        assert "no exchange" in found.also[found.main[0].control.key]

    def test_what_trains_the_same_is_trained_once(self) -> None:
        found = designed(plan(methods={"graft": None, "again": {"graft.amplitude": 0.4}}))
        assert found.also[found.arms[0].key] == ["again"]

    def test_a_learning_rate_that_was_not_found_is_said(self) -> None:
        found = designed(plan(), best_lr=None)
        assert any("best learning rate: not known" in text for text in found.absent)
        assert len(found.arms) == 2

    @pytest.mark.parametrize(
        ("against", "name"),
        [
            ("no_exchange", "no exchange"),
            ("best_lr", "independent, best lr 0.3"),
            ("one_network", "one network, 2 x epochs, best lr 0.3"),
        ],
    )
    def test_the_plan_names_the_control_of_the_verdict(self, against: str, name: str) -> None:
        found = designed(plan(against=against), best_lr=0.3)
        assert [contrast.control_name for contrast in found.main] == [name]
        assert name not in [contrast.control_name for contrast in found.further]

    def test_every_contrast_is_there_once(self) -> None:
        methods = {"graft": None, "dlr": {"optim.lr_diversity": "cosine"}}
        found = designed(plan(methods=methods, networks=[2, 4]))
        pairs = [contrast.pair for contrast in (*found.main, *found.further)]
        assert len(pairs) == len(set(pairs))
        assert len(found.main) == 4


class TestCoefficientsThatKnowNothing:
    def names(self, **changes: Any) -> list[str]:
        found = designed(plan(leave_out=[], **changes))
        return [arm.name for arm in found.arms if arm.name.startswith(("constant", "shuffled"))]

    def test_are_controls_of_grafting(self) -> None:
        assert self.names() == ["constant", "shuffled"]

    def test_one_half_is_one_half_whatever_the_sensitivity(self) -> None:
        methods = {"graft": None, "sharp": {"graft.sensitivity": 500}}
        assert self.names(methods=methods) == ["constant", "shuffled", "shuffled (as sharp)"]

    @pytest.mark.parametrize("method", ["papa", "wash", "average", "internal", "noise", "filter"])
    def test_are_none_of_what_has_no_coefficients_by_layer(self, method: str) -> None:
        assert self.names(methods=[method]) == []

    def test_are_none_of_a_network_alone(self) -> None:
        assert self.names(networks=[1]) == []

    def test_may_be_methods_themselves(self) -> None:
        found = designed(plan(methods=["graft", "constant"], leave_out=[]))
        assert [arm.name for arm in found.arms].count("constant") == 1
        assert "constant" in [contrast.control_name for contrast in found.further]

    def test_what_the_plan_leaves_out_is_said(self) -> None:
        found = designed(plan(leave_out=["one_network", "shuffled"]))
        assert found.absent == [
            "one_network: left out by the plan",
            "shuffled: left out by the plan",
        ]
        assert not any(arm.name.startswith(("one network", "shuff")) for arm in found.arms)


class TestLearningRates:
    def test_candidates_are_those_of_the_members(self) -> None:
        methods = {"graft": None, "dlr": {"optim.lr_diversity": "cosine"}}
        asked = plan(methods=methods, networks=[2, 3])
        (trial,) = lr_trials(asked, asked)
        assert trial.candidates == (0.025, 0.05, 0.075, 0.1)

    def test_or_what_the_plan_names(self) -> None:
        asked = plan(best_lr={"candidates": [0.3, 0.2]})
        assert lr_trials(asked, asked)[0].candidates == (0.3, 0.2)
        asked = plan(best_lr={"value": 0.3})
        assert lr_trials(asked, asked)[0].candidates == (0.3,)

    def test_populations_that_learn_otherwise_are_tried_apart(self) -> None:
        asked = plan(methods={"graft": None, "heavy": {"optim.weight_decay": 0.01}})
        assert len(lr_trials(asked, asked)) == 2


class TestKeys:
    CONFIG = TrainConfig()

    def key(self, networks: int = 2, **options: Any) -> str:
        return key_of(resolve(expand(options), networks), networks)

    def test_what_changes_numbers_changes_the_key(self) -> None:
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

    def test_what_does_not_leaves_it(self) -> None:
        for name, value in {
            "run_dir": "x",
            "resume": "must",
            "checkpoint.keep": 5,
            "monitor.tensorboard": False,
            "runtime.timeout_seconds": 3.0,
            "graft.amplitude": 0.4,
        }.items():
            assert self.key(**{name: value}) == self.key(), name

    def test_without_exchange_its_options_do_not_count(self) -> None:
        none = self.key(method="none")
        assert self.key(method="none", graft={"every": 0, "amplitude": 1.0}) == none
        assert self.key(graft={"every": 0, "amplitude": 1.0}) == none
        assert self.key(method="average", graft={"every": 0}) == none
        assert self.key(graft={"every": 0, "every_steps": 5}) != none
        assert self.key(method="papa", graft={"every": 0}) != none

    def test_a_network_alone_exchanges_nothing(self) -> None:
        none = self.key(1, method="none")
        assert self.key(1) == self.key(1, method="wash") == none
        assert self.key(1, graft={"source": "noise"}) != none


def test_merging_lays_sections_over_each_other() -> None:
    under = {"a": {"x": 1, "y": {"z": 2}}, "b": 3}
    assert merge(under, {"a.y.w": 4, "b": {"c": 5}}) == {
        "a": {"x": 1, "y": {"z": 2, "w": 4}},
        "b": {"c": 5},
    }
    assert under == {"a": {"x": 1, "y": {"z": 2}}, "b": 3}


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
def test_dots_are_expanded(options: dict[str, Any], expanded: dict[str, Any]) -> None:
    assert expand(options) == expanded
