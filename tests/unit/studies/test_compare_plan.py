"""Plans of a comparison: parsing, and errors found before any run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from dist_graft.errors import ConfigError
from dist_graft.studies.plan import BUILT_IN, parse_plan, plan_text, read_plan
from dist_graft.studies.selection import load_plan

ROOT = Path(__file__).parents[3]
MINIMAL: dict[str, Any] = {
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
WITHOUT_SEEDS = {name: value for name, value in MINIMAL.items() if name != "seeds"}


def write_plan(folder: Path, content: dict[str, Any] | str) -> Path:
    path = folder / "plan.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


class TestReading:
    def test_minimal_plan(self, tmp_path: Path) -> None:
        plan = load_plan(write_plan(tmp_path, MINIMAL))
        assert plan.primary == "delivered"
        assert plan.against == "no_exchange"
        assert plan.method_options("graft") == {"method": "graft"}
        assert plan.test_seeds == [0, 1]
        assert plan.rates == [0.05, 0.1, 0.2]
        assert plan.smallest_effect == 0.3

    def test_option_names_may_contain_dots(self) -> None:
        dotted = parse_plan(MINIMAL | {"methods": {"sharp": {"graft.sensitivity": 500}}})
        nested = parse_plan(MINIMAL | {"methods": {"sharp": {"graft": {"sensitivity": 500}}}})
        assert dotted == nested

    def test_options_are_merged_into_a_built_in_method(self) -> None:
        plan = parse_plan(MINIMAL | {"methods": {"independent": {"optim.lr_diversity": "cosine"}}})
        assert plan.method_options("independent") == {
            "method": "none",
            "graft": {"every": 0},
            "optim": {"lr_diversity": "cosine"},
        }

    @pytest.mark.parametrize(
        ("recipe", "options"),
        [
            ("a.yaml", {"epochs": 9, "optim": {"lr": 0.3, "momentum": 0.5}}),
            (
                {"config": ["a.yaml", "b.yaml"], "epochs": 2},
                {"epochs": 2, "optim": {"lr": 0.2, "momentum": 0.5}},
            ),
            ("recipes/row.yaml", {"epochs": 9, "optim": {"lr": 0.01}}),
        ],
        ids=["one file", "files and options", "section in another file"],
    )
    def test_recipe_files_are_included_in_the_plan(
        self, recipe: Any, options: dict[str, Any], tmp_path: Path
    ) -> None:
        (tmp_path / "a.yaml").write_text(
            "epochs: 9\noptim: {lr: 0.3, momentum: 0.5}\nrun_dir: runs/other\n"
        )
        (tmp_path / "b.yaml").write_text("optim: {lr: 0.2}\n")
        (tmp_path / "recipes/sections").mkdir(parents=True)
        (tmp_path / "recipes/sections/slow.yaml").write_text("lr: 0.01\n")
        (tmp_path / "recipes/row.yaml").write_text("epochs: 9\noptim: sections/slow.yaml\n")
        assert read_plan(write_plan(tmp_path, MINIMAL | {"recipe": recipe})).recipe == options

    @pytest.mark.parametrize("content", [MINIMAL, WITHOUT_SEEDS | {"search": SEARCH}])
    def test_plan_text_round_trips(self, content: dict[str, Any], tmp_path: Path) -> None:
        plan = parse_plan(content)
        again = load_plan(write_plan(tmp_path, plan_text(plan)))
        assert again == plan
        assert plan_text(again) == plan_text(plan)

    def test_tuning_seeds_are_disjoint_from_the_plans_seeds(self) -> None:
        plan = parse_plan(MINIMAL | {"seeds": [1000, 0, 1002]})
        assert plan.tuning_seeds == [1001, 1003]

    @pytest.mark.parametrize(
        ("tuning", "rates"),
        [({}, [0.2, 0.4, 0.8]), ({"rates": [0.3, 0.1]}, [0.1, 0.3]), ("none", [])],
    )
    def test_learning_rates_to_try(self, tuning: Any, rates: list[float]) -> None:
        plan = parse_plan(MINIMAL | {"recipe": {"optim.lr": 0.4}, "tuning": tuning})
        assert plan.rates == rates

    def test_delivers_is_no_option_of_train(self) -> None:
        plan = parse_plan(MINIMAL | {"methods": {"graft": {"delivers": "soup"}, "papa": None}})
        assert plan.method_options("graft") == {"method": "graft"}
        assert [plan.method_delivery(name) for name in plan.methods] == ["soup", None]

    def test_test_seeds_of_a_search_are_its_confirm_seeds(self) -> None:
        plan = parse_plan(WITHOUT_SEEDS | {"search": SEARCH})
        assert plan.test_seeds == [10, 11, 12, 13, 14]
        assert plan.with_regime("fast").recipe == {"optim": {"lr": 0.4}}
        assert [regime.networks for regime in plan.with_each_regime()] == [[2], [2]]

    @pytest.mark.parametrize(("networks", "sizes"), [(8, [8]), ([4, 8], [4, 8])])
    def test_regime_replaces_the_population_sizes(
        self, networks: int | list[int], sizes: list[int], tmp_path: Path
    ) -> None:
        search = SEARCH | {"recipes": {"plain": None, "many": {"epochs": 9, "networks": networks}}}
        plan = load_plan(write_plan(tmp_path, WITHOUT_SEEDS | {"search": search}))
        assert plan.with_regime("plain").networks == [2]
        assert plan.with_regime("many").networks == sizes
        assert plan.with_regime("many").recipe == {"epochs": 9}


INVALID: list[tuple[dict[str, Any], str]] = [
    ({"seed": [0]}, "Option 'seed' is not accepted; did you mean seeds?"),
    ({"networks": [0]}, "networks must contain population sizes of at least 1, got [0]"),
    ({"networks": []}, "networks must contain population sizes"),
    ({"networks": [2, 2]}, "networks contains 2 twice"),
    ({"networks": ["two"]}, "networks"),
    ({"seeds": []}, "seeds must contain at least one seed"),
    ({"seeds": [3, 1, 3]}, "seeds contains 3 twice"),
    ({"seeds": [-1]}, "seeds must be in [0, 2^63), got -1"),
    ({"name": "a b"}, "name must consist of letters, digits, '.', '_' and '-', got 'a b'"),
    ({"methods": {}}, "methods must contain at least one method"),
    (
        {"methods": ["grafting"]},
        f"methods.grafting needs options, or a name among {', '.join(BUILT_IN)}",
    ),
    ({"methods": {"graft": {"seed": 3}}}, "methods.graft must not set seed: the comparison sets"),
    ({"recipe": {"run_dir": "x"}}, "recipe must not set run_dir: the comparison sets it"),
    ({"recipe": "none.yaml"}, "none.yaml cannot be read: No such file"),
    ({"primary": "best"}, "primary"),
    ({"keep_checkpoints": -1}, "keep_checkpoints must be at least 0, got -1"),
    ({"leave_out": ["no_exchange"]}, "leave_out"),
    ({"best_lr": {"value": 0.1}}, "best_lr was replaced by tuning"),
    ({"tuning": {"rates": [0.1, 0]}}, "tuning.rates must be above 0, got 0"),
    ({"tuning": {"rates": [0.1, 0.1]}}, "tuning.rates contains a rate twice"),
    ({"recipe": {"population.join": "donor"}}, "population.join must be fresh"),
    ({"tuning": {"seeds": [1]}}, "tuning.seeds and seeds must be disjoint, both contain 1"),
    ({"tuning": {"val_fraction": 1.0}}, "tuning.val_fraction must be above 0 and below 1"),
    ({"tuning": {"max_extensions": -1}}, "tuning.max_extensions must be at least 0, got -1"),
    ({"smallest_effect": 0}, "smallest_effect must be above 0, got 0"),
    ({"primary": "largest_lr_member"}, "primary"),
    (
        {"primary": "ensemble", "against": "one_network"},
        "primary ensemble must not be compared with one_network",
    ),
    ({"baselines": ["swa"]}, "baselines must be among ema, checkpoint_average, data_parallel"),
    ({"baselines": {"ema": {"seed": 1}}}, "baselines.ema must not set seed"),
    ({"baselines": {"ema": {"lengths": [2]}}}, "baselines.ema.lengths must be [1], [K] or [1, K]"),
    ({"baselines": {"ema": {"lengths": []}}}, "baselines.ema.lengths must be [1], [K] or [1, K]"),
    ({"baselines": {"local_sgd": {"lengths": [1]}}}, "baselines.local_sgd has no option lengths"),
    ({"baselines": {"ema": {"start": 0.5}}}, "baselines.ema has no option start"),
    ({"baselines": {"branches": {"start": 1}}}, "branches.start must be above 0 and below 1, got"),
    ({"baselines": {"branches": {"start": "x"}}}, "branches.start must be above 0 and below 1"),
    (
        {"baselines": ["distilled"], "keep_checkpoints": 0},
        "baselines.distilled requires keep_checkpoints of at least 1",
    ),
    ({"baselines": {"ema": {"optim.ema_decay": 2}}}, "optim.ema_decay must be in (0, 1), got 2"),
    ({"methods": {"graft": {"delivers": "best"}}}, "methods.graft.delivers must be one of member"),
    ({"search": SEARCH}, "seeds and search are mutually exclusive"),
    ({"search": {"seeds": [1]}}, "search.recipes must contain at least one regime"),
    # What train would refuse, and what compares nothing
    ({"methods": {"odd": {"graft.amplitude": 2}}}, "odd with 2 networks: graft.amplitude"),
    ({"methods": {"odd": {"graft.amplitud": 0.2}}}, "did you mean graft.amplitude?"),
    ({"recipe": {"epoch": 3}}, "did you mean epochs?"),
    ({"recipe": {"data.name": "mnist"}}, "data.name must be one of"),
    ({"recipe": {"optim.lrs": [0.1]}}, "optim.lrs"),
    ({"methods": ["independent"]}, "no method has the control 'no_exchange'"),
    (
        {"against": "one_network", "leave_out": ["one_network"]},
        "no method has the control 'one_network'",
    ),
]

INVALID_SEARCHES: list[tuple[dict[str, Any], str]] = [
    ({"seeds": []}, "search.seeds must contain at least one seed"),
    ({"confirm_seeds": [10, 11, 12, 13]}, "search.confirm_seeds must contain at least 5 seeds"),
    ({"confirm_seeds": [1, 11, 12, 13, 14]}, "search.confirm_seeds and search.seeds must be disj"),
    ({"val_fraction": 0.0}, "search.val_fraction must be above 0 and below 1, got 0.0"),
    ({"recipes": {"fast": {"resume": "never"}}}, "search.recipes.fast must not set resume"),
    *(
        (
            {"recipes": {"many": {"networks": sizes}}},
            "search.recipes.many.networks must contain population sizes of at least 1, "
            f"got {sizes!r}",
        )
        for sizes in ("eight", 0, 2.5, True, [], [4, 0], None)
    ),
    ({"recipes": {"many": {"networks": [4, 4]}}}, "search.recipes.many.networks contains 4 twice"),
    ({"recipes": {"many": {"networks.of": 4}}}, "search.recipes.many.networks must contain pop"),
    ({"recipes": {"plain": None, "odd": {"optim.momentum": 2}}}, "optim.momentum must be in [0, 1"),
]


class TestErrors:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            *((MINIMAL | change, message) for change, message in INVALID),
            *(
                (WITHOUT_SEEDS | {"search": SEARCH | change}, message)
                for change, message in INVALID_SEARCHES
            ),
            *(
                (WITHOUT_SEEDS | {"search": SEARCH, "tuning": {"seeds": [seed]}}, message)
                for seed, message in (
                    (0, "tuning.seeds and search.seeds must be disjoint"),
                    (14, "tuning.seeds and search.confirm_seeds must be disjoint"),
                )
            ),
            (
                WITHOUT_SEEDS | {"search": SEARCH, "primary": "ensemble"},
                "primary must be delivered or mean_of_members in a search",
            ),
            ("name: a\nname: b\n", "key 'name' is given twice"),
            ("methods:\n  graft:\n  graft:\n", "key 'graft' is given twice"),
            ("- a\n", "must contain a mapping"),
            ("name: [\n", "is not valid YAML"),
            ("name: small\n", "methods"),
        ],
    )
    def test_invalid_plan(
        self, content: dict[str, Any] | str, message: str, tmp_path: Path
    ) -> None:
        path = write_plan(tmp_path, content)
        with pytest.raises(ConfigError) as error:
            load_plan(path)
        assert str(path) in str(error.value)
        assert message in str(error.value)

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"plan\.yaml cannot be read: No such file"):
            load_plan(tmp_path / "plan.yaml")


@pytest.mark.parametrize(
    "path", sorted((ROOT / "launch" / "plans").glob("*.yaml")), ids=lambda path: path.name
)
def test_shipped_plans_are_valid(path: Path) -> None:
    assert load_plan(path).test_seeds


def test_plans_of_the_guide_are_valid(tmp_path: Path) -> None:
    guide = (ROOT / "docs" / "compare.md").read_text()
    first, second = (part.partition("```")[0] for part in guide.split("```yaml\n")[1:3])
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "quickstart.yaml").write_text("epochs: 3\n")
    (tmp_path / "plans").mkdir()
    assert load_plan(write_plan(tmp_path / "plans", first)).recipe == {"epochs": 40}
    search = first.replace("seeds: [1, 2, 3, 4, 5]\n", "") + second
    assert len(load_plan(write_plan(tmp_path / "plans", search)).search.recipes) == 4
