"""`deepseek-r1 train` from files to a folder that loads, and what it refuses."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from modeling_deepseek_r1 import cli
from modeling_deepseek_r1.training import DeepseekR1Trainer, run
from tests.data.tokenizers import make_tokenizer
from tests.models import tiny_model

TEXT = "the quick brown fox jumps over the lazy dog and "
ON_A_CPU = pytest.mark.skipif(torch.accelerator.is_available(), reason="is no mistake there")
SHORT = ["--max-steps", 3, "--length", 32, "--log-steps", 1, "--batch-size", 2, "--accumulation", 1]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "tiny"
    model = tiny_model("routed_mixed", vocab_size=259)
    model.generation_config.temperature = 0.5
    model.generation_config.do_sample = True
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path):
    (tmp_path / "texts").mkdir()
    for number in range(6):
        (tmp_path / "texts" / f"{number}.txt").write_text(TEXT * (number + 1))
    return tmp_path / "texts"


def train(*arguments):
    return cli.main(["train", *map(str, arguments)])


def write_rows(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def report_of(folder):
    return json.loads((folder / "training.json").read_text())


def test_texts_from_a_folder(source, text, tmp_path, capsys):
    output = tmp_path / "out"
    assert train(source, text, "--output", output, *SHORT, "--eval-share", 0.2, "--learning-rate", 1e-2) == 0
    printed = capsys.readouterr().out
    assert "data: 5 documents, " in printed and f"written: {output}" in printed and "eval_perplexity" in printed
    model = AutoModelForCausalLM.from_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert model.config.use_cache and model.generation_config.temperature == 0.5
    assert model.generate(**tokenizer("the", return_tensors="pt"), max_new_tokens=3).shape[1] <= 6
    before = AutoModelForCausalLM.from_pretrained(source)
    assert not torch.equal(model.lm_head.weight, before.lm_head.weight)
    centroids = [one.model.layers[1].self_attn.router.centroids for one in (model, before)]
    assert not torch.equal(*centroids)
    report = report_of(output)
    assert report["steps"] == 3 and report["task"] == "text"
    card = (output / "README.md").read_text()
    final = [entry["loss"] for entry in report["history"] if "loss" in entry][-1]
    assert f"| 3 | {final:.4f} |" in card
    assert "base_model: tiny" in card and "learning_rate: 0.01" in card and str(tmp_path) not in card
    assert f"| eval_loss | {report['metrics']['eval_loss']:.6g} |" in card


def test_conversations_by_a_recipe_with_adapters(source, tmp_path, capsys):
    rows = [{"messages": [{"role": "user", "content": "a" * n}, {"role": "assistant", "content": "b"}]} for n in range(1, 9)]
    data = write_rows(tmp_path / "chat.jsonl", rows)
    (tmp_path / "recipe.yaml").write_text(
        f"model: {source}\ndata: [{data}]\nlora_rank: 2\nlora_targets: [attention, mlp, router]\nlength: 48\nseed: 4\n"
        "max_steps: 9\nlearning_rate: 1e-2\n"
    )
    output = tmp_path / "out"
    arguments = [
        "--recipe",
        tmp_path / "recipe.yaml",
        "--output",
        output,
        "--max-steps",
        2,
        "--packing",
        "none",
        "--checkpointing",
    ]
    assert (
        train(*arguments, "--arguments", "warmup_steps=0", "save_strategy=no", "--accumulation", 2, "--batch-size", 2, "--json")
        == 0
    )
    printed = json.loads(capsys.readouterr().out)  # the log has gone to stderr
    assert printed["task"] == "chat" and printed["steps"] == 2
    assert report_of(output)["settings"]["seed"] == 4
    assert report_of(output)["settings"]["arguments"] == {"warmup_steps": 0, "save_strategy": False}
    model, before = (AutoModelForCausalLM.from_pretrained(folder) for folder in (output, source))
    assert model.state_dict().keys() == before.state_dict().keys()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before.state_dict()[name])}
    assert {"model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"} < changed
    assert {"model.layers.1.self_attn.router.weight", "model.layers.1.self_attn.router.centroids"} < changed
    assert "lm_head.weight" not in changed and "model.embed_tokens.weight" not in changed


def test_a_classification(source, tmp_path, capsys):
    rows = [{"text": "x" * (3 + n) if n % 2 else "y" * (3 + n), "label": ("no", "yes")[n % 2]} for n in range(16)]
    data = write_rows(tmp_path / "classes.jsonl", rows)
    output, common = tmp_path / "out", [*SHORT, "--max-steps", 40, "--learning-rate", 1e-2]
    assert train(source, data, "--output", output, *common, "--eval-data", data) == 0
    model = AutoModelForSequenceClassification.from_pretrained(output)
    assert model.config.id2label == {0: "no", 1: "yes"}
    assert report_of(output)["metrics"]["eval_accuracy"] > 0.9
    unknown = write_rows(tmp_path / "unknown.jsonl", [{"text": "x", "label": "maybe"}])
    capsys.readouterr()
    assert train(source, data, "--output", tmp_path / "b", *SHORT, "--eval-data", unknown) == 1
    assert "unknown.jsonl line 1: the label 'maybe' is unknown; known are no, yes" in capsys.readouterr().err
    # A trained classifier keeps the numbers of its classes.
    data.write_text(json.dumps({"text": "x", "label": "yes"}))
    assert train(output, data, "--output", tmp_path / "c", *SHORT) == 0
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "c").config.id2label == {0: "no", 1: "yes"}


def test_a_stream(source, text, tmp_path):
    assert train(source, text, "--output", tmp_path / "out", *SHORT, "--streaming", "--max-steps", 12) == 0
    assert report_of(tmp_path / "out")["tokens"] is None


def test_without_packing_long_documents_are_cut_with_a_note(source, text, tmp_path, capsys):
    assert train(source, text, "--output", tmp_path / "out", *SHORT, "--length", 50, "--packing", "none") == 0
    assert "5 documents will be cut to 50 tokens" in capsys.readouterr().out
    assert report_of(tmp_path / "out")["metrics"]["train_tokens_per_second"] > 0


@pytest.mark.parametrize("option", ["--streaming", "--no-streaming"])
def test_an_interrupted_run_resumes_to_the_same_weights(option, source, text, tmp_path, monkeypatch, capsys):
    common = [*SHORT, "--max-steps", 8, "--save-steps", 3, option, "--freeze", "*.mlp.*"]
    assert train(source, text, "--output", tmp_path / "whole", *common) == 0
    step = DeepseekR1Trainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(DeepseekR1Trainer, "training_step", interrupted)
    assert train(source, text, "--output", tmp_path / "parts", *common) == 130
    assert not (tmp_path / "parts").exists()
    monkeypatch.setattr(DeepseekR1Trainer, "training_step", step)
    capsys.readouterr()
    assert train(source, text, "--output", tmp_path / "parts", *common) == 1
    assert "holds checkpoints of an earlier run; go on with resume" in capsys.readouterr().err
    assert train(source, text, "--output", tmp_path / "parts", *common, "--resume", "--seed", 1) == 1
    assert "this is not the run that was interrupted: seed=1 (was 0)" in capsys.readouterr().err
    assert train(source, text, "--output", tmp_path / "parts", *common, "--resume", "--log-steps", 2) == 0
    states = [AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "parts")]
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-6, atol=1e-6, msg=name)


def test_changed_data_is_not_resumed(source, text, tmp_path, capsys):
    common = [source, text, "--output", tmp_path / "out", *SHORT, "--save-steps", 2]
    assert train(*common) == 0
    shutil.rmtree(tmp_path / "out")
    (text / "more.txt").write_text("one more text")
    capsys.readouterr()
    assert train(*common, "--resume") == 1
    assert "the data has {'documents': 7" in capsys.readouterr().err


def test_an_interruption_while_writing_leaves_the_old_state(source, text, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    assert train(source, text, "--output", output, *SHORT) == 0
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    capsys.readouterr()
    assert train(source, text, "--output", output, *SHORT) == 1
    assert "is not empty; choose another folder" in capsys.readouterr().err

    def fails(*args):
        raise OSError("the disk is full")

    monkeypatch.setattr(run, "model_card", fails)
    assert train(source, text, "--output", output, *SHORT, "--overwrite", "--seed", 3) == 1
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out-run", "texts"]
    monkeypatch.undo()
    assert train(source, text, "--output", output, *SHORT, "--overwrite", "--seed", 3) == 0
    assert (output / "model.safetensors").read_bytes() != before["model.safetensors"]


@pytest.mark.parametrize(
    ("name", "content", "arguments", "message"),
    [
        ("a.txt", b"", [], "a.txt: no training data is left: left out 1 empty texts"),
        ("a.jsonl", b"", [], "a.jsonl: the data is empty"),
        ("a.jsonl", b'{"body": "x"}', [], "a.jsonl line 1 has the columns body; needed are text, or messages"),
        ("a.jsonl", b'{"text": "x"}', ["--task", "chat"], "line 1 is data for the task 'text', not 'chat'"),
        ("a.txt", b"x\xff", [], "a.txt is not UTF-8 text: byte 0xff at position 1"),
        ("a.doc", b"x", [], "files of kind '.doc' cannot be read"),
        ("a.csv", b'text,label\nx,a\n', [], "1 kinds of labels; a classification needs at least two"),
        ("a.txt", b"abc", ["--eval-share", "0.5"], "cannot be set aside; give a separate file"),
        ("a.txt", b"abc", ["--freeze", "nothing"], "no parameter is called 'nothing'"),
        ("a.txt", b"abc", ["--lora-rank", "2", "--lora-targets", "attention,experts"], "adapters for 'experts'"),
        ("a.txt", b"abc", ["--resume"], "there is nothing to resume"),
        ("a.txt", b"abc", ["--arguments", "learning_rte=1"], "arguments: learning_rte is no field of TrainingArguments"),
        pytest.param("a.txt", b"abc", ["--precision", "fp16"], "needs an accelerator; on a CPU use bf16", marks=ON_A_CPU),
        ("a.txt", b"abc", ["--recipe", "none.yaml"], "none.yaml"),
    ],
)  # fmt: skip
def test_a_users_mistake_is_one_line(name, content, arguments, message, source, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(content)
    assert train(source, name, "--output", "out", *arguments) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error and error.startswith("deepseek-r1 train: error: ")
    assert not (tmp_path / "out").exists()


def test_a_text_of_one_token_is_too_short(tmp_path, source, capsys):
    without_end = tmp_path / "model"
    shutil.copytree(source, without_end)
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(without_end)
    (tmp_path / "a.txt").write_text("x")
    assert train(without_end, tmp_path / "a.txt", "--output", tmp_path / "out") == 1
    assert "the training texts are too short: none has a second token" in capsys.readouterr().err


def test_other_models_are_refused_with_the_way_there(tmp_path, capsys):
    from tests.conversion.sources import model_of, save

    folder = save(model_of("llama"), tmp_path / "llama")
    (tmp_path / "a.txt").write_text("x")
    for model, what in ((folder, "is a llama checkpoint"), (tmp_path / "x.gguf", "is a GGUF file")):
        assert train(model, tmp_path / "a.txt", "--output", tmp_path / "out") == 1
        assert f"{what}; " in (error := capsys.readouterr().err) and "deepseek-r1 convert" in error


def test_a_run_folder_that_is_something_else_stays(source, text, tmp_path, capsys):
    (tmp_path / "out-run").mkdir()
    (tmp_path / "out-run" / "diary.txt").write_text("mine")
    assert train(source, text, "--output", tmp_path / "out", *SHORT, "--overwrite") == 1
    assert "is not empty and no folder of a training run" in capsys.readouterr().err
    assert (tmp_path / "out-run" / "diary.txt").read_text() == "mine"


def test_bad_values_are_rejected_by_the_parser(capsys):
    for arguments in (["--length", "long"], ["--packing", "tight"], ["--arguments", "x"]):
        with pytest.raises(SystemExit) as end:
            train("model", "data", *arguments)
        assert end.value.code == 2
