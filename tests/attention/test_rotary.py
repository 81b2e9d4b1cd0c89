"""Rotary position embedding whose base changes with the position, against a literal reading of its formula."""

import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from modeling_deepseek_r1.attention.rotary import DeepseekR1RotaryEmbedding, PiecewiseLinearRotaryEmbedding, rotary_embedding
from modeling_deepseek_r1.conversion import to_dense
from tests.models import random_ids, tiny_config, tiny_model

SEGMENTS = [[0, 100.0], [5, 10], [9, 1000.0]]


def piecewise(segments, **fields):
    return {"rope_parameters": {"rope_type": "piecewise_linear", "segments": segments}, **fields}


def test_phases_are_the_formula():
    config = tiny_config("full", **piecewise(SEGMENTS))
    embedding = rotary_embedding(config.per_layer_config[0])
    assert isinstance(embedding, PiecewiseLinearRotaryEmbedding)
    cos, sin = embedding(torch.empty(0), torch.arange(14)[None])
    for p in range(14):
        lengths = [sum(low <= q < high for q in range(p)) for low, high in ((0, 5), (5, 9), (9, 99))]
        for d in range(4):
            phase = sum(n * base ** (-2 * d / 8) for n, (_, base) in zip(lengths, SEGMENTS, strict=True))
            expected = torch.tensor(phase)
            for half in (d, d + 4):
                torch.testing.assert_close(cos[0, p, half], expected.cos(), rtol=0, atol=1e-5)
                torch.testing.assert_close(sin[0, p, half], expected.sin(), rtol=0, atol=1e-5)


def test_one_segment_is_plain_rotation():
    plain = DeepseekR1RotaryEmbedding(tiny_config("full", rope_parameters={"rope_type": "default", "rope_theta": 5e5}))
    single = rotary_embedding(tiny_config("full", **piecewise([[0, 5e5]])).per_layer_config[0])
    positions = torch.tensor([[0, 1, 7, 8191, 100_000]])
    for dtype in (torch.float32, torch.bfloat16):
        like = torch.empty(0, dtype=dtype)
        for mine, theirs in zip(single(like, positions), plain(like, positions), strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        {
            "rope_type": "longrope",
            "factor": 4.0,
            "short_factor": [1.0] * 4,
            "long_factor": [1.5] * 4,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=lambda parameters: parameters["rope_type"],
)
def test_other_types_are_those_of_transformers_bit_for_bit(parameters):
    parameters = {"rope_theta": 1e4, **parameters}
    mine = DeepseekR1RotaryEmbedding(tiny_config("full", rope_parameters=parameters))
    sizes = {"hidden_size": 48, "num_attention_heads": 6, "head_dim": 8, "max_position_embeddings": 256}
    theirs = LlamaRotaryEmbedding(LlamaConfig(rope_parameters=parameters, **sizes))
    # Up to the limit, beyond it, and back.
    for length in (256, 700, 40):
        positions, like = torch.arange(length)[None], torch.empty(0, dtype=torch.bfloat16)
        for one, other in zip(mine(like, positions), theirs(like, positions), strict=True):
            assert torch.equal(one, other)


def test_models_save_load_and_decode_with_it(tmp_path):
    model = tiny_model("mixed", **piecewise(SEGMENTS, per_layer_config={1: piecewise([[0, 50.0]])}))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["rope_parameters"]["segments"] == SEGMENTS
    loaded, ids = AutoModelForCausalLM.from_pretrained(tmp_path), random_ids(2, 30)
    assert loaded.config == model.config
    expected = model(ids, use_cache=False).logits
    assert torch.equal(loaded(ids, use_cache=False).logits, expected)
    parts = model(ids[:, :20], use_cache=True)
    rest = model(ids[:, 20:], past_key_values=parts.past_key_values, use_cache=True).logits
    torch.testing.assert_close(torch.cat((parts.logits, rest), 1), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(tiny_model("mixed")(ids).logits, expected, atol=1e-3)
    changed = AutoModelForCausalLM.from_pretrained(tmp_path, per_layer_config=None, **piecewise([[0, 77.0]]))
    assert changed.config.rope_parameters["segments"] == [[0, 77.0]]
    tiny_model("full", **piecewise(SEGMENTS)).save_pretrained(tmp_path / "full")
    with pytest.raises(ValueError, match="rope_type='piecewise_linear'"):
        to_dense(tmp_path / "full", tmp_path / "dense")


@pytest.mark.parametrize(
    "segments",
    [None, [], [[1, 1e4]], [[0, 1e4], [0, 1e5]], [[0, -1.0]], [[0, float("inf")]], [[0.0, 1e4]], [[0, 1e4, 2]], [0, 1e4]],
)
def test_impossible_segments_are_refused(segments):
    with pytest.raises((ValueError, StrictDataclassError), match="must be pairs"):
        tiny_config("full", **piecewise(segments))
