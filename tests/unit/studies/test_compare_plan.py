from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from dist_graft.errors import ConfigError
from dist_graft.studies.plan import BUILT_IN, plan_of, plan_text, read_plan
from dist_graft.studies.state import load_plan

SMALLEST: dict[str, Any] = {
    "name": "small",
    "methods": ["graft"],
    "networks": [2],
    "seeds": [0, 1],
}
SEARCH: dict[str, Any] = {
    "recipes": {"plain": None, "fast": {"optim.lr": 0.4}},
    "seeds": [0, 1],
    "confirm_seeds": [10, 11, 12, 13, 14],
}
SEARCHING = {name: value for name, value in SMALLEST.items() if name != "seeds"}


def written(folder: Path, content: dict[str, Any] | str) -> Path:
    path = folder / "plan.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


class TestWhatIsUnderstood:
    def test_the_smallest_plan(self, tmp_path: Path) -> None:
        plan = load_plan(written(tmp_path, SMALLEST))
        assert plan.primary == "largest_lr_member"
        assert plan.against == "no_exchange"
        assert plan.method_options("graft") == {"method": "graft"}
        assert plan.test_seeds == [0, 1]

    def test_options_may_be_written_with_dots(self) -> None:
        dotted = plan_of(SMALLEST | {"methods": {"sharp": {"graft.sensitivity": 500}}})
        nested = plan_of(SMALLEST | {"methods": {"sharp": {"graft": {"sensitivity": 500}}}})
        assert dotted == nested

    def test_a_built_in_method_with_options_of_its_own(self) -> None:
        plan = plan_of(SMALLEST | {"methods": {"independent": {"optim.lr_diversity": "cosine"}}})
        assert plan.method_options("independent") == {
            "method": "none",
            "graft": {"every": 0},
            "optim": {"lr_diversity": "cosine"},
        }

    def test_a_section_of_a_file_may_be_a_file_beside_it(self, tmp_path: Path) -> None:
        (tmp_path / "recipes/sections").mkdir(parents=True)
        (tmp_path / "recipes/sections/slow.yaml").write_text("lr: 0.01\n")
        (tmp_path / "recipes/row.yaml").write_text("epochs: 9\noptim: sections/slow.yaml\n")
        content = SMALLEST | {"recipe": "recipes/row.yaml"}
        plan = read_plan(written(tmp_path, content))
        assert plan.recipe == {"epochs": 9, "optim": {"lr": 0.01}}

    def test_the_recipe_of_a_file_is_put_into_the_plan(self, tmp_path: Path) -> None:
        (tmp_path / "recipe.yaml").write_text("epochs: 9\noptim: {lr: 0.3}\nrun_dir: runs/other\n")
        content = SMALLEST | {"recipe": "recipe.yaml"}
        assert read_plan(written(tmp_path, content)).recipe == {"epochs": 9, "optim": {"lr": 0.3}}

    def test_files_and_options_come_one_over_the_other(self, tmp_path: Path) -> None:
        (tmp_path / "a.yaml").write_text("epochs: 9\noptim: {lr: 0.3, momentum: 0.5}\n")
        (tmp_path / "b.yaml").write_text("optim: {lr: 0.2}\n")
        content = SMALLEST | {"recipe": {"config": ["a.yaml", "b.yaml"], "epochs": 2}}
        assert read_plan(written(tmp_path, content)).recipe == {
            "epochs": 2,
            "optim": {"lr": 0.2, "momentum": 0.5},
        }

    @pytest.mark.parametrize("content", [SMALLEST, SEARCHING | {"search": SEARCH}])
    def test_the_plan_that_is_written_down_is_the_plan(
        self, content: dict[str, Any], tmp_path: Path
    ) -> None:
        plan = plan_of(content)
        again = load_plan(written(tmp_path, plan_text(plan)))
        assert again == plan
        assert plan_text(again) == plan_text(plan)

    def test_seeds_of_trials_are_none_of_the_plans(self) -> None:
        plan = plan_of(SMALLEST | {"seeds": [1000, 0, 1002]})
        assert plan.lr_seeds == [1001, 1003]

    def test_a_search_is_tested_on_the_seeds_of_its_confirmation(self) -> None:
        plan = plan_of(SEARCHING | {"search": SEARCH})
        assert plan.test_seeds == [10, 11, 12, 13, 14]
        assert plan.in_regime("fast").recipe == {"optim": {"lr": 0.4}}
        assert [regime.networks for regime in plan.in_regimes()] == [[2], [2]]

    @pytest.mark.parametrize(("given", "sizes"), [(8, [8]), ([4, 8], [4, 8])])
    def test_a_regime_may_have_its_own_sizes_of_population(
        self, given: int | list[int], sizes: list[int], tmp_path: Path
    ) -> None:
        search = SEARCH | {"recipes": {"plain": None, "many": {"epochs": 9, "networks": given}}}
        plan = load_plan(written(tmp_path, SEARCHING | {"search": search}))
        assert plan.in_regime("plain").networks == [2]
        assert plan.in_regime("many").networks == sizes
        assert plan.in_regime("many").recipe == {"epochs": 9}


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"seed": [0]}, "Option 'seed' is not accepted; did you mean seeds?"),
    ({"networks": [0]}, "networks must name sizes of populations, each at least 1, got [0]"),
    ({"networks": []}, "networks must name sizes"),
    ({"networks": [2, 2]}, "networks names 2 twice"),
    ({"networks": ["two"]}, "networks"),
    ({"seeds": []}, "seeds must name at least one seed"),
    ({"seeds": [3, 1, 3]}, "seeds names 3 twice"),
    ({"seeds": [-1]}, "seeds must be in [0, 2^63), got -1"),
    ({"name": "a b"}, "name must be letters, digits, '.', '_' and '-', got 'a b'"),
    ({"methods": {}}, "methods must name at least one method"),
    ({"methods": ["grafting"]}, f"methods.grafting is none of {', '.join(BUILT_IN)}: give"),
    ({"methods": {"graft": {"seed": 3}}}, "methods.graft must not set seed: the comparison does"),
    ({"recipe": {"run_dir": "x"}}, "recipe must not set run_dir: the comparison does"),
    ({"recipe": "none.yaml"}, "none.yaml cannot be read: No such file"),
    ({"primary": "best"}, "primary"),
    ({"keep_checkpoints": -1}, "keep_checkpoints must be at least 0, got -1"),
    ({"leave_out": ["no_exchange"]}, "leave_out"),
    ({"best_lr": {"value": 0.1, "candidates": [0.1]}}, "best_lr.value and best_lr.candidates"),
    ({"best_lr": {"value": 0}}, "best_lr holds a learning rate that is not above 0: 0"),
    ({"best_lr": {"candidates": []}}, "best_lr.candidates must name at least one"),
    ({"best_lr": {"seeds": [1]}}, "best_lr.seeds and seeds share the seed 1: they must be disj"),
    ({"best_lr": {"val_fraction": 1.0}}, "best_lr.val_fraction must be above 0 and below 1"),
    ({"search": SEARCH}, "seeds and search exclude each other"),
    ({"search": {"seeds": [1]}}, "search.recipes must name at least one regime"),
]

