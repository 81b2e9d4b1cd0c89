"""vLLM's Transformers backend: what it asks of the models, with a stand-in for its attention, and itself where it is installed."""

import importlib.util
import inspect
import os
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AutoModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_deepseek_r1 import DeepseekR1ForCausalLM
from modeling_deepseek_r1.attention.layer import DeepseekR1Attention
from tests.models import random_ids, tiny_config, tiny_model

ROOT = Path(__file__).parent.parent


def entry_point():
    plugins = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["vllm.general_plugins"]
    module, _, name = plugins["modeling_deepseek_r1"].partition(":")
    return getattr(import_module(module), name)


@pytest.fixture
def attention():
    """vLLM's attention: the module says nothing of positions or masks but its window, and rows are one text without padding."""

    def attend(module, query, key, value, attention_mask, scaling=None, sliding_window=None, **kwargs):
        assert attention_mask is None
        place = torch.arange(query.shape[2])
        distance = place[:, None] - place
        visible = (distance >= 0) & (distance < (sliding_window or len(place)))
        output = F.scaled_dot_product_attention(query, key, value, visible, scale=scaling, enable_gqa=True)
        return output.transpose(1, 2), None

    AttentionInterface.register("vllm", attend)
    yield
    ALL_ATTENTION_FUNCTIONS._global_mapping.pop("vllm")


def test_the_plugin_puts_the_class_where_vllm_looks_for_it(monkeypatch):
    names = SimpleNamespace()
    registry = SimpleNamespace(transformers=names)
    monkeypatch.setitem(sys.modules, "vllm.model_executor.models", SimpleNamespace(registry=registry))
    entry_point()()
    assert names.DeepseekR1ForCausalLM is DeepseekR1ForCausalLM and DeepseekR1ForCausalLM.is_backend_compatible()
    # vLLM finds the layers that it serves by reading this method.
    source = inspect.getsource(DeepseekR1Attention.forward)
    assert source.count("interface = ALL_ATTENTION_FUNCTIONS[") == source.count("interface(self") == 1
    assert "scaling=self.scaling" in source


@pytest.mark.parametrize("pattern", ["full", "sliding", "experts", "low_rank_experts"])
def test_the_backend_gets_the_same_hidden_states(pattern, attention):
    model, ids = tiny_model(pattern), random_ids(1, 40)
    config = tiny_config(pattern)
    config._attn_implementation = "vllm"
    base = AutoModel.from_config(config)
    base.load_state_dict(model.model.state_dict())
    with torch.no_grad():
        outputs = base.eval()(input_ids=ids, position_ids=torch.arange(40)[None], use_cache=False, return_dict=False)
        torch.testing.assert_close(outputs[0], model.model(ids).last_hidden_state, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("pattern", "fields", "message"),
    [
        ("sinks", {}, "sink tokens"),
        ("routed", {}, "local_routed_attention layers"),
        ("sliding", {"per_layer_config": {1: {"sliding_window": 3}}}, "different windows"),
        ("full", {"per_layer_config": {1: {"head_dim": 16}}}, r"one head_dim for all layers; this model has \[8, 16\]"),
        ("experts", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ],
)
def test_what_vllm_would_get_wrong_is_refused(pattern, fields, message, attention):
    config = tiny_config(pattern, **fields)
    config._attn_implementation = "vllm"
    with pytest.raises(ValueError, match=message):
        AutoModel.from_config(config)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM")
def test_vllm_gives_the_text_of_generate():
    command = [sys.executable, "scripts/check_vllm.py", "--models", "sliding", "experts"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
