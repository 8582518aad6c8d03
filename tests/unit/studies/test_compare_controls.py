from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from made_up import make_plan

from dist_graft.config import TrainConfig
from dist_graft.studies.controls import Design, build_design, lr_trials
from dist_graft.studies.plan import Plan
from dist_graft.studies.train_options import expand, merge, resolve, run_key


def plan(**changes: Any) -> Plan:
    return make_plan(**{"seeds": [0], "leave_out": ["constant", "shuffled"]} | changes)


def designed(plan: Plan, best_lr: float | None = 0.1) -> Design:
    return build_design(plan, {trial.key: best_lr for trial in lr_trials(plan, plan)})


def labels(design: Design) -> list[str]:
    return [arm.label for arm in design.arms]


class TestControls:
    def test_of_a_minimal_plan(self) -> None:
        found = designed(plan())
        assert labels(found) == [
            "graft, 2 networks",
            "no exchange, 2 networks",
            "one network, 2 x epochs, best lr 0.1",
        ]
        assert found.aliases[found.arms[1].key] == ["independent, best lr 0.1"]
        (contrast,) = found.primary
        assert (contrast.method, contrast.control) == (found.arms[0], found.arms[1])
        assert [further.control_name for further in found.secondary] == [
            "ensemble of 2 independent, best lr 0.1",
            "one network, 2 x epochs, best lr 0.1",
        ]
        assert [role.role for role in found.arms] == ["method", "control", "control"]

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

    def test_independent_networks_use_the_best_learning_rate(self) -> None:
        found = designed(plan(recipe={"optim.lr_diversity": "cosine"}), best_lr=0.05)
        control = next(c for c in found.secondary if c.control_name == "independent, best lr 0.05")
        config = control.control.config(0)
        assert (config.optim.lr, config.optim.lr_diversity) == (0.05, "none")
        assert config.method == "none"
        assert control.control.networks == 2

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
            "one network, 2 x epochs, best lr 0.1",
            "no exchange (as long)",
            "one network, 2 x epochs, best lr 0.1 (as long)",
        ]

    def test_a_method_without_exchange_is_not_compared_with_itself(self) -> None:
        found = designed(plan(methods=["graft", "independent"]))
        assert [contrast.method.name for contrast in found.primary] == ["graft"]
        assert found.primary[0].control.name == "independent"
        assert "no exchange" in found.aliases[found.primary[0].control.key]

    def test_identical_arms_are_run_once(self) -> None:
        found = designed(plan(methods={"graft": None, "again": {"graft.amplitude": 0.4}}))
        assert found.aliases[found.arms[0].key] == ["again"]

    def test_an_unknown_learning_rate_is_reported(self) -> None:
        found = designed(plan(), best_lr=None)
        assert any("best learning rate: unknown" in text for text in found.omitted)
        assert len(found.arms) == 2

    @pytest.mark.parametrize(
        ("against", "name"),
        [
            ("no_exchange", "no exchange"),
            ("best_lr", "independent, best lr 0.3"),
            ("one_network", "one network, 2 x epochs, best lr 0.3"),
        ],
    )
    def test_against_selects_the_primary_contrasts(self, against: str, name: str) -> None:
        found = designed(plan(against=against), best_lr=0.3)
        assert [contrast.control_name for contrast in found.primary] == [name]
        assert name not in [contrast.control_name for contrast in found.secondary]

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


class TestLearningRates:
    def test_candidates_default_to_the_members_rates(self) -> None:
        methods = {"graft": None, "dlr": {"optim.lr_diversity": "cosine"}}
        study = plan(methods=methods, networks=[2, 3])
        (trial,) = lr_trials(study, study)
        assert trial.candidates == (0.025, 0.05, 0.075, 0.1)

    def test_candidates_of_the_plan(self) -> None:
        study = plan(best_lr={"candidates": [0.3, 0.2]})
        assert lr_trials(study, study)[0].candidates == (0.3, 0.2)
        study = plan(best_lr={"value": 0.3})
        assert lr_trials(study, study)[0].candidates == (0.3,)

    def test_ways_of_training_have_separate_trials(self) -> None:
        study = plan(methods={"graft": None, "heavy": {"optim.weight_decay": 0.01}})
        assert len(lr_trials(study, study)) == 2


class TestKeys:
    CONFIG = TrainConfig()

    def key(self, networks: int = 2, **options: Any) -> str:
        return run_key(resolve(expand(options), networks), networks)

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
            "graft.amplitude": 0.4,
        }.items():
            assert self.key(**{name: value}) == self.key(), name

    def test_options_of_the_exchange_are_ignored_without_exchange(self) -> None:
        none = self.key(method="none")
        assert self.key(method="none", graft={"every": 0, "amplitude": 1.0}) == none
        assert self.key(graft={"every": 0, "amplitude": 1.0}) == none
        assert self.key(method="average", graft={"every": 0}) == none
        assert self.key(graft={"every": 0, "every_steps": 5}) != none
        assert self.key(method="papa", graft={"every": 0}) != none

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
