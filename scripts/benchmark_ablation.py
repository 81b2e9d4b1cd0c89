"""What nodes, their gate and memory tokens each add to window and sink tokens, when SmolLM2-135M is healed for a few hundred steps;
writes results/smollm2_ablation.json.

python scripts/benchmark_ablation.py

Four students with sparse attention in all layers learn side by side to predict what the dense model predicts: the same rows in the
same order, low-rank updates of attention at the same learning rate, one teacher. "window + sinks" has local layers, the others
local_global ones: "+ nodes" with the gate left at one, "+ gate" with a gate that learns, "+ memory" with memory tokens besides.
Rows and window are short, as one core trains, and every student is measured at the length at which it was trained, on text that
nobody has trained on. The file is written anew with every measurement, and a run that was stopped goes on from the last one.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from demo import packaged_checkpoint
from transformers import AutoModelForCausalLM, get_linear_schedule_with_warmup
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
from modeling_deepseek_r1.training import add_adapters, load_teacher, share_weights
from modeling_deepseek_r1.training.distillation import divergence

MODELS = Path(".cache/benchmark")
STUDENTS = {
    "window + sinks": ("S", 0, ("attention",)),
    "+ nodes": ("G", 0, ("attention",)),
    "+ gate": ("G", 0, ("attention", "router")),
    "+ memory": ("G", 1, ("attention", "router")),
}
"""Label -> pattern, whether there are memory tokens, and what is trained."""


class Student:
    """A converted model with adapters, its optimizer and its schedule."""

    def __init__(self, label: str, teacher, args: argparse.Namespace):
        pattern, memory, targets = STUDENTS[label]
        fields = {"sliding_window": args.window, "num_sink_tokens": args.sinks}
        if pattern == "G":
            fields |= {"global_stride": args.stride, "num_memory_tokens": memory * args.memory}
        folder = MODELS / f"ablation_{pattern}{'_'.join(str(value) for value in fields.values())}"
        if not folder.exists():
            convert_checkpoint(packaged_checkpoint(), folder, layer_types=pattern, dtype=args.dtype, **fields)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, args.dtype))
        self.adapted, self.report = add_adapters(model, rank=args.rank, targets=targets)
        share_weights(teacher, self.adapted)
        self.model = self.adapted.get_base_model().train()
        self.trained = {name: x for name, x in self.adapted.named_parameters() if x.requires_grad}
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=args.learning_rate, weight_decay=0.0)
        self.schedule = get_linear_schedule_with_warmup(self.optimizer, args.steps // 20, args.steps)

    def step(self, row: torch.Tensor, target: torch.Tensor) -> float:
        """One optimizer step on ids `[1, n]`, towards the teacher's logits `[n, vocabulary]`; the mean divergence."""
        loss = divergence(self.model(row, use_cache=False).logits[0], target).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return loss.item()

    def state(self) -> dict:
        weights = {name: x.detach() for name, x in self.trained.items()}
        return {"weights": weights, "optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict()}

    def restore(self, state: dict) -> None:
        with torch.no_grad():
            for name, tensor in self.trained.items():
                tensor.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])


def measured(model, held_out: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    """Text -> mean loss of each of its windows."""
    was = model.training
    losses = measure_domains(model.eval(), held_out).window_losses
    model.train(was)
    return losses


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="of one row each (default: %(default)s)")
    parser.add_argument("--every", type=int, default=50, help="steps between measurements (default: %(default)s)")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a row (default: %(default)s)")
    parser.add_argument("--window", type=int, default=128, help="(default: %(default)s)")
    parser.add_argument("--sinks", type=int, default=4, help="(default: %(default)s)")
    parser.add_argument("--stride", type=int, default=16, help="tokens from one node to the next (default: %(default)s)")
    parser.add_argument("--memory", type=int, default=16, help="memory tokens of a layer (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=8, help="of the adapters (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="(default: %(default)s)")
    parser.add_argument("--windows", type=int, default=16, help="held-out windows of each text (default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", help="of the frozen weights (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("results/smollm2_ablation.json"))
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    teacher = load_teacher(packaged_checkpoint(), getattr(torch, args.dtype))
    students = {label: Student(label, teacher, args) for label in STUDENTS}
    tokenizer = load_tokenizer(next(MODELS.glob("ablation_S*")))
    texts = {name: [encode_text(tokenizer, read_text([path])) for path in pair] for name, pair in write_domain_texts(MODELS / "two_domains").items()}  # fmt: skip
    sizes = {"context_length": args.length}
    # Texts take turns; one that is shorter than the run begins anew.
    rows = [token_windows(pair[0], num_windows=min(-(-args.steps // 2), len(pair[0]) // args.length), **sizes) for pair in texts.values()]  # fmt: skip
    held_out = {name: token_windows(pair[1], num_windows=args.windows, **sizes) for name, pair in texts.items()}
    settings = {name: value for name, value in vars(args).items() if name != "output"}
    saved = MODELS / f"{args.output.stem}.state.pt"
    done = torch.load(saved, weights_only=False) if saved.exists() else None
    if done is not None and done["settings"] == settings:
        seconds, measurements = done["seconds"], done["measurements"]
        for label, student in students.items():
            student.restore(done["students"][label])
    else:
        seconds, dense = 0.0, measured(teacher, held_out)
        losses = {label: measured(student.model, held_out) for label, student in students.items()}
        measurements = [{"step": 0, "losses": {"dense": dense} | losses}]
    for step in range(measurements[-1]["step"], args.steps):
        row, start = rows[step % len(rows)], time.process_time()
        row = row[step // len(rows) % len(row)][None]
        with torch.no_grad():
            target = teacher(row, use_cache=False).logits[0]
        found = {label: student.step(row, target) for label, student in students.items()}
        seconds += time.process_time() - start
        print(step + 1, f"{seconds:.0f} s", {label: round(value, 4) for label, value in found.items()}, flush=True)
        if (step + 1) % args.every and step + 1 < args.steps:
            continue
        losses = {label: measured(student.model, held_out) for label, student in students.items()}
        measurements.append({"step": step + 1, "divergence": found, "losses": {"dense": measurements[0]["losses"]["dense"]} | losses})  # fmt: skip
        state = {"settings": settings, "seconds": seconds, "measurements": measurements}
        torch.save(state | {"students": {label: student.state() for label, student in students.items()}}, saved)
        write(state, students, args.output)
    saved.unlink(missing_ok=True)


def write(state: dict, students: dict[str, Student], output: Path) -> None:
    result = {"format_version": FORMAT_VERSION, "environment": environment(), "settings": state["settings"]}
    result |= {"trained": {label: student.report.trainable for label, student in students.items()}}
    write_report(result | {"cpu_seconds": state["seconds"], "measurements": state["measurements"]}, output)
    print(json.dumps(state["measurements"][-1]["step"]), "steps:", output, flush=True)


if __name__ == "__main__":
    main()
