"""Tokenizer, chat template, generation settings and licences of a folder."""

import json

import pytest
from transformers import AutoTokenizer, GenerationConfig

import modeling_deepseek_r1  # noqa: F401 (registers the converted model type)
from modeling_deepseek_r1.conversion import convert_checkpoint, to_dense
from modeling_deepseek_r1.conversion.tokenizer_files import copy_tokenizer

from .sources import edit_config, model_of, save, save_tokenizer

CHATML = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
TEXT = "<|im_start|>user hi<|im_end|>"


@pytest.fixture
def source(tmp_path):
    return save(model_of("llama"), tmp_path / "source")


def edit_settings(folder, **fields):
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({name: value for name, value in settings.items() if value is not None}))


def generation_settings(folder):
    return json.loads((folder / "generation_config.json").read_text())


def test_files_are_copied_as_they_are(source, tmp_path):
    save_tokenizer(source, chat_template=CHATML)
    for name in ("LICENSE", "NOTICE.txt"):
        (source / name).write_text(name)
    for name in ("README.md", "optimizer.pt", "modeling_other.py"):
        (source / name).write_text("not carried")
    GenerationConfig(eos_token_id=[2, 0], temperature=0.6, do_sample=True).save_pretrained(source)
    report = convert_checkpoint(source, tmp_path / "converted")
    to_dense(tmp_path / "converted", tmp_path / "dense")
    assert report.tokenizer == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    carried = {"LICENSE", "NOTICE.txt", "generation_config.json", *report.tokenizer}
    for folder in (tmp_path / "converted", tmp_path / "dense"):
        assert {path.name for path in folder.iterdir()} == carried | {"config.json", "model.safetensors"}
        for name in carried:
            assert (folder / name).read_bytes() == (source / name).read_bytes(), name


def test_converted_tokenizer_gives_the_same_ids(source, tmp_path):
    tokenizer = save_tokenizer(source, chat_template=CHATML)
    convert_checkpoint(source, tmp_path / "converted")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "converted")
    assert loaded(TEXT).input_ids == tokenizer(TEXT).input_ids
    chat = [{"role": "user", "content": "hi"}]
    assert loaded.apply_chat_template(chat, tokenize=False) == tokenizer.apply_chat_template(chat, tokenize=False)


@pytest.mark.parametrize("declared", ["LlamaTokenizerFast", "LlamaTokenizer", None])
def test_class_that_would_misread_a_byte_level_tokenizer_is_corrected(declared, source, tmp_path):
    tokenizer = save_tokenizer(source)
    edit_settings(source, tokenizer_class=declared)
    convert_checkpoint(source, tmp_path / "converted")
    settings = json.loads((tmp_path / "converted" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    loaded = AutoTokenizer.from_pretrained(tmp_path / "converted")
    assert loaded(TEXT).input_ids == tokenizer(TEXT).input_ids


def test_class_is_named_where_the_model_type_implied_it(source, tmp_path):
    tokenizer = save_tokenizer(source)
    (source / "tokenizer.json").unlink()
    vocab = tokenizer.get_vocab()
    (source / "vocab.json").write_text(json.dumps(vocab))
    (source / "merges.txt").write_text("#version: 0.2\n")
    edit_settings(source, tokenizer_class=None)
    (tmp_path / "converted").mkdir()
    copy_tokenizer(source, tmp_path / "converted", "qwen2")
    assert json.loads((tmp_path / "converted" / "tokenizer_config.json").read_text())["tokenizer_class"] == "Qwen2Tokenizer"


def test_missing_tokenizer_is_reported(source, tmp_path):
    report = convert_checkpoint(source, tmp_path / "converted")
    assert report.tokenizer == [] and any("no tokenizer files" in line for line in report.warnings)
    assert "none in the source" in report.summary()


def test_generation_settings_are_made_where_there_are_none(source, tmp_path):
    (source / "generation_config.json").unlink()
    convert_checkpoint(source, tmp_path / "converted")
    settings = generation_settings(tmp_path / "converted")
    assert (settings["bos_token_id"], settings["eos_token_id"], settings["pad_token_id"]) == (1, 2, 3)
    assert "_from_model_config" not in settings  # such settings are recomputed from the model's configuration


@pytest.mark.parametrize(
    ("eos", "template", "expected"),
    [
        ("<|im_end|>", None, [2, 0]),  # the tokenizer of a chat model ends a turn, its configuration a document
        ("<|endoftext|>", CHATML, [0, 2]),  # the template alone knows
        ("<|endoftext|>", None, 0),
    ],
)
def test_generation_stops_at_the_end_of_a_turn(eos, template, expected, source, tmp_path):
    (source / "generation_config.json").unlink()
    edit_config(source, eos_token_id=0)
    save_tokenizer(source, eos=eos, chat_template=template)
    convert_checkpoint(source, tmp_path / "converted")
    assert generation_settings(tmp_path / "converted")["eos_token_id"] == expected


def test_no_end_token_at_all(source, tmp_path):
    (source / "generation_config.json").unlink()
    edit_config(source, eos_token_id=None)
    convert_checkpoint(source, tmp_path / "converted")
    assert generation_settings(tmp_path / "converted").get("eos_token_id") is None
