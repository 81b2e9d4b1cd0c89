"""Progressive against fixed sparsity in training SmolLM2-135M with experts; writes results/progressive_sparsity.json.

python scripts/benchmark_progressive.py

The upper 15 layers get 8 low-rank experts each, of which a token should have 2 in the end. "fixed" moves the thresholds to that
target from the first step on, "progressive" starts with all experts, goes down over 60 % of the steps, and has the target for the
last 20 % (training.ProgressiveSparsity). Both see the same batches. Reported: the held-out loss every so many steps, with
thresholds as they are, and at which step "progressive" first has the last loss of "fixed".
"""

import argparse
import time
from pathlib import Path

import torch
from demo import packaged_checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from two_domains import write_domain_texts

from modeling_deepseek_r1.conversion import convert_checkpoint
from modeling_deepseek_r1.evaluation import (
    FORMAT_VERSION,
    encode_text,
    environment,
    load_tokenizer,
    measure_domains,
    read_text,
    token_windows,
    write_report,
)
from modeling_deepseek_r1.training import ProgressiveSparsity, ThresholdUpdate, freeze

MODELS = Path(".cache/benchmark")
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 8, "expert_rank": 16, "expert_layers": list(range(15, 30))}
FROZEN = ["model.embed_tokens.*", "*norm*", "*_proj.weight"]
RATE = 0.2
RUNS = {"fixed": ThresholdUpdate, "progressive": ProgressiveSparsity}


class Measure(TrainerCallback):
    """Held-out loss and active experts every so many steps, and the time that training took up to there."""

    def __init__(self, windows: torch.Tensor, every: int):
        self.windows, self.every, self.rows, self.seconds, self.start = windows, every, [], 0.0, 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seconds += time.perf_counter() - self.start
        if state.global_step % self.every and state.global_step < state.max_steps:
            return
        active = []
        hooks = [r.register_forward_hook(lambda m, a, out: active.append((out.top_k_weights != 0).sum(-1).float().mean())) for r in model.model.routers]  # fmt: skip
        was, loss = model.training, measure_domains(model.eval(), {"mixed": self.windows}).losses["mixed"]
        model.train(was)
        for hook in hooks:
            hook.remove()
        self.rows.append({"step": state.global_step, "loss": loss, "active": float(torch.stack(active).mean()), "seconds": self.seconds})  # fmt: skip
        print(self.rows[-1], flush=True)


def train(folder: Path, label: str, rows: torch.Tensor, held_out: torch.Tensor, args: argparse.Namespace) -> list[dict]:
    config = AutoConfig.from_pretrained(folder)
    config.routing = config.routing | {"min_experts_per_tok": 1, "target_experts_per_tok": args.target}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
    freeze(model, FROZEN)
    measure = Measure(held_out, args.every)
    settings = TrainingArguments(
        output_dir=str(MODELS / f"progressive_{label}"), max_steps=args.steps, per_device_train_batch_size=1, learning_rate=2e-3,
        warmup_steps=args.steps // 20, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=args.every,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in rows]
    Trainer(model, settings, train_dataset=data, callbacks=[RUNS[label](rate=RATE), measure]).train()
    return measure.rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200, help="(default: %(default)s)")
    parser.add_argument("--every", type=int, default=20, help="steps between measurements (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=256, help="of a step (default: %(default)s)")
    parser.add_argument("--target", type=float, default=2.0, help="experts per token (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=8, help="held-out windows of each text (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--output", default="results/progressive_sparsity.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    texts, folder = write_domain_texts(MODELS / "two_domains"), MODELS / "two_domains_all_active"
    if not folder.exists():
        print(convert_checkpoint(packaged_checkpoint(), folder, **EXPERTS).summary(), flush=True)
    tokenizer = load_tokenizer(folder)

    def windows(which: int, number: int) -> torch.Tensor:
        size = {"context_length": args.tokens, "num_windows": number}
        parts = [token_windows(encode_text(tokenizer, read_text([pair[which]])), **size) for pair in texts.values()]
        return torch.stack(parts, 1).flatten(0, 1)

    rows, held_out = windows(0, args.steps // 2), windows(1, args.windows)
    runs = {label: train(folder, label, rows, held_out, args) for label in RUNS}
    last = runs["fixed"][-1]
    # At the start all experts are active and the loss says nothing of sparse ones.
    reached = [row for row in runs["progressive"] if row["loss"] <= last["loss"] and row["active"] <= last["active"] * 1.1]
    result = {"format_version": FORMAT_VERSION, "environment": environment(), "settings": vars(args) | EXPERTS}
    result |= {"runs": runs, "reached": reached[0] if reached else None}
    write_report(result, args.output)
    print(
        f"fixed ends at {last['loss']:.4f} with {last['active']:.2f} experts; progressive: {result['reached'] or 'not reached'}"
    )


if __name__ == "__main__":
    main()
