"""`deepseek-r1 train` of a multimodal checkpoint: conversations with pictures in, a checkpoint with its processor out."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

from modeling_deepseek_r1 import cli
from modeling_deepseek_r1.conversion import compose_checkpoint
from modeling_deepseek_r1.training import Recipe
from modeling_deepseek_r1.training.prepare import prepare_data
from tests.data.tokenizers import make_tokenizer
from tests.models import tiny_model
from tests.multimodal.models import VISION

COLOURS = {"R": (250, 10, 10), "B": (10, 10, 250)}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("source")
    tiny_model("experts", vocab_size=259).save_pretrained(folder / "text")
    make_tokenizer().save_pretrained(folder / "text")
    AutoModel.from_config(VISION["dinov2"]).save_pretrained(folder / "vision")
    compose_checkpoint(folder / "text", folder / "all", vision=folder / "vision", bridge=[1], image_size=28)
    return folder / "all"


@pytest.fixture
def data(tmp_path):
    content = [{"type": "image"}, {"type": "text", "text": "?"}]
    rows = []
    for answer, colour in COLOURS.items():
        Image.fromarray(np.full((30, 30, 3), colour, np.uint8)).save(tmp_path / f"{answer}.png")
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        rows += [json.dumps({"messages": messages, "images": [str(tmp_path / f"{answer}.png")]})] * 8
    (tmp_path / "data.jsonl").write_text("\n".join(rows))
    return tmp_path / "data.jsonl"


def train(*arguments):
    return cli.main(["train", *map(str, arguments), "--packing", "none", "--accumulation", "1", "--batch-size", "4"])


def answers(folder, pictures):
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    found = []
    for answer in COLOURS:
        block = {"type": "image", "path": str(pictures / f"{answer}.png")}
        message = {"role": "user", "content": [block, {"type": "text", "text": "?"}]}
        inputs = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=True, return_dict=True)
        tokens = model.generate(**inputs, max_new_tokens=1, do_sample=False)
        found.append(processor.decode(tokens[0, -1]))
    return found


@pytest.mark.parametrize("how", [["--freeze", "*_tower.*"], ["--lora-rank", 4, "--lora-targets", "attention,router"]])
def test_conversations_about_pictures(source, data, tmp_path, capsys, how):
    output = tmp_path / "out"
    steps = ["--max-steps", 40, "--learning-rate", "1e-2", "--log-steps", 20, "--eval-share", 0.2]
    assert train(source, data, "--output", output, *steps, *how) == 0
    assert "data: 13 conversations (multimodal)" in capsys.readouterr().out
    assert answers(output, tmp_path) == list(COLOURS)
    before, after = (AutoModelForImageTextToText.from_pretrained(folder).state_dict() for folder in (source, output))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) == ("_tower." in name) for name in before if name.endswith("patch_embeddings.projection.weight") or ".bridge.gate" in name or "vision_adapter" in name)  # fmt: skip
    assert "AutoModelForImageTextToText, AutoProcessor" in (output / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--packing", "best_fit"], "neither streamed nor packed: set packing to none"),
        (["--expert-config", "all=1"], "heal_from and expert_config are for text models"),
        (["--length", 5], " has placeholders up to token 22, but rows have at most 5 tokens"),
    ],
)
def test_what_is_refused(source, data, tmp_path, capsys, arguments, message):
    command = ["train", source, data, "--output", tmp_path / "out", "--max-steps", 1, "--packing", "none", *arguments]
    assert cli.main(list(map(str, command))) == 1
    assert message in capsys.readouterr().err


def test_numbers_of_rows_vary_in_training_alone(source, tmp_path):
    messages = [{"role": "user", "content": [{"type": "row"}]}, {"role": "assistant", "content": "x"}]
    line = json.dumps({"messages": messages, "rows": [{"age": 40.0, "job": "cook"}]})
    (tmp_path / "rows.jsonl").write_text("\n".join([line] * 20))
    given = {"model": str(source), "data": [str(tmp_path / "rows.jsonl")], "output": "x", "packing": "none", "eval_share": 0.2}
    recipe = Recipe().changed({**given, "number_jitter": 0.1})
    data = prepare_data(recipe, AutoProcessor.from_pretrained(source))
    ages, aside = ([one.fields["rows"][0]["age"] for one in part] for part in (data.train, data.evaluation))
    assert set(aside) == {40.0} and len(set(ages)) == len(ages) and all(36 <= age <= 44 for age in ages)
    with pytest.raises(ValueError, match="number_jitter is for table rows"):
        prepare_data(recipe, make_tokenizer())


def test_data_without_conversations_are_refused(source, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("some text")
    assert train(source, tmp_path / "a.txt", "--output", tmp_path / "out") == 1
    assert "a multimodal model is trained on conversations" in capsys.readouterr().err
