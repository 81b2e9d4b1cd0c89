import json
import shutil

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPConfig,
    CLIPModel,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from modeling_deepseek_r1 import DeepseekR1ForCausalLM, DeepseekR1ForConditionalGeneration, cli
from modeling_deepseek_r1.conversion import compose_checkpoint
from modeling_deepseek_r1.tokenization import RowSchema

from ..data.tokenizers import make_tokenizer
from ..models import PATTERNS, random_ids, tiny_model
from ..multimodal.models import AUDIO, VISION
from ..tokenization.test_processing import PICTURE, SOUND, VIDEO
from . import sources

DOMAINS = {"expert_topology": [{"image": 2, "text": 3}], "min_experts_per_tok": 1, "expert_activation_threshold": 0.1}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folders of a converted text checkpoint, DINOv2 and Whisper."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("parts")
    tiny_model("mixed", vocab_size=259).save_pretrained(folder / "text")
    make_tokenizer().save_pretrained(folder / "text")
    AutoModel.from_config(VISION["dinov2"]).save_pretrained(folder / "dinov2")
    WhisperForConditionalGeneration(AUDIO).save_pretrained(folder / "whisper")
    WhisperFeatureExtractor(feature_size=8).save_pretrained(folder / "whisper")
    return folder


def test_a_checkpoint_of_parts(parts, tmp_path):
    schema = RowSchema.fit([{"age": 3, "job": "cook"}])
    report = compose_checkpoint(
        parts / "text",
        tmp_path / "all",
        vision=parts / "dinov2",
        audio=parts / "whisper",
        row_schema=schema,
        bridge=[1],
        image_size=28,
    )
    assert report.placeholders == {"image": 259, "video": 260, "audio": 261, "structured": 262}
    model, processor = (
        AutoModelForImageTextToText.from_pretrained(tmp_path / "all"),
        AutoProcessor.from_pretrained(tmp_path / "all"),
    )
    assert sum(report.parameters.values()) + model.lm_head.weight.numel() == sum(p.numel() for p in model.parameters())
    text, ids = DeepseekR1ForCausalLM.from_pretrained(parts / "text"), random_ids(2, 30, vocab_size=259)
    with torch.no_grad():
        assert torch.equal(model(ids).logits[..., :259], text(ids).logits)
    for own, name in ((model.model.vision_tower, "dinov2"), (model.model.audio_tower, "whisper")):
        source = AutoModel.from_pretrained(parts / name)
        expected = source.state_dict() if name == "dinov2" else source.get_encoder().state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in own.encoder.state_dict().items())
    rms = text.get_input_embeddings().weight.square().mean().sqrt()
    features = model.model.encode_images(torch.randn(1, 3, 28, 28))
    torch.testing.assert_close(features.square().mean().sqrt(), rms, rtol=0.02, atol=0)

    content = [{"type": "image", "image": PICTURE}, {"type": "audio", "audio": SOUND, "sampling_rate": 16000}]
    content += [{"type": "video", "video": VIDEO}, {"type": "row", "row": {"job": "cook"}}, {"type": "text", "text": "What?"}]
    messages = [[{"role": "user", "content": content}], [{"role": "user", "content": "Hello"}]]
    inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    tokens = model.generate(**inputs, max_new_tokens=4, do_sample=True, temperature=50.0)
    new = tokens[:, inputs["input_ids"].shape[1] :]
    assert 1 <= new.shape[1] <= 4 and int(new.max()) < 259


def test_experts_of_a_domain_get_its_modality(parts):
    text = tiny_model("expert_domains", routing={**PATTERNS["expert_domains"]["routing"], **DOMAINS, "num_modalities": 0, "domain_weights": None})  # fmt: skip
    compose = DeepseekR1ForConditionalGeneration.from_text_vision_audio_pretrained
    arguments = {"placeholders": {"image": 97, "video": 98}, "vision": AutoModel.from_pretrained(parts / "dinov2")}
    model, ids = compose(text, **arguments).eval(), random_ids(2, 20)
    tables = [router.domain_gate.modality_bias for router in model.model.routers]
    assert len(tables) == 3 and all(table[:2].tolist() == [[0, 0], [2, -2]] and not table[2:].any() for table in tables)
    with torch.no_grad():
        assert torch.equal(model(ids).logits[..., :97], text(ids).logits)
    plain = compose(text, **arguments, modality_preference=0.0)
    assert not any(router.domain_gate.modality_bias.any() for router in plain.model.routers)


