from pathlib import Path

import pytest

from twa_merge.errors import UserError
from twa_merge.learn_config import LearnConfig
from twa_merge.recipe import Recipe, from_dict, load_recipe, to_yaml, with_options

RECIPES = sorted((Path(__file__).resolve().parents[1] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_loads_and_opens_with_its_command(path):
    assert load_recipe(path).output.path is not None
    assert path.read_text().startswith(f"# twa-merge run recipes/{path.name}")


def test_a_recipe_survives_yaml(tmp_path):
    recipe = Recipe(checkpoints=["a", "b"], learn=LearnConfig(lr=1e-3, granularity=["x*"], steps=7))
    (tmp_path / "r.yaml").write_text(to_yaml(recipe))
    assert load_recipe(tmp_path / "r.yaml") == recipe


def test_overrides_reach_sections_and_keep_types(tmp_path):
    (tmp_path / "r.yaml").write_text("learn: {lr: 1e-3}\n")
    recipe = load_recipe(tmp_path / "r.yaml", ["learn.steps=5", "data.columns={text: s}", "learn.granularity=[a, b]"])
    assert (recipe.learn.lr, recipe.learn.steps) == (0.001, 5)
    assert recipe.data.columns == {"text": "s"} and recipe.learn.granularity == ["a", "b"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"lern": {}}, "unknown key lern; did you mean learn?"),
        ({"learn": {"lr": "fast"}}, "learn.lr: expected float, got 'fast'"),
        ({"learn": 3}, "learn: expected keys and values, got 3"),
        ({"learn": {"steps": True}}, "learn.steps: expected int or null, got True"),
        ({"checkpoints": "a"}, "checkpoints: expected"),
        ({"data": {"columns": {"text": 1}}}, "data.columns: expected"),
    ],
)
def test_mistakes_name_the_key(content, message):
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        from_dict(content)


@pytest.mark.parametrize("text", ["a: [", "- a", "!!python/object:os.system {}"])
def test_files_that_are_no_recipe(tmp_path, text):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError, match=r"r\.yaml"):
        load_recipe(tmp_path / "r.yaml")


def test_options_in_python_are_checked_as_those_of_a_file():
    assert with_options(LearnConfig(), {"lr": 1, "steps": 3}, "train") == LearnConfig(lr=1.0, steps=3)
    with pytest.raises(UserError, match=r"train: unknown key weigth_decay; did you mean weight_decay\?"):
        with_options(LearnConfig(), {"weigth_decay": 0.1}, "train")
    with pytest.raises(UserError, match="train: steps: expected int or null, got 'x'"):
        with_options(LearnConfig(), {"steps": "x"}, "train")