WRONG_SEARCHES: list[tuple[dict[str, Any], str]] = [
    ({"seeds": []}, "search.seeds must name at least one seed"),
    ({"confirm_seeds": [10, 11, 12, 13]}, "search.confirm_seeds must name at least 5 seeds"),
    ({"confirm_seeds": [1, 11, 12, 13, 14]}, "search.confirm_seeds and search.seeds share the s"),
    ({"val_fraction": 0.0}, "search.val_fraction must be above 0 and below 1, got 0.0"),
    ({"recipes": {"fast": {"resume": "never"}}}, "search.recipes.fast must not set resume"),
    *(
        (
            {"recipes": {"many": {"networks": sizes}}},
            f"search.recipes.many.networks must name sizes of populations, each at least 1, "
            f"got {sizes!r}",
        )
        for sizes in ("eight", 0, 2.5, True, [], [4, 0], None)
    ),
    ({"recipes": {"many": {"networks": [4, 4]}}}, "search.recipes.many.networks names 4 twice"),
    ({"recipes": {"many": {"networks.of": 4}}}, "search.recipes.many.networks must name sizes"),
]


class TestWhatIsRefused:
    @pytest.mark.parametrize(("change", "message"), WRONG)
    def test_plans(self, change: dict[str, Any], message: str, tmp_path: Path) -> None:
        path = written(tmp_path, SMALLEST | change)
        with pytest.raises(ConfigError) as error:
            load_plan(path)
        assert str(path) in str(error.value)
        assert message in str(error.value)

    @pytest.mark.parametrize(("change", "message"), WRONG_SEARCHES)
    def test_searches(self, change: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError) as error:
            plan_of(SEARCHING | {"search": SEARCH | change})
        assert message in str(error.value)

    @pytest.mark.parametrize("seeds", [[0], [14]])
    def test_learning_rates_are_not_chosen_on_a_searchs_seeds(self, seeds: list[int]) -> None:
        with pytest.raises(ConfigError, match=r"best_lr\.seeds and search\.\w+ share"):
            plan_of(SEARCHING | {"search": SEARCH, "best_lr": {"seeds": seeds}})

    def test_a_search_for_what_a_validation_split_has_not(self) -> None:
        with pytest.raises(ConfigError, match="a search needs a primary outcome that a validation"):
            plan_of(SEARCHING | {"search": SEARCH, "primary": "ensemble"})

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("name: a\nname: b\n", "key 'name' is given twice"),
            ("methods:\n  graft:\n  graft:\n", "key 'graft' is given twice"),
            ("- a\n", "must hold names and values"),
            ("name: [\n", "is not the YAML that is wanted"),
            ("name: small\n", "methods"),
        ],
    )
    def test_files(self, text: str, message: str, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=message):
            load_plan(written(tmp_path, text))

    def test_a_file_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="cannot be read: No such file"):
            load_plan(tmp_path / "plan.yaml")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"methods": {"odd": {"graft.amplitude": 2}}}, "odd with 2 networks: graft.amplitude"),
            ({"methods": {"odd": {"graft.amplitud": 0.2}}}, "did you mean graft.amplitude?"),
            ({"recipe": {"epoch": 3}}, "did you mean epochs?"),
            ({"recipe": {"data.name": "mnist"}}, "data.name must be one of"),
            ({"recipe": {"optim.lrs": [0.1]}}, "optim.lrs names 1 learning rates for 2 networks"),
            (
                {"methods": ["independent"]},
                "no method has a control of the kind 'no_exchange': nothing would be compared",
            ),
            (
                {"against": "one_network", "leave_out": ["one_network"]},
                "no method has a control of the kind 'one_network'",
            ),
        ],
    )
    def test_what_train_would_refuse_is_refused_before_anything_runs(
        self, change: dict[str, Any], message: str, tmp_path: Path
    ) -> None:
        with pytest.raises(ConfigError) as error:
            load_plan(written(tmp_path, SMALLEST | change))
        assert message in str(error.value)

    def test_every_regime_is_checked(self, tmp_path: Path) -> None:
        search = SEARCH | {"recipes": {"plain": None, "odd": {"optim.momentum": 2}}}
        with pytest.raises(ConfigError, match=r"optim\.momentum must be in \[0, 1\)"):
            load_plan(written(tmp_path, SEARCHING | {"search": search}))


PLANS = sorted((Path(__file__).parents[3] / "launch" / "plans").glob("*.yaml"))


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.name)
def test_every_shipped_plan_can_be_carried_out(path: Path) -> None:
    plan = load_plan(path)
    assert plan.test_seeds


def test_the_plan_of_the_guide_can_be_carried_out(tmp_path: Path) -> None:
    guide = (Path(__file__).parents[3] / "docs" / "compare.md").read_text()
    first, second = (part.partition("```")[0] for part in guide.split("```yaml\n")[1:3])
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "quickstart.yaml").write_text("epochs: 3\n")
    (tmp_path / "plans").mkdir()
    assert load_plan(written(tmp_path / "plans", first)).recipe == {"epochs": 40}
    searching = first.replace("seeds: [1, 2, 3, 4, 5]\n", "") + second
    assert len(load_plan(written(tmp_path / "plans", searching)).search.recipes) == 4