def test_a_text_checkpoint_that_is_not_converted_yet_and_the_command(parts, tmp_path, capsys):
    llama = sources.save(sources.model_of("llama_tied"), tmp_path / "llama")
    sources.save_tokenizer(llama)
    command = [
        "compose",
        llama,
        tmp_path / "joined",
        "--vision",
        parts / "dinov2",
        "--image-size",
        "14",
        "--bridge-layers",
        "0",
    ]
    assert cli.main([str(part) for part in command]) == 0
    assert "placeholder of video: token" in capsys.readouterr().out
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "joined")
    assert model.lm_head.weight is model.get_input_embeddings().weight and model.model.audio_tower is None
    ids = sources.input_ids()
    with torch.no_grad():
        expected = sources.model_of("llama_tied").eval()(ids).logits
        torch.testing.assert_close(model(ids).logits[..., : expected.shape[-1]], expected, rtol=1e-4, atol=1e-5)
    assert cli.main([str(part) for part in command]) == 1
    assert "is not empty" in capsys.readouterr().err


def test_a_composed_checkpoint_in_the_terminal(parts, tmp_path, capsys):
    compose_checkpoint(parts / "text", tmp_path / "all", vision=parts / "dinov2", image_size=14)
    Image.fromarray(PICTURE).save(tmp_path / "a.png")
    ask = ["--prompt", "What?", "--max-new-tokens", "2", "--temperature", "0"]
    assert cli.main(["generate", str(tmp_path / "all"), *ask, "--image", str(tmp_path / "a.png"), "--system", "Look."]) == 0
    assert cli.main(["generate", str(tmp_path / "all"), *ask]) == 0
    capsys.readouterr()
    for folder, more, message in (
        ("text", ["--image", "a.png"], "is a text model; join it with encoders first"),
        ("all", ["--image", "a.png", "--raw"], "leave out --raw"),
        ("all", ["--audio", "a.wav"], "1 inputs of modality 'audio' were given"),
    ):
        home = parts if folder == "text" else tmp_path
        assert cli.main(["generate", str(home / folder), *ask, *more]) == 1
        assert message in capsys.readouterr().err


def test_answers_of_a_reasoning_model_parse(parts, tmp_path):
    shutil.copytree(parts / "text", tmp_path / "text")
    (tmp_path / "text/chat_template.jinja").write_text("{{ '<｜Assistant｜>' }}")
    compose_checkpoint(tmp_path / "text", tmp_path / "all", vision=parts / "dinov2", image_size=14)
    processor = AutoProcessor.from_pretrained(tmp_path / "all")
    parsed = processor.parse_response("<think>Hm.</think>Yes.", prefix="<｜Assistant｜>")
    assert parsed == {"role": "assistant", "reasoning_content": "Hm.", "content": "Yes."}


def test_half_of_clip(parts, tmp_path):
    vision = {name: value for name, value in VISION["clip_vision_model"].to_dict().items() if name != "model_type"}
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}
    clip = CLIPModel(CLIPConfig(vision_config=vision, text_config=sizes, projection_dim=8))
    clip.save_pretrained(tmp_path / "clip")
    compose_checkpoint(parts / "text", tmp_path / "all", vision=tmp_path / "clip", fusion=None, dtype=torch.bfloat16)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "all", dtype="auto")
    own, expected = model.model.vision_tower.encoder.state_dict(), clip.vision_model.state_dict()
    assert model.dtype == torch.bfloat16 and len(own) == len(expected) and model.model.fusion is None
    assert all(torch.equal(value, expected[name.removeprefix("vision_model.")].bfloat16()) for name, value in own.items())
    assert json.loads((tmp_path / "all/config.json").read_text())["vision_config"]["model_type"] == "clip_vision_model"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give at least one of vision, audio and row_schema"),
        ({"vision": "dinov2", "image_size": 30}, "image_size=30 does not fit the vision encoder; it must be a multiple of 7"),
        ({"vision": "dinov2", "use_audio_in_video": True}, "use_audio_in_video needs vision, audio and fusion"),
        ({"vision": "whisper"}, "vision_config has model_type='whisper'"),
        ({"audio": "dinov2"}, "the audio encoder has model_type='dinov2'; supported is 'whisper'"),
        ({"vision": "dinov2", "bridge": [7]}, "has 7; the text model has the layers 0 ... 2"),
    ],
)
def test_parts_that_do_not_fit(parts, tmp_path, arguments, message):
    arguments = {name: parts / value if name in ("vision", "audio") else value for name, value in arguments.items()}
    with pytest.raises(Exception, match=message):
        compose_checkpoint(parts / "text", tmp_path / "all", **arguments)
    assert not (tmp_path / "all").exists()
