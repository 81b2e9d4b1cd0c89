"""One of two processes of `test_expert_parallel.py`: a model spread over both, against the same model whole.

python -m torch.distributed.run --nproc-per-node 2 parallel_worker.py KIND FOLDER...
"""

import sys

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from modeling_deepseek_r1.moe.experts import DeepseekR1Experts
from tests.models import random_ids


def compare(kind: str, folder: str) -> str:
    """What is wrong, or nothing."""
    rank, wrong = dist.get_rank(), []
    config = DistributedConfig(ep_size=2, **{f"{kind}_size": 2})
    spread = AutoModelForCausalLM.from_pretrained(folder, distributed_config=config).train()
    whole = AutoModelForCausalLM.from_pretrained(folder).train()
    experts = [module for module in spread.modules() if isinstance(module, DeepseekR1Experts)]
    for module in experts:
        if module.gate_up_proj.to_local().shape[0] * 2 != module.gate_up_proj.shape[0]:
            wrong.append(
                f"{folder}: a rank holds {module.gate_up_proj.to_local().shape[0]} of {module.gate_up_proj.shape[0]} experts"
            )
    ids = random_ids(4, 24)
    # Sharded data parallelism gives each rank rows of its own, tensor parallelism the same ones.
    own = ids[2 * rank : 2 * rank + 2] if kind == "fsdp" else ids
    output, expected = spread(own, labels=own), whole(ids, labels=ids)
    logits = expected.logits[2 * rank : 2 * rank + 2] if kind == "fsdp" else expected.logits
    wrong += differs(f"{folder}: logits", output.logits, logits)
    output.loss.backward()
    expected.loss.backward()
    gradients = {name: parameter.grad for name, parameter in spread.named_parameters()}
    for name, parameter in whole.named_parameters():
        found = gradients[name]
        found = found.full_tensor() if hasattr(found, "full_tensor") else found
        wrong += differs(f"{folder}: gradient of {name}", found, parameter.grad)
    spread.save_pretrained(f"{folder}-saved-{kind}")
    dist.barrier()
    saved = AutoModelForCausalLM.from_pretrained(f"{folder}-saved-{kind}").state_dict()
    wrong += [f"{folder}: {name} saved" for name, tensor in whole.state_dict().items() if not torch.equal(saved[name], tensor)]
    return "\n".join(wrong if experts else [f"{folder}: no experts"])


def differs(what: str, found: torch.Tensor, expected: torch.Tensor) -> list[str]:
    largest = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-9))
    return [f"{what}: {largest:.1e}"] if largest > 2e-5 else []


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    kind, *folders = sys.argv[1:]
    wrong = list(filter(None, (compare(kind, folder) for folder in folders)))
    dist.destroy_process_group()
    if wrong:
        raise SystemExit("\n".join(wrong))
    print("equal", flush=True)


if __name__ == "__main__":
    main()
