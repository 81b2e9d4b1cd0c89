"""Time of a whole sparse block, router included, against those of Mixtral, Qwen3-MoE and DeepSeek-V3 of equal shape.

Mixtral's and Qwen3-MoE's blocks run on the parameters of ours and must give the same. DeepSeek-V3's routes otherwise and has a shared
expert; it stands beside a block of ours that has one too.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from transformers import DeepseekV3Config, MixtralConfig, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from ..configuration import DeepseekR1TextConfig
from ..moe.block import DeepseekR1SparseMoeBlock
from .attention_speed import in_turn
from .expert_speed import CALL_TOKENS, IMPLEMENTATIONS, every_set, per_call, relative_error

OURS = {"Mixtral": "ours", "Qwen3-MoE": "ours", "DeepSeek-V3": "ours, shared expert"}
"""Family -> the block of ours that it stands beside."""
LARGEST_ERROR = 1e-4


class _Blocks:
    """Our blocks and those of the families."""

    def __init__(self, hidden_size: int, expert_size: int, num_experts: int, num_experts_per_tok: int):
        torch.manual_seed(0)
        sizes = {"hidden_size": hidden_size, "moe_intermediate_size": expert_size, "num_experts_per_tok": num_experts_per_tok}
        plain = {"num_hidden_layers": 1, "num_experts": num_experts, "chunk_size_feed_forward": 0, **sizes}
        config = DeepseekR1TextConfig(**plain)
        shared = DeepseekR1TextConfig(shared_expert_intermediate_size=expert_size, **plain)
        self.ours = {"ours": self._made(config), "ours, shared expert": self._made(shared)}
        weight = self.ours["ours"].router.scores.weight
        experts = self.ours["ours"].experts
        families = {
            "Mixtral": (
                MixtralSparseMoeBlock,
                MixtralConfig(num_local_experts=num_experts, intermediate_size=expert_size, **sizes),
            ),
            "Qwen3-MoE": (Qwen3MoeSparseMoeBlock, Qwen3MoeConfig(num_experts=num_experts, norm_topk_prob=True, **sizes)),
            "DeepSeek-V3": (
                DeepseekV3MoE,
                DeepseekV3Config(n_routed_experts=num_experts, n_shared_experts=1, n_group=1, topk_group=1, **sizes),
            ),
        }
        self.families, self.configs = {}, {}
        for name, (kind, own) in families.items():
            own._experts_implementation = "eager"
            block = kind(own)
            for parameter in block.parameters():
                nn.init.normal_(parameter, std=0.02)
            if name != "DeepSeek-V3":
                block.gate.weight = weight
                block.experts.gate_up_proj, block.experts.down_proj = experts.gate_up_proj, experts.down_proj
            self.families[name], self.configs[name] = block, own

    @staticmethod
    def _made(config) -> DeepseekR1SparseMoeBlock:
        config._experts_implementation = "eager"
        block = DeepseekR1SparseMoeBlock(config, 0)
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=0.02)
        return block

    def variants(self, names: Sequence[str]) -> dict[str, tuple[Callable, list[nn.Parameter]]]:
        """Name -> function of hidden states `[1, T, H]`, and the parameters that it uses."""
        runs = {name: (lambda rows, block=block: block(rows)[0], list(block.parameters())) for name, block in self.ours.items()}
        for family, block in self.families.items():
            for name in names:
                runs[f"{family}, {name}"] = (self._through(block, self.configs[family], name), list(block.parameters()))
        return runs

    @staticmethod
    def _through(block: nn.Module, config, name: str) -> Callable:
        def run(rows: torch.Tensor) -> torch.Tensor:
            config._experts_implementation = name
            output = block(rows)
            return output if isinstance(output, torch.Tensor) else output[0]

        return run


def measure_blocks(
    tokens: Sequence[int],
    *,
    hidden_size: int = 1024,
    moe_intermediate_size: int = 768,
    num_experts: int = 32,
    num_experts_per_tok: int = 2,
    backward_tokens: Sequence[int] = (),
    implementations: Sequence[str] = IMPLEMENTATIONS,
    max_copied_bytes: int = 2**31,
    repeats: int = 3,
) -> list[dict[str, Any]]:
    """For each number of tokens the seconds per call of every block, and of the families' the ratio to ours, float32.

    Args: as in `measure_experts`.

    Raises:
        RuntimeError: a block that shares its parameters with ours gives something else.
    """
    blocks = _Blocks(hidden_size, moe_intermediate_size, num_experts, num_experts_per_tok)
    cells = []
    for count in tokens:
        copied = count * num_experts_per_tok * 3 * hidden_size * moe_intermediate_size * 4
        names = [name for name in implementations if name != "batched_mm" or copied <= max_copied_bytes]
        # Several sets of few tokens, so that one token does not always find its experts in the processor's cache.
        generator = torch.Generator().manual_seed(count)
        sets = [(torch.randn(1, count, hidden_size, generator=generator),) for _ in range(max(1, CALL_TOKENS // count))]
        rows = sets[0][0]
        variants = blocks.variants(names)
        with torch.no_grad():
            for name, (run, _) in variants.items():
                error = relative_error([run(rows)], [variants["ours"][0](rows)])
                if name.startswith(("Mixtral", "Qwen3")) and error > LARGEST_ERROR:
                    raise RuntimeError(f"{name} gives something else than our block: relative difference {error:.1e}")
            forward = in_turn({name: every_set(run, sets) for name, (run, _) in variants.items()}, repeats)
        forward = {name: per_call(taken, len(sets)) for name, taken in forward.items()}
        both = {}
        if count in backward_tokens:
            both = in_turn({name: _step(*variant, rows) for name, variant in variants.items()}, repeats)
        cell = {"tokens": count}
        for what, taken in (("forward", forward), ("forward_backward", both)):
            cell[what] = {name: asdict(value) for name, value in taken.items()}
            cell[f"{what}_speedups"] = {
                name: asdict(value.over(taken[OURS[name.split(",")[0]]]))
                for name, value in taken.items()
                if name not in blocks.ours
            }
        cells.append(cell)
    return cells


def _step(run: Callable, parameters: list[nn.Parameter], rows: torch.Tensor) -> Callable:
    """Forward and backward; the gradients of the parameters and of the hidden states."""
    tracked, direction = rows.clone().requires_grad_(), torch.ones_like(rows)
    return lambda: torch.autograd.grad(run(tracked), [*parameters, tracked], direction, allow_unused=True)
