"""Settings from files and command lines, with their types."""

import pytest

from modeling_deepseek_r1.training import Recipe
from modeling_deepseek_r1.training.recipe import setting_fields
from modeling_deepseek_r1.training.run import _arguments


def from_yaml(tmp_path, text):
    (tmp_path / "recipe.yaml").write_text(text)
    return Recipe.from_file(tmp_path / "recipe.yaml")


def test_a_file_and_what_wins_over_it(tmp_path):
    recipe = from_yaml(
        tmp_path,
        "model: m\ndata: a.txt\nlearning-rate: 2e-5\nlength: 64\nprecision: no\nmax_steps: null\nfreeze: ['*.mlp.*']\n"
        "arguments: {warmup_steps: 3}\nstreaming: yes\nlabels: [1, b]\n",
    )
    expected = Recipe(
        model="m", data=["a.txt"], learning_rate=2e-5, length=64, freeze=["*.mlp.*"], arguments={"warmup_steps": 3}
    )
    assert recipe == expected.changed({"streaming": True, "labels": ["1", "b"]})
    assert recipe.changed({"length": "32"}).length == 32
    assert Recipe().changed({}) == Recipe()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lenght: 3", r"recipe.yaml: there is no setting 'lenght'; did you mean 'length'\?"),
        ("length: x", "recipe.yaml: length='x' must be of type int"),
        ("length: 1.5", "length=1.5 must be of type int"),
        ("length: true", "length=True must be of type int"),
        ("length: ", "length has no value"),
        ("streaming: 1", "streaming=1 must be of type bool"),
        ("packing: first_fit", "packing='first_fit' must be one of best_fit, concatenate, none"),
        ("data: {a: b}", "data={'a': 'b'} must be a list"),
        ("arguments: 3", "arguments=3 must be of type dict"),
        ("- a", "must hold settings as `name: value`, not list"),
        ("a: [", "recipe.yaml is not a YAML file"),
    ],
)
def test_a_wrong_file(text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        from_yaml(tmp_path, text)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": ""}, "model is missing"),
        ({"data": []}, "data is missing"),
        ({"length": 1}, "length=1 must be at least 2"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"max_steps": 0}, "max_steps=0"),
        ({"eval_share": 1.0}, r"eval_share=1.0 must lie in \[0, 1\)"),
        ({"eval_share": 0.1, "eval_data": ["x"]}, "be 0 beside eval_data"),
        ({"epochs": 0.0}, "epochs must be above 0"),
        ({"streaming": True}, "streaming needs max_steps"),
        ({"lora_rank": 2, "freeze": ["x"]}, "freeze and lora_rank exclude each other"),
        ({"expert_config": {"a": 1}, "freeze": ["x"]}, "expert_config trains experts alone"),
        (
            {"expert_config": {"a": 1}, "lora_rank": 2, "lora_dropout": 0.1},
            "expert_config trains experts alone, without dropout",
        ),
        ({"train_routers": True}, "train_routers belongs to expert_config"),
    ],
)
def test_impossible_settings(fields, message):
    good = Recipe(model="m", data=["a"], output="o")
    good.check()
    with pytest.raises(ValueError, match=message):
        good.changed(fields).check()


def test_differences_leave_out_how_a_run_is_watched():
    recipe = Recipe(model="m", lora_targets=["mlp"])
    assert recipe.changed({"log_steps": 3, "keep": 9}).differences(recipe.to_dict()) == []
    assert recipe.changed({"seed": 3}).differences(recipe.to_dict()) == ["seed=3 (was 0)"]
    older = {name: value for name, value in recipe.to_dict().items() if name != "number_jitter"}
    assert recipe.differences(older) == []
    assert recipe.changed({"number_jitter": 0.1}).differences(older) == ["number_jitter=0.1 (was 0.0)"]


def test_every_setting_has_a_line_of_help():
    assert all(metadata["help"] for *_, metadata in setting_fields())


def test_bf16_trains_where_there_is_no_accelerator(tmp_path):
    assert _arguments(Recipe(precision="bf16"), tmp_path / "output").bf16
