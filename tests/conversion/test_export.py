import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from modeling_deepseek_r1 import DeepseekR1ForCausalLM, DeepseekR1QuantizationConfig, DeepseekR1TextConfig, cli
from modeling_deepseek_r1.conversion.export import export_checkpoint
from modeling_deepseek_r1.conversion.flatten import HUB_IMPORTS
from modeling_deepseek_r1.quantization.run import quantize_checkpoint

WORDS = [f"w{i}" for i in range(60)]
INPUT_IDS = torch.arange(4, 44).view(2, 20)

# Runs where this package cannot be imported: loads, compares with the tensors of the original, saves again.
FRESH_PROCESS = """
import importlib.util, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "modeling_deepseek_r1":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
try:
    import modeling_deepseek_r1
except ModuleNotFoundError:
    print("blocked")

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

folder, expected_file, saved = sys.argv[1:]
expected = load_file(expected_file)
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
assert type(config).__module__.startswith("transformers_modules."), type(config)
model, loading = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), loading
with torch.no_grad():
    logits = model(input_ids=expected["input_ids"]).logits
    base = AutoModel.from_pretrained(folder, trust_remote_code=True)
    hidden = base(input_ids=expected["input_ids"]).last_hidden_state
classifier = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True, num_labels=3)
assert type(classifier).__name__ == "DeepseekR1ForSequenceClassification"
generated = model.generate(expected["input_ids"], max_new_tokens=8, do_sample=False)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
print("logits", torch.equal(logits, expected["logits"]))
print("hidden", torch.equal(hidden, expected["hidden"]))
print("generated", torch.equal(generated, expected["generated"]))
print("tokens", tokenizer("w3 w5").input_ids, tokenizer.apply_chat_template([{"role": "user", "content": "w7"}], tokenize=False))
print("package", "modeling_deepseek_r1" in sys.modules)
model.save_pretrained(saved)
tokenizer.save_pretrained(saved)
"""
FRESH_OUTPUT = [
    "blocked",
    "logits True",
    "hidden True",
    "generated True",
    "tokens [3, 5] user: w7",
    "package False",
]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = DeepseekR1TextConfig.from_preset(
        "balanced",
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        layer_types="RG",
        sliding_window=5,
        sparse_attention={"num_sink_tokens": 2, "global_stride": 3, "num_memory_tokens": 2},
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        mlp_layer_types=["dense", "sparse", "dense", "sparse"],
        num_experts=3,
        moe_intermediate_size=16,
    )
    return DeepseekR1ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="w1", eos_token="w2", pad_token="w2", unk_token="w0"
    )
    tokenizer.chat_template = "{% for message in messages %}{{ message.role }}: {{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    (folder / "optimizer.pt").write_bytes(b"not part of a model")
    (folder / "trainer_state.json").write_text("{}", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def quantized(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized") / "checkpoint"
    quantize_checkpoint(checkpoint, folder, DeepseekR1QuantizationConfig(bits=8))
    return folder


@pytest.fixture
def copy(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "checkpoint")


def read_tensors(folder):
    tensors = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            tensors.update((key, file.get_tensor(key)) for key in file.keys())  # noqa: SIM118
    return tensors


def run_fresh(script, cwd, *arguments):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"HF_MODULES_CACHE": str(cwd / "modules"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-I", "-c", script, *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "place"), [("checkpoint", "modeling_deepseek_r1"), ("quantized", "quantized_classes")], ids=["plain", "quantized"]
)
def test_the_export_loads_and_saves_again_where_the_package_is_missing(kind, place, request, tmp_path):
    from safetensors.torch import save_file

    checkpoint = request.getfixturevalue(kind)
    model = DeepseekR1ForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        logits = model(input_ids=INPUT_IDS).logits
        hidden = model.model(input_ids=INPUT_IDS).last_hidden_state
    generated = model.generate(INPUT_IDS, max_new_tokens=8, do_sample=False)
    tensors = {"input_ids": INPUT_IDS, "logits": logits, "hidden": hidden, "generated": generated}
    save_file(tensors, tmp_path / "expected.safetensors")

    exported = tmp_path / "exported"
    export_checkpoint(checkpoint, exported)
    folders = [exported, tmp_path / "saved", tmp_path / "saved again"]
    for number, (source, target) in enumerate(zip(folders, folders[1:], strict=False)):
        cwd = tmp_path / f"process {number}"
        cwd.mkdir()
        assert run_fresh(FRESH_PROCESS, cwd, source, tmp_path / "expected.safetensors", target) == FRESH_OUTPUT

    code = {path.name: path.read_text(encoding="utf-8") for path in exported.glob("*.py")}
    for folder in folders[1:]:
        assert {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.py")} == code
        auto_map = json.loads((folder / "config.json").read_text(encoding="utf-8"))["auto_map"]
        assert auto_map["AutoModelForCausalLM"] == f"{place}.DeepseekR1ForCausalLM"


def test_what_is_written(checkpoint, tmp_path):
    report = export_checkpoint(checkpoint, tmp_path / "new" / "exported")
    folder = report.destination
    assert folder == tmp_path / "new" / "exported"
    on_disk = sorted(path.name for path in folder.iterdir())
    assert list(report.files) == on_disk
    assert report.bytes == sum(path.stat().st_size for path in folder.iterdir())
    assert report.left_out == ("optimizer.pt", "trainer_state.json")
    assert [path.name for path in folder.parent.iterdir()] == ["exported"]

    source_config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    assert json.loads((folder / "config.json").read_text(encoding="utf-8")) == {**source_config, "auto_map": report.auto_map}
    assert report.auto_map == {
        "AutoConfig": "configuration_deepseek_r1.DeepseekR1TextConfig",
        "AutoModel": "modeling_deepseek_r1.DeepseekR1TextModel",
        "AutoModelForCausalLM": "modeling_deepseek_r1.DeepseekR1ForCausalLM",
        "AutoModelForQuestionAnswering": "modeling_deepseek_r1.DeepseekR1ForQuestionAnswering",
        "AutoModelForSequenceClassification": "modeling_deepseek_r1.DeepseekR1ForSequenceClassification",
        "AutoModelForTokenClassification": "modeling_deepseek_r1.DeepseekR1ForTokenClassification",
    }
    for name in (
        "model.safetensors",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ):
        assert (folder / name).read_bytes() == (checkpoint / name).read_bytes()
        assert (folder / name).stat().st_nlink == 1
    python = {path.name for path in folder.glob("*.py")}
    assert {
        "configuration_deepseek_r1.py",
        "configuration_presets.py",
        "modeling_deepseek_r1.py",
        "attention_layer.py",
    } <= python
    needed = {match[2] for name in python for match in HUB_IMPORTS.finditer((folder / name).read_text(encoding="utf-8"))}
    assert python == {f"{name}.py" for name in needed} | {"modeling_deepseek_r1.py"}


def test_an_export_can_be_exported_again(checkpoint, tmp_path):
    first = export_checkpoint(checkpoint, tmp_path / "first")
    second = export_checkpoint(first.destination, tmp_path / "second")
    assert (second.files, second.left_out) == (first.files, ())
    for name in first.files:
        assert (second.destination / name).read_bytes() == (first.destination / name).read_bytes()


def test_weights_are_split_where_they_exceed_the_limit_and_then_copied(checkpoint, tmp_path):
    split = export_checkpoint(checkpoint, tmp_path / "split", max_shard_size=20_000).destination
    shards = sorted(split.glob("*.safetensors"))
    assert len(shards) > 1 and max(path.stat().st_size for path in shards) < 25_000
    assert not (split / "model.safetensors").exists()
    expected, actual = read_tensors(checkpoint), read_tensors(split)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert DeepseekR1ForCausalLM.from_pretrained(split).dtype == torch.float32

    again = export_checkpoint(split, tmp_path / "again")
    assert set(again.files) == {path.name for path in split.iterdir()}
    whole = export_checkpoint(split, tmp_path / "small", max_shard_size=10_000)
    assert sum(name.endswith(".safetensors") for name in whole.files) > len(shards)


def test_overwrite(checkpoint, tmp_path):
    destination = tmp_path / "exported"
    destination.mkdir()
    export_checkpoint(checkpoint, destination)  # an empty folder is no obstacle
    (destination / "old.txt").write_text("old", encoding="utf-8")
    with pytest.raises(FileExistsError, match="exported"):
        export_checkpoint(checkpoint, destination)
    assert (destination / "old.txt").exists()
    assert "old.txt" not in export_checkpoint(checkpoint, destination, overwrite=True).files
    assert not (destination / "old.txt").exists()


def test_a_failure_leaves_the_destination_as_it_was(checkpoint, tmp_path, monkeypatch):
    destination = tmp_path / "exported"
    export_checkpoint(checkpoint, destination)
    (destination / "mark.txt").write_text("mine", encoding="utf-8")
    copied = []

    def fail_at_third(source, target):
        copied.append(target)
        if len(copied) == 3:
            raise OSError("no space left")

    monkeypatch.setattr("modeling_deepseek_r1.conversion.export.shutil.copyfile", fail_at_third)
    with pytest.raises(OSError, match="no space left"):
        export_checkpoint(checkpoint, destination, overwrite=True)
    assert (destination / "mark.txt").read_text(encoding="utf-8") == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["exported"]


def write_config(folder, text):
    (folder / "config.json").write_text(text, encoding="utf-8")


def write_index(folder, index):
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (shutil.rmtree, FileNotFoundError, "has no config.json"),
        (lambda folder: (folder / "config.json").unlink(), FileNotFoundError, "has no config.json"),
        (lambda folder: write_config(folder, "{"), ValueError, "config.json is not valid JSON"),
        (lambda folder: write_config(folder, '{"model_type": "llama"}'), ValueError, "model_type='llama'; only checkpoints of"),
        (lambda folder: write_config(folder, "[]"), ValueError, "model_type=None; only checkpoints of"),
        (lambda folder: (folder / "model.safetensors").unlink(), FileNotFoundError, "there is no model.safetensors"),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b"version https://git-lfs"),
            ValueError,
            "model.safetensors is no complete safetensors file",
        ),
        (lambda folder: write_index(folder, {}), ValueError, "is not an index of safetensors files"),
        (
            lambda folder: write_index(folder, {"weight_map": {"x": "model-2.safetensors"}}),
            FileNotFoundError,
            "there is no model-2.safetensors",
        ),
        (
            lambda folder: write_index(folder, {"weight_map": {"x": "model-1.safetensors"}}),
            ValueError,
            "lacks 1 tensors that model.safetensors.index.json promises, e.g. x",
        ),
        (
            lambda folder: write_index(folder, {"weight_map": {"x": "../model-1.safetensors"}}),
            ValueError,
            "names a file outside of its folder",
        ),
    ],
)
def test_what_is_no_checkpoint_is_refused(copy, tmp_path, spoil, error, message):
    spoil(copy)
    with pytest.raises(error, match=message):
        export_checkpoint(copy, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize("destination", ["checkpoint", "checkpoint/exported", "."])
def test_a_destination_around_or_inside_the_source_is_refused(copy, tmp_path, destination):
    before = sorted(copy.rglob("*"))
    with pytest.raises(ValueError, match="contain"):
        export_checkpoint(copy, tmp_path / destination, overwrite=True)
    assert sorted(copy.rglob("*")) == before


def test_command(checkpoint, tmp_path, capsys):
    destination = tmp_path / "exported"
    assert cli.main(["export", str(checkpoint), str(destination)]) == 0
    out = capsys.readouterr().out
    assert str(destination) in out and "optimizer.pt, trainer_state.json" in out
    assert cli.main(["export", str(checkpoint), str(destination)]) == 1
    assert capsys.readouterr().err.startswith("deepseek-r1 export: error: ")
    assert cli.main(["export", str(checkpoint), str(destination), "--overwrite", "--max-shard-size", "10KB"]) == 0
    assert (destination / "model.safetensors.index.json").is_file()
