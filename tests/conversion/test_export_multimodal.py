import json

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from modeling_deepseek_r1 import DeepseekR1ForConditionalGeneration
from modeling_deepseek_r1.conversion.export import export_checkpoint
from modeling_deepseek_r1.conversion.flatten import HUB_IMPORTS

from ..multimodal.models import multimodal_config
from ..tokenization.test_processing import PICTURE, SOUND, make_processor
from .test_export import run_fresh

# Runs where this package cannot be imported: loads all parts, asks the pipeline, saves again.
FRESH_PROCESS = """
import importlib.util, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "modeling_deepseek_r1":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline

folder, expected_file, picture, saved = sys.argv[1:]
expected = load_file(expected_file)
model, loading = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), loading
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
assert type(processor).__module__.startswith("transformers_modules."), type(processor)
inputs = processor(text="<|image|> and <|audio|>", images=picture, audio=expected.pop("sound"), sampling_rate=8000)
logits = expected.pop("logits")
print("inputs", all(torch.equal(inputs[name], expected[name]) for name in inputs))
with torch.no_grad():
    print("logits", torch.equal(model(**inputs).logits, logits))
assert type(AutoModel.from_pretrained(folder, trust_remote_code=True)).__name__ == "DeepseekR1Model"
messages = [{"role": "user", "content": [{"type": "image", "path": picture}, {"type": "text", "text": "What?"}]}]
pipe = pipeline("image-text-to-text", model=model, processor=processor)
print(type(pipe(text=messages, max_new_tokens=3, return_full_text=False)[0]["generated_text"]).__name__)
model.save_pretrained(saved)
processor.save_pretrained(saved)
"""
FRESH_OUTPUT = ["inputs True", "logits True", "str"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder, processor = tmp_path_factory.mktemp("checkpoint"), make_processor()
    names = {"image": "image", "video": "video", "audio": "audio", "structured": "row"}
    ids = {f"{kind}_token_id": processor.tokenizer.convert_tokens_to_ids(f"<|{name}|>") for kind, name in names.items()}
    torch.manual_seed(0)
    config = multimodal_config("routed_mixed", text={"vocab_size": len(processor.tokenizer)}, **ids)
    model = DeepseekR1ForConditionalGeneration(config).eval()
    model.generation_config.suppress_tokens = list(ids.values())
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor, folder


def test_what_is_written(checkpoint, tmp_path):
    report = export_checkpoint(checkpoint[2], tmp_path / "exported")
    assert report.auto_map["AutoConfig"] == "configuration_multimodal.DeepseekR1Config"
    assert report.auto_map["AutoModelForImageTextToText"] == "modeling_multimodal.DeepseekR1ForConditionalGeneration"
    processor = json.loads((report.destination / "processor_config.json").read_text(encoding="utf-8"))
    assert processor["auto_map"] == {"AutoProcessor": "processing_deepseek_r1.DeepseekR1Processor"}
    python = {path.name for path in report.destination.glob("*.py")}
    texts = [(report.destination / name).read_text(encoding="utf-8") for name in python]
    needed = {f"{match[2]}.py" for text in texts for match in HUB_IMPORTS.finditer(text)}
    assert python == needed | {"modeling_multimodal.py", "processing_deepseek_r1.py"}
    assert export_checkpoint(report.destination, tmp_path / "again").files == report.files


@pytest.mark.slow
def test_the_export_works_where_the_package_is_missing(checkpoint, tmp_path):
    model, processor, folder = checkpoint
    Image.fromarray(PICTURE).save(tmp_path / "a.png")
    inputs = processor(text="<|image|> and <|audio|>", images=str(tmp_path / "a.png"), audio=SOUND, sampling_rate=8000)
    with torch.no_grad():
        logits = model(**inputs).logits
    save_file({**inputs, "logits": logits, "sound": torch.from_numpy(SOUND)}, tmp_path / "expected.safetensors")
    export_checkpoint(folder, tmp_path / "exported")
    folders = [tmp_path / "exported", tmp_path / "saved", tmp_path / "saved again"]
    for number, (source, target) in enumerate(zip(folders, folders[1:], strict=False)):
        cwd = tmp_path / f"process {number}"
        cwd.mkdir()
        arguments = source, tmp_path / "expected.safetensors", tmp_path / "a.png", target
        assert run_fresh(FRESH_PROCESS, cwd, *arguments) == FRESH_OUTPUT
