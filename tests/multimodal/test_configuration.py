import pytest
from transformers import AutoConfig, BertConfig

from modeling_deepseek_r1 import DeepseekR1Config

from .models import VISION, multimodal_config


@pytest.mark.parametrize("pattern", ["mixed", "global_mixed", "per_layer", "low_rank_experts"])
@pytest.mark.parametrize("vision", VISION)
def test_round_trip(pattern, vision, tmp_path):
    config = multimodal_config(pattern, vision)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is DeepseekR1Config and loaded == config
    assert loaded.text_config == config.text_config and loaded.vision_config.model_type == vision
    assert loaded.get_text_config().model_type == "deepseek_r1_text"
    loaded.bridge["layers"] = [1]
    assert loaded != config


def test_what_is_left_out_does_not_exist(tmp_path):
    config = multimodal_config(vision_config=None, structured_config=None, fusion=None, bridge=None)
    config.save_pretrained(tmp_path)
    loaded = DeepseekR1Config.from_pretrained(tmp_path)
    assert (loaded.vision_config, loaded.structured_config, loaded.fusion, loaded.bridge) == (None,) * 4
    assert loaded.placeholders == {"audio": 92}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vision_config": BertConfig().to_dict()}, "model_type='bert'; supported are .*dinov2"),
        ({"audio_config": VISION["dinov2"]}, "audio_config has model_type='dinov2'; supported are .*whisper"),
        ({"fusion": {"initial_token_share": 1.0}}, r"fusion\['initial_token_share'\]=1.0 must lie between 0 and 1"),
        ({"fusion": {"gate": 1}}, "fusion=.* must be a dictionary with keys among .*initial_token_share"),
        ({"bridge": {"layers": [3]}}, "bridge.* has 3; the text model has the layers 0 ... 2"),
        ({"bridge": {"layers": [1, 1]}}, "must be different numbers of layers"),
        ({"bridge": {"layers": [1], "num_heads": 0}}, r"bridge\['num_heads'\]=0 must be at least 1"),
        ({"structured_config": {}}, "has no field"),
        ({"image_token_id": 97}, r"image_token_id=97 must be an id of its own within the vocabulary \(0 ... 96\)"),
        ({"image_token_id": 91}, "image_token_id=91 must be an id of its own"),
        ({"audio_token_id": None}, "audio_config is given, but no audio_token_id"),
        ({"vision_downsampling": 0}, "vision_downsampling=0 must be at least 1"),
        ({"pattern": "expert_domains"}, r"routing\['num_modalities'\]=2, but tokens .* it must be at least 5"),
    ],
)
def test_what_cannot_be_is_refused(fields, message):
    with pytest.raises(Exception, match=message):
        multimodal_config(**fields)


def test_the_text_configuration_must_be_a_converted_one():
    with pytest.raises(Exception, match="model_type='bert'; it must be 'deepseek_r1_text'"):
        DeepseekR1Config(text_config=BertConfig())
